"""The blocking face: the names, parameters and errors of the async one, for scripts, threads and notebooks.

    from sandbox_kernel.sync import SessionManager

    with SessionManager() as manager:
        session = manager.start("conv")
        print(session.execute("1 + 1").result)

Each manager has an event loop in a thread of its own (anyio's blocking portal), so that it also works below an event
loop that is running, as in a notebook. Without ``with``, :meth:`SessionManager.close` ends it, at the latest when the
interpreter exits. Ctrl-C while a call waits ends the cell, then raises KeyboardInterrupt; the session stays usable.

What a method does, and what it raises, is said once: at its twin in ``session.py`` and ``manager.py``.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # its exit hook must be there before ours: the last in goes first
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from sandbox_kernel import manager as asynchronous
from sandbox_kernel import session as twin
from sandbox_kernel.datasets import FetchDataset
from sandbox_kernel.errors import SessionClosed
from sandbox_kernel.events import Artifact, Dataset, ExecutionResult, PythonState, SessionInfo, StreamEvent
from sandbox_kernel.session import DEFAULT, Timeout
from sandbox_kernel.settings import Settings

__all__ = ["Session", "SessionManager"]

T = TypeVar("T")
Infos = list[SessionInfo]
Lines = list[str]
# `list` inside SessionManager is its method.


class _Loop:
    """An event loop in a thread of its own, and calls into it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = self._stack.enter_context(start_blocking_portal(name="sandbox-kernel"))
        self._thread = self._portal.call(threading.get_ident)
        self._releasing: asyncio.Future[None] | None = None

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Await ``work()`` over there and give what it gives. Ctrl-C cancels it and waits until it has ended."""
        if self._portal is None:
            raise SessionClosed(asynchronous.CLOSED)
        task: asyncio.Task[Any] | None = None

        async def run() -> T:
            nonlocal task
            task = asyncio.current_task()
            return await work()

        def cancel() -> None:
            # Not the future's own cancel(): anyio would cancel again and again, and so cut short the clean-up
            # that waits for the interrupted cell.
            if task is not None:
                task.cancel()

        future = self._portal.start_task_soon(run)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise SessionClosed(asynchronous.CLOSED) from None
        except KeyboardInterrupt:
            if not future.done():
                self._portal.call(cancel)
                concurrent.futures.wait([future])
            raise

    def release(self, work: Callable[[], Awaitable[None]]) -> None:
        """As :meth:`call`, for what a garbage collector may run, in any thread and at any time."""
        if threading.get_ident() == self._thread:
            self._releasing = asyncio.ensure_future(work())
        elif self._portal is not None:
            with suppress(RuntimeError):  # closed in between: its end has closed the generators
                self.call(work)

    def close(self) -> None:
        """End the thread. Calls of other threads that still wait raise SessionClosed."""
        portal, self._portal = self._portal, None
        if portal is not None:
            with self._stack:
                portal.call(portal.stop, True)


class Session:
    """The blocking face of :class:`sandbox_kernel.session.Session`; use it from any thread."""

    def __init__(self, session: twin.Session, loop: _Loop) -> None:
        self._session = session
        self._loop = loop
        self.id = session.id
        self.settings = session.settings

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def status(self) -> Literal["running", "stopped"]:
        """``stopped`` once this process has let go of it."""
        return self._session.status

    @property
    def busy(self) -> bool:
        """A cell is running or waiting, whoever sent it."""
        return self._session.busy

    @property
    def directory(self) -> Path | None:
        """The session directory; None for TMPFS."""
        return self._session.directory

    @property
    def container_id(self) -> str | None:
        """The engine's id of the container; None with ``engine="local"``, and while a dead one is replaced."""
        return self._session.container_id

    @property
    def host_port(self) -> int | None:
        """The published shell port; None over ipc."""
        return self._session.host_port

    @property
    def connection_file(self) -> Path:
        """The Jupyter connection file, for another client's ``load_connection_file``."""
        return self._session.connection_file

    @property
    def execution_count(self) -> int:
        """The number of the last cell that was seen."""
        return self._session.execution_count

    def execute(self, code: str, *, timeout: Timeout = DEFAULT) -> ExecutionResult:
        """Run a cell and return how it ended; see :meth:`sandbox_kernel.session.Session.execute`."""
        return self._loop.call(partial(self._session.execute, code, timeout=timeout))

    def stream(self, code: str, *, timeout: Timeout = DEFAULT) -> Generator[StreamEvent, None, None]:
        """Run a cell and yield what it says, ``finished`` last. Leaving the loop, or ``close()``, interrupts it."""
        events = self._session.stream(code, timeout=timeout)
        try:
            while (event := self._loop.call(partial(anext, events, None))) is not None:
                yield event
        finally:
            self._loop.release(events.aclose)

    def interrupt(self) -> bool:
        """End the running cell; True if there was one. Call it from another thread than the cell's."""
        return self._loop.call(self._session.interrupt)

    def restart(self) -> list[str]:
        """Restart the kernel; the names of the variables that are gone."""
        return self._loop.call(self._session.restart)

    def state(self) -> PythonState:
        """The variables and imports after the last cell."""
        return self._loop.call(self._session.state)

    def artifacts(self) -> list[Artifact]:
        """All artifacts of this session, oldest first."""
        return self._loop.call(self._session.artifacts)

    def read_artifact(self, artifact_id: str) -> bytes:
        """The bytes of an artifact."""
        return self._loop.call(partial(self._session.read_artifact, artifact_id))

    def save_artifact(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Save an artifact to a file, or into a folder under its own name; the file's path."""
        return self._loop.call(partial(self._session.save_artifact, artifact_id, path))

    def open_artifact(self, artifact_id: str) -> BinaryIO:
        """An artifact as an open binary file; the caller closes it."""
        return self._loop.call(partial(self._session.open_artifact, artifact_id))

    def export(self, path: str | os.PathLike[str]) -> Artifact:
        """Copy a file of the container into the store."""
        return self._loop.call(partial(self._session.export, path))

    def datasets(self) -> list[Dataset]:
        """The data sets this session can see, with their status."""
        return self._loop.call(self._session.datasets)

    def select_dataset(self, dataset_id: str) -> Dataset:
        """Stage a data set at ``/data/<id>``."""
        return self._loop.call(partial(self._session.select_dataset, dataset_id))

    def stop(self, *, reason: str | None = None) -> None:
        """Stop the session. Twice is once."""
        self._loop.call(partial(self._session.stop, reason=reason))

    def detach(self) -> None:
        """Let go of the session and leave its kernel running."""
        self._loop.call(self._session.detach)


class SessionManager:
    """The blocking face of :class:`sandbox_kernel.manager.SessionManager`, for any thread, with or without ``with``."""

    def __init__(self, settings: Settings | None = None, *, fetch_dataset: FetchDataset | None = None) -> None:
        self._manager = asynchronous.SessionManager(settings, fetch_dataset=fetch_dataset)
        self.settings = self._manager.settings
        self._changing = threading.Lock()
        self._loop: _Loop | None = None
        self._closed = False
        # One face per session, so that starting a living id gives the same object: id(session) -> face.
        self._faces: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _running(self) -> _Loop:
        """The loop, begun when it is first needed."""
        with self._changing:
            if self._closed:
                raise SessionClosed(asynchronous.CLOSED)
            if self._loop is None:
                loop = _Loop()
                try:
                    loop.call(self._manager.__aenter__)
                except BaseException:
                    loop.close()
                    raise
                self._loop = loop
                _open.add(self)
            return self._loop

    def _face(self, session: twin.Session, loop: _Loop) -> Session:
        with self._changing:
            face = self._faces.get(id(session))
            if face is None:
                face = self._faces[id(session)] = Session(session, loop)
            return face

    @property
    def sessions(self) -> dict[str, Session]:
        """The sessions this manager holds, by id."""
        loop = self._loop
        return {} if loop is None else {key: self._face(held, loop) for key, held in self._manager.sessions.items()}

    def start(self, session_id: str | None = None, *, secrets: Mapping[str, str] | None = None) -> Session:
        """Start a session, or return the living one; see :meth:`sandbox_kernel.manager.SessionManager.start`."""
        loop = self._running()
        return self._face(loop.call(partial(self._manager.start, session_id, secrets=secrets)), loop)

    def get(self, session_id: str) -> Session:
        """The living session of that id."""
        loop = self._running()
        return self._face(loop.call(partial(self._manager.get, session_id)), loop)

    def stop(self, session_id: str) -> None:
        """Stop a session."""
        self._running().call(partial(self._manager.stop, session_id))

    def list(self) -> Infos:
        """Every session that is alive or recorded, by id."""
        return self._running().call(self._manager.list)

    def gc(self, *, all: bool = False) -> Lines:
        """Remove what nobody holds any more; a line for each thing."""
        return self._running().call(partial(self._manager.gc, all=all))

    def close(self) -> None:
        """Stop the sessions (``stop_on_exit``) or let go of them, and end the loop's thread. Twice is once."""
        with self._changing:
            self._closed = True
            loop, self._loop = self._loop, None
            _open.discard(self)
        if loop is not None:
            try:
                loop.call(self._manager.close)
            finally:
                loop.close()


_open: set[SessionManager] = set()


def _close_all() -> None:
    """Managers that nobody closed. Errors are shown and do not keep the others from being closed."""
    with ExitStack() as stack:
        for manager in list(_open):
            stack.callback(manager.close)


# Sessions are stopped by threads of an executor, and these are gone when `atexit` has its turn; the hook that
# executors use themselves comes before. It has no public name.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
