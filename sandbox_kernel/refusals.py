"""Files that the store does not take: they stay where they are, and the log says why, at a bounded rate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sandbox_kernel.late import Append

AT_ONCE, PER_SECOND = 200, 20
"""Lines that are written as they come, then so many a second; the rest is counted."""
COUNT_AFTER_S = 1.0


class Refusals:
    """Those of one session."""

    def __init__(self, append: Append) -> None:
        self._append = append
        self._credit, self._refilled = float(AT_ONCE), 0.0
        self._untold = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, refusals: Sequence[Any]) -> None:
        """Take what was refused just now: each has a ``path`` and a ``reason``."""
        now = asyncio.get_running_loop().time()
        self._credit = min(AT_ONCE, self._credit + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        told = min(len(refusals), int(self._credit))
        self._credit -= told
        for refusal in refusals[:told]:
            self._append("artifact_refused", path=refusal.path, reason=refusal.reason)
        self._untold += len(refusals) - told
        if self._untold and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COUNT_AFTER_S, self.flush)

    def flush(self) -> None:
        """Log how many had no line of their own."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        untold, self._untold = self._untold, 0
        if untold:
            self._append("artifact_refused", path="...", reason=f"and {untold} more")
