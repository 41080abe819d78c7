"""One channel to a kernel: a zmq socket of ours, read from the event loop without a thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import zmq
from jupyter_client.session import Session as WireSession

from sandbox_kernel.message import Message, read_message, write_message

log = logging.getLogger(__name__)

MESSAGES_PER_TURN, BYTES_PER_TURN, TURN_S = 500, 2 * 2**20, 0.005
"""What is read before other tasks of the event loop get a turn: a message may end a cell, and have its line written."""
MAX_WAITING = 4
"""Messages that zmq reads ahead of us: each may be large. The rest waits in the kernel, which drops none of it. (More
for small ones gains nothing, and to change the number while connected makes zmq wait for ever.)"""
HELD_S = 0.01
_MORE, _READABLE = int(zmq.SNDMORE), int(zmq.POLLIN)


class Channel:
    """One zmq socket on the event loop. Its descriptor is edge-triggered: after a wake-up or a send it is read dry."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        wire: WireSession,
        deliver: Callable[[Message], None],
        hold: Callable[[], bool] = lambda: False,
    ) -> None:
        """``hold()``: what was read before must be dealt with first; nothing is read meanwhile."""
        self._socket = socket
        self._hold = hold
        self._held: asyncio.TimerHandle | None = None
        self._wire = wire
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._fd = cast(int, socket.getsockopt(zmq.FD))
        self._open = True
        self.unreadable = 0
        """Messages that were no valid message (bad signature, not JSON, of another shape): counted and dropped."""
        self.heard = self._loop.time()
        """When the last message came."""
        self._loop.add_reader(self._fd, self.read)
        self._loop.call_soon(self.read)  # the descriptor tells of nothing before a first look

    def send(self, message: Message) -> None:
        try:
            *frames, last = write_message(self._wire, message)
            for frame in frames:  # as send_multipart, which checks each frame once more, in a third of its time
                self._socket.send(frame, _MORE)
            self._socket.send(last)
        except zmq.Again:  # a kernel that reads nothing must not stop the event loop
            log.warning("a request was dropped: a thousand wait already, and the kernel takes none")
        # The send may have consumed the edge of a message that came meanwhile.
        self._loop.call_soon(self.read)

    def read(self) -> None:
        messages = size = 0
        until = self._loop.time() + TURN_S
        while messages < MESSAGES_PER_TURN and size < BYTES_PER_TURN and self.heard < until:
            if not self._open:
                return
            if self._hold():
                if self._held is None:
                    self._held = self._loop.call_later(HELD_S, self._read_on)
                return
            try:
                if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:  # half the price of trying in vain
                    return
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            messages += 1
            size += sum(map(len, frames))
            self.heard = self._loop.time()
            try:
                self._deliver(read_message(self._wire, frames))
            except Exception as exc:  # whatever a hostile kernel sends, the reader goes on
                self.unreadable += 1
                if self.unreadable <= 3:
                    log.warning("a message of the kernel was dropped: %s", repr(exc)[:200])
        self._loop.call_soon(self.read)

    def _read_on(self) -> None:
        self._held = None
        self.read()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)
