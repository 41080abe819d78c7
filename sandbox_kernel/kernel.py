"""A running kernel, whoever launched it: its sockets, the requests we send, the Feed that reads.

Wire format, signatures and CurveZMQ keys are those of jupyter_client (its ``Session`` signs). The sockets
are our own, read from the event loop without a thread per channel. What the host has no room for waits in the kernel,
whose iopub socket has no limit (``kernel_side/launch.py``): nothing it publishes is dropped.

A kernel can replace its Unix sockets by links to sockets of the host. So each is opened first with
``O_PATH | O_NOFOLLOW``, checked, and connected to through that descriptor: what was checked is what is connected to.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import zmq
from jupyter_client.session import Session as WireSession

from sandbox_kernel.channel import MAX_WAITING, Channel
from sandbox_kernel.errors import ConnectionFileError, KernelGone, KernelStartError, SandboxError
from sandbox_kernel.feed import Feed
from sandbox_kernel.guard import Guard
from sandbox_kernel.message import Message, new_message

MAX_MESSAGE_BYTES = 256 * 2**20
"""zmq refuses a larger message and drops the connection: it would only fill the host's memory."""
REOPEN_S = 0.2
"""iopub's connection, lost while the kernel lives, is opened again after so long; a dying kernel drops them all."""
MAX_SOCKETS = 16_000


def _context() -> zmq.Context[Any]:
    context: zmq.Context[Any] = zmq.Context.instance()
    with suppress(zmq.ZMQError):
        if context.get(zmq.MAX_SOCKETS) < MAX_SOCKETS:
            context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


class SocketReplaced(KernelStartError):
    """Where a socket of the kernel should be is something else: nobody but the kernel can have put it there."""


@contextmanager
def _translated(info: Mapping[str, Any]) -> Iterator[None]:
    """zmq's errors as ours."""
    try:
        yield
    except zmq.ZMQError as exc:
        raise KernelStartError(f"cannot connect to the kernel at {info.get('ip')}: {exc}") from exc


