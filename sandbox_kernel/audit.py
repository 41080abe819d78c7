"""Checking the chain of ``session.log``: each line carries its number (``seq``) and the SHA-256 of the line before
it (``prev``); the head (``log_head``, ``log_lines``, ``log_bytes``) is kept in ``session_metadata.json``.

After a crash the head may lag behind the log by some lines; it never runs ahead of it. There is no key: somebody who
can write both files can forge both. What is found is every change made to the log alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sandbox_kernel.errors import RecordError
from sandbox_kernel.jsonline import decode
from sandbox_kernel.logfile import RawLine, open_regular, raw_lines
from sandbox_kernel.snapshot import read_metadata

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
        if isinstance(digest, str) and type(lines) is int and type(size) is int and lines > 0:
            return cls(digest, lines, size)
        return None

    def as_metadata(self) -> dict[str, Any]:
        return {"log_head": self.digest, "log_lines": self.lines, "log_bytes": self.size}


class Link(NamedTuple):
    """What a line says of the chain; ``entry`` is None when it is not readable, ``prev`` when it carries no hash."""

    entry: dict[str, Any] | None
    prev: str | None
    seq: int

    @property
    def is_cell(self) -> bool:
        return self.entry is not None and self.entry.get("event") == "code_execution"

    @classmethod
    def of(cls, line: RawLine) -> Link:
        try:
            entry = decode(line.data or b"")
        except ValueError:
            return cls(None, None, 0)
        prev, seq = entry.get("prev"), entry.get("seq")
        return cls(entry, prev, seq) if isinstance(prev, str) and type(seq) is int else cls(entry, None, 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`verify` found. ``intact`` is None for a log without a chain."""

    intact: bool | None
    lines: int
    first_bad_line: int | None
    """From 1; one more than ``lines`` when the end was cut off."""
    reason: str
    """One sentence for a person."""
    after_head: int = 0
    """Lines after the recorded head: a crash, or a session that is running."""


