"""One session: a kernel in its container, its record, its artifacts, its data sets.

Made by :class:`~sandbox_kernel.manager.SessionManager`; the parts are wired by one AsyncExitStack.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import BinaryIO, Literal

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.cell_queue import CellQueue
from sandbox_kernel.datasets import Datasets
from sandbox_kernel.errors import ArtifactError, ArtifactNotFound, SessionClosed
from sandbox_kernel.events import (
    Artifact,
    CellEvent,
    Dataset,
    ExecutionResult,
    Finished,
    PythonState,
    StreamEvent,
    timestamp,
)
from sandbox_kernel.feed import Feed
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.settings import Settings
from sandbox_kernel.workspace import Workspace

STATE_WAIT_S = 2.0
"""How long ``state()`` waits for the hook to describe the last cell (it writes some milliseconds after the reply)."""
DEFAULT: Literal["default"] = "default"
Timeout = float | None | Literal["default"]
Exporter = Callable[[str | os.PathLike[str], tuple[str | None, int | None]], Awaitable[Artifact]]
"""Makes a file of the container an artifact of a cell: its msg_id and execution_count."""


class Session:
    """A Python session that keeps its variables.

    ``id``, ``settings`` and ``directory`` (None for TMPFS) never change. Calls of :meth:`execute` and :meth:`stream`
    queue in order; everything else answers while a cell runs.
    """

    def __init__(self, session_id: str, settings: Settings, store: ArtifactStore) -> None:
        self.id = session_id
        self.settings = settings
        self.store = store
        self._stack = AsyncExitStack()
        self._closed = False
        self._leaving: asyncio.Task[None] | None = None
        self.opened = False
        """It was put together: what fails before that leaves nothing behind."""
        self._keep_alive = False
        self._reason: str | None = None
        self._last: tuple[str, int | None] | None = None
        self.last_used = asyncio.get_running_loop().time()
        # Wired by assembly.py (see `wire`):
        self._cells: CellQueue
        self._recorder: Recorder | NoRecorder
        self._ledger: Ledger
        self._feed: Feed
        self._lifecycle: Lifecycle
        self._workspace: Workspace
        self._datasets: Datasets
        self._exporter: Exporter

    def wire(
        self,
        *,
        recorder: Recorder | NoRecorder,
        ledger: Ledger,
        feed: Feed,
        lifecycle: Lifecycle,
        workspace: Workspace,
        datasets: Datasets,
        exporter: Exporter,
    ) -> None:
        """Give the session its parts; called once, while it is put together."""
        self._recorder, self._ledger, self._feed = recorder, ledger, feed
        self._lifecycle, self._workspace, self._datasets = lifecycle, workspace, datasets
        self._exporter = exporter
        self._cells = CellQueue(recorder, ledger, feed, lifecycle, check_open=self._check_open)
        ledger.on_recorded = self._recorded

    def __repr__(self) -> str:
        return f"<Session {self.id} {self.status}>"

    # -- what it is ------------------------------------------------------------------------

    @property
    def status(self) -> Literal["running", "stopped"]:
        return "stopped" if self._closed else "running"

    @property
    def busy(self) -> bool:
        """A cell is running or waiting, whoever sent it."""
        return self._cells.busy or bool(self._feed.cells)

    @property
    def directory(self) -> Path | None:
        """The session directory; None for TMPFS."""
        return self._workspace.path

    @property
    def container_id(self) -> str | None:
        """The engine's id of the container; None with ``engine="local"``, and while a dead one is replaced."""
        return self._lifecycle.provisioner.container_id

    @property
    def host_port(self) -> int | None:
        """The published shell port; None over ipc."""
        return self._lifecycle.provisioner.host_port

    @property
    def connection_file(self) -> Path:
        """The Jupyter connection file (0600; the keys are in it), for another client's ``load_connection_file``."""
        path = self._lifecycle.provisioner.connection_file
        assert path is not None  # there is a kernel as long as there is a session
        return path

    @property
    def execution_count(self) -> int:
        """The number of the last cell that was seen."""
        return self._feed.execution_count

    # -- cells -----------------------------------------------------------------------------

    async def execute(self, code: str, *, timeout: Timeout = DEFAULT) -> ExecutionResult:
        """Run a cell and return how it ended; its line stands in the log by then.

        ``timeout``: seconds, ``None`` for no limit; default ``Settings.timeout_s``. A cell that fails, times out or
        kills its kernel is a result, not an exception. Raises TypeError or ValueError for code that is no text,
        SessionClosed after :meth:`stop`, KernelStartError or EngineError when there is no kernel and none can be
        started, RecordError when the record cannot be written. Cancelling the call interrupts the cell and waits for
        its end, as long as a timeout would: ``interrupt_grace_s``, then its kernel is started anew.
        """
        result: ExecutionResult | None = None
        async with aclosing(self._run(code, timeout, events=False)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    result = event.result
        assert result is not None
        return result

    async def stream(self, code: str, *, timeout: Timeout = DEFAULT) -> AsyncGenerator[StreamEvent, None]:
        """Run a cell and yield what it says as it says it; the last event is ``finished`` with the result.

        A cell never waits for its reader, and one who is slower misses nothing: about ``max_output_bytes`` of what he
        has not read yet wait in memory, the rest (to 2 GiB; then a text says what was left out) in a file without a
        name beside the artifacts. Leaving the loop early interrupts the cell. Errors as for :meth:`execute`.
        """
        async with aclosing(self._run(code, timeout, events=True)) as events:
            async for event in events:
                yield event  # type: ignore[misc]  # the Feed makes only events of the union

    def _run(self, code: str, timeout: Timeout, *, events: bool) -> AsyncGenerator[CellEvent, None]:
        if not isinstance(code, str):
            raise TypeError(f"code must be a str, not {type(code).__name__}")
        try:
            code.encode()
        except UnicodeEncodeError as exc:  # no message and no file could hold it
            raise ValueError(
                f"code has half a surrogate pair ({code[exc.start]!a}) at position {exc.start}, which is no text; "
                "read it as UTF-8, or with errors='replace'"
            ) from None
        if not (timeout is None or timeout == "default" or (isinstance(timeout, (int, float)) and timeout > 0)):
            raise ValueError(f"timeout must be a number of seconds above 0 or None, not {timeout!r}")
        limit = self.settings.timeout_s if timeout == "default" else timeout
        return self._cells.run(code, limit, events=events)

    def _recorded(self, result: ExecutionResult) -> None:
        self._last = (result.msg_id, result.execution_count)
        self.last_used = asyncio.get_running_loop().time()

    async def interrupt(self) -> bool:
        """Interrupt the running cell, whoever sent it; True if there was one.

        Returns when it has ended (status ``interrupted``), or when its kernel had to be restarted because it went on
        for longer than ``Settings.interrupt_grace_s``.
        """
        self._check_open()
        running = [cell for cell in self._feed.cells.values() if cell.running] or list(self._feed.cells.values())[:1]
        for cell in running:
            await self._lifecycle.end_cell(cell, "interrupted")
        return bool(running)

    async def restart(self) -> list[str]:
        """Restart the kernel; returns the names of the variables that are gone. Running cells end as interrupted."""
        self._check_open()
        if self._lifecycle.kernel is None:
            await self._lifecycle.revive(asked=True)
            return []
        await self.state()  # the names it returns are of the last cell too
        return await self._lifecycle.replace("requested")

    # -- what it has -----------------------------------------------------------------------

    async def state(self) -> PythonState:
        """What ``python_state.json`` says: the variables and the imports after the last cell.

        Answers at once while a cell runs, then with the state before it.
        """
        self._check_open()
        deadline = asyncio.get_running_loop().time() + STATE_WAIT_S
        while True:
            state = await self._workspace.read_state()
            current = self._last is None or state.msg_id == self._last[0] or self.busy
            if current or (state.execution_count or 0) > (self._last[1] or 0):  # type: ignore[index]
                return state
            if asyncio.get_running_loop().time() > deadline:
                return state
            await asyncio.sleep(0.004)  # the hook writes some milliseconds after the reply

    async def artifacts(self) -> list[Artifact]:
        """All artifacts of this session, oldest first."""
        return await asyncio.to_thread(self.store.list, self.id)

    async def read_artifact(self, artifact_id: str) -> bytes:
        """The bytes of an artifact. Raises ArtifactNotFound."""
        await self._own_artifact(artifact_id)
        return await asyncio.to_thread(self.store.read, artifact_id)

    async def save_artifact(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Save an artifact to ``path`` (a file, or a folder: then under its own name); returns the file's path."""
        await self._own_artifact(artifact_id)
        return await asyncio.to_thread(self.store.save, artifact_id, Path(path))

    async def open_artifact(self, artifact_id: str) -> BinaryIO:
        """An artifact as an open binary file; the caller closes it."""
        await self._own_artifact(artifact_id)
        return await asyncio.to_thread(self.store.open_artifact, artifact_id)

    async def _own_artifact(self, artifact_id: str) -> Artifact:
        artifact = await asyncio.to_thread(self.store.get, artifact_id)
        if artifact.session_id != self.id:
            raise ArtifactNotFound(f"session {self.id!r} has no artifact {artifact_id!r}")
        return artifact

    async def export(self, path: str | os.PathLike[str]) -> Artifact:
        """Copy a file of the container, e.g. ``/data/clean.parquet``, into the store; also while a cell runs.

        A relative path begins at ``/session``. Raises ArtifactNotFound when it is not there, ArtifactRefused when the
        store does not take it (no regular file, too big, no room).
        """
        self._check_open()
        artifact = await self._exporter(path, self._last or (None, None))
        self._ledger.created([artifact])
        return artifact

    async def datasets(self) -> list[Dataset]:
        """The data sets this session can see, with their status."""
        return await self._datasets.list()

    async def select_dataset(self, dataset_id: str) -> Dataset:
        """Stage a data set at ``/data/<id>``. A fetch that failed has status FAILED.

        Raises DatasetNotFound or DatasetRefused.
        """
        self._check_open()
        return await self._datasets.select(dataset_id)

    # -- its end ---------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed(f"session {self.id!r} is stopped; SessionManager.start({self.id!r}) starts it again")

    async def stop(self, *, reason: str | None = None) -> None:
        """Stop the session: end its kernel, ingest what lies in ``artifacts/``, close the record. Twice is once."""
        if self._leaving is None:
            self._reason = reason
        await self._leave()

    async def detach(self) -> None:
        """Let go of the session and leave its kernel running; ``SessionManager.start`` or ``get`` takes it up again.

        A running cell goes on; its line is written by whoever attaches next. Who waits for it here gets SessionClosed.
        """
        self._keep_alive = True
        await self._leave()

    async def _leave(self) -> None:
        if self._leaving is None:
            self._closed = True
            self._leaving = asyncio.create_task(self._stack.aclose(), name=f"end of {self.id}")
        # Also for who comes later, and to its end when a caller goes away: half of it would leave cells without a line.
        await asyncio.shield(self._leaving)

    def spare_kernel(self, yes: bool) -> None:
        """Whether leaving lets go of the kernel, as :meth:`detach` does: an attempt to take it over must not end it."""
        self._keep_alive = yes

    def owns(self, stack: AsyncExitStack) -> None:
        """What is closed when the session is left; called once, when it has been put together."""
        self._stack = stack
        self.opened = True

    async def end_kernel(self) -> None:
        """The first step of leaving: end the kernel, or let go of it."""
        if self._keep_alive:
            await self._lifecycle.detach()
            return
        # Out of a container's memory artifacts can be fetched only while it lives; from a folder once nobody writes.
        in_memory = self._workspace.path is None
        await self._lifecycle.close(self._ledger.watch.drain if in_memory and self._ledger.watch is not None else None)

    async def last_lines(self) -> None:
        """The last but one: every cell has its line, now the rest of the artifacts and the end."""
        if self._keep_alive:
            return
        if self._workspace.path is not None and self._ledger.watch is not None:
            try:
                await self._ledger.watch.drain()
            except ArtifactError as exc:  # they stay where they are
                self._ledger.append("artifact_refused", path=".", reason=str(exc))
            await self._ledger.settle()
        self._ledger.close_books()
        if self.opened:  # what never started is not said to have stopped
            more = {} if self._reason is None else {"reason": self._reason}
            self._recorder.stopped(self._recorder.metadata.get("container_id"), **more)
        count = self._recorder.metadata.get("execution_count", 0)
        self._recorder.update_metadata(stopped_at=timestamp(), final_execution_count=count)
