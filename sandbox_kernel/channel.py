"""One channel to a kernel: a zmq socket of ours, read from the event loop without a thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import zmq
from jupyter_client.session import Session as WireSession

from sandbox_kernel.message import Message, read_message

log = logging.getLogger(__name__)

MESSAGES_PER_TURN, BYTES_PER_TURN = 500, 2 * 2**20
"""What is read before other tasks of the event loop get a turn."""


class Channel:
    """One zmq socket on the event loop. Its descriptor is edge-triggered: after a wake-up or a send it is read dry."""

    def __init__(self, socket: zmq.Socket[bytes], wire: WireSession, deliver: Callable[[Message], None]) -> None:
        self._socket = socket
        self._wire = wire
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._fd = cast(int, socket.getsockopt(zmq.FD))
        self._open = True
        self.unreadable = 0
        """Messages that were no valid message (bad signature, not JSON, of another shape): counted and dropped."""
        self._loop.add_reader(self._fd, self.read)
        self._loop.call_soon(self.read)  # the descriptor tells of nothing before a first look

    def send(self, message: Message) -> None:
        self._wire.send(self._socket, message)
        # The send may have consumed the edge of a message that came meanwhile.
        self._loop.call_soon(self.read)

    def read(self) -> None:
        messages = size = 0
        while messages < MESSAGES_PER_TURN and size < BYTES_PER_TURN:
            if not self._open:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                return
            messages += 1
            size += sum(map(len, frames))
            try:
                self._deliver(read_message(self._wire, frames))
            except Exception as exc:  # whatever a hostile kernel sends, the reader goes on
                self.unreadable += 1
                if self.unreadable <= 3:
                    log.warning("a message of the kernel was dropped: %s", repr(exc)[:200])
        self._loop.call_soon(self.read)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)
