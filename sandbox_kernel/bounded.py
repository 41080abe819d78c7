"""What is kept of text without end: its head and tail in memory, and the whole in a file without a name."""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from sandbox_kernel.events import gap

MAX_SPOOL = 2 * 2**30
"""Bytes kept of the whole of one output: printing without end must not fill the disk."""


def clean(text: Any) -> str:
    """``text`` as valid Unicode: lone surrogates, which no UTF-8 file can hold, become ``\\udXXX``."""
    if not isinstance(text, str):
        text = "".join(text) if isinstance(text, list) and all(isinstance(part, str) for part in text) else str(text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return str(text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return str(text)


def size_of(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


class BoundedText:
    """Text that keeps its first and last ``limit // 2`` bytes."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head: list[str] = []
        self._head_size = 0
        self._tail: deque[tuple[str, int]] = deque()
        self._tail_size = 0
        self._gone = 0

    @property
    def size(self) -> int:
        """Bytes of the whole text, left out ones included."""
        return self._head_size + self._tail_size + self._gone

    def add(self, text: str) -> None:
        size = size_of(text)
        if not self._tail and self._head_size + size <= self._half:
            self._head.append(text)
            self._head_size += size
            return
        if not self._tail and self._head_size < self._half:
            data = text.encode("utf-8")
            first = data[: self._half - self._head_size].decode("utf-8", "ignore")
            self._head.append(first)
            self._head_size += size_of(first)
            text = text[len(first) :]
            size -= size_of(first)
        if size > self._half:
            kept = end_of(text, self._half)
            self._gone += self._tail_size + size - size_of(kept)
            self._tail.clear()
            self._tail_size = 0
            text, size = kept, size_of(kept)
        self._tail.append((text, size))
        self._tail_size += size
        # What the others fill without it goes; the first one that stays is cut when it is read.
        while len(self._tail) > 1 and self._tail_size - self._tail[0][1] >= self._half:
            _, gone = self._tail.popleft()
            self._tail_size -= gone
            self._gone += gone
        if len(self._tail) > 4096:  # many tiny prints: join them, so that memory is bounded by bytes and not by pieces
            joined = "".join(piece for piece, _ in self._tail)
            self._tail = deque([(joined, self._tail_size)])

    def text(self) -> str:
        head, tail = "".join(self._head), "".join(piece for piece, _ in self._tail)
        tail = end_of(tail, self._half)
        left_out = self.size - self._head_size - size_of(tail)
        return head + gap(left_out) + tail if left_out else head + tail


def end_of(text: str, limit: int) -> str:
    """The last ``limit`` bytes of ``text``, or all of it."""
    data = text.encode("utf-8")
    return text if len(data) <= limit else data[len(data) - limit :].decode("utf-8", "ignore")


class Spool:
    """The whole of one output in a temporary file without a name: nothing is left behind if we die.

    What the disk does not take costs the whole, and nothing else: :attr:`error` says so.
    """

    def __init__(self, directory: Path, filename: str, content_type: str) -> None:
        self.filename = filename
        self.content_type = content_type
        self.size = 0
        self.error: OSError | None = None
        self._file: BinaryIO | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed after it was stored
        except OSError as exc:
            self.error = exc

    def write(self, data: bytes) -> None:
        """Keep ``data``, up to ``MAX_SPOOL`` altogether."""
        if self._file is None:
            return
        data = data[: MAX_SPOOL - self.size]
        try:
            self._file.write(data)
            self.size += len(data)
        except OSError as exc:
            self._give_up(exc)

    def whole(self) -> BinaryIO | None:
        """The file from its beginning, to be closed by the caller; None when it could not be kept."""
        if self._file is not None:
            try:
                self._file.seek(0)  # writes what is still buffered
            except OSError as exc:
                self._give_up(exc)
        file, self._file = self._file, None
        return file

    def _give_up(self, exc: OSError) -> None:
        self.error = exc
        if self._file is not None:
            with contextlib.suppress(OSError):  # the buffer is tried once more
                self._file.close()
            self._file = None
