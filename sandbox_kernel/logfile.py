"""Reading ``session.log``: JSON lines, written by us or by another program, whole or torn.

Lenient by design: a line that cannot be read becomes a :class:`Problem` and reading goes on. Unknown events and
fields are kept as they stand; timestamps are left as text, with or without an offset, in whatever order they come.
Memory is bounded by the longest line that is kept (``MAX_LINE``), and reading the last N entries costs what those
N entries are long, however long the file is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sandbox_kernel.errors import RecordError
from sandbox_kernel.jsonline import decode

MAX_LINE = 64 * 2**20
"""Longest line that is parsed, in bytes; longer ones are reported and skipped."""

_BLOCK = 64 * 2**10
_GARBAGE = 16 * 2**20
"""Bytes of unreadable lines after which looking for the last N entries is given up."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a session folder that could not be read as it should; ``where`` names file and place."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(slots=True)
class Log:
    """What :func:`read_log` found, oldest entry first."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    end: int = 0
    """Byte at which :func:`follow` goes on: after the last line that has a newline. Only set with a ``limit``."""


@dataclass(slots=True)
class RawLine:
    """One line as it stands in the file. ``data`` is None when the line is longer than ``MAX_LINE``."""

    number: int
    """From 1."""
    offset: int
    size: int
    """Bytes without the newline."""
    data: bytes | None
    ended: bool
    """False for a last line without newline."""
    digest: str = ""
    """SHA-256 (hex) of the bytes without the newline."""


# --- lines ------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, following no link at its last component and never blocking on a FIFO.

    Raises FileNotFoundError where there is none, RecordError (naming the file) for all but a readable regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        reason = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror
        raise RecordError(f"cannot read {path}: {reason}") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RecordError(f"cannot read {path}: it is not a regular file")
    return os.fdopen(descriptor, "rb")


def raw_lines(file: BinaryIO, *, number: int = 0, digests: bool = False) -> Iterator[RawLine]:
    """The lines from the file's position on; ``number`` is how many came before. A blank line is a line."""
    offset = file.tell()
    while piece := file.readline(_BLOCK * 16):
        number += 1
        size, pieces, sha = len(piece), [piece], None
        while not piece.endswith(b"\n"):
            piece = file.readline(_BLOCK * 16)
            if not piece:
                break
            size += len(piece)
            if size <= MAX_LINE:
                pieces.append(piece)
            elif digests and sha is None:
                sha = hashlib.sha256(b"".join(pieces))
            if sha is not None:
                sha.update(piece.removesuffix(b"\n"))
        ended = piece.endswith(b"\n")
        whole = None if size > MAX_LINE else b"".join(pieces).removesuffix(b"\n")
        digest = ""
        if digests:
            digest = hashlib.sha256(whole).hexdigest() if whole is not None else sha.hexdigest() if sha else ""
        yield RawLine(number, offset, size - ended, whole, ended, digest)
        offset += size


def _backwards(file: BinaryIO, end: int) -> Iterator[tuple[int, int, bytes | None, bool]]:
    """``(offset, size, data, ended)`` of the lines before ``end``, last first, read in blocks from the end.

    Ends at a line longer than ``MAX_LINE``: where that one begins is not looked for.
    """
    parts: deque[bytes] = deque()
    size, position, ended = 0, end, False
    first = True
    while position > 0:
        start = max(0, position - _BLOCK)
        file.seek(start)
        block = file.read(position - start)
        stop = len(block)
        if first:
            first = False
            if block.endswith(b"\n"):
                ended, stop = True, stop - 1
        while (cut := block.rfind(b"\n", 0, stop)) >= 0:
            parts.appendleft(block[cut + 1 : stop])
            size += stop - cut - 1
            yield start + cut + 1, size, b"".join(parts), ended
            parts.clear()
            size, stop, ended = 0, cut, True
        size += stop
        if size > MAX_LINE:
            yield start, size, None, ended
            return
        parts.appendleft(block[:stop])
        position = start
    if end > 0:
        yield 0, size, b"".join(parts), ended


