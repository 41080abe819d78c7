"""A real kernel under ``kernel_side/launch.py``, on this machine: what the hook and the supervisor are tested with."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient

from sandbox_kernel.provisioning.readiness import socket_identity

LAUNCH = Path(__file__).parent.parent / "sandbox_kernel" / "kernel_side" / "launch.py"
LIMIT_S = 20.0


def wait_for(condition: Callable[[], Any], what: str, limit: float = LIMIT_S) -> Any:
    """The first true value of ``condition``; fails saying ``what`` was waited for."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.001)
    raise AssertionError(f"waited {limit} s for {what}")


class Launched:
    """One supervisor and its kernel. ``options`` are those of ``boot/options.json``."""

    def __init__(
        self,
        folder: Path,
        *,
        curve: bool = False,
        python: str = os.environ.get("KERNEL_PYTHON", sys.executable),
        **options: Any,
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.connection_file = folder / "connection.json"
        ports = {f"{name}_port": i for i, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        self.info: Any = {**ports, "ip": str(folder / "k"), "transport": "ipc", "key": "a key"}
        self.info |= {"signature_scheme": "hmac-sha256", "kernel_name": "python3"}
        if curve:
            public, secret = zmq.curve_keypair()
            self.info |= {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
        self.connection_file.write_text(json.dumps(self.info))
        self.connection_file.chmod(0o400)
        self.options = {
            "connection_file": str(self.connection_file),
            "state_dir": str(self.state_dir),
            "artifacts_dir": str(folder / "artifacts"),
            "cwd": str(folder),
            **options,
        }
        self.write_options()
        self.log_path = folder / "log"
        # ipykernel does not watch its descriptors where it sees pytest.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        command = [python, str(LAUNCH), str(folder / "options.json")]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.client: BlockingKernelClient = self.connect()

    def write_options(self) -> None:
        (self.folder / "options.json").write_text(json.dumps(self.options))

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def connect(self) -> BlockingKernelClient:
        """A client whose channels have all answered."""
        client = BlockingKernelClient()
        client.load_connection_info(dict(self.info))
        client.start_channels(hb=False)
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            client.kernel_info()
            with suppress(queue.Empty):
                client.get_shell_msg(timeout=1)
                client.get_iopub_msg(timeout=1)
                break
        else:
            client.stop_channels()
            raise AssertionError(f"no answer from the kernel; its log:\n{self.log}")
        while True:  # answers to questions that were asked while the kernel was still starting
            try:
                client.get_shell_msg(timeout=0.05)
            except queue.Empty:
                break
        return client

    def run(self, code: str, limit: float = LIMIT_S, **kwargs: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The reply, and what came on iopub up to idle."""
        msg_id = self.client.execute(code, **kwargs)
        messages, reply = [], None
        while True:
            message = self.client.get_iopub_msg(timeout=limit)
            if message["parent_header"].get("msg_id") == msg_id:
                messages.append(message)
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    break
        while reply is None or reply["parent_header"]["msg_id"] != msg_id:
            reply = self.client.get_shell_msg(timeout=limit)
        return reply, messages

    def printed(self, code: str, **kwargs: Any) -> str:
        reply, messages = self.run(code, **kwargs)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")

    def state(self, after: str | None = None) -> dict[str, Any]:
        """``python_state.json`` once it is that of the message ``after`` (default: the last one sent)."""

        def current() -> dict[str, Any]:
            state: dict[str, Any] = json.loads((self.state_dir / "python_state.json").read_bytes())
            return state if after is None or state["msg_id"] == after else {}

        state: dict[str, Any] = wait_for(current, f"the state after {after}")
        return state

    def state_of(self, code: str, status: str = "ok") -> dict[str, Any]:
        """Run a cell; the state after it."""
        reply, _ = self.run(code)
        assert reply["content"]["status"] == status, reply["content"]
        return self.state(reply["parent_header"]["msg_id"])

    def cells(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.state_dir / "cells.jsonl").read_bytes().splitlines()]
        return []

    def restart(self) -> None:
        """SIGHUP, then a fresh client, once the fresh kernel has answered."""
        socket = Path(f"{self.info['ip']}-{self.info['control_port']}")
        before = socket_identity(socket)
        self.client.stop_channels()
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: socket_identity(socket) not in (None, before), "fresh sockets")
        client = BlockingKernelClient()
        client.load_connection_info(dict(self.info))
        client.start_channels(hb=False)
        client.kernel_info()
        client.get_shell_msg(timeout=LIMIT_S)
        client.stop_channels()
        self.client = self.connect()

    def close(self) -> None:
        self.client.stop_channels()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(LIMIT_S)


@contextmanager
def launched(**options: Any) -> Iterator[Launched]:
    """A kernel in a short folder of its own (a socket's path may have 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="ks-", dir="/tmp") as folder:
        kernel = Launched(Path(folder), **options)
        try:
            yield kernel
        finally:
            kernel.close()


def alive(pid: int) -> bool:
    """True while the process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def environ_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1, children
    return int(children[0])
