"""The spool of a session whose ``artifacts/`` the host cannot see: TMPFS now, a pod later.

It stands where :class:`~sandbox_kernel.artifacts.observer.Observer` stands elsewhere and keeps the same promises.
inotify does not reach into a container, so it asks: every :data:`POLL_S` seconds while a cell runs (one question,
answered from a directory scan beside the kernel), once at its end, and on while a file is held open by its writer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Self

from sandbox_kernel.artifacts.agent import (
    Agent,
    AgentGone,
    ByteStream,
    Listing,
    Missing,
    OpenStream,
    RemoteFile,
    RemoteFileInfo,
)
from sandbox_kernel.artifacts.feeding import Cell, put_chunks
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.sweep import SWEEP_S, SweepBooks, Waiting
from sandbox_kernel.errors import ArtifactError, ArtifactNotFound, ArtifactRefused
from sandbox_kernel.events import Artifact
from sandbox_kernel.snapshot import STATE_LIMIT
from sandbox_kernel.untrusted import Refusal

__all__ = ["ByteStream", "OpenStream", "RemoteSpool", "export_file"]

POLL_S = 0.5
LAST_SWEEP_S = 300.0
"""The same of the last one, after which nothing is left to be taken."""
QUIET_S = 1.0
"""While its cell runs a file is taken once it was closed and unchanged for QUIET_S, and for twice as long per further
version: not each line of a log is one."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """What became of a file that was listed, for as long as its identity holds."""

    identity: tuple[int, int, int]
    since: float
    stored: bool = False
    refused: str | None = None


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
        self._known: dict[str, _Known] = {}
        self._books = SweepBooks()
        self._tag: str | None = None
        self._listing = Listing([], [], True)
        self._running: dict[str, int | None] = {}
        self._last: Cell = (None, None)
        # Files older than this object, at the first look: a host that died may have stored and not removed them.
        self._inherited: dict[str, tuple[int, int, int]] | None = None
        self._began_ns = time.time_ns()
        self._launched = False
        self._broken_off = False
        """The last sweep took too long."""
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
        self._books.cell_started(msg_id, fresh=msg_id not in self._running)
        self._running[msg_id] = execution_count
        self._last = (msg_id, execution_count)
        self._ended.clear()
        self._wake.set()

    def settled(self, msg_id: str) -> list[Artifact] | None:
        """None: what lies in the container only a question to it can tell."""

    async def cell_finished(self, msg_id: str) -> list[Artifact]:
        """Sweeps and removes what is stored; everything the cell made, also what was ingested while it ran."""
        count = self._running.pop(msg_id, self._last[1] if self._last[0] == msg_id else None)
        if not self._running:
            self._ended.set()
        self._books.cell_started(msg_id, fresh=False)  # where nobody has heard that it began
        await self._sweep((msg_id, count), ended=True)
        self._wake.set()  # the poller goes on while something is held open
        return self._books.cell_finished(msg_id)

    async def drain(self) -> list[Artifact]:
        """The last sweep before the container goes: takes also what is still open. Returns what it ingested."""
        return await self._sweep(self._last, ended=True, force=True)

    async def waiting(self) -> list[Waiting]:
        """What lies in the container's ``artifacts/`` now. Raises AgentGone."""
        async with self._lock:
            self._note(*await self._agent.listing(self._tag))
            self._forget()
        refused = [Waiting(path, 0, reason) for path, reason in self._listing.refused]
        return refused + [
            Waiting(file.path, file.size, known.refused if (known := self._known.get(file.path)) else None)
            for file in self._listing.files
        ]

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
                        self._note(*await self._agent.listing(self._tag))
            if not self._running and not self._unsettled():
                await self._wake.wait()
            change = self._ended if self._running else self._wake
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await change.wait()
                continue
            try:
                await self._sweep(self._last, ended=not self._running)
            except ArtifactError as exc:
                _log.warning("session %s: %s", self._session_id, exc)  # the cell's end says it to the caller

    def _unsettled(self) -> bool:
        """Something was listed and neither taken nor refused: it is open, or changed while it was read, or there was no
        time for it."""
        known = (self._known.get(file.path) for file in self._listing.files)
        return self._broken_off or any(item is None or not (item.stored or item.refused) for item in known)

    def _note(self, listing: Listing | None, tag: str | None) -> None:
        if listing is not None:
            self._listing = listing
            if self._inherited is None:
                old = (file for file in listing.files if file.mtime_ns < self._began_ns)
                self._inherited = {file.path: file.identity for file in old}
        self._tag = tag

    async def _sweep(self, cell: Cell, *, ended: bool, force: bool = False) -> list[Artifact]:
        """One look at the folder: takes what may be taken, and removes what is stored once its cell has ended."""
        created: list[Artifact] = []
        async with self._lock:
            refused: list[Refusal] = []
            try:
                async with asyncio.timeout(LAST_SWEEP_S if force else SWEEP_S):
                    await self._look(cell, created, ended=ended, force=force)
                refused += [Refusal(path, reason) for path, reason in self._listing.refused]
            except (AgentGone, ArtifactRefused) as exc:
                self._tag = None
                refused.append(Refusal(".", f"artifacts cannot be fetched: {exc}"))
            except TimeoutError:
                self._tag, self._broken_off = None, True
            else:
                self._broken_off = False
            finally:
                if created:
                    self._on_created(created)
            self._tell(refused)
        return created

    async def _look(self, cell: Cell, created: list[Artifact], *, ended: bool, force: bool) -> None:
        self._note(*await self._agent.listing(self._tag))
        self._forget()
        for file in self._listing.files:
            if self._ready(file, ended=ended, force=force):
                await self._take(file, cell, created, force=force)
        if ended and not self._running:
            await self._remove()

    def _forget(self) -> None:
        """What is gone or has another content now is unknown again."""
        now = {file.path: file.identity for file in self._listing.files}
        self._known = {path: known for path, known in self._known.items() if now.get(path) == known.identity}

    def _ready(self, file: RemoteFileInfo, *, ended: bool, force: bool) -> bool:
        clock = asyncio.get_running_loop().time()
        known = self._known.setdefault(file.path, _Known(file.identity, clock))
        if known.stored or ((known.refused or file.open) and not force):
            return False
        if file.size > self._store.max_artifact_bytes:
            known.refused = f"has {file.size} bytes; max_artifact_bytes is {self._store.max_artifact_bytes}"
            return False
        return ended or clock - known.since >= self._books.quiet(file.path, QUIET_S)

    async def _take(self, file: RemoteFileInfo, cell: Cell, created: list[Artifact], *, force: bool) -> None:
        """Stores the file, or notes why not; one that changed meanwhile is left to the next sweep."""
        known = self._known[file.path]

        def committed(artifact: Artifact) -> None:
            known.stored = True
            created.append(artifact)
            self._books.created(artifact, running=bool(self._running))

        try:
            inherited = self._inherited is not None and self._inherited.pop(file.path, None) == file.identity
            if inherited and await self._is_stored(file):
                known.stored = True
                return
            async with self._agent.get(file.path, limit=self._store.max_artifact_bytes) as content:
                source = _unchanged(content, file, force)
                await put_chunks(self._store, self._session_id, file.path, source, "file", cell, committed)
        except (_Changed, Missing):
            return
        except ArtifactRefused as exc:
            known.refused = str(exc)

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

    async def _remove(self) -> None:
        stored = [file for file in self._listing.files if (known := self._known.get(file.path)) and known.stored]
        if stored:
            removed = await self._agent.remove(stored)
            self._listing.files[:] = [file for file in self._listing.files if file.path not in removed]
            for path in removed:
                self._known.pop(path, None)

    def _tell(self, refused: list[Refusal]) -> None:
        """Each refusal once for as long as it holds."""
        refused += [Refusal(path, known.refused) for path, known in self._known.items() if known.refused]
        news = self._books.news(refused, all_of_them=True)
        if news:
            self._on_refused(news)


