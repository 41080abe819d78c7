"""The spool of a session whose ``artifacts/`` the host cannot see: TMPFS now, a pod later.

It stands where :class:`~sandbox_kernel.artifacts.observer.Observer` stands elsewhere and keeps the same promises.
inotify does not reach into a container, so it asks: every :data:`POLL_S` seconds while a cell runs (one question,
answered from a directory scan beside the kernel), once at its end, and on while a file is held open by its writer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from types import TracebackType
from typing import Self

from sandbox_kernel.artifacts.agent import Agent, AgentGone, ByteStream, Missing, OpenStream, RemoteFileInfo
from sandbox_kernel.artifacts.feeding import Cell, put_chunks, put_together
from sandbox_kernel.artifacts.fetching import Changed, export_file, unchanged
from sandbox_kernel.artifacts.ingest import Origin
from sandbox_kernel.artifacts.listed import Listed
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.sweep import SWEEP_S, SweepBooks, Waiting
from sandbox_kernel.errors import ArtifactError, ArtifactRefused
from sandbox_kernel.events import Artifact
from sandbox_kernel.snapshot import STATE_LIMIT
from sandbox_kernel.untrusted import Refusal

__all__ = ["ByteStream", "OpenStream", "RemoteSpool", "export_file"]

POLL_S = 0.5
LAST_SWEEP_S = 300.0
"""The same of the last one, after which nothing is left to be taken."""
SMALL, TOGETHER = 1 << 16, 100
"""Files of so few bytes are stored so many at once: one transaction."""

_log = logging.getLogger(__name__)


class RemoteSpool:
    """Ingests what a session leaves in the container's ``/session/artifacts``, through an agent beside the kernel.

    Nothing that the agent says is believed further than its bytes. Sweeps never raise for what the container did:
    one that is gone has no artifacts any more, and that is told once through ``on_refused``.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        store: ArtifactStore,
        session_id: str,
        *,
        on_created: Callable[[list[Artifact]], None],
        on_refused: Callable[[list[Refusal]], None],
    ) -> None:
        """``open_stream(argv)`` runs a command in the container as the kernel's user.

        The callbacks are those of Observer: rows committed, each artifact once; refusals, each once while it holds.
        """
        self._store = store
        self._session_id = session_id
        self._on_created = on_created
        self._on_refused = on_refused
        self._agent = Agent(open_stream)
        # state() and export() must not wait behind a file of gigabytes: a stream of their own, opened when first used.
        self._asking = Agent(open_stream)
        self._lock = asyncio.Lock()
        self._listed = Listed()
        self._books = SweepBooks()
        self._tag: str | None = None
        self._running: dict[str, int | None] = {}
        self._last: Cell = (None, None)
        self._began: dict[str, int] = {}
        """When those began (Unix ns) that are not swept yet, in their order."""
        self._waiting: set[str] = set()
        """Those of them that have ended."""
        self._launched = False
        self._broken_off = False
        """The last sweep took too long, or gave way to one that somebody waits for."""
        self._awaited = 0
        """Sweeps that somebody waits for, and that wait for the lock."""
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._poller = asyncio.create_task(self._poll(), name=f"artifacts of {self._session_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        await self._agent.close()
        await self._asking.close()

    def launched(self) -> None:
        """The container runs: the agent is started in the background, so that the first cell need not wait for it."""
        self._launched = True
        self._wake.set()

    # --- cells --------------------------------------------------------------------------------

    def cell_started(self, msg_id: str, execution_count: int | None) -> None:
        """From now on what appears is this cell's. Again with the same ``msg_id``: its count has become known."""
        fresh = msg_id not in self._running
        self._books.cell_started(msg_id, fresh=fresh)
        if fresh:
            self._began[msg_id] = time.time_ns()
        self._running[msg_id] = execution_count
        self._last = (msg_id, execution_count)
        self._ended.clear()
        self._wake.set()

    def cell_ended(self, msg_id: str) -> None:
        """It will be :meth:`cell_finished` in its turn, others before it: until then what it wrote is nobody else's."""
        if msg_id in self._began:
            self._waiting.add(msg_id)

    def settled(self, msg_id: str) -> list[Artifact] | None:
        """None: what lies in the container only a question to it can tell."""

    async def cell_finished(self, msg_id: str) -> list[Artifact]:
        """Sweeps and removes what is stored; everything the cell made, also what was ingested while it ran."""
        count = self._running.pop(msg_id, self._last[1] if self._last[0] == msg_id else None)
        if not self._running:
            self._ended.set()
        self._books.cell_started(msg_id, fresh=False)  # where nobody has heard that it began
        try:
            await self._sweep((msg_id, count), ended=True)
        except ArtifactError as exc:  # what it had not come to stays where it is
            self._on_refused([Refusal(".", str(exc))])
        finally:
            self._began.pop(msg_id, None)
            self._waiting.discard(msg_id)
        self._wake.set()  # the poller goes on while something is held open
        return self._books.cell_finished(msg_id)

    async def drain(self) -> list[Artifact]:
        """The last sweep before the container goes: takes also what is still open. Returns what it ingested."""
        return await self._sweep(self._last, ended=True, force=True)

    async def waiting(self) -> list[Waiting]:
        """What lies in the container's ``artifacts/`` now. Raises AgentGone."""
        async with self._lock:
            await self._list()
        return self._listed.waiting()

    # --- questions ----------------------------------------------------------------------------

    async def read_state(self, name: str = "python_state.json", *, limit: int = STATE_LIMIT) -> bytes:
        """A file of the container's ``/session/state``: hostile bytes, at most ``limit``.

        Raises ArtifactRefused when there is none or it is bigger, AgentGone when the container does not answer.
        """
        return await self._asking.state(name, limit=limit)

    async def export(self, path: str | os.PathLike[str]) -> Artifact:
        """Any file of the container that the kernel's user can read, as an artifact of kind ``export``.

        Relative paths are below ``/session``. Raises as :func:`export_file`.
        """
        return await export_file(self._asking, self._store, self._session_id, path, self._last)

    # --- the sweep ----------------------------------------------------------------------------

    async def _poll(self) -> None:
        """Looks while a cell runs or a file is held open; else it waits for the next cell."""
        while True:
            self._wake.clear()
            if self._launched:
                self._launched = False
                with suppress(AgentGone, ArtifactRefused):
                    async with self._lock:
                        await self._list()
            if not self._running and not self._broken_off and not self._listed.unsettled:
                await self._wake.wait()
            change = self._ended if self._running else self._wake
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await change.wait()
                continue
            try:
                await self._sweep(self._last, ended=not self._running, behind=True)
            except ArtifactError as exc:
                _log.warning("session %s: %s", self._session_id, exc)  # the cell's end says it to the caller

    async def _list(self) -> None:
        listing, self._tag = await self._agent.listing(self._tag)
        if listing is not None:
            self._listed.note(listing)

    async def _sweep(self, cell: Cell, *, ended: bool, force: bool = False, behind: bool = False) -> list[Artifact]:
        """One look at the folder: takes what may be taken, and removes what is stored once its cell has ended.

        ``behind``: nobody waits for it, and it gives way to who does.
        """
        created: list[Artifact] = []
        refused: list[Refusal] = []
        self._awaited += not behind
        try:
            await self._lock.acquire()
        finally:
            self._awaited -= not behind
        try:
            async with asyncio.timeout(LAST_SWEEP_S if force else SWEEP_S):
                await self._look(cell, created, ended=ended, force=force, behind=behind)
            self._broken_off = False
        except (AgentGone, ArtifactRefused) as exc:
            self._tag = None
            refused.append(Refusal(".", f"artifacts cannot be fetched: {exc}"))
        except TimeoutError:
            self._tag, self._broken_off = None, True
            if ended:
                left = self._listed.leave(cell, *self._share(cell, force))
                if force and left:
                    refused.append(Refusal(".", f"{left} files could not be fetched within {LAST_SWEEP_S:.0f} s"))
        finally:
            if created:
                self._on_created(created)
            self._lock.release()
        news = self._books.news(refused + self._listed.refusals(), all_of_them=True)
        if news:
            self._on_refused(news)
        return created

    def _share(self, cell: Cell, force: bool) -> tuple[float, float]:
        """From which mtime on (Unix ns), and before which, files are this cell's: others may wait for their sweep, or
        have begun since."""
        began = self._began.get(cell[0] or "", 0)
        others = [(other, at) for other, at in self._began.items() if other != cell[0]]
        earlier = any(at < began and other in self._waiting for other, at in others)
        following = min((at for _, at in others if at > began and not force), default=math.inf)
        return (began if earlier and not force else -math.inf), following

    async def _look(self, cell: Cell, created: list[Artifact], *, ended: bool, force: bool, behind: bool) -> None:
        await self._list()
        together: list[tuple[RemoteFileInfo, Cell, bytes]] = []
        since, before = self._share(cell, force)
        for number, file in enumerate(self._listed.files):
            if number % 1000 == 0:
                await asyncio.sleep(0)  # of very many: others have their turn
            if behind and self._awaited:
                break
            left_by = self._listed.known(file).left_by
            if left_by is not None:
                if not (behind or force):
                    continue  # the next cell does not wait for it
            elif not since <= file.mtime_ns < before:
                continue  # another's sweep takes it
            if not self._listed.is_due(file, self._books, ended=ended, force=force) or self._is_too_big(file):
                continue
            if file.size > SMALL or self._listed.is_inherited(file):
                await self._take(file, left_by or cell, created, force=force)
            elif (data := await self._read(file, force=force)) is not None:
                together.append((file, left_by or cell, data))
                if len(together) == TOGETHER:
                    await self._store_together(together, created)
                    together = []
        await self._store_together(together, created)
        if behind and self._awaited:
            raise TimeoutError
        if ended and not self._running:
            stored = self._listed.stored()
            if stored:
                self._listed.removed(await self._agent.remove(stored))

    def _is_too_big(self, file: RemoteFileInfo) -> bool:
        if file.size <= self._store.max_artifact_bytes:
            return False
        reason = f"has {file.size} bytes; max_artifact_bytes is {self._store.max_artifact_bytes}"
        self._listed.known(file).refused = reason
        return True

    async def _take(self, file: RemoteFileInfo, cell: Cell, created: list[Artifact], *, force: bool) -> None:
        """Stores the file, or notes why not; one that changed meanwhile is left to the next sweep."""

        def committed(artifact: Artifact) -> None:
            self._stored(file, artifact, created)

        try:
            if self._listed.is_inherited(file) and await self._is_stored(file):
                self._listed.known(file).stored = True
                return
            async with self._agent.get(file.path, limit=self._store.max_artifact_bytes) as content:
                source = unchanged(content, file, force)
                await put_chunks(self._store, self._session_id, file.path, source, "file", cell, committed)
        except (Changed, Missing):
            return
        except ArtifactRefused as exc:
            self._listed.known(file).refused = str(exc)

    async def _read(self, file: RemoteFileInfo, *, force: bool) -> bytes | None:
        """The bytes of a small file; None: it changed meanwhile and is left to the next sweep, or is refused."""
        try:
            async with self._agent.get(file.path, limit=self._store.max_artifact_bytes) as content:
                if content.size > SMALL:
                    return None
                return b"".join([chunk async for chunk in unchanged(content, file, force)])
        except (Changed, Missing):
            return None
        except ArtifactRefused as exc:
            self._listed.known(file).refused = str(exc)
            return None

    async def _store_together(
        self, files: Sequence[tuple[RemoteFileInfo, Cell, bytes]], created: list[Artifact]
    ) -> None:
        def committed(stored: Sequence[Artifact | ArtifactRefused]) -> None:
            for (file, _, _), done in zip(files, stored, strict=True):
                if isinstance(done, Artifact):
                    self._stored(file, done, created)
                else:
                    self._listed.known(file).refused = str(done)

        if files:
            rows = [(Origin(self._session_id, count, msg_id), file.path, data) for file, (msg_id, count), data in files]
            await put_together(self._store, rows, committed)

    def _stored(self, file: RemoteFileInfo, artifact: Artifact, created: list[Artifact]) -> None:
        self._listed.known(file).stored = True
        created.append(artifact)
        self._books.created(artifact, running=bool(self._running))

    async def _is_stored(self, file: RemoteFileInfo) -> bool:
        """Whether the newest version of this path in the store has just these bytes."""
        versions = await asyncio.to_thread(self._store.list, self._session_id, path=file.path, kind="file")
        if not versions or versions[-1].size_bytes != file.size:
            return False
        digest = sha256()
        async with self._agent.get(file.path, limit=self._store.max_artifact_bytes) as content:
            async for chunk in content.chunks():
                digest.update(chunk)
        return digest.hexdigest() == versions[-1].sha256
