"""What an agent has listed of a container's ``artifacts/``, and what became of each file while it stays the same."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

from sandbox_kernel.artifacts.agent import Listing, RemoteFileInfo
from sandbox_kernel.artifacts.feeding import Cell
from sandbox_kernel.artifacts.sweep import SweepBooks, Waiting
from sandbox_kernel.untrusted import MAX_REFUSALS, Refusal

QUIET_S = 1.0
"""While its cell runs a file is taken once it was closed and unchanged for QUIET_S, and for twice as long per further
version: not each line of a log is one."""
TICK_NS = 10_000_000
"""A new file's time is that of the Linux kernel's last tick: it may seem so much older than it is."""


@dataclass(slots=True)
class Known:
    """What became of a file."""

    identity: tuple[int, int, int]
    since: float
    stored: bool = False
    refused: str | None = None
    left_by: Cell | None = None
    """An ended cell, whose sweep was broken off before it came to it."""

    @property
    def settled(self) -> bool:
        return self.stored or self.refused is not None


class Listed:
    """The newest listing, with the books on its files."""

    def __init__(self) -> None:
        self._listing = Listing([], [], True)
        self._known: dict[str, Known] = {}
        # Files older than this object, at the first look: a host that died may have stored and not removed them.
        self._inherited: dict[str, tuple[int, int, int]] | None = None
        self._began_ns = time.time_ns() - TICK_NS

    def note(self, listing: Listing) -> None:
        """There is a new one: what is gone or has another content now is unknown again."""
        self._listing = listing
        if self._inherited is None:
            old = (file for file in listing.files if file.mtime_ns < self._began_ns)
            self._inherited = {file.path: file.identity for file in old}
        now = {file.path: file.identity for file in listing.files}
        self._known = {path: known for path, known in self._known.items() if now.get(path) == known.identity}

    @property
    def files(self) -> list[RemoteFileInfo]:
        return self._listing.files

    def known(self, file: RemoteFileInfo) -> Known:
        """What became of it so far."""
        found = self._known.get(file.path)
        if found is None:
            found = self._known[file.path] = Known(file.identity, time.monotonic())
        return found

    def is_inherited(self, file: RemoteFileInfo) -> bool:
        """Whether a host that died may have stored it."""
        return self._inherited is not None and self._inherited.get(file.path) == file.identity

    def is_due(self, file: RemoteFileInfo, books: SweepBooks, *, ended: bool, force: bool) -> bool:
        """Whether it may be taken now: nobody writes it, and its cell has ended or left it alone for long enough."""
        known = self.known(file)
        if known.stored or ((known.refused or file.open) and not force):
            return False
        return ended or time.monotonic() - known.since >= books.quiet(file.path, QUIET_S)

    def leave(self, cell: Cell, since: float, before: float) -> int:
        """A sweep was broken off: what it did not reach, and was written between these times (Unix ns), stays
        ``cell``'s. How much that is."""
        written = [self.known(file) for file in self.files if since <= file.mtime_ns < before]
        left = [known for known in written if not known.settled]
        for known in left:
            known.left_by = known.left_by or cell
        return len(left)

    @property
    def unsettled(self) -> bool:
        """Something was neither taken nor refused: it is open, or changed while it was read."""
        return any((known := self._known.get(file.path)) is None or not known.settled for file in self.files)

    def stored(self) -> list[RemoteFileInfo]:
        """Those that can be removed."""
        return [file for file in self.files if (known := self._known.get(file.path)) and known.stored]

    def removed(self, paths: set[str]) -> None:
        self.files[:] = [file for file in self.files if file.path not in paths]
        for path in paths:
            self._known.pop(path, None)

    def refusals(self) -> list[Refusal]:
        """What is refused of the listed, and what is no regular file; one by one up to a bound: others wait for it."""
        special = [Refusal(path, reason) for path, reason in self._listing.refused]
        refused = ((path, known.refused) for path, known in self._known.items() if known.refused)
        told = [Refusal(path, reason) for path, reason in islice(refused, MAX_REFUSALS)]
        more = sum(1 for _ in refused)
        return special + told + ([Refusal(".", f"{more} more that are not taken")] if more else [])

    def waiting(self) -> list[Waiting]:
        special = [Waiting(path, 0, reason) for path, reason in self._listing.refused]
        known = ((file, self._known.get(file.path)) for file in self.files)
        return special + [Waiting(file.path, file.size, known.refused if known else None) for file, known in known]
