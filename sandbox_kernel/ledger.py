"""The ledger closes the books on each cell: its artifacts, the whole of its output, its line in the log, its result.

One path for every cell, whoever ran it. Cells are closed one after the other in the order in which they ended;
``execute()`` returns only after that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from sandbox_kernel.announcements import Announcements
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import RecordError, SandboxError, SessionClosed
from sandbox_kernel.events import Artifact, ArtifactCreated, ExecutionResult, timestamp
from sandbox_kernel.feed import OWN_ORIGIN, Cell
from sandbox_kernel.late import LateOutput
from sandbox_kernel.masking import Masker
from sandbox_kernel.outcome import Outcome
from sandbox_kernel.outputs import Output
from sandbox_kernel.payloads import Payloads, is_light
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.refusals import Refusals

log = logging.getLogger(__name__)

METADATA_AFTER_S = 0.001
"""``session_metadata.json`` has a cell's number so soon after its line is in the log, unless cell follows cell."""
METADATA_EVERY_S = 0.05
TOLD = frozenset({"lost_names", "path", "reason", "message", "host"})
"""Fields of events whose text the kernel chooses: a secret can be in them."""


class Watch(Protocol):
    """What sees the artifacts of a session: ``artifacts.observer.Observer`` or ``artifacts.remote.RemoteSpool``."""

    def cell_started(self, msg_id: str, execution_count: int | None) -> None: ...
    def cell_ended(self, msg_id: str) -> None: ...
    def settled(self, msg_id: str) -> list[Artifact] | None: ...
    async def cell_finished(self, msg_id: str) -> list[Artifact]: ...
    async def drain(self) -> list[Artifact]: ...


