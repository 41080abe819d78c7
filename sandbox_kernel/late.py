"""Output that comes after its cell has ended, mostly of threads: gathered, bounded, one line per cell and stream."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

QUIET_S = 0.3
"""Late output is gathered for so long, then logged; or with the next line of the log."""
LIMIT = 64_000
"""Characters in one such batch: a thread that prints without end must not fill the disk."""
KEYS = 64
"""Cells and streams told apart in one batch."""


class Append(Protocol):
    """Writes a line of the log."""

    def __call__(self, event: str, /, **fields: Any) -> None: ...


class Masked(Protocol):
    """Masks a text; ``cut``: its end is missing."""

    def __call__(self, text: str, *, cut: bool = False) -> str: ...


class LateOutput:
    """The late output of one session."""

    def __init__(self, append: Append, masked: Masked) -> None:
        self._append, self._masked = append, masked
        self._texts: dict[tuple[str | None, int | None, str], list[str]] = {}
        self._size = 0
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, msg_id: str | None, execution_count: int | None, name: str, text: str) -> None:
        """Take what the cell ``msg_id`` (None: not known) has said on ``name``."""
        key = (msg_id, execution_count, name)
        if self._size < LIMIT and (key in self._texts or len(self._texts) < KEYS):
            self._texts.setdefault(key, []).append(text[:LIMIT])
            self._size += len(text)
            self._dropped += len(text[LIMIT:])
        else:
            self._dropped += len(text)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(QUIET_S, self.flush)

    def flush(self) -> None:
        """Log what there is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        texts, self._texts, self._size = self._texts, {}, 0
        dropped, self._dropped = self._dropped, 0
        more = {"characters_left_out": dropped} if dropped else {}
        for (msg_id, execution_count, name), parts in texts.items():
            self._append(
                "output_after_cell",
                msg_id=msg_id,
                execution_count=execution_count,
                name=name,
                text=self._masked("".join(parts), cut=dropped > 0),
                **more,
            )
