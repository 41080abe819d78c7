"""The host's memory, guarded against a message that comes in parts without end.

zmq hands over a message when it has all of its parts, counts no bytes, and bounds one part only. So what a connection
holds of an unfinished one cannot be asked for; but while it does, nothing else can come over that connection. When this
process has grown by ``GROWTH``, the connections over which nothing came of late are opened anew, which frees that.
"""

from __future__ import annotations

import asyncio
import resource
import weakref
from pathlib import Path
from typing import ClassVar, Protocol

GROWTH = 2**30
EVERY_S = 0.5
SILENT_S = 1.0
_PAGE = resource.getpagesize()


class Guarded(Protocol):
    """A kernel's connections."""

    def reopen_silent(self, since: float) -> bool:
        """Open anew each connection over which nothing has come after ``since`` (time of the event loop); whether there
        was one."""


def resident() -> int:
    """Bytes of memory that this process holds; 0 where nobody tells."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0


class Guard:
    """One of an event loop; it looks twice a second while there is something to guard."""

    _of_loops: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Guard]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._guarded: weakref.WeakSet[Guarded] = weakref.WeakSet()
        self._timer: asyncio.TimerHandle | None = None
        self._least = 0

    @classmethod
    def of_this_loop(cls) -> Guard:
        """The guard of the loop that runs."""
        loop = asyncio.get_running_loop()
        if loop not in cls._of_loops:
            cls._of_loops[loop] = cls()
        return cls._of_loops[loop]

    def add(self, guarded: Guarded) -> None:
        """Guard these connections, until :meth:`remove` or the object's end."""
        self._guarded.add(guarded)
        if self._timer is None:
            self._least = resident()
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._look)

    def remove(self, guarded: Guarded) -> None:
        """They are closed; twice is once."""
        self._guarded.discard(guarded)
        if not self._guarded and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(EVERY_S, self._look)
        now = resident()
        if now - self._least > GROWTH:
            reopened = [guarded.reopen_silent(loop.time() - SILENT_S) for guarded in list(self._guarded)]
            if any(reopened):
                self._least = now  # what is freed shows from the next look on; whoever grew by himself is asked once
        self._least = min(self._least, now)
