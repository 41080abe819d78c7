"""ipykernel's application as a session needs it: it drops no output, `exit` does not end it, and one thread serves it.

Imported before the fork, made in the child.
"""

import asyncio
import signal
import threading
import types
from typing import Any, Callable, Optional, Set

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from tornado.ioloop import IOLoop

from . import trims

SHELL_THREAD = {"shell_channel_thread", "_supports_kernel_subshells"}
USERS = {
    "_abort_queues",
    "_post_dummy_stop_aborting_message",
    "_publish_status_and_flush",
    "_supports_kernel_subshells",
    "create_subshell_request",
    "delete_subshell_request",
    "dispatch_shell",
    "do_execute",
    "kernel_info",
    "list_subshell_request",
    "shell_channel_thread_main",
    "shell_main",
    "start",
}
"""The methods of ipykernel 7's kernel that know of these two: all of them were read, and do without."""


class _NoThread:
    """Stands where ipykernel's shell thread would: false, but awaiting cells ask whether theirs is its parent."""

    def __init__(self) -> None:
        self.parent_thread = threading.current_thread()

    def __bool__(self) -> bool:
        return False


class MainThreadKernel(IPythonKernel):  # type: ignore[misc, unused-ignore]
    """A kernel without subshells (see :func:`in_one_thread`)."""

    _supports_kernel_subshells = False

    def _abort_queues(self, subshell_id: Optional[str] = None) -> None:
        """A cell has failed: requests that came before now are aborted, later ones are not.

        The end of it takes the requests' own way, as with ipykernel's thread. Its way without one is shorter than that
        of those that were received while the failing cell awaited.
        """

        async def as_a_request() -> None:
            await asyncio.create_task(self.shell_main(None, [zmq.Frame(b"stop aborting")]))

        # An interrupt in here would lose the request being read, or leave all later ones aborted or unread.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._aborting = True
            self.shell_stream.flush(zmq.POLLIN)
            self._abort_ends = asyncio.ensure_future(as_a_request())  # held: the loop itself would not
        finally:
            signal.signal(signal.SIGINT, handler)


def in_one_thread(app: Any) -> None:
    """ipykernel 7 reads requests in a thread of its own, which hands each to the main thread and each reply back, so
    that subshells are served while a cell runs. Nobody here has any, and kernel_info says so: have the main thread read
    the socket, as ipykernel does without subshells. ``pass``: 0.88.
    """
    found = {name for kind in IPythonKernel.__mro__ for name, member in vars(kind).items() if _names(member)}
    if not found:  # ipykernel 6 has no such thread
        return
    if found != USERS:
        raise AttributeError(f"its shell thread is used by {sorted(found ^ USERS)}")
    app.kernel_class = MainThreadKernel
    app.shell_channel_thread = _NoThread()


def _names(member: Any) -> Set[str]:
    """Those of :data:`SHELL_THREAD` that a function or property uses."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    codes, found = [getattr(function, "__code__", None)], set()
    while codes:
        code = codes.pop()
        if code is not None:
            found.update(SHELL_THREAD.intersection(code.co_names))
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


class KernelApp(IPKernelApp):  # type: ignore[misc, unused-ignore]
    """One kernel's application."""

    def __init__(self, *, chosen: trims.Chosen, say: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._chosen, self._say = chosen, say

    def init_iopub(self, context: Any) -> None:
        """The socket's high-water mark of 1,000 messages would drop what a cell prints fast, and the idle message with
        it. The mark must be set before the socket is bound, so as the context's default while this one socket is made.
        """
        context.setsockopt(zmq.SNDHWM, 0)
        try:
            super().init_iopub(context)
        finally:
            context.sockopts.pop(zmq.SNDHWM, None)
        # An interrupt within Python's own is_alive() (up to 3.12) has it take a living thread for dead, for good: the
        # main thread would then send by itself, beside that one, and both spoil each other's messages.
        thread = self.iopub_thread.thread
        thread.is_alive = lambda: threading._active.get(thread.ident) is thread  # type: ignore[attr-defined]

    def init_kernel(self) -> None:
        trims.attempt(in_one_thread, self._chosen, self._say, self)
        super().init_kernel()

    def start(self) -> None:
        """A late interrupt, between a cell's end and ipykernel's ignoring them again, or a task that exits: both would
        end the loop, and with it the kernel and its variables. Whoever has it shut down stops the loop.

        ipykernel 6 reads requests in a task that an interrupt ends for good: without it a kernel had better end.
        """
        loop: Any = IOLoop.current()
        run = loop.start

        def start() -> None:
            while True:
                try:
                    run()
                    return
                except (KeyboardInterrupt, SystemExit) as exc:
                    if isinstance(exc, KeyboardInterrupt) and hasattr(self.kernel, "dispatch_queue"):
                        raise
                    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as ever between cells

        loop.start = start
        super().start()

    def init_shell(self) -> None:
        """`exit` in a cell is told to the client, which may close its window; the kernel is its session's to end.

        ipykernel's own would end it a tenth of a second later: the cell is ok, and the variables are gone.
        """
        super().init_shell()
        shell: Any = self.shell
        shell.ask_exit = lambda: shell.payload_manager.write_payload(
            {"source": "ask_exit", "keepkernel": shell.keepkernel_on_exit}
        )
