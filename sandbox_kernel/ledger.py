"""The ledger closes the books on each cell: its artifacts, the whole of its output, its line in the log, its result.

One path for every cell, whoever ran it. Cells are closed one after the other in the order in which they ended;
``execute()`` returns only after that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, Protocol

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import ArtifactError, RecordError, SandboxError, SessionClosed
from sandbox_kernel.events import Artifact, ArtifactCreated, ExecutionResult, timestamp
from sandbox_kernel.feed import OWN_ORIGIN, Cell
from sandbox_kernel.late import LateOutput
from sandbox_kernel.masking import Masker
from sandbox_kernel.outputs import Output, for_log
from sandbox_kernel.record import NoRecorder, Recorder

log = logging.getLogger(__name__)

METADATA_AFTER_S = 0.001
"""``session_metadata.json`` has a cell's number so soon after its line is in the log, unless cell follows cell."""
METADATA_EVERY_S = 0.05
TOLD = frozenset({"lost_names", "path", "reason", "message", "host"})
"""Fields of events whose text the kernel chooses: a secret can be in them."""
ARTIFACTS_PER_LINE = 1_000
"""In one ``artifacts_created``: a path may be 16 kB long, and no line may be longer than readers take."""
FEW = 20
"""Outputs that are quickly dealt with."""
REFUSALS, REFUSALS_PER_S = 200, 20
"""Lines that tell of refused files: so many as they come, then so many a second; the rest is counted."""


