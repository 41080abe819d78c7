"""The audit chain of ``session.log``: each line carries its number (``seq``) and the SHA-256 of the line before it (``prev``).

The head (``log_head``, ``log_lines``, ``log_bytes``) is kept in ``session_metadata.json``; it may lag behind the log by the
lines of a crash, never run ahead of it. There is no key: somebody who can write both files can forge both.
What the chain finds is every change made to the log alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sandbox_kernel.events import timestamp
from sandbox_kernel.journal import AppendFile, disk_sync
from sandbox_kernel.logfile import RawLine, decode, encode, open_regular, raw_lines

GENESIS = "0" * 64
"""``prev`` of a log's first line."""


class Head(NamedTuple):
    """The last line of a chain: its SHA-256, its number, and the size of the log with it."""

    digest: str
    lines: int
    size: int

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Head | None:
        """The head that a session's metadata recorded, if it did."""
        digest, lines, size = (metadata.get(name) for name in ("log_head", "log_lines", "log_bytes"))
        if isinstance(digest, str) and isinstance(lines, int) and isinstance(size, int) and lines > 0:
            return cls(digest, lines, size)
        return None

    def as_metadata(self) -> dict[str, Any]:
        return {"log_head": self.digest, "log_lines": self.lines, "log_bytes": self.size}


def _link(data: bytes | None) -> tuple[dict[str, Any] | None, bool]:
    """A line's entry (None when it is not readable) and whether it belongs to a chain."""
    try:
        entry = decode(data or b"")
    except ValueError:
        return None, False
    return entry, isinstance(entry.get("prev"), str) and type(entry.get("seq")) is int


class ChainedLog:
    """The writing end. Opening continues the chain that is there and says in the log what it found wrong:
    ``log_repaired`` after a torn line, ``log_broken`` when the recorded head is not in it, ``log_chain_started`` after
    lines without a chain (with the SHA-256 of all of them).
    """

    def __init__(self, path: Path, recorded: Head | None, *, fsync: bool) -> None:
        self.path = path
        self._fsync = fsync
        self._file = AppendFile(path)
        self.head = Head(GENESIS, 0, 0)
        try:
            self._join(recorded)
        except BaseException:
            self._file.close()
            raise

    def append(self, event: str, fields: dict[str, Any]) -> None:
        """Write one line. Raises RecordFull or RecordError; the file is then as it was."""
        if self._file.disturbed():
            self._rejoin()
        self._write(event, fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        when = fields.pop("timestamp", None) or timestamp()
        line = encode(
            {"timestamp": when, "event": event, **fields, "seq": self.head.lines + 1, "prev": self.head.digest}
        )
        self._file.append(line + b"\n")
        self.head = Head(hashlib.sha256(line).hexdigest(), self.head.lines + 1, self._file.size)
        if self._fsync:
            self._file.sync()
        else:
            disk_sync.soon(self._file)

    def _rejoin(self) -> None:
        """Somebody else changed or removed the file: go on with what stands there now."""
        self._file.close()
        self._file = AppendFile(self.path)
        self._join(self.head if self.head.lines else None)

    def _join(self, recorded: Head | None) -> None:
        found = recorded is not None and self._ends_at(recorded)
        at = recorded if recorded is not None and found else Head(GENESIS, 0, 0)
        last, previous, linked = None, at.digest, None
        with open_regular(self.path) as file:
            file.seek(at.size)
            for line in raw_lines(file, number=at.lines, digests=True):
                last, previous, at = line, at.digest, Head(line.digest, line.number, line.offset + line.size + 1)
                if b'"prev": "' in (line.data or b""):
                    linked = line
        self.head = at
        if last is not None:
            self._close_torn(last, previous)
        if recorded is not None and not found:
            reason = f"the log does not hold the {recorded.lines} lines that the metadata recorded"
            fields = {"reason": reason, "expected_lines": recorded.lines, "expected_head": recorded.digest}
            self._write("log_broken", fields)
        elif last is not None and not found and (linked is None or not _link(linked.data)[1]):
            with open_regular(self.path) as file:
                digest = _digest_of_first(file.fileno(), self.head.size)
            self._write("log_chain_started", {"lines": self.head.lines, "bytes": self.head.size, "sha256": digest})

    def _close_torn(self, last: RawLine, previous: str) -> None:
        """End a last line that has no newline; when it is not readable either, keep it and say so in a line after it."""
        if not last.ended:
            self._file.append(b"\n")
        if _link(last.data)[0] is None:
            fields = {"line": last.number, "size_bytes": last.size, "before": previous}
            self._write("log_repaired", fields | {"reason": "the line was torn by a crash; it was left as it is"})

    def _ends_at(self, head: Head) -> bool:
        """Whether the line of ``head`` ends where it should."""
        if not 0 < head.size <= self._file.size:
            return False
        with open_regular(self.path) as file:
            length, start = 4096, head.size
            while start > 0:
                start = max(0, head.size - length)
                file.seek(start)
                block = file.read(head.size - start)
                cut = block.rfind(b"\n", 0, len(block) - 1)
                if cut >= 0 or start == 0:
                    line = block[cut + 1 :]
                    return line.endswith(b"\n") and hashlib.sha256(line[:-1]).hexdigest() == head.digest
                length *= 8
        return False

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def _digest_of_first(descriptor: int, size: int) -> str:
    """SHA-256 (hex) of a file's first ``size`` bytes."""
    sha, offset = hashlib.sha256(), 0
    while offset < size and (block := os.pread(descriptor, min(2**20, size - offset), offset)):
        sha.update(block)
        offset += len(block)
    return sha.hexdigest()