class Ledger:
    """Closes cells of one session. Callbacks of Feed and observer come in here; lines of the log go out."""

    def __init__(
        self, session_id: str, recorder: Recorder | NoRecorder, store: ArtifactStore, mask: Masker | None
    ) -> None:
        self.session_id = session_id
        self.recorder = recorder
        self.store = store
        self.watch: Watch | None = None
        self._mask = mask
        self._queue: asyncio.Queue[Cell | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._waits = False
        """The task is at a cell that ended before."""
        self._current: Cell | None = None
        self.late = LateOutput(self.append, self.masked)
        self._written = 0.0
        self.refusals = Refusals(self.append)
        self._announcements = Announcements(recorder, store, self._named, self._failed)
        self._payloads = Payloads(session_id, store, mask, self.append)
        self.outcomes: dict[str, Outcome] = {}
        """What callers wait for, by msg_id."""
        self.notes: dict[str, dict[str, Any]] = {}
        """Further fields of a cell's result by msg_id: ``state_preserved``, ``lost_names``, ``death``."""
        self.on_recorded: Callable[[ExecutionResult], None] | None = None
        self.failure: SandboxError | None = None
        """The last line of the record that could not be written; raised to the next caller."""

    # -- life ------------------------------------------------------------------------------

    async def __aenter__(self) -> Ledger:
        self._task = asyncio.create_task(self._run(), name=f"ledger {self.session_id}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Closes every cell that has ended, then the late output."""
        self._queue.put_nowait(None)
        if self._task is not None:
            await self._task
        self.late.flush()
        self.refusals.flush()
        await self.settle()
        for outcome in self.outcomes.values():
            outcome.close(
                SessionClosed(
                    f"session {self.session_id!r} was let go of while its cell ran; it goes on, and has its line "
                    "in the log when the session is taken up again"
                )
            )

    async def settle(self) -> None:
        """Every artifact that is known has its line."""
        await self._announcements.settle()

    async def _run(self) -> None:
        while (cell := await self._queue.get()) is not None:
            self._waits = True
            try:
                self._tell(cell, await self._close(cell))
            except Exception as exc:  # the caller must hear of it, and the next cell must still be closed
                self._tell(cell, exc)
            finally:
                self._waits = False

    def _tell(self, cell: Cell, result: ExecutionResult | Exception) -> None:
        """The books of ``cell`` are closed, or cannot be."""
        cell.recorded()
        outcome = self.outcomes.pop(cell.msg_id, None)
        if isinstance(result, Exception):
            log.warning("session %s, cell %s: %s", self.session_id, cell.msg_id, repr(result))
            if outcome is not None:
                outcome.close(result)
            elif isinstance(result, SandboxError):
                self.failure = result
            return
        if outcome is not None:
            outcome.close(result)
        if self.on_recorded is not None:
            self.on_recorded(result)

    # -- what Feed and observer tell -------------------------------------------------------

    def started(self, cell: Cell) -> None:
        self._current = cell
        if self.watch is not None:
            self.watch.cell_started(cell.msg_id, cell.execution_count)

    def finished(self, cell: Cell) -> None:
        """Close its books: at once where nothing has to be waited for, else in their turn."""
        result: ExecutionResult | Exception | None = None
        if not self._waits and self._queue.empty():
            try:
                result = self._close_at_once(cell)
            except Exception as exc:
                result = exc
        if result is None:
            if self.watch is not None:
                self.watch.cell_ended(cell.msg_id)
            self._queue.put_nowait(cell)
        else:
            self._tell(cell, result)

    def created(self, artifacts: Sequence[Artifact]) -> None:
        """Artifacts whose rows are committed: told to the running cell's listener, then to the log."""
        self._announcements.add(artifacts)
        cell = self._current
        if cell is not None and cell.listener is not None:
            for artifact in artifacts:
                if artifact.msg_id == cell.msg_id:
                    cell.listener(ArtifactCreated(msg_id=cell.msg_id, artifact=artifact))

    # -- lines -----------------------------------------------------------------------------

    def append(self, event: str, /, **fields: Any) -> None:
        """A line whose loss nobody waits for; a failure to write it is raised to the next caller."""
        try:
            self.recorder.append(event, **{k: self.masked_tree(v) if k in TOLD else v for k, v in fields.items()})
        except RecordError as exc:
            self.failure = exc

    def _failed(self, exc: RecordError) -> None:
        self.failure = exc

    def _named(self, artifact: Artifact) -> Artifact:
        """As the log may name it: a file can be named after a secret."""
        if self._mask is None:
            return artifact
        return artifact.model_copy(
            update={"filename": self.masked(artifact.filename), "path": self.masked(artifact.path)}
        )

    def _close_at_once(self, cell: Cell) -> ExecutionResult | None:
        """As :meth:`_close`; None where a thread is needed or a look at the artifacts."""
        outputs = cell.collector.outputs()
        if cell.collector.truncated or not is_light(outputs):
            return None
        artifacts = [] if self.watch is None else self.watch.settled(cell.msg_id)
        if artifacts is None:
            return None
        try:
            lost: list[str] = []
            return self._record(cell, outputs, self._payloads.keep_displays(outputs, lost), lost, artifacts)
        finally:
            self._leave(cell)

    async def _close(self, cell: Cell) -> ExecutionResult:
        self._announcements.hold()
        try:
            artifacts = [] if self.watch is None else await self.watch.cell_finished(cell.msg_id)
            lost: list[str] = []
            spooled = await self._payloads.store_spools(cell, lost) if cell.collector.truncated else []
            outputs = cell.collector.outputs()
            if is_light(outputs):
                logged = self._payloads.keep_displays(outputs, lost)
            else:
                # In a thread: pictures are decoded, hashed and synced, and other sessions would wait for that.
                logged = await asyncio.to_thread(self._payloads.keep_displays, outputs, lost)
            return self._record(cell, outputs, logged, lost, artifacts, spooled)
        finally:
            await self._announcements.release()
            self._leave(cell)

    def _leave(self, cell: Cell) -> None:
        if self._current is cell:
            self._current = None

    def _record(
        self,
        cell: Cell,
        outputs: list[Output],
        logged: list[Output],
        lost: list[str],
        artifacts: list[Artifact],
        spooled: Sequence[Artifact] = (),
    ) -> ExecutionResult:
        """The result, its line written. ``logged``: the outputs as the log has them."""
        collector = cell.collector
        result = ExecutionResult(
            session_id=self.session_id,
            msg_id=cell.msg_id,
            code=cell.code,
            status=cell.status,
            origin=cell.origin,
            stdout=collector.stdout,
            stderr=collector.stderr,
            outputs=outputs,
            result=collector.result,
            error=cell.error,
            execution_count=cell.execution_count,
            started_at=cell.started_at,
            duration_s=cell.duration_s,
            artifacts=artifacts,
            truncated=collector.truncated or bool(spooled),
            output_artifacts=list(spooled),
            **self.notes.pop(cell.msg_id, {}),
        )
        self.late.flush()
        # Not the line of one that another client's failing cell swept out of the kernel's queue before it ran: the
        # session sends it again, and takes it back only when it has been accepted anew.
        if not (cell.own and cell.status == "aborted"):
            note = {} if cell.note is None else {"note": cell.note}
            self.write(result.msg_id, **self._line(result, logged, lost), **note)
        return result

    def write(self, msg_id: str, **line: Any) -> None:
        """A ``code_execution`` line (masked already) and the count of cells. Raises RecordError."""
        self.recorder.finish(msg_id, **line)
        # Cells of the session, over all its kernels: a restarted kernel counts from 1 again.
        count = self.recorder.metadata.get("execution_count")
        self.recorder.metadata_soon(last_used=timestamp(), execution_count=count + 1 if isinstance(count, int) else 1)
        # Replacing the file takes as long as some cells do: the caller gets the result first. When cell follows cell
        # the recorder's own thread writes what is due, every quarter of a second.
        loop = asyncio.get_running_loop()
        if loop.time() - self._written >= METADATA_EVERY_S:
            self._written = loop.time()
            loop.call_later(METADATA_AFTER_S, self.recorder.sync)

    def close_books(self) -> None:
        """No cell is sent any more. Who was accepted and has no line was swept out of the kernel's queue by another
        client's failing cell, and its caller did not send it again.
        """
        for cell in self.recorder.pending():
            line: dict[str, Any] = {
                "stderr": "",
                "status": "aborted",
                "error": None,
                "origin": OWN_ORIGIN,
                "started_at": cell.timestamp,
                "duration_s": 0.0,
                "outputs": [],
            }
            with suppress(RecordError):  # it stands in .pending for who opens the session next
                self.write(cell.msg_id, **line)

    def _line(self, result: ExecutionResult, outputs: list[Output], lost: list[str]) -> dict[str, Any]:
        """The fields of a ``code_execution`` line; ``lost``: what of its output could not be kept, and why."""
        fields: dict[str, Any] = {
            "code": self.masked(result.code),
            "success": result.success,
            "stdout": self.masked(result.stdout),
            "stderr": self.masked(result.stderr),
            "status": result.status,
            "result": None if result.result is None else self.masked(result.result),
            "error": self.masked_tree(result.error.model_dump()) if result.error is not None else None,
            "execution_count": result.execution_count,
            "origin": result.origin,
            "started_at": result.started_at.isoformat(),
            "duration_s": round(result.duration_s, 6),
            "outputs": outputs,
            "artifacts": [artifact.id for artifact in result.artifacts],
        }
        if result.truncated:
            fields |= {
                "truncated": True,
                "output_artifacts": [a.model_dump(mode="json") for a in result.output_artifacts],
            }
        if lost:
            fields["output_lost"] = "; ".join(dict.fromkeys(lost))
        if not result.state_preserved:
            fields |= {"state_preserved": False, "lost_names": self.masked_tree(result.lost_names)}
        if result.death is not None:
            fields["death"] = result.death.model_dump()
        return fields

    # -- masking ---------------------------------------------------------------------------

    def masked(self, text: str, *, cut: bool = False) -> str:
        """``text`` without the values of the session's secrets, nor, where it is ``cut`` at its end, a part of one."""
        return text if self._mask is None else self._mask(text, cut=cut)

    def masked_tree(self, value: Any) -> Any:
        return value if self._mask is None else self._mask.tree(value)
