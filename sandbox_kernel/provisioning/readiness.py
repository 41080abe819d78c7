"""When a kernel can be reached: its socket files are there (ipc), or its heartbeat answers the handshake (tcp)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from sandbox_kernel.errors import EngineError

_IN_CREATE, _IN_DELETE, _IN_ATTRIB, _IN_MOVED_TO = 0x100, 0x200, 0x4, 0x80
_RECONNECT_MS = 5

Identity = tuple[int, int] | None


def socket_identity(path: Path) -> Identity:
    """What tells one socket file from a later one of the same name; None when there is no socket (a link is none)."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_ino, found.st_ctime_ns) if stat.S_ISSOCK(found.st_mode) else None


class SocketFiles:
    """Waits for fresh sockets in one folder, woken by inotify. Enter before the kernel is started or restarted."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._before = {path: socket_identity(path) for path in paths}
        self._fd = -1
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = _IN_CREATE | _IN_DELETE | _IN_ATTRIB | _IN_MOVED_TO
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(self._paths[0].parent), mask) < 0:
            number = ctypes.get_errno()
            self._close()
            raise EngineError(
                f"cannot watch {self._paths[0].parent} for the kernel's sockets: {os.strerror(number)}; "
                "raise fs.inotify.max_user_instances, or stop a session"
            )
        asyncio.get_running_loop().add_reader(self._fd, self._read)
        return self

    def _read(self) -> None:
        os.read(self._fd, 65536)
        self._changed.set()

    async def fresh(self) -> None:
        """Return when every path is a socket that was not there on entering."""
        while True:
            self._changed.clear()
            now = {path: socket_identity(path) for path in self._paths}
            if all(now[path] is not None and now[path] != self._before[path] for path in self._paths):
                return
            await self._changed.wait()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        self._close()


class Handshake:
    """The state of one CurveZMQ connection to the kernel's heartbeat, the last of the five that it binds."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    async def until(self, *events: int) -> None:
        """Return when zmq reports one of ``events`` (``zmq.Event``) of the connection."""
        while True:
            message = await recv_monitor_message(self._monitor)
            if message["event"] in events:
                return

    async def up(self) -> None:
        """Return once the kernel has proved that it holds the Curve key."""
        await self.until(zmq.Event.HANDSHAKE_SUCCEEDED)

    async def down(self) -> None:
        """Return once the connection that was up is gone."""
        await self.until(zmq.Event.DISCONNECTED)


@asynccontextmanager
async def handshake(info: Mapping[str, Any]) -> AsyncIterator[Handshake]:
    """Connect to the heartbeat of a tcp kernel; zmq tries again until somebody with the right key answers."""
    context = zmq.asyncio.Context.shadow(zmq.Context.instance())
    socket = context.socket(zmq.REQ)
    socket.linger = 0
    socket.reconnect_ivl = _RECONNECT_MS
    public, secret = zmq.curve_keypair()
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_serverkey = info["curve_publickey"].encode()
    monitor = socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
    try:
        socket.connect(f"tcp://{info['ip']}:{info['hb_port']}")
        yield Handshake(monitor)
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)


async def first(main: Callable[[], Any], *others: Callable[[], Any], timeout: float) -> int:
    """Run these coroutines side by side and return the index of the one that ended first; the rest are cancelled.

    Raises TimeoutError after ``timeout`` seconds, and what the first to end raised.
    """
    tasks = [asyncio.ensure_future(function()) for function in (main, *others)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        index = next(number for number, task in enumerate(tasks) if task in done)
        await tasks[index]
        return index
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
