"""Whose a file is: the cells of one session in their order, each with the time from which on files may be its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

NEXT_CELL_S = 0.25
"""How late the host may learn that the next cell has started."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A cell, as far as files are concerned."""

    msg_id: str | None = None
    execution_count: int | None = None
    started: float = 0.0
    """Unix time at which the host heard of it."""
    number: int = 0
    """Its place among the cells: the clock may be set back. 0: nobody heard that it began."""


class Turns:
    """Which cell runs, and which have ended and are not swept yet. Written on the event loop, read by any thread."""

    def __init__(self) -> None:
        self.last = Turn()
        self.running = False
        """Whether the last one still runs."""
        self._begun: dict[str, Turn] = {}
        self.ended: tuple[Turn, ...] = ()
        """They wait for their sweep, or it took so long that it was broken off."""
        self.left: tuple[Turn, ...] = ()
        """Those of the latter sort: nobody waits for them."""

    def begin(self, msg_id: str, execution_count: int | None) -> bool:
        """False: it was known to run; its count has become known."""
        same = msg_id == self.last.msg_id and self.running
        if same:
            self.last = replace(self.last, execution_count=execution_count)
        else:
            self.last = Turn(msg_id, execution_count, time.time(), self.last.number + 1)
        self._begun[msg_id] = self.last
        self.running = True
        return not same

    def wait(self, msg_id: str) -> None:
        """The cell has ended, and its sweep is still to come: what it wrote is left to that."""
        if msg_id in self._begun:
            self.ended += (self.end(msg_id),)

    def end(self, msg_id: str) -> Turn:
        """The cell has ended."""
        turn = self._begun.pop(msg_id, None)
        if turn is None:
            return next((other for other in self.ended if other.msg_id == msg_id), None) or Turn(msg_id)
        if turn is self.last:
            self.running = False
        return turn

    @contextmanager
    def swept(self, turn: Turn) -> Iterator[list[bool]]:
        """From the wait for its sweep on until that is over; a False put into the list: it was broken off."""
        whole: list[bool] = []
        if turn not in self.ended:
            self.ended += (turn,)
        try:
            yield whole
        finally:
            self.left = tuple(other for other in self.left if other is not turn)
            if all(whole):
                self.ended = tuple(other for other in self.ended if other is not turn)
            else:
                self.left += (turn,)

    def following(self, turn: Turn) -> Turn | None:
        """The cell that came after it, where it runs or is not swept yet; it may begin while a sweep is under way."""
        after = (other for other in (*self.ended, self.last) if other.number > turn.number)
        return min(after, key=lambda other: other.number, default=None)

    def of_an_earlier(self, turn: Turn, changed: float) -> bool:
        """Whether a file of this ctime was there before the cell, and an earlier one's sweep is still to take it."""
        early = changed < turn.started - NEXT_CELL_S
        return early and any(other.number < turn.number for other in self.ended)

    def share(self, turn: Turn, changed: float) -> bool | None:
        """Whether a file of this ctime can only be of the ended cell ``turn``; None: it is another's.

        False: the following cell may have written it, too.
        """
        if self.of_an_earlier(turn, changed):
            return None
        following = self.following(turn)
        if following is None or changed < following.started - NEXT_CELL_S:
            return True
        return False if changed < following.started else None