class Kernel:
    """The client side of one running kernel process. A restarted kernel is a new ``Kernel``.

    ``info``: the connection info (https://jupyter-client.readthedocs.io/en/stable/kernels.html#connection-files),
    with jupyter_client's ``curve_publickey``/``curve_secretkey`` where the kernel speaks CurveZMQ.
    """

    def __init__(self, info: Mapping[str, Any], *, client_session: str, username: str = "sandbox-kernel") -> None:
        key = info.get("key", b"")
        self._info = info
        self._wire = WireSession(
            key=key if isinstance(key, bytes) else str(key).encode(),
            signature_scheme=info.get("signature_scheme") or "hmac-sha256",
            username=username,
            session=client_session,
        )
        self._channels: dict[str, Channel] = {}
        self._kinds: dict[str, tuple[int, Callable[[Message], None]]] = {
            "iopub": (zmq.SUB, self._on_iopub),
            "shell": (zmq.DEALER, self._on_shell),
            "control": (zmq.DEALER, self._on_control),
        }
        self._pins: dict[str, int] = {}
        self._interrupts = 0
        """Those sent that were not answered yet."""
        self._replies: dict[str, asyncio.Future[Message]] = {}
        self._idles: dict[str, asyncio.Future[None]] = {}
        self.feed: Feed | None = None
        self._welcome: asyncio.Future[None] | None = None
        self.on_disconnected: Callable[[Kernel], None] | None = None
        """Called when the kernel's process has let go of its control socket: it ended, or somebody restarted it."""
        self._monitors: dict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes], int]] = {}
        """By channel: its socket, what tells of that one's connection, and the descriptor of the latter."""
        self._ended = False

    # -- life ------------------------------------------------------------------------------

    async def connect(self, feed: Feed | None, *, timeout: float) -> Message:
        """Open the channels and wait for the iopub subscription and the kernel_info reply, whose content is returned.

        Without ``feed`` what the kernel says is dropped until :attr:`feed` is set (a spare's session comes later).
        Raises KernelStartError when nothing answers within ``timeout`` seconds.
        """
        loop = asyncio.get_running_loop()
        Guard.of_this_loop().add(self)
        self.feed = feed
        self._welcome = loop.create_future()
        try:
            with _translated(self._info):
                for name in self._kinds:
                    self._open(name)
            async with asyncio.timeout(timeout):
                # On control: its thread answers while a cell runs, so that a busy kernel can be taken over.
                reply = await self.request("control", "kernel_info_request")
                # ipykernel >= 7 welcomes a subscriber (JEP 65); an older one's busy/idle for a request proves it too.
                while not self._welcome.done():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(self._welcome), 0.25)
                    if not self._welcome.done():
                        await self.request("control", "kernel_info_request")
        except BaseException as exc:
            self.close()
            if isinstance(exc, TimeoutError):
                raise KernelStartError(f"the kernel did not answer within {timeout:g} s") from exc
            raise
        content: Message = reply["content"]
        return content

    def close(self) -> None:
        """Close the channels; the kernel itself is not touched."""
        self.on_disconnected = None
        Guard.of_this_loop().remove(self)
        for name in list(self._monitors):
            self._unwatch(name)
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for pin in self._pins.values():
            os.close(pin)
        self._pins.clear()
        asked: list[asyncio.Future[Any]] = [*self._replies.values(), *self._idles.values()]
        for waiting in asked:
            if not waiting.done():  # and not a cancellation: who waits was not told to end
                waiting.set_exception(KernelGone("the connection to the kernel was closed"))
        self._replies.clear()
        self._idles.clear()

    def _open(self, name: str) -> None:
        kind, deliver = self._kinds[name]
        socket = _context().socket(kind)
        try:
            socket.linger = 0
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
            socket.setsockopt(zmq.SNDTIMEO, 0)
            if kind == zmq.SUB:
                socket.setsockopt(zmq.SUBSCRIBE, b"")
            else:
                socket.identity = self._wire.bsession
            server_key = self._info.get("curve_publickey")
            if server_key is not None:
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = server_key.encode() if isinstance(server_key, str) else server_key
            if name in ("control", "iopub"):
                self._watch(name, socket)
            socket.connect(self._address(name))
        except BaseException:
            self._unwatch(name)
            socket.close(linger=0)
            raise
        self._channels[name] = Channel(socket, self._wire, deliver, self._behind if name == "iopub" else _never)

    def _watch(self, name: str, socket: zmq.Socket[bytes]) -> None:
        """Have zmq tell when the connection is lost."""
        # An address of its own: pyzmq's is made of a descriptor's number, which another socket may have a moment later.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED, f"inproc://{secrets.token_hex(8)}")
        descriptor = cast(int, monitor.getsockopt(zmq.FD))
        self._monitors[name] = (socket, monitor, descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._lost, name)
        asyncio.get_running_loop().call_soon(self._lost, name)  # the descriptor tells of nothing before a first look

    def _unwatch(self, name: str) -> None:
        if name not in self._monitors:
            return
        socket, monitor, descriptor = self._monitors.pop(name)
        asyncio.get_running_loop().remove_reader(descriptor)
        # In this order: to tell of an event zmq waits for whoever listens, and would wait for ever once nobody does. It
        # has one thread for all kernels of the process.
        socket.disable_monitor()
        monitor.close(linger=0)

    def _lost(self, name: str) -> None:
        try:
            while name in self._monitors:
                self._monitors[name][1].recv_multipart(zmq.NOBLOCK)
                if name == "iopub":
                    asyncio.get_running_loop().call_later(REOPEN_S, self._reopen_iopub)
                    continue
                again, self._ended = self._ended, True
                if self.on_disconnected is not None and not again:
                    self.on_disconnected(self)
        except zmq.ZMQError:
            return

    def _reopen_iopub(self) -> None:
        """After a message larger than any may be, zmq does not connect again by itself."""
        self._reopen("iopub")

    def reopen_silent(self, since: float) -> bool:
        """See :class:`~sandbox_kernel.guard.Guarded`."""
        silent = [name for name, channel in self._channels.items() if channel.heard < since]
        for name in silent:
            self._reopen(name)
        return bool(silent)

    def _reopen(self, name: str) -> None:
        if self._ended or name not in self._channels:
            return
        self._unwatch(name)
        self._channels.pop(name).close()
        pin = self._pins.pop(name, None)
        if pin is not None:
            os.close(pin)
        try:
            self._open(name)
        except (SandboxError, zmq.ZMQError):
            if name != "iopub" and self.on_disconnected is not None:
                self._ended = True
                self.on_disconnected(self)

    def _behind(self) -> bool:
        return self.feed is not None and self.feed.behind

    def _address(self, name: str) -> str:
        try:
            port, ip, transport = self._info[f"{name}_port"], self._info["ip"], self._info.get("transport", "tcp")
        except KeyError as exc:
            raise ConnectionFileError(
                f"the connection info has no {exc}; it is not a kernel's connection file"
            ) from exc
        if transport != "ipc":
            return f"{transport}://{ip}:{port}"
        path = Path(f"{ip}-{port}")
        try:
            pin = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            raise KernelStartError(f"the kernel's socket {path} is not there: {exc.strerror}") from exc
        self._pins[name] = pin
        if not stat.S_ISSOCK(os.fstat(pin).st_mode):
            raise SocketReplaced(f"{path} is not a socket: the kernel replaced it; the session must be restarted")
        return f"ipc:///proc/self/fd/{pin}"

    # -- requests --------------------------------------------------------------------------

    def message(self, msg_type: str, content: Message | None = None) -> Message:
        """A new message; its ``header.msg_id`` is known before it is sent."""
        return new_message(self._wire, msg_type, content or {})

    def send_execute(self, message: Message) -> None:
        """Send an execute_request made with :meth:`message` whose cell the Feed already expects."""
        self._channels["shell"].send(message)

    async def request(self, channel: str, msg_type: str, content: Message | None = None) -> Message:
        """Send a request and wait for its reply (no timeout of its own). Raises KernelGone when :meth:`close` comes."""
        message = self.message(msg_type, content)
        msg_id = message["header"]["msg_id"]
        future = self._replies[msg_id] = asyncio.get_running_loop().create_future()
        self._channels[channel].send(message)
        try:
            reply: Message = await future
            return reply
        finally:
            self._replies.pop(msg_id, None)

    async def caught_up(self) -> None:
        """Return when the kernel has dealt with all that it was sent before, and what it said of that has been read.

        Shell is first in, first out, and iopub tells in order: the idle of a request of ours comes after the rest.
        Raises KernelGone when :meth:`close` comes before.
        """
        message = self.message("kernel_info_request")
        msg_id = message["header"]["msg_id"]
        idle = self._idles[msg_id] = asyncio.get_running_loop().create_future()
        self._channels["shell"].send(message)
        try:
            await idle
        finally:
            self._idles.pop(msg_id, None)

    def interrupt(self) -> None:
        """Ask the kernel to interrupt itself. Returns at once: whether the cell ends is seen in the Feed."""
        if "control" in self._channels:
            self._interrupts += 1
            self._channels["control"].send(self.message("interrupt_request"))

    def request_shutdown(self) -> None:
        """Ask the kernel to end. Returns at once."""
        if "control" in self._channels:
            self._channels["control"].send(self.message("shutdown_request", {"restart": False}))

    async def drain(self, limit: float = 2.0) -> None:
        """Read what a dead kernel's sockets still hold: until nothing comes for 20 ms, at most ``limit`` seconds."""
        channel = self._channels.get("iopub")
        if channel is None:
            return
        deadline = asyncio.get_running_loop().time() + limit
        quiet = False
        while not quiet and asyncio.get_running_loop().time() < deadline:
            self._heard = False
            channel.read()
            await asyncio.sleep(0.02)  # the condition is silence, which only time can show
            quiet = not self._heard

    _heard = False

    # -- what comes in ---------------------------------------------------------------------

    def _on_shell(self, message: Message) -> None:
        self._answer(message)
        if self.feed is not None:
            self.feed.shell(message)

    def _on_control(self, message: Message) -> None:
        self._answer(message)
        if message.get("msg_type") == "interrupt_reply" and self._interrupts and "shell" in self._channels:
            self._interrupts -= 1
            # Wakes a loop that waits in `await asyncio.sleep(...)`: the signal alone does not (ipykernel #881).
            self._channels["shell"].send(self.message("kernel_info_request"))

    def _answer(self, message: Message) -> None:
        future = self._replies.get(message["parent_header"].get("msg_id", ""))
        if future is not None and not future.done():
            future.set_result(message)

    def _on_iopub(self, message: Message) -> None:
        self._heard = True
        # Any message proves the subscription, the welcome or the busy of our own request alike.
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_result(None)
        if self.feed is not None:
            self.feed.iopub(message)
        if self._idles and message.get("msg_type") == "status" and message["content"].get("execution_state") == "idle":
            idle = self._idles.get((message.get("parent_header") or {}).get("msg_id", ""))
            if idle is not None and not idle.done():
                idle.set_result(None)


def _never() -> bool:
    return False
