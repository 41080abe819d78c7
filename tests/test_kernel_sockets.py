"""The host's sockets to a kernel that ends at the very moment they are closed."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import zmq

from sandbox_kernel.channel import TURN_S
from sandbox_kernel.kernel import Kernel
from sandbox_kernel.message import write_message

CHANNELS = {"shell": zmq.ROUTER, "control": zmq.ROUTER, "iopub": zmq.XPUB}


class FarEnd:
    """A kernel's side of the sockets, without a kernel."""

    def __init__(self, folder: Path, number: int) -> None:
        self.info: dict[str, Any] = {"transport": "ipc", "ip": str(folder / f"k{number}"), "key": b"k"}
        self.context = zmq.Context()
        self.sockets: dict[str, Any] = {}
        for port, (name, kind) in enumerate(CHANNELS.items(), start=1):
            self.info[f"{name}_port"] = port
            self.sockets[name] = self.context.socket(kind)
            self.sockets[name].bind(f"ipc://{self.info['ip']}-{port}")

    async def reached(self, kernel: Kernel) -> None:
        kernel._open("iopub")
        for name in ("shell", "control"):
            kernel._open(name)
            kernel._channels[name].send(kernel.message("kernel_info_request"))
        for socket in self.sockets.values():
            assert await asyncio.to_thread(socket.poll, 5000), "the host's zmq threads do nothing any more"

    def close(self) -> None:
        self.context.destroy(linger=0)


async def test_a_kernel_that_ends_while_it_is_let_go_of_stops_nobody_else(tmp_path: Path) -> None:
    """zmq's one thread told of the lost connection and waited for ever: no session of the process got a word more."""
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(150):
        with closing(FarEnd(tmp_path, number)) as far_end:
            kernel = Kernel(far_end.info, client_session="s")
            await far_end.reached(kernel)
            ending = asyncio.get_running_loop().run_in_executor(None, far_end.close)
            if number % 2:
                await asyncio.sleep(0)
            kernel.close()
            await ending
    assert len(os.listdir("/proc/self/fd")) < opened + 20


async def test_messages_that_take_long_leave_others_their_turn(tmp_path: Path) -> None:
    """A kernel that says that cells end, one after the other, has a line written for each."""
    told: list[Any] = []
    with closing(FarEnd(tmp_path, 0)) as far_end:
        kernel = Kernel(far_end.info, client_session="s")
        await far_end.reached(kernel)
        identity = far_end.sockets["shell"].recv_multipart()[0]
        kernel._answer = lambda message: (told.append(message), time.sleep(TURN_S))  # type: ignore[method-assign]
        frames = write_message(kernel._wire, kernel.message("kernel_info_reply"))
        for _ in range(20):
            far_end.sockets["shell"].send_multipart([identity, *frames])
        turns = 0
        async with asyncio.timeout(10):
            while len(told) < 20:
                await asyncio.sleep(0)
                turns += bool(told)
        kernel.close()
    assert turns >= 8
