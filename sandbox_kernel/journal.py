"""The files a recorder appends to: whole lines or nothing, synced off the path; and ``.pending``, what is in flight.

The file system's errors become :class:`RecordFull` and :class:`RecordError` here, each naming the file.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sandbox_kernel.directory import replace_file
from sandbox_kernel.errors import RecordError, RecordFull
from sandbox_kernel.jsonline import decode, encode
from sandbox_kernel.logfile import Problem, open_regular, raw_lines

_FULL = {
    errno.ENOSPC: "no space left on the device; free some",
    errno.EDQUOT: "over the disk quota; free some space",
    errno.EROFS: "the file system is read-only; mount it writable",
}
_SYNC_EVERY_S = 0.25


def explain(path: Path, exc: OSError) -> RecordError:
    """The error to raise for ``exc`` on ``path``."""
    if exc.errno in _FULL:
        return RecordFull(f"cannot write {path}: {_FULL[exc.errno]}")
    if exc.errno == errno.ELOOP:
        return RecordError(f"cannot write {path}: it is a symbolic link; remove it")
    if exc.errno in (errno.EACCES, errno.EPERM):
        return RecordError(f"cannot write {path}: {exc.strerror}; give this user the right to write it")
    return RecordError(f"cannot write {path}: {exc.strerror or exc}")


class AppendFile:
    """A file that grows by whole writes: what cannot be written entirely is taken back, so a later try finds it whole.

    ``size`` is what we wrote it to; :meth:`disturbed` tells whether somebody else changed, cut or removed it since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._sync_error: OSError | None = None
        try:
            self._fd = os.open(
                path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
        except OSError as exc:
            raise explain(path, exc) from exc
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise RecordError(f"cannot write {path}: it is not a regular file; remove it")
        self.size = status.st_size

    def disturbed(self) -> bool:
        """Raises RecordError when the file was closed."""
        if self._fd < 0:
            raise RecordError(f"{self.path} is closed: the session was stopped")
        status = os.fstat(self._fd)
        return status.st_size != self.size or status.st_nlink == 0

    def append(self, data: bytes) -> None:
        """Write ``data`` at the end, all or nothing. Raises RecordFull or RecordError."""
        error, self._sync_error = self._sync_error, None
        try:
            if error is not None:
                raise error
            done = os.write(self._fd, data)
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as exc:
            if error is None and self._fd >= 0 and os.fstat(self._fd).st_size > self.size:
                os.ftruncate(self._fd, self.size)
            raise explain(self.path, exc) from exc
        self.size += len(data)

    def truncate(self) -> None:
        """Empty the file."""
        try:
            os.ftruncate(self._fd, 0)
        except OSError as exc:
            raise explain(self.path, exc) from exc
        self.size = 0

    def sync(self) -> None:
        """Wait until the bytes are on the disk. An error is kept and raised by the next append."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                os.fdatasync(self._fd)
            except OSError as exc:
                self._sync_error = exc

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Syncable(Protocol):
    """What can be brought to the disk later; ``sync`` is called on another thread and must not raise."""

    def sync(self) -> None: ...


class _DiskSync:
    """Syncs what the recorders of the process wrote, within a second, on one thread that ends when nothing is left."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._due: set[Syncable] = set()
        self._running = False

    def soon(self, file: Syncable) -> None:
        if file in self._due:
            return
        with self._wake:
            self._due.add(file)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="sandbox-kernel-sync", daemon=True).start()

    def _run(self) -> None:
        idle = threading.Event()
        while True:
            # The wait IS the batch: lines of a quarter of a second share one sync.
            idle.wait(_SYNC_EVERY_S)
            with self._wake:
                due, self._due = self._due, set()
                if not due:
                    self._running = False
                    return
            for file in due:
                file.sync()


disk_sync = _DiskSync()


@dataclass(frozen=True, slots=True)
class PendingCell:
    """A cell that was accepted and has no ``code_execution`` line yet."""

    msg_id: str
    code: str
    timestamp: str
    log_bytes: int = 0
    """Size of ``session.log`` when it was accepted: its line, if there is one, comes after."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What else was given to ``accept``."""


class Journal:
    """``.pending``: JSON lines ``{"msg_id", "code", "timestamp", "log_bytes", ...}`` and ``{"done": msg_id}``.

    Emptied whenever nothing is in flight, rewritten when it has grown past a megabyte of done cells.
    """

    _COMPACT = 2**20

    def __init__(self, path: Path) -> None:
        self.cells: dict[str, PendingCell] = {}
        self.problems: list[Problem] = []
        self._path = path
        self._load()
        self._file = AppendFile(path)
        self._rewrite()

    def _load(self) -> None:
        try:
            file = open_regular(self._path)
        except FileNotFoundError:
            return
        with file:
            for line in raw_lines(file):
                try:
                    record = decode(line.data or b"")
                except ValueError as exc:
                    # A torn line is a cell that was being accepted when the process ended: it was never sent.
                    if line.ended:
                        self.problems.append(Problem(f"{self._path.name}, line {line.number}", str(exc)))
                    continue
                if isinstance(done := record.get("done"), str):
                    self.cells.pop(done, None)
                elif isinstance(msg_id := record.pop("msg_id", None), str):
                    start = record.pop("log_bytes", 0)
                    self.cells[msg_id] = PendingCell(
                        msg_id,
                        str(record.pop("code", "")),
                        str(record.pop("timestamp", "")),
                        start if isinstance(start, int) and start >= 0 else 0,
                        record,
                    )

    def _rewrite(self) -> None:
        """Leave only what is in flight; through a second file, so that no moment is without it."""
        if not self.cells:
            if self._file.size:
                self._file.truncate()
            return
        try:
            replace_file(self._path, b"".join(self._line(cell) for cell in self.cells.values()), fsync=True)
        except OSError as exc:
            raise explain(self._path, exc) from exc
        self._file.close()
        self._file = AppendFile(self._path)

    @staticmethod
    def _line(cell: PendingCell) -> bytes:
        head = {"msg_id": cell.msg_id, "code": cell.code, "timestamp": cell.timestamp, "log_bytes": cell.log_bytes}
        return encode(head | cell.fields) + b"\n"

    def add(self, cell: PendingCell) -> None:
        self._file.append(self._line(cell))
        self.cells[cell.msg_id] = cell

    def forget(self, msg_id: str) -> None:
        if self.cells.pop(msg_id, None) is None:
            return
        if not self.cells:
            self._file.truncate()
        elif self._file.size > self._COMPACT + 2 * sum(len(cell.code) for cell in self.cells.values()):
            self._rewrite()
        else:
            self._file.append(encode({"done": msg_id}) + b"\n")

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()