def _entry(name: str, where: str, size: int, data: bytes | None, ended: bool) -> dict[str, Any] | Problem | None:
    """A line's entry, or what is wrong with it; None for a blank line."""
    if data is None:
        return Problem(f"{name}, {where}", f"a line of {size} bytes or more is skipped (longest: {MAX_LINE})")
    if not data.strip():
        return None
    try:
        return decode(data)
    except ValueError as exc:
        reason = "the last line is torn" if not ended else f"not readable: {exc}"
        return Problem(f"{name}, {where}", f"{reason}; it begins with {data[:60]!r}")


def iter_log(path: Path) -> Iterator[dict[str, Any] | Problem]:
    """The entries of a log from its beginning, and what is wrong with lines that are none. Memory: one line.

    Raises RecordError when the file is not a regular file or cannot be read; a file that is not there has no entries.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for line in raw_lines(file):
            found = _entry(path.name, f"line {line.number}", line.size, line.data, line.ended)
            if found is not None:
                yield found


def iter_log_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log from its last one on, read from the end; what is unreadable is left out.

    Raises as :func:`iter_log`. Ends at a line longer than ``MAX_LINE``.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for _, _, data, _ in _backwards(file, os.fstat(file.fileno()).st_size):
            try:
                yield decode(data or b"")
            except ValueError:
                continue


def _tail(path: Path, limit: int) -> Log:
    log = Log()
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return log
    garbage = 0
    with file:
        log.end = os.fstat(file.fileno()).st_size
        for offset, size, data, ended in _backwards(file, log.end):
            if not ended:
                log.end = offset
            found = _entry(path.name, f"byte {offset}", size, data, ended) if limit else None
            if isinstance(found, dict):
                log.entries.append(found)
            if len(log.entries) >= limit:
                break
            if isinstance(found, dict):
                continue
            if found is not None:
                log.problems.append(found)
            garbage += size + 1
            if garbage > _GARBAGE:
                message = f"{garbage} unreadable bytes; nothing before them is read"
                log.problems.append(Problem(f"{path.name}, byte {offset}", message))
                break
    log.entries.reverse()
    log.problems.reverse()
    return log


def read_log(path: Path, *, limit: int | None = None) -> Log:
    """The log's entries, or its last ``limit`` ones (read from the end of the file), oldest first.

    Raises RecordError when the file is not a regular file or cannot be read; a file that is not there has no entries.
    """
    if limit is not None:
        return _tail(Path(path), limit)
    log = Log()
    for found in iter_log(Path(path)):
        if isinstance(found, Problem):
            log.problems.append(found)
        else:
            log.entries.append(found)
    return log


def follow(
    path: Path, *, start: int | None = None, stop: threading.Event | None = None, interval_s: float = 0.1
) -> Iterator[dict[str, Any] | Problem]:
    """Entries as they are appended, from byte ``start`` (default: the file's present end), until ``stop`` is set.

    A last line without newline is waited for, not reported. A file that shrinks or is replaced is said and then read
    from its beginning. Polls the size: that works on every file system, also where inotify is silent.
    """
    path, stop = Path(path), stop or threading.Event()
    number, inode, position = 0, -1, start
    while True:
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                if position is None:
                    position = status.st_size
                if status.st_size < position or (inode not in (-1, status.st_ino)):
                    position = 0
                    yield Problem(path.name, "the file was replaced or cut; reading it from its beginning")
                inode = status.st_ino
                file.seek(position)
                for line in raw_lines(file, number=number):
                    if not line.ended:
                        break
                    position = line.offset + line.size + 1
                    found = _entry(path.name, f"byte {line.offset}", line.size, line.data, True)
                    if found is not None:
                        yield found
        except FileNotFoundError:
            position = 0
        if stop.wait(interval_s):
            return
