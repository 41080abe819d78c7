"""Where one session's fetched data sets are put: a folder of the host that its container sees, or the container."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from sandbox_kernel.artifacts.agent import Agent, OpenStream
from sandbox_kernel.dataset_cache import DatasetCache, FetchDataset, Progress, fetched_files, remove_tree
from sandbox_kernel.errors import ArtifactError, DatasetError


class Stage(Protocol):
    """One session's fetched data sets."""

    async def load(self, dataset_id: str, fetch: FetchDataset, progress: Progress) -> int:
        """Puts the data set at its place, whole or not at all; its bytes. Raises what fetching raises, and OSError."""

    async def staged(self) -> list[tuple[str, int]]:
        """What was loaded, also by a process before: ``(id, bytes)``."""

    async def link(self, links: Sequence[tuple[str, str]]) -> None:
        """Symbolic links ``(path, target)``, except where something stands."""


def _token(dataset_id: str) -> str:
    return hashlib.sha256(dataset_id.encode()).hexdigest()[:32]


class HostStage:
    """``<folder>/data``, bound read-only at ``/data``: hard links into the cache, so that nothing is there twice."""

    def __init__(self, cache: DatasetCache, folder: Path) -> None:
        self._cache = cache
        self._folder = folder
        self.data = folder / "data"

    async def create(self) -> None:
        self._cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self._folder, self._folder / "selected", self._folder / "tmp", self.data):
            folder.mkdir(parents=True, exist_ok=True)
        self.data.chmod(0o755)  # whatever the umask: the kernel may be another user

    async def remove(self) -> None:
        await asyncio.to_thread(remove_tree, self._folder)

    async def load(self, dataset_id: str, fetch: FetchDataset, progress: Progress) -> int:
        path = await self._cache.fetch(dataset_id, fetch, progress)
        return await asyncio.to_thread(self._place, dataset_id, path)

    def _place(self, dataset_id: str, source: Path) -> int:
        temporary = self._folder / "tmp" / _token(dataset_id)
        target = self.data / dataset_id
        remove_tree(temporary)
        size = 0
        if source.is_dir():
            for folder, _, names in os.walk(source):
                copy = temporary / Path(folder).relative_to(source)
                copy.mkdir()
                copy.chmod(0o755)
                for name in names:
                    size += _link(Path(folder) / name, copy / name)
        else:
            size = _link(source, temporary)
        try:
            _make_folders(self.data, target.parent)
            temporary.rename(target)
        except OSError as exc:
            remove_tree(temporary)
            raise DatasetError(f"{dataset_id!r} cannot stand beside another data set: {exc.strerror}") from exc
        (self._folder / "selected" / _token(dataset_id)).write_text(json.dumps([dataset_id, size]))
        return size

    async def staged(self) -> list[tuple[str, int]]:
        return [(str(found[0]), int(found[1])) for found in map(_read_json, (self._folder / "selected").iterdir())]

    async def link(self, links: Sequence[tuple[str, str]]) -> None:
        await asyncio.to_thread(self._link_all, links)

    def _link_all(self, links: Sequence[tuple[str, str]]) -> None:
        for path, target in links:
            place = self.data / path
            if not os.path.lexists(place):
                _make_folders(self.data, place.parent)
                place.symlink_to(target)


class ContainerStage:
    """A tmpfs of the running container's root. The kernel reads it; the host's disk sees nothing."""

    def __init__(self, cache: DatasetCache) -> None:
        self._cache = cache
        self._open_stream: OpenStream | None = None
        self._linked: set[tuple[str, str]] = set()

    def connect(self, open_stream: OpenStream) -> None:
        """``open_stream`` runs a command as the container's root."""
        self._open_stream = open_stream

    def emptied(self) -> None:
        """The container is another one now: nothing is linked."""
        self._linked.clear()

    @asynccontextmanager
    async def _agent(self) -> AsyncIterator[Agent]:
        """One each time: it is asked for seldom, and a slow fetch must not hold up another, nor :meth:`link`."""
        if self._open_stream is None:
            raise DatasetError("the session's container does not run yet")
        agent = Agent(self._open_stream)
        try:
            yield agent
        finally:
            await agent.close()

    async def load(self, dataset_id: str, fetch: FetchDataset, progress: Progress) -> int:
        token, total = _token(dataset_id), 0
        cached = self._cache.path(dataset_id)

        async def counted(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            nonlocal total
            async for chunk in chunks:
                yield chunk
                total += len(chunk)
                progress(total)

        # What another session (BIND) has fetched already need not be fetched again.
        source: FetchDataset = (lambda _: cached) if cached.exists() else fetch
        async with self._agent() as agent:
            await agent.discard(token)
            try:
                async for name, chunks in fetched_files(source, dataset_id):
                    await agent.put(token, name, counted(chunks))
                return await agent.publish(token, dataset_id)
            except BaseException:
                with suppress(ArtifactError):
                    await asyncio.shield(agent.discard(token))
                raise

    async def staged(self) -> list[tuple[str, int]]:
        async with self._agent() as agent:
            return await agent.selected()

    async def link(self, links: Sequence[tuple[str, str]]) -> None:
        new = [link for link in links if link not in self._linked]
        if new:
            async with self._agent() as agent:
                await agent.link(new)
            self._linked.update(new)


def _read_json(path: Path) -> Any:
    found: list[object] = json.loads(path.read_text())
    return found


def _link(source: Path, target: Path) -> int:
    """A second name of ``source``, or a copy where the file system has none; its bytes."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o444)
    return source.stat().st_size


def _make_folders(root: Path, folder: Path) -> None:
    """``folder`` below ``root``, readable by everybody."""
    for parent in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        path = root / parent
        if not path.is_dir():
            path.mkdir()
            path.chmod(0o755)
