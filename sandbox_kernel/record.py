"""The record of a BIND session: ``session.log`` and ``session_metadata.json``, written by the host only.

Every accepted cell has exactly one ``code_execution`` line, whatever is killed and when: it stands in ``.pending``
before it is sent and leaves it after its line is in the log. The lines are chained, see :mod:`sandbox_kernel.audit`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Sequence
from typing import Any, Literal, Self

from sandbox_kernel.audit import Head
from sandbox_kernel.chain import ChainedLog
from sandbox_kernel.directory import SessionDirectory, replace_file
from sandbox_kernel.errors import RecordError
from sandbox_kernel.events import Artifact, timestamp
from sandbox_kernel.journal import Journal, PendingCell, disk_sync, explain
from sandbox_kernel.jsonline import decode, encode
from sandbox_kernel.logfile import iter_log_backwards, open_regular, raw_lines
from sandbox_kernel.snapshot import read_metadata, rebuild_metadata, sorted_metadata

_RECENT = 20_000
"""Finished cells remembered while a session runs; a cell that ends twice does so within a few."""
WAITING_BYTES = 64 * 2**20
"""Lines of other clients' cells that are kept in memory while the disk is full: a kernel can forge any number."""


class Recorder:
    """Writes one session's record. Synchronous, tens of microseconds a call; one thread at a time.

    Every method that writes raises RecordFull (no space, quota, read-only) or RecordError, naming the file.
    """

    def __init__(self, directory: SessionDirectory, *, fsync: bool) -> None:
        """Use :meth:`open`."""
        self.directory = directory
        self._fsync = fsync
        self._written: dict[int, None] = {}
        """Hashes of the msg_ids whose lines are in the log: a third of the memory of the ids."""
        self._knows_all_written = False
        self._unwritten: dict[str, dict[str, Any]] = {}
        """Lines of cells that have ended and could not be written yet, in their order."""
        self._unwritten_bytes = 0
        self._left_out = 0
        self._metadata_lock = threading.Lock()
        self._metadata_due = False
        with contextlib.ExitStack() as undo:
            self._sweep()
            self.metadata, rebuilt = self._load_metadata()
            self._metadata_stamp = self._stamp()
            self._log = ChainedLog(directory.log, Head.of(self.metadata), fsync=fsync)
            undo.callback(self._log.close)
            if isinstance(count := self.metadata.get("execution_count"), int):
                # The metadata lag behind the log by what a crash did not let them learn.
                self.metadata["execution_count"] = count + self._log.cells_after_head
            self._journal = Journal(directory.pending)
            undo.callback(self._journal.close)
            if rebuilt is not None:
                self._log.append("metadata_rebuilt", rebuilt)
            self._forget_written()
            undo.pop_all()

    @classmethod
    def open(cls, directory: SessionDirectory, *, durability: Literal["batch", "fsync"] = "batch") -> Self:
        """Open or begin the record in ``directory`` (which is there); the log says what a crash left torn.

        ``durability="fsync"``: every line is on the disk before its call returns; ``"batch"``: within a second.
        """
        return cls(directory, fsync=durability == "fsync")

    # --- events -------------------------------------------------------------------------------

    def append(self, event: str, /, **fields: Any) -> None:
        """Write one line ``{"timestamp", "event", **fields, "seq", "prev"}``."""
        self._log.append(event, fields)
        if event == "session_started":
            # No cell of the kernel that now begins can have a line already.
            self._knows_all_written = True

    def started(self, container_id: str | None, host_port: int | None, **more: Any) -> None:
        """``session_started``; ``host_port`` is None over ipc."""
        self.append("session_started", container_id=container_id, host_port=host_port, **more)

    def artifacts_created(self, artifacts: Sequence[Artifact], **more: Any) -> None:
        """``artifacts_created``: the document's fields first, then what else is known of each."""
        rows = []
        for artifact in artifacts:
            known = artifact.model_dump(mode="json", exclude={"session_id"})
            rows.append({name: known[name] for name in ("id", "filename", "size_bytes")} | known)
        self.append("artifacts_created", artifact_count=len(rows), artifacts=rows, **more)

    def stopped(self, container_id: str | None, **more: Any) -> None:
        """``session_stopped``."""
        self.append("session_stopped", container_id=container_id, **more)

    # --- cells --------------------------------------------------------------------------------

    def accept(self, msg_id: str, code: str, **fields: Any) -> None:
        """Write a cell to ``.pending``; to be called before it is sent. When this raises, do not send it."""
        self._retry()
        self._journal.add(PendingCell(msg_id, code, timestamp(), self._log.head.size, fields))
        if self._fsync:
            self._journal.sync()
        else:
            disk_sync.soon(self._journal)

    def finish(self, msg_id: str, **fields: Any) -> None:
        """Write the cell's ``code_execution`` line and forget it in ``.pending``. Later calls for it do nothing.

        The document's fields come first; ``code`` may be left out for an accepted cell. When the line cannot be
        written it is kept in memory and written before the next cell is accepted or finished; the error is raised
        all the same. Of cells that were not accepted here no more than :data:`WAITING_BYTES` wait so.
        """
        fresh = not self.seen(msg_id) and msg_id not in self._unwritten
        if fresh:
            code, success = fields.pop("code", None), fields.pop("success", None)
            if code is None:
                cell = self._journal.cells.get(msg_id)
                code = cell.code if cell is not None else ""
            self._unwritten[msg_id] = {
                "code": code,
                "success": fields.get("status") == "ok" if success is None else success,
                "stdout": fields.pop("stdout", ""),
                "execution_count": fields.pop("execution_count", None),
                "msg_id": msg_id,
                **fields,
            }
        try:
            self._retry()
        except RecordError:
            if fresh:
                self._keep(msg_id)
            raise

    def retract(self, msg_id: str) -> None:
        """Forget an accepted cell that was never sent."""
        # Where the disk is full it still stands in .pending: who opens that finds out that it never ran.
        with contextlib.suppress(RecordError):
            self._journal.forget(msg_id)

    def pending(self) -> list[PendingCell]:
        """The accepted cells without a line, oldest first; after a crash: those whose books are to be closed."""
        return list(self._journal.cells.values())

    def seen(self, msg_id: str) -> bool:
        """Whether the cell's line is in the log, looking back to the last ``session_started``."""
        known = hash(msg_id) in self._written
        if not known and msg_id not in self._journal.cells and not self._knows_all_written:
            self._read_written()
            known = hash(msg_id) in self._written
        return known

    def _finish(self, msg_id: str, line: dict[str, Any]) -> None:
        self._log.append("code_execution", dict(line))
        self._written[hash(msg_id)] = None
        if len(self._written) > _RECENT and self._knows_all_written:
            del self._written[next(iter(self._written))]
        # The line is in the log: whatever .pending still says, opening it again finds that out.
        with contextlib.suppress(RecordError):
            self._journal.forget(msg_id)

    def _retry(self) -> None:
        """Write what has no line yet; whatever came first is first."""
        for msg_id in list(self._unwritten):
            self._finish(msg_id, self._unwritten[msg_id])
            del self._unwritten[msg_id]
        self._unwritten_bytes = 0
        if self._left_out:
            reason = "the log could not be written, and too many cells of other clients ended meanwhile"
            self._log.append("cells_not_recorded", {"count": self._left_out, "reason": reason})
            self._left_out = 0

    def _keep(self, msg_id: str) -> None:
        """A line has to wait for the disk: for another client's cell within the bound."""
        size = len(encode(self._unwritten[msg_id]))
        if msg_id not in self._journal.cells and self._unwritten_bytes + size > WAITING_BYTES:
            del self._unwritten[msg_id]
            self._left_out += 1
        else:
            self._unwritten_bytes += size

    def _read_written(self) -> None:
        """Learn which cells have lines since the session was last started."""
        for entry in iter_log_backwards(self.directory.log):
            if entry.get("event") == "session_started":
                break
            if entry.get("event") == "code_execution" and isinstance(entry.get("msg_id"), str):
                self._written[hash(entry["msg_id"])] = None
        self._knows_all_written = True

    def _forget_written(self) -> None:
        """Cells whose line was written, but the crash came before ``.pending`` heard of it."""
        if not self._journal.cells:
            return
        start = min(cell.log_bytes for cell in self._journal.cells.values())
        with open_regular(self.directory.log) as file:
            file.seek(start if start <= self._log.head.size else 0)
            for line in raw_lines(file):
                with contextlib.suppress(ValueError):
                    entry = decode(line.data or b"")
                    if entry.get("event") == "code_execution" and entry.get("msg_id") in self._journal.cells:
                        self._written[hash(entry["msg_id"])] = None
                        self._journal.forget(entry["msg_id"])

    # --- metadata -----------------------------------------------------------------------------

    def update_metadata(self, **fields: Any) -> None:
        """Merge ``fields`` and the log's head into ``session_metadata.json``, replaced at once; others' fields stay."""
        with self._metadata_lock:
            self.metadata |= fields
            self._write_metadata()

    def metadata_soon(self, **fields: Any) -> None:
        """As :meth:`update_metadata`, but written within a quarter of a second on another thread.

        Replacing a file takes longer than running a cell may. An error shows at the next :meth:`update_metadata`.
        """
        if self._fsync:
            self.update_metadata(**fields)
            return
        with self._metadata_lock:
            self.metadata |= fields
            self._metadata_due = True
        disk_sync.soon(self)

    def sync(self) -> None:
        """Write the metadata that are due; called by the syncing thread, or by who cannot wait for it."""
        with self._metadata_lock, contextlib.suppress(RecordError):
            if self._metadata_due:
                self._write_metadata()

    def _write_metadata(self) -> None:
        if self._stamp() != self._metadata_stamp:
            theirs, _ = read_metadata(self.directory.path)
            self.metadata = (theirs or {}) | self.metadata
        self.metadata = sorted_metadata(self.metadata | self._log.head.as_metadata())
        path = self.directory.metadata
        try:
            data = json.dumps(json.loads(encode(self.metadata)), indent=2).encode() + b"\n"
            replace_file(path, data, fsync=self._fsync)
        except OSError as exc:
            raise explain(path, exc) from exc
        self._metadata_due = False
        self._metadata_stamp = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.directory.metadata.lstat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _load_metadata(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The metadata, and what ``metadata_rebuilt`` is to say when they had to be rebuilt from the log."""
        folder, moved = self.directory.path, None
        found, problem = read_metadata(folder)
        if found is not None:
            return found, None
        if problem is not None:
            names = (f"session_metadata.json.corrupt-{n}" for n in itertools.count(1))
            moved = next(name for name in names if not (folder / name).exists())
            try:
                self.directory.metadata.rename(folder / moved)
            except OSError as exc:
                raise explain(self.directory.metadata, exc) from exc
        rebuilt = rebuild_metadata(folder, self.directory.session_id)
        if not rebuilt and moved is None:
            return {}, None
        return rebuilt, {"reason": str(problem or "session_metadata.json was missing"), "moved_to": moved}

    def _sweep(self) -> None:
        """Remove what a crash left of a replacement that was under way."""
        for name in (self.directory.metadata.name, self.directory.pending.name):
            for left in self.directory.path.glob(f".{name}.*"):
                left.unlink(missing_ok=True)

    # --- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what could not be written before, the head into the metadata, and sync. May wait for the disk."""
        try:
            self._retry()
            if self._metadata_due or self.metadata.get("log_head") != self._log.head.digest:
                self.update_metadata()
        finally:
            self._metadata_due = False
            self._log.sync()
            self._log.close()
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class NoRecorder:
    """The record of a TMPFS session: the same methods, and nothing is written."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}

    def append(self, event: str, /, **fields: Any) -> None:
        pass

    def started(self, container_id: str | None, host_port: int | None, **more: Any) -> None:
        pass

    def artifacts_created(self, artifacts: Sequence[Artifact], **more: Any) -> None:
        pass

    def stopped(self, container_id: str | None, **more: Any) -> None:
        pass

    def accept(self, msg_id: str, code: str, **fields: Any) -> None:
        pass

    def finish(self, msg_id: str, **fields: Any) -> None:
        pass

    def retract(self, msg_id: str) -> None:
        pass

    def pending(self) -> list[PendingCell]:
        return []

    def seen(self, msg_id: str) -> bool:
        return False

    def update_metadata(self, **fields: Any) -> None:
        self.metadata |= fields

    def metadata_soon(self, **fields: Any) -> None:
        self.metadata |= fields

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