class _Changed(Exception):
    """The file changed while it was read."""


async def _unchanged(content: RemoteFile, file: RemoteFileInfo, force: bool) -> AsyncIterator[bytes]:
    """The bytes; at their end an exception instead of an end when they are not those of the file that was listed."""
    if (content.ino, content.size, content.mtime_ns) != file.identity and not force:
        raise _Changed
    async for chunk in content.chunks():
        yield chunk
    if content.changed and not force:
        raise _Changed


async def export_file(
    agent: Agent, store: ArtifactStore, session_id: str, path: str | os.PathLike[str], cell: Cell = (None, None)
) -> Artifact:
    """``path`` of the container as an artifact of kind ``export``; for BIND too: ``/data``, ``/tmp`` are not shared.

    ``cell``: msg_id and execution_count to record. Raises ArtifactNotFound, ArtifactRefused (no regular file, too big,
    changed while it was read), AgentGone, TypeError.
    """
    path = os.fsdecode(path)
    try:
        if "\0" in path:
            raise Missing
        async with agent.export(path, limit=store.max_artifact_bytes) as content:
            return await put_chunks(store, session_id, path.strip("/"), _steady(content), "export", cell)
    except Missing as exc:
        raise ArtifactNotFound(f"{path!r} cannot be exported: there is no such file in the container") from exc
    except ArtifactRefused as exc:
        raise ArtifactRefused(f"{path!r} cannot be exported: {exc}") from None


async def _steady(content: RemoteFile) -> AsyncIterator[bytes]:
    async for chunk in content.chunks():
        yield chunk
    if content.changed:
        raise ArtifactRefused("it changed while it was read; export it once it is complete")
