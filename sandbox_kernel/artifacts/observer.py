"""The observer sees what a kernel writes into ``artifacts/`` and has it ingested, while a cell runs and at its end.

inotify only says where to look early; what counts is the sweep when a cell has ended: nothing depends on its latency.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sandbox_kernel.artifacts.intake import never
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.sweep import SWEEP_S, SweepBooks, Waiting, batches
from sandbox_kernel.artifacts.watch import FolderWatch
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import ArtifactError, UntrustedPath
from sandbox_kernel.events import Artifact
from sandbox_kernel.untrusted import (
    FOLDER,
    MAX_REFUSALS,
    Found,
    Refusal,
    file_identity,
    is_text,
    printable,
    refusal_of,
    scan_untrusted,
    stat_untrusted,
)

QUIET_S = 0.5
"""A file is taken while its cell runs when it was not closed again for so long; twice as long per further version."""
QUIET_MANY_S = 2.0
"""The same for a file that is one of very many: taking them at the cell's end costs less, if that comes soon."""
NEXT_CELL_S = 0.25
"""How late the host may learn that the next cell has started."""
_MANY = 200
_MAX_DIRTY = 10_000

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Cell:
    msg_id: str | None = None
    execution_count: int | None = None
    started: float = 0.0
    """Unix time at which the host heard of it."""


