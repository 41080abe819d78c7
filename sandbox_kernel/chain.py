"""The writing end of ``session.log``: every line chained to the one before it. See :mod:`sandbox_kernel.audit`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sandbox_kernel.audit import GENESIS, Head, Link, digest_of_first
from sandbox_kernel.events import timestamp
from sandbox_kernel.journal import AppendFile, disk_sync
from sandbox_kernel.jsonline import encode
from sandbox_kernel.logfile import RawLine, open_regular, raw_lines


class ChainedLog:
    """Opening it continues the chain that is there and says in the log what it found: ``log_repaired`` after a torn
    line, ``log_broken`` when the recorded head is not in it, ``log_chain_started`` after lines without a chain (with
    the SHA-256 of all of them). Costs what stands after the recorded head; without one, what the whole log holds.
    """

    def __init__(self, path: Path, recorded: Head | None, *, fsync: bool) -> None:
        self.path = path
        self._fsync = fsync
        self._file = AppendFile(path)
        self.head = Head(GENESIS, 0, 0)
        self.cells_after_head = 0
        """``code_execution`` lines that the recorded head did not know of."""
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
        if recorded is not None and recorded.size == self._file.size + 1:
            self._file.append(b"\n")  # only the newline was lost
        found = recorded is not None and self._ends_at(recorded)
        at = recorded if recorded is not None and found else Head(GENESIS, 0, 0)
        last: RawLine | None = None
        linked: RawLine | None = None
        previous = at.digest
        with open_regular(self.path) as file:
            file.seek(at.size)
            for line in raw_lines(file, number=at.lines, digests=True):
                last, previous, at = line, at.digest, Head(line.digest, line.number, line.offset + line.size + 1)
                if b'"prev": "' in (line.data or b""):
                    linked = line
                if found and Link.of(line).is_cell:
                    self.cells_after_head += 1
        self.head = at
        if last is not None and not last.ended:
            self._file.append(b"\n")
        if last is not None and not found and (linked is None or Link.of(linked).prev is None):
            with open_regular(self.path) as file:
                digest = digest_of_first(file.fileno(), self.head.size)
            self._write("log_chain_started", {"lines": self.head.lines, "bytes": self.head.size, "sha256": digest})
        if last is not None and Link.of(last).entry is None:
            reason = "the line was torn by a crash; it was left as it is"
            fields = {"line": last.number, "size_bytes": last.size, "before": previous, "reason": reason}
            self._write("log_repaired", fields)
        if recorded is not None and not found:
            reason = f"the log does not hold the {recorded.lines} lines that the metadata recorded"
            fields = {"reason": reason, "expected_lines": recorded.lines, "expected_head": recorded.digest}
            self._write("log_broken", fields)

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