class _Broken(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def verify(folder: Path) -> Verdict:
    """Check ``folder``'s log against its own chain and the head in the metadata. Reads all of it, a line at a time.

    Raises RecordError when the log cannot be read.
    """
    # The metadata first: what is appended meanwhile comes after the head, never before it.
    metadata, _ = read_metadata(folder)
    recorded = Head.of(metadata or {})
    walk = _Walk(recorded)
    try:
        with open_regular(folder / "session.log") as file:
            walk.over(raw_lines(file, digests=True), file.fileno())
    except FileNotFoundError:
        if recorded is not None:
            return Verdict(False, 0, 1, f"session.log is gone; the metadata recorded {recorded.lines} lines")
        raise RecordError(f"{folder / 'session.log'}: there is no log to verify") from None
    except _Broken as exc:
        return Verdict(False, walk.number, exc.line, f"line {exc.line}: {exc.reason}")
    return walk.verdict()


class _Walk:
    """One pass over a log. ``digests`` are those of the last two lines."""

    def __init__(self, recorded: Head | None) -> None:
        self.recorded = recorded
        self.number = 0
        self.begun: int | None = None
        self.repaired = 0
        self._digest, self._before = GENESIS, GENESIS
        self._unreadable: RawLine | None = None
        self._suspect: int | None = None
        self._head_found = recorded is None

    def over(self, lines: Iterator[RawLine], descriptor: int) -> None:
        for line in lines:
            self._take(line, Link.of(line), descriptor)
            self._before, self._digest, self.number = self._digest, line.digest, line.number
            if self.recorded is not None and line.number == self.recorded.lines:
                self._head_found = line.digest == self.recorded.digest
            last = line
        if self.number and not last.ended and (self.begun or self.recorded):
            raise _Broken(self.number, "it is torn: no newline ends it")
        if self._unreadable is not None and self.begun:
            raise _Broken(self.number, "it is not readable")
        if self._suspect is not None:
            # Nothing follows that would tell which of the two was changed; the recorded head may.
            self._head_tells(self._suspect)
        if self.recorded is None:
            return
        if self.number < self.recorded.lines:
            raise _Broken(
                self.number + 1, f"it is missing, and all after it: the metadata recorded {self.recorded.lines} lines"
            )
        if not self._head_found:
            raise _Broken(self.recorded.lines, "it was changed: the metadata recorded another hash for it")

    def _take(self, line: RawLine, link: Link, descriptor: int) -> None:
        if self._suspect is not None:
            changed = self._suspect - (link.prev == self._digest)
            raise _Broken(max(1, changed), "it was changed")
        if self._unreadable is not None and self.begun:
            self._excuse(self._unreadable, link)
        self._unreadable = line if link.entry is None else None
        if link.entry is None:
            return
        if link.prev is None:
            if self.begun:
                raise _Broken(line.number, "it carries no hash of the line before it")
            return
        self._check(line, link)
        if self.begun is None:
            self.begun = line.number
            self._check_prefix(link.entry, descriptor)
        if link.entry.get("event") == "log_broken":
            expected = link.entry.get("expected_lines")
            first = min(line.number, expected) if type(expected) is int and expected > 0 else line.number
            raise _Broken(first, f"when the session was opened again, {link.entry.get('reason')}")

    def _check(self, line: RawLine, link: Link) -> None:
        number, follows = line.number, link.prev == self._digest
        if follows and link.seq == number:
            return
        if follows:
            raise _Broken(number, f"its number was changed to {link.seq}")
        if link.seq > number:
            raise _Broken(number, f"it is missing; what stands there was line {link.seq}")
        if link.seq < number:
            inserted = number - 1 if link.prev == self._before and link.seq == number - 1 else number
            raise _Broken(inserted, "it does not belong here; it was put in or moved")
        if number == 1:
            raise _Broken(1, "it was changed, or lines before it were removed")
        # Either the line before was changed, or this one's own hash: the next line knows.
        self._suspect = number

    def _excuse(self, torn: RawLine, link: Link) -> None:
        """An unreadable line is in order when the next one says that a crash left it so."""
        entry = link.entry or {}
        told = entry.get("event") == "log_repaired" and entry.get("line") == torn.number
        if not told or entry.get("before") != self._before:
            raise _Broken(torn.number, "it is not readable")
        self.repaired += 1

    def _check_prefix(self, entry: dict[str, Any], descriptor: int) -> None:
        if entry.get("event") != "log_chain_started" or type(entry.get("bytes")) is not int:
            return
        if digest_of_first(descriptor, entry["bytes"]) != entry.get("sha256"):
            raise _Broken(1, f"it or another of the {entry.get('lines')} lines before the chain was changed")

    def _head_tells(self, suspect: int) -> None:
        last_is_whole = self.recorded is None or self.recorded.lines != suspect or self._head_found
        raise _Broken(suspect - last_is_whole, "it was changed")

    def verdict(self) -> Verdict:
        """The log passed."""
        if self.begun is None:
            if self.recorded is not None:
                return Verdict(False, self.number, 1, "line 1: it carries no hash, but the metadata recorded a chain")
            return Verdict(None, self.number, None, f"no chain: {self.number} lines written without hashes")
        notes = []
        after = self.number - self.recorded.lines if self.recorded is not None else 0
        if self.recorded is None:
            notes.append("the metadata recorded no head, so a cut end would not show")
        if after:
            notes.append(f"{after} lines after the recorded head")
        if self.repaired:
            notes.append(f"{self.repaired} torn by a crash and marked so")
        if self.begun > 1:
            notes.append(f"the chain begins at line {self.begun}")
        return Verdict(True, self.number, None, "; ".join([f"intact: {self.number} lines", *notes]), after)


def digest_of_first(descriptor: int, size: int) -> str:
    """SHA-256 (hex) of a file's first ``size`` bytes."""
    sha, offset = hashlib.sha256(), 0
    while offset < size and (block := os.pread(descriptor, min(2**20, size - offset), offset)):
        sha.update(block)
        offset += len(block)
    return sha.hexdigest()
