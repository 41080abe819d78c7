"""What a running cell has closed: files that are taken early, once they have been left alone for long enough."""

from __future__ import annotations

import heapq
import threading
import time

from sandbox_kernel.artifacts.sweep import SweepBooks
from sandbox_kernel.untrusted import printable

QUIET_S = 0.5
"""A file is taken while its cell runs when it was not closed again for so long; twice as long per further version."""
QUIET_MANY_S = 2.0
"""The same for a file that is one of very many: taking them at the cell's end costs less, if that comes soon."""
_MANY = 200
_MAX = 10_000
_AT_ONCE = 1000


class DirtyFiles:
    """Paths and when they were closed. For any thread; nothing here takes longer the more there are."""

    def __init__(self, books: SweepBooks) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._closed: dict[bytes, float] = {}
        self._due: list[tuple[float, bytes]] = []
        """A heap with one entry for each path; when it is reached, a path that was closed again is put back."""

    def __len__(self) -> int:
        return len(self._closed)

    def add(self, path: bytes) -> bool:
        """It was closed now; False: there are too many."""
        with self._lock:
            if path not in self._closed:
                if len(self._closed) >= _MAX:
                    return False
                heapq.heappush(self._due, (time.monotonic() + self._quiet(path), path))
            self._closed[path] = time.monotonic()
            return True

    def next_due(self) -> float | None:
        """When the first of them may be due (monotonic)."""
        with self._lock:
            return self._due[0][0] if self._due else None

    def due(self) -> list[bytes]:
        """Those that have been left alone for long enough, a thousand at a time; they are forgotten."""
        now = time.monotonic()
        paths: list[bytes] = []
        with self._lock:
            while self._due and self._due[0][0] <= now and len(paths) < _AT_ONCE:
                _, path = heapq.heappop(self._due)
                when = self._closed[path] + self._quiet(path)
                if when > now:
                    heapq.heappush(self._due, (when, path))
                else:
                    del self._closed[path]
                    paths.append(path)
        return paths

    def forget(self, before: float) -> None:
        """Those that were closed before that time: a sweep has seen to them."""
        if not self._closed:
            return  # as after most cells
        with self._lock:
            self._closed = {path: closed for path, closed in self._closed.items() if closed >= before}
            self._due = [(closed + self._quiet(path), path) for path, closed in self._closed.items()]
            heapq.heapify(self._due)

    def _quiet(self, path: bytes) -> float:
        return self._books.quiet(printable(path), QUIET_S if len(self._closed) < _MANY else QUIET_MANY_S)
