"""The observer sees what a kernel writes into ``artifacts/`` and has it ingested, while a cell runs and at its end.

inotify only says where to look early; what counts is the sweep when a cell has ended: nothing depends on its latency.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from sandbox_kernel.artifacts.dirty import QUIET_S, DirtyFiles
from sandbox_kernel.artifacts.feeding import in_thread
from sandbox_kernel.artifacts.ingest import Ingest
from sandbox_kernel.artifacts.intake import never
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.sweep import SWEEP_S, SweepBooks, Waiting, batches
from sandbox_kernel.artifacts.turns import NEXT_CELL_S, Turn, Turns
from sandbox_kernel.artifacts.watch import FolderWatch
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import ArtifactError, UntrustedPath
from sandbox_kernel.events import Artifact
from sandbox_kernel.untrusted import (
    FOLDER,
    MAX_REFUSALS,
    UNSEEN,
    Below,
    Found,
    Refusal,
    file_identity,
    is_empty,
    is_text,
    printable,
    refusal_of,
    scan_untrusted,
)

_log = logging.getLogger(__name__)


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
        self._turns = Turns()
        self._books = SweepBooks()
        self._dirty = DirtyFiles(self._books)
        self._sweeps = 0
        """Sweeps that wait for the lock."""
        self._look = False
        """A whole scan is due: a new folder, or lost events."""
        self._look_at = 0.0
        """When it may begin (monotonic)."""
        self._looked = 0.0
        """Unix time at which the last one began."""
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
        try:
            self._watch = FolderWatch(self._file_closed, self._folder_made)
        except OSError:
            os.close(self._fd)
            raise
        self._watch.add("", self._fd)
        self._task = asyncio.create_task(self._run(), name=f"observer {self.session_id}")
        if not is_empty(self._fd):
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
        fresh = self._turns.begin(msg_id, execution_count)
        self._books.cell_started(msg_id, fresh=fresh)

    def cell_ended(self, msg_id: str) -> None:
        """It will be :meth:`cell_finished` in its turn, others before it: until then what it wrote is nobody else's."""
        self._turns.wait(msg_id)

    def settled(self, msg_id: str) -> list[Artifact] | None:
        """As :meth:`cell_finished` where nothing lies in ``artifacts/``; else None, and the cell has not ended yet."""
        if self._lock.locked() or self._look or not is_empty(self._fd):
            return None
        self._turns.end(msg_id)
        self._dirty.forget(time.monotonic())
        return self._books.cell_finished(msg_id)

    async def cell_finished(self, msg_id: str) -> list[Artifact]:
        """All artifacts the cell made, complete for the files closed by now; they are gone from ``artifacts/``.

        When the next cell runs already, what it may have touched is left to it.
        """
        made = self.settled(msg_id)
        if made is None:
            try:
                await self._sweep(self._turns.end(msg_id))
            except ArtifactError as exc:  # what it had not come to stays where it is
                self._on_refused([Refusal(".", str(exc))])
            made = self._books.cell_finished(msg_id)
        return made

    async def drain(self) -> list[Artifact]:
        """The kernel is gone: take everything, also what it left open. Raises ArtifactError."""
        self._turns.running = False
        made: list[Artifact] = []
        for turn in dict.fromkeys((*self._turns.ended, self._turns.last)):
            made += await self._sweep(turn, force=True)
            while turn in self._turns.left:  # there was more than one scan looks at
                made += await self._sweep(turn, force=True)
        return made

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
            return await in_thread(look)

    # -- what watchdog's thread says -------------------------------------------------------

    def _file_closed(self, path: bytes) -> None:
        if not self._dirty.add(path):
            self._folder_made()
        elif len(self._dirty) == 1:
            self._rouse()  # only the first one matters to the task: it sleeps until the oldest is due

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
            try:
                if self._turns.left:
                    await self._sweep(self._turns.left[0], behind=True)
                    continue
                look = self._look and self._look_at <= time.monotonic()
                due = self._dirty.due()
                if due or look:
                    async with self._lock:
                        await in_thread(lambda: self._take_early(self._turns.last, due, look))  # noqa: B023 (awaited here)
            except ArtifactError as exc:
                _log.warning("session %s: %s", self.session_id, exc)

    async def _wait(self) -> None:
        """Until something is due, or something new was said."""
        due = self._dirty.next_due()
        times = [] if due is None else [max(due, time.monotonic() + 0.05)]
        if self._turns.left:
            times.append(0.0)
        if self._look:
            times.append(self._look_at)
        timeout = max(min(times) - time.monotonic(), 0) if times else None
        if timeout is None or timeout > 0:
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._wake.clear()
        self._woken = False

    # -- in a thread, under the lock -------------------------------------------------------

    def _take_early(self, turn: Turn, due: Sequence[bytes], look: bool) -> None:
        if look:
            self._look_around()
        found: list[Found] = []
        refused: list[Refusal] = []
        with Below(self._fd) as below:
            for path in due:
                try:
                    status = below.stat(os.fsdecode(path))
                except (OSError, ArtifactError):
                    continue
                reason = refusal_of(status) if is_text(path) else "a name that is not valid UTF-8"
                if reason is not None:
                    if reason != "a folder":
                        refused.append(Refusal(printable(path), reason, status.st_size, file_identity(status)))
                elif not self._turns.of_an_earlier(turn, status.st_ctime - NEXT_CELL_S):  # in doubt it is left
                    found.append(Found(os.fsdecode(path), status))
        for batch in batches(found):
            if self._sweeps:
                break
            ended = not self._turns.running and turn is self._turns.last  # asked anew: the next one may have begun
            refused += self._ingest(turn, ended=ended, give_up=lambda: self._sweeps > 0).batch(batch).refused
        self._tell(refused)

    def _look_around(self) -> None:
        """Watch new folders, and note the files that came since the last look: nobody may have said so."""
        began, self._look = time.monotonic(), False
        looked, self._looked = self._looked, time.time()
        for item in scan_untrusted(self._fd, on_folder=self._watch.add):
            if isinstance(item, Found) and item.status.st_ctime >= looked - 1:
                self._dirty.add(os.fsencode(item.path))
        now = time.monotonic()
        self._look_at = max(began + QUIET_S, now + 10 * (now - began))  # folder after folder: not scan after scan

    async def _sweep(self, turn: Turn, *, force: bool = False, behind: bool = False) -> list[Artifact]:
        """``behind``: nobody waits for it, and it gives way to who does."""
        with self._turns.swept(turn) as whole:
            self._sweeps += 1  # what is being taken early gives way: the sweep takes it, and more quickly
            try:
                await self._lock.acquire()
            finally:
                self._sweeps -= 1
            try:
                before = time.monotonic()
                self._look = False
                made: list[Artifact] = []
                whole.append(await in_thread(lambda: self._take_all(turn, force, behind, made)))
                if self._turns.following(turn) is None:
                    self._dirty.forget(before)
            finally:
                self._lock.release()
        self._rouse()
        return made

    def _take_all(self, turn: Turn, force: bool, behind: bool, made: list[Artifact]) -> bool:
        """False: it took so long that it was broken off, or there was more than one scan looks at."""
        refused: list[Refusal] = []
        deadline = time.monotonic() + SWEEP_S
        whole, seen, stuck = True, 0, 0

        def files(ended: bool) -> Generator[Found, None, None]:
            """``ended``: those that only an ended cell can have written; else those that may be the next one's, too."""
            nonlocal seen
            for item in scan_untrusted(self._fd, on_folder=self._watch.add):
                if isinstance(item, Found):
                    if self._turns.share(turn, item.status.st_ctime) is ended:
                        seen += 1
                        yield item
                elif ended:
                    refused.append(item)

        def in_time(found: Iterator[Found]) -> Iterator[list[Found]]:
            nonlocal whole
            for batch in batches(found):
                yield batch
                if not force and (time.monotonic() > deadline or (behind and self._sweeps)):
                    whole = False
                    return

        for ended in (True, False):
            if not whole or (not ended and self._turns.following(turn) is None):
                break
            # Closed at once whatever happens: who looks into the folder next does it from where this scan stands.
            with closing(files(ended)) as found:
                for result in self._ingest(turn, ended=ended, force=force, made=made).batches(in_time(found)):
                    refused += result.refused[: MAX_REFUSALS - len(refused)]
                    stuck += len(result.waiting) + len(result.refused)
        unseen = [refusal for refusal in refused if refusal.reason.endswith(UNSEEN)]
        if unseen and (seen > stuck or self._turns.of_an_earlier(turn, 0.0)):
            refused.remove(unseen[0])  # there is, or will be, room to see it
            whole = False
        self._tell(refused, all_of_them=whole)
        return whole

    def _ingest(
        self,
        turn: Turn,
        *,
        ended: bool,
        force: bool = False,
        made: list[Artifact] | None = None,
        give_up: Callable[[], bool] = never,
    ) -> Ingest:
        def committed(artifacts: list[Artifact]) -> None:
            if made is not None:
                made.extend(artifacts)
            self._loop.call_soon_threadsafe(self._created, artifacts)

        return self.store.ingest(
            self.session_id,
            self._fd,
            ended=ended,
            force=force,
            give_up=give_up,
            execution_count=turn.execution_count,
            msg_id=turn.msg_id,
            on_committed=committed,
        )

    def _tell(self, refused: Sequence[Refusal], *, all_of_them: bool = False) -> None:
        news = self._books.news(refused, all_of_them=all_of_them)
        if news:
            self._loop.call_soon_threadsafe(self._on_refused, news)

    # -- on the loop -----------------------------------------------------------------------

    def _created(self, artifacts: list[Artifact]) -> None:
        for artifact in artifacts:
            self._books.created(artifact, running=self._turns.running)
        self._on_created(artifacts)