class Observer:
    """Ingests one session's ``artifacts/``; an async context manager of one event loop.

    ``on_created`` (rows committed, each artifact exactly once) and ``on_refused`` (once per file and change) are called
    on the event loop; those of a cell before its :meth:`cell_finished` returns.
    """

    def __init__(
        self,
        artifacts: SessionDirectory | Path,
        store: ArtifactStore,
        session_id: str,
        *,
        on_created: Callable[[list[Artifact]], None],
        on_refused: Callable[[list[Refusal]], None],
    ) -> None:
        self.path = artifacts.artifacts if isinstance(artifacts, SessionDirectory) else artifacts
        self.store = store
        self.session_id = session_id
        self._on_created = on_created
        self._on_refused = on_refused
        self._cell = _Cell()
        self._running = False
        self._cells: dict[str, _Cell] = {}
        self._books = SweepBooks()
        self._dirty: dict[bytes, float] = {}
        self._sweeps = 0
        """Sweeps that wait for the lock."""
        self._left: _Cell | None = None
        """Whose sweep took so long that it was broken off."""
        self._looked = 0.0
        self._look = False
        """A whole scan is due: a new folder, or lost events."""
        self._woken = False
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._fd = -1

    async def __aenter__(self) -> Observer:
        """Begins to watch; what lies there already is ingested soon. Raises UntrustedPath, OSError."""
        self._loop = asyncio.get_running_loop()
        try:
            self._fd = os.open(self.path, FOLDER)
        except NotADirectoryError:
            raise UntrustedPath(f"{self.path} is a link or no folder") from None
        self._watch = FolderWatch(self._file_closed, self._folder_made)
        self._watch.add("", self._fd)
        self._task = asyncio.create_task(self._run(), name=f"observer {self.session_id}")
        if not self._empty():
            self._folder_made()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Ends watching; what has not been ingested stays."""
        self._task.cancel()
        await asyncio.wait({self._task})
        async with self._lock:
            self._watch.close()
            os.close(self._fd)
            self._fd = -1

    # -- cells -----------------------------------------------------------------------------

    def cell_started(self, msg_id: str, execution_count: int | None) -> None:
        """From now on files are this cell's. Again with the same ``msg_id``: its count has become known."""
        same = msg_id == self._cell.msg_id and self._running
        self._cell = _Cell(msg_id, execution_count, self._cell.started if same else time.time())
        self._running = True
        self._cells[msg_id] = self._cell
        self._books.cell_started(msg_id, fresh=not same)

    def settled(self, msg_id: str) -> list[Artifact] | None:
        """As :meth:`cell_finished` where nothing lies in ``artifacts/``; else None, and the cell has not ended yet."""
        if self._lock.locked() or self._look or not self._empty():
            return None
        self._end(msg_id)
        self._dirty.clear()
        return self._books.cell_finished(msg_id)

    async def cell_finished(self, msg_id: str) -> list[Artifact]:
        """All artifacts the cell made, complete for the files closed by now; they are gone from ``artifacts/``.

        When the next cell runs already, what it may have touched is left to it. Raises ArtifactError.
        """
        made = self.settled(msg_id)
        if made is None:
            await self._sweep(self._end(msg_id))
            made = self._books.cell_finished(msg_id)
        return made

    def _end(self, msg_id: str) -> _Cell:
        cell = self._cells.pop(msg_id, None) or _Cell(msg_id)
        if cell is self._cell:
            self._running = False
        return cell

    async def drain(self) -> list[Artifact]:
        """The kernel is gone: take everything, also what it left open. Raises ArtifactError."""
        self._running = False
        return await self._sweep(self._cell, force=True)

    async def waiting(self) -> list[Waiting]:
        """What lies in ``artifacts/`` now. Raises ArtifactError."""

        def look() -> list[Waiting]:
            return [
                Waiting(item.path, item.status.st_size, None)
                if isinstance(item, Found)
                else Waiting(item.path, item.size_bytes, item.reason)
                for item in scan_untrusted(self._fd)
            ]

        async with self._lock:
            return await _in_thread(look)

    # -- what watchdog's thread says -------------------------------------------------------

    def _file_closed(self, path: bytes) -> None:
        if len(self._dirty) < _MAX_DIRTY:
            self._dirty[path] = time.monotonic()
            # Only the first one matters to the task: it sleeps until the oldest is due.
            if len(self._dirty) == 1:
                self._rouse()
        else:
            self._folder_made()

    def _folder_made(self) -> None:
        if not self._look:
            self._look = True
            self._rouse()

    def _rouse(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                return  # the loop is closed: nobody is left to tell

    # -- the task --------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wait()
            left, self._left = self._left, None
            if left is not None:
                try:
                    await self._sweep(left, behind=True)
                except ArtifactError as exc:
                    _log.warning("session %s: %s", self.session_id, exc)
                continue
            now = time.monotonic()
            look = self._look and self._looked + QUIET_S <= now
            if look:
                self._look, self._looked = False, now
            due = [path for path, closed in list(self._dirty.items()) if closed + self._quiet(path) <= now]
            for path in due:
                self._dirty.pop(path, None)
            if not due and not look:
                continue
            try:
                async with self._lock:
                    await _in_thread(lambda: self._take_early(self._cell, due, look))  # noqa: B023 (awaited here)
            except ArtifactError as exc:
                _log.warning("session %s: %s", self.session_id, exc)

    async def _wait(self) -> None:
        """Until something is due, or something new was said."""
        times = [closed + self._quiet(path) for path, closed in list(self._dirty.items())]
        if self._left is not None:
            times.append(0.0)
        if self._look:
            times.append(self._looked + QUIET_S)  # folder after folder must not mean scan after scan
        timeout = max(min(times) - time.monotonic(), 0.05 if self._dirty else 0) if times else None
        if timeout is None or timeout > 0:
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._wake.clear()
        self._woken = False

    def _quiet(self, path: bytes) -> float:
        return self._books.quiet(printable(path), QUIET_S if len(self._dirty) < _MANY else QUIET_MANY_S)

    # -- in a thread, under the lock -------------------------------------------------------

    def _take_early(self, cell: _Cell, due: Sequence[bytes], look: bool) -> None:
        if look:
            now = time.monotonic()
            for item in scan_untrusted(self._fd, on_folder=self._watch.add):
                if isinstance(item, Found) and len(self._dirty) < _MAX_DIRTY:
                    self._dirty.setdefault(os.fsencode(item.path), now)
        found: list[Found] = []
        refused: list[Refusal] = []
        for path in due:
            try:
                status = stat_untrusted(self._fd, path)
            except (OSError, ArtifactError):
                continue
            reason = refusal_of(status) if is_text(path) else "a name that is not valid UTF-8"
            if reason is None:
                found.append(Found(os.fsdecode(path), status))
            elif reason != "a folder":
                refused.append(Refusal(printable(path), reason, status.st_size, file_identity(status)))
        for batch in batches(found):
            if self._sweeps:
                break
            ended = not self._running and cell is self._cell  # asked anew: the next one may have begun
            refused += self._ingest(batch, cell, ended=ended, give_up=lambda: self._sweeps > 0)
        self._tell(refused)

    async def _sweep(self, cell: _Cell, *, force: bool = False, behind: bool = False) -> list[Artifact]:
        """``behind``: nobody waits for it, and it gives way to who does."""
        self._sweeps += 1  # what is being taken early gives way: the sweep takes it, and more quickly
        try:
            await self._lock.acquire()
        finally:
            self._sweeps -= 1
        try:
            before = time.monotonic()
            self._look = False
            made: list[Artifact] = []
            await _in_thread(lambda: self._take_all(cell, force, behind, made))
            for path, closed in list(self._dirty.items()):
                if closed < before and self._following(cell) is None:
                    self._dirty.pop(path, None)
            return made
        finally:
            self._lock.release()

    def _following(self, cell: _Cell) -> _Cell | None:
        """The cell that runs now, where it is another one; it may begin while a sweep is under way."""
        return self._cell if self._running and cell is not self._cell else None

    def _take_all(self, cell: _Cell, force: bool, behind: bool, made: list[Artifact]) -> None:
        refused: list[Refusal] = []

        def files(ended: bool) -> Iterator[Found]:
            """``ended``: those that nobody but an ended cell can have written; else those that may be either's."""
            for item in scan_untrusted(self._fd, on_folder=self._watch.add):
                if isinstance(item, Refusal):
                    if ended:
                        refused.append(item)
                    continue
                following = self._following(cell)
                if following is not None:
                    written = item.status.st_ctime
                    old = written < following.started - NEXT_CELL_S
                    if old != ended or written >= following.started:
                        continue
                yield item

        deadline = time.monotonic() + SWEEP_S
        for old in (True, False):
            if not old and self._following(cell) is None:
                break
            for batch in batches(files(old)):
                refused += self._ingest(batch, cell, ended=old, force=force, made=made)[: MAX_REFUSALS - len(refused)]
                if not force and (time.monotonic() > deadline or (behind and self._sweeps)):
                    self._left = cell  # the task takes the rest
                    self._rouse()
                    self._tell(refused)
                    return
        self._tell(refused, all_of_them=True)

    def _ingest(
        self,
        batch: list[Found],
        cell: _Cell,
        *,
        ended: bool,
        force: bool = False,
        made: list[Artifact] | None = None,
        give_up: Callable[[], bool] = never,
    ) -> list[Refusal]:
        def committed(artifacts: list[Artifact]) -> None:
            if made is not None:
                made.extend(artifacts)
            self._loop.call_soon_threadsafe(self._created, artifacts)

        return self.store.ingest(
            self.session_id,
            self._fd,
            batch,
            ended=ended,
            force=force,
            give_up=give_up,
            execution_count=cell.execution_count,
            msg_id=cell.msg_id,
            on_committed=committed,
        ).refused

    def _tell(self, refused: Sequence[Refusal], *, all_of_them: bool = False) -> None:
        news = self._books.news(refused, all_of_them=all_of_them)
        if news:
            self._loop.call_soon_threadsafe(self._on_refused, news)

    # -- on the loop -----------------------------------------------------------------------

    def _created(self, artifacts: list[Artifact]) -> None:
        for artifact in artifacts:
            self._books.created(artifact, running=self._running)
        self._on_created(artifacts)

    def _empty(self) -> bool:
        """False too where that cannot be seen (no descriptor left, say): a sweep tells why."""
        try:
            with os.scandir(self._fd) as entries:
                return next(entries, None) is None
        except OSError:
            return False


async def _in_thread(work: Callable[[], _T]) -> _T:
    """``work()`` in a thread. A cancelled caller waits for it all the same: it uses our descriptors."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
    except OSError as exc:
        raise ArtifactError(f"artifacts cannot be read: {exc}") from exc