class Watch(Protocol):
    """What sees the artifacts of a session: ``artifacts.observer.Observer`` or ``artifacts.remote.RemoteSpool``."""

    def cell_started(self, msg_id: str, execution_count: int | None) -> None: ...
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
        self._current: Cell | None = None
        self._held: list[Artifact] | None = None
        self.late = LateOutput(self.append, self.masked)
        self._written = 0.0
        self._refusals, self._refilled = float(REFUSALS), 0.0
        self._untold = 0
        self._refusals_timer: asyncio.TimerHandle | None = None
        self.results: dict[str, asyncio.Future[ExecutionResult]] = {}
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
        self._tell_the_rest()
        for waiting in self.results.values():
            if not waiting.done():
                waiting.set_exception(
                    SessionClosed(
                        f"session {self.session_id!r} was let go of while its cell ran; it goes on, and has its line "
                        "in the log when the session is taken up again"
                    )
                )

    async def _run(self) -> None:
        while (cell := await self._queue.get()) is not None:
            future = self.results.pop(cell.msg_id, None)
            try:
                result = await self._close(cell)
            except Exception as exc:  # the caller must hear of it, and the next cell must still be closed
                log.warning("session %s, cell %s: %s", self.session_id, cell.msg_id, repr(exc))
                if future is not None and not future.done():
                    future.set_exception(exc)
                elif isinstance(exc, SandboxError):
                    self.failure = exc
                continue
            finally:
                cell.recorded()
            if future is not None and not future.done():
                future.set_result(result)
            if self.on_recorded is not None:
                self.on_recorded(result)

    # -- what Feed and observer tell -------------------------------------------------------

    def started(self, cell: Cell) -> None:
        self._current = cell
        if self.watch is not None:
            self.watch.cell_started(cell.msg_id, cell.execution_count)

    def finished(self, cell: Cell) -> None:
        self._queue.put_nowait(cell)

    def created(self, artifacts: Sequence[Artifact]) -> None:
        """Artifacts whose rows are committed: told to the running cell's listener, then to the log."""
        if self._held is not None:
            self._held.extend(artifacts)
        else:
            self._log_artifacts(artifacts)
        cell = self._current
        if cell is not None and cell.listener is not None:
            for artifact in artifacts:
                if artifact.msg_id == cell.msg_id:
                    cell.listener(ArtifactCreated(msg_id=cell.msg_id, artifact=artifact))

    def refused(self, refusals: Sequence[Any]) -> None:
        """Files that the store does not take: they stay where they are, and the log says why."""
        now = asyncio.get_running_loop().time()
        self._refusals = min(REFUSALS, self._refusals + (now - self._refilled) * REFUSALS_PER_S)
        self._refilled = now
        told = min(len(refusals), int(self._refusals))
        self._refusals -= told
        for refusal in refusals[:told]:
            self.append("artifact_refused", path=refusal.path, reason=refusal.reason)
        self._untold += len(refusals) - told
        if self._untold and self._refusals_timer is None:
            self._refusals_timer = asyncio.get_running_loop().call_later(1.0, self._tell_the_rest)

    def _tell_the_rest(self) -> None:
        if self._refusals_timer is not None:
            self._refusals_timer.cancel()
            self._refusals_timer = None
        untold, self._untold = self._untold, 0
        if untold:
            self.append("artifact_refused", path="...", reason=f"and {untold} more")

    # -- lines -----------------------------------------------------------------------------

    def append(self, event: str, /, **fields: Any) -> None:
        """A line whose loss nobody waits for; a failure to write it is raised to the next caller."""
        try:
            self.recorder.append(event, **{k: self.masked_tree(v) if k in TOLD else v for k, v in fields.items()})
        except RecordError as exc:
            self.failure = exc

    def _log_artifacts(self, artifacts: Sequence[Artifact]) -> None:
        files = [artifact for artifact in artifacts if artifact.kind != "output"]
        for start in range(0, len(files), ARTIFACTS_PER_LINE):
            batch = files[start : start + ARTIFACTS_PER_LINE]
            told = batch
            if self._mask is not None:  # a file can be named after one
                names = [{"filename": self.masked(item.filename), "path": self.masked(item.path)} for item in batch]
                told = [item.model_copy(update=name) for item, name in zip(batch, names, strict=True)]
            try:
                self.recorder.artifacts_created(told)
            except RecordError as exc:
                self.failure = exc
                return
            with suppress(ArtifactError):  # who opens the session next finds the line, and marks them then
                self.store.mark_logged([artifact.id for artifact in batch])

    async def _close(self, cell: Cell) -> ExecutionResult:
        collector = cell.collector
        artifacts: list[Artifact] = []
        self._held = []
        try:
            if self.watch is not None:
                try:
                    artifacts = await self.watch.cell_finished(cell.msg_id)
                except ArtifactError as exc:  # they stay where they are
                    self.append("artifact_refused", path=".", reason=str(exc))
            lost: list[str] = []
            spooled = await self._store_spools(cell, lost) if collector.truncated else []
            outputs = collector.outputs()
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
                output_artifacts=spooled,
                **self.notes.pop(cell.msg_id, {}),
            )
            self.late.flush()
            await self._write(result, cell, lost)
        finally:
            held, self._held = self._held or [], None
            self._log_artifacts(held)
            if self._current is cell:
                self._current = None
        return result

    async def _write(self, result: ExecutionResult, cell: Cell, lost: list[str]) -> None:
        if cell.own and cell.status == "aborted":
            # Another client's failing cell swept it out of the kernel's queue before it ran: the session sends it
            # again, and takes it back only when it has been accepted anew.
            return
        note = {} if cell.note is None else {"note": cell.note}
        outputs = result.outputs
        if len(outputs) <= FEW and all(output.get("data", {}).keys() <= {"text/plain"} for output in outputs):
            outputs = self._keep_displays(outputs, lost)
        else:
            # In a thread: pictures are decoded, hashed and synced, and other sessions would wait for that.
            outputs = await asyncio.to_thread(self._keep_displays, outputs, lost)
        self.write(result.msg_id, **self._line(result, outputs, lost), **note)

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

    def _keep_displays(self, outputs: list[Output], lost: list[str]) -> list[Output]:
        """``outputs`` for the log, what they refer to put into the store (blocks)."""
        blobs: dict[str, bytes] = {}

        def keep(data: bytes) -> str:
            digest = sha256(data).hexdigest()
            blobs[digest] = data
            return digest

        logged = for_log(self.masked_tree(outputs), keep)
        if blobs:
            try:
                self.store.put_blobs(blobs)
            except ArtifactError as exc:  # what the store does not take must not cost the cell its line
                lost.append(f"the bytes of its pictures could not be kept: {exc}")
        return logged

    async def _store_spools(self, cell: Cell, lost: list[str]) -> list[Artifact]:
        stored = []
        for spool in cell.collector.take_spools():
            file = spool.whole()
            if file is None:
                lost.append(f"the whole output could not be kept: {spool.error and spool.error.strerror}")
                continue
            with file:
                source = file if self._mask is None else self._mask.stream(file)
                try:
                    stored.append(
                        await asyncio.to_thread(
                            self.store.put_stream,
                            self.session_id,
                            f"cell-{cell.execution_count or 0}-{spool.filename}",
                            source,
                            kind="output",
                            execution_count=cell.execution_count,
                            msg_id=cell.msg_id,
                            content_type=spool.content_type,
                        )
                    )
                except ArtifactError as exc:
                    lost.append(f"the whole output could not be kept: {exc}")
                    self.append("artifact_refused", path=spool.filename, reason=str(exc))
        return stored

    # -- masking ---------------------------------------------------------------------------

    def masked(self, text: str, *, cut: bool = False) -> str:
        """``text`` without the values of the session's secrets, nor, where it is ``cut`` at its end, a part of one."""
        return text if self._mask is None else self._mask(text, cut=cut)

    def masked_tree(self, value: Any) -> Any:
        return value if self._mask is None else self._mask.tree(value)
