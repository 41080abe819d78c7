"""Data sets fetched by the caller's function: its many answers as streams, and a cache on the host's disk.

    <store>/datasets/<id, "/" as %2F>    complete: a file, or a folder of files; read-only
    <store>/datasets/.tmp/  .locks/      what is on its way

A data set that is there is complete: it is synced and renamed into place. Sessions of any number of processes that want
one data set at once fetch it once. To have one fetched anew, delete it here.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import inspect
import os
import shutil
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from sandbox_kernel.errors import DatasetError, DatasetRefused

CHUNK = 2**20
MAX_DEPTH = 16

Source: TypeAlias = bytes | Path | AsyncIterable[bytes] | Iterable[bytes] | BinaryIO
"""The bytes of one file, or a host folder (as a Path). Never a text: nobody could tell content from a name."""
Fetched: TypeAlias = Source | Mapping[str, Source]
"""A mapping gives several files: the data set is a folder."""
FetchDataset: TypeAlias = Callable[[str], Fetched | Awaitable[Fetched]]
"""``fetch_dataset(id)``. May be ``async``; a plain function runs in a thread, so it may block."""
Progress: TypeAlias = Callable[[int], None]
"""Called with the bytes so far."""


def check_dataset_id(dataset_id: object) -> str:
    """``dataset_id`` itself. Raises DatasetRefused, naming the rule."""
    if isinstance(dataset_id, str) and len(cache_name(dataset_id)) <= 240:
        parts = dataset_id.split("/")
        if len(parts) <= MAX_DEPTH and all(_is_name(part) for part in parts):
            return dataset_id
    raise DatasetRefused(
        f"data set id {str(dataset_id)[:300]!r} is not allowed; it is one or more names joined by '/', each beginning "
        "with a letter, a digit or '_' and without control characters or backslashes, 240 bytes at most"
    )


def _is_name(part: str) -> bool:
    # No name begins with a dot: neither "..", nor what we keep beside the data sets.
    return bool(part) and (part[0].isalnum() or part[0] == "_") and part.isprintable() and "\\" not in part


def cache_name(dataset_id: str) -> bytes:
    """The id as one file name; sub-paths cannot meet: ``a`` may be a file where ``a/b`` is one, too."""
    return dataset_id.replace("%", "%25").replace("/", "%2F").encode("utf-8", "backslashreplace")


async def fetched_files(fetch: FetchDataset, dataset_id: str) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
    """The files of a data set, each to be read to its end: ``(name below it, chunks)``; one named "" when it is a file.

    Raises DatasetError for an answer that is none of :data:`Fetched`, and what ``fetch`` raises.
    """
    if inspect.iscoroutinefunction(fetch) or inspect.isasyncgenfunction(fetch):
        answer: Any = fetch(dataset_id)
    else:
        answer = await asyncio.to_thread(fetch, dataset_id)
    if inspect.isawaitable(answer):
        answer = await answer
    if isinstance(answer, Mapping):
        for name, source in answer.items():
            yield check_dataset_id(name), _chunks(source)
    elif isinstance(answer, Path) and answer.is_dir():
        for path in await asyncio.to_thread(lambda: sorted(p for p in answer.rglob("*") if p.is_file())):
            yield check_dataset_id(path.relative_to(answer).as_posix()), _chunks(path)
    else:
        yield "", _chunks(answer)


async def _chunks(source: Any) -> AsyncIterator[bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        view = memoryview(source).cast("B")
        for start in range(0, len(view), CHUNK):
            yield bytes(view[start : start + CHUNK])
    elif isinstance(source, Path):
        file = await asyncio.to_thread(source.open, "rb")
        try:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk
        finally:
            file.close()
    elif hasattr(source, "read"):
        try:
            while chunk := _bytes(await _maybe(await asyncio.to_thread(source.read, CHUNK))):
                yield chunk
        finally:
            if hasattr(source, "close"):
                await _maybe(source.close())
    elif isinstance(source, AsyncIterable):
        async for chunk in source:
            yield _bytes(chunk)
    elif isinstance(source, Iterable) and not isinstance(source, str | Mapping):
        iterator: Iterator[Any] = iter(source)
        advance: Callable[[], Any] = partial(next, iterator, None)
        while (chunk := await asyncio.to_thread(advance)) is not None:
            yield _bytes(chunk)
    else:
        raise _unfit(source)


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _bytes(chunk: Any) -> bytes:
    if not isinstance(chunk, bytes | bytearray | memoryview):
        raise _unfit(chunk)
    return bytes(chunk)


def _unfit(value: object) -> DatasetError:
    return DatasetError(
        f"fetch_dataset gave a {type(value).__name__}; give bytes, a pathlib.Path, a binary file, "
        "an iterator of bytes (plain or async), or a mapping of names to these"
    )


class DatasetCache:
    """Complete data sets below ``<store>/datasets``."""

    def __init__(self, store_root: Path) -> None:
        self.root = store_root / "datasets"

    def path(self, dataset_id: str) -> Path:
        """Where the data set is or will be."""
        return self.root / os.fsdecode(cache_name(dataset_id))

    async def fetch(self, dataset_id: str, fetch: FetchDataset, progress: Progress) -> Path:
        """The complete data set, fetched when it is not there. Raises what fetching raises, DatasetError, OSError."""
        path = self.path(dataset_id)
        if path.exists():
            return path
        async with self._alone(dataset_id) as temporary:
            if not path.exists():
                await _write_all(temporary, fetched_files(fetch, dataset_id), progress)
                await asyncio.to_thread(_publish, temporary, path)
        return path

    @asynccontextmanager
    async def _alone(self, dataset_id: str) -> AsyncIterator[Path]:
        """Nobody else on this machine fetches it meanwhile; the path is for what is on its way."""
        name = hashlib.sha256(dataset_id.encode()).hexdigest()[:32]
        for folder in (self.root, self.root / ".locks", self.root / ".tmp"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock, temporary = self.root / ".locks" / name, self.root / ".tmp" / name
        while (descriptor := _try_lock(lock)) is None:  # noqa: ASYNC110 - other processes hold it; flock cannot be awaited
            await asyncio.sleep(0.05)
        try:
            await asyncio.to_thread(remove_tree, temporary)  # of a process that died
            yield temporary
        finally:
            await asyncio.shield(asyncio.to_thread(remove_tree, temporary))
            lock.unlink()
            os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # held; or its holder removed it just now
    os.close(descriptor)
    return None


async def _write_all(target: Path, files: AsyncIterator[tuple[str, AsyncIterator[bytes]]], progress: Progress) -> None:
    """``files`` at ``target``: a file, or a folder; synced."""
    total, empty = 0, True
    async for name, chunks in files:
        empty = False
        path = target / name if name else target
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            async for chunk in chunks:
                await asyncio.to_thread(file.write, chunk)
                total += len(chunk)
                progress(total)
            await asyncio.to_thread(os.fsync, file.fileno())
    if empty:
        target.mkdir()  # noqa: ASYNC240 - as quick as a look-up


def _publish(temporary: Path, path: Path) -> None:
    for folder, _, names in os.walk(temporary):
        Path(folder).chmod(0o755)
        for name in names:
            Path(folder, name).chmod(0o444)
    if temporary.is_file():
        temporary.chmod(0o444)
    temporary.rename(path)


def remove_tree(path: Path) -> None:
    """A file or folder and all below it; nothing when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
