"""What a running cell has said and its caller has not read yet: in order, complete, bounded in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Self

from pydantic import TypeAdapter

from sandbox_kernel.bounded import MAX_SPOOL, size_of
from sandbox_kernel.events import CellEvent, Stderr, Stdout, StreamEvent, gap

EVENT_SIZE = 1_000
"""About the bytes that an event takes beside its text."""
CHUNK = 2**16
_EVENTS: TypeAdapter[CellEvent] = TypeAdapter(StreamEvent)


class Backlog:
    """The events of one cell, put in as they come and read by somebody who may be slower; a context manager.

    About ``limit`` bytes wait in memory, what comes after them in a file without a name in ``directory``, up to
    :data:`~sandbox_kernel.bounded.MAX_SPOOL`. What finds no room there either is left out; in its place a text says
    how much that was.
    """

    def __init__(self, limit: int, directory: Path) -> None:
        self._limit, self._directory = limit, directory
        self._waiting: deque[tuple[CellEvent, int]] = deque()
        self._size = 0
        self._file: BinaryIO | None = None
        """JSON lines that follow on ``_waiting``."""
        self._read = self._written = 0
        self._left_out = 0
        self._msg_id = ""
        self._ended = False
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nobody reads any more."""
        self.end()
        self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
            self._read = self._written = 0

    # -- put in: never waits for the reader --------------------------------------------------

    def put(self, event: CellEvent) -> None:
        if self._ended:
            return
        said = size_of(event.text) if isinstance(event, (Stdout, Stderr)) else len(_line(event))
        room = not self._waiting or self._size + said + EVENT_SIZE <= self._limit
        if room and self._read == self._written and not self._left_out:
            self._keep(event, said + EVENT_SIZE)
        elif self._left_out or not self._spill(_line(event)):
            self._left_out += said
            self._msg_id = event.msg_id
        self._news.set()

    def end(self) -> None:
        """That was all."""
        self._ended = True
        self._news.set()

    def _keep(self, event: CellEvent, size: int) -> None:
        self._waiting.append((event, size))
        self._size += size

    def _spill(self, line: bytes) -> bool:
        """Write it behind the others; False when there is no room."""
        if self._written + len(line) > MAX_SPOOL:
            return False
        try:
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - see __exit__
            if os.pwrite(self._file.fileno(), line, self._written) < len(line):
                return False  # the disk took a part of it, which the next one overwrites
        except OSError:
            return False
        self._written += len(line)
        return True

    # -- read --------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[CellEvent]:
        """The events in order, until :meth:`end`."""
        while True:
            while (event := self._next()) is not None:
                yield event
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def _next(self) -> CellEvent | None:
        if not self._waiting and self._read < self._written:
            self._fetch()
        if self._waiting:
            event, size = self._waiting.popleft()
            self._size -= size
            return event
        if self._left_out:
            text, self._left_out = gap(self._left_out), 0
            return Stdout(msg_id=self._msg_id, text=text)
        return None

    def _fetch(self) -> None:
        """The next events out of the file into memory."""
        assert self._file is not None
        size, lines = CHUNK, b""
        while not lines:
            data = os.pread(self._file.fileno(), min(size, self._written - self._read), self._read)
            lines = data[: data.rfind(b"\n") + 1]
            size *= 2
        self._read += len(lines)
        for line in lines.splitlines():
            self._keep(_EVENTS.validate_json(line), len(line) + EVENT_SIZE)
        if self._read == self._written:
            self._read = self._written = 0
            with contextlib.suppress(OSError):
                self._file.truncate(0)


def _line(event: CellEvent) -> bytes:
    if isinstance(event, (Stdout, Stderr)):
        return event.model_dump_json().encode() + b"\n"
    return json.dumps(event.model_dump(), default=str).encode() + b"\n"  # as Jupyter has it: Infinity and all
