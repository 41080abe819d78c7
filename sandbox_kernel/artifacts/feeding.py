"""The store blocks, an event loop must not: storing what arrives there, and work in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TypeVar

from sandbox_kernel.artifacts.ingest import Origin
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.stored import Kind
from sandbox_kernel.errors import ArtifactError, ArtifactRefused
from sandbox_kernel.events import Artifact

_T = TypeVar("_T")

Cell = tuple[str | None, int | None]
"""msg_id and execution_count of the cell that something is recorded under."""


async def put_chunks(
    store: ArtifactStore,
    session_id: str,
    path: str,
    chunks: AsyncIterator[bytes],
    kind: Kind,
    cell: Cell,
    committed: Callable[[Artifact], None] | None = None,
) -> Artifact:
    """``store.put_stream`` in a thread, fed from this loop; a cancelled caller leaves neither thread nor bytes."""
    pieces = _Pieces(chunks, asyncio.get_running_loop())
    put = partial(store.put_stream, session_id, path, pieces, kind=kind, msg_id=cell[0], execution_count=cell[1])
    return await _to_its_end(put, committed, pieces.stop)


async def put_together(
    store: ArtifactStore,
    files: Sequence[tuple[Origin, str, bytes]],
    committed: Callable[[Sequence[Artifact | ArtifactRefused]], None],
) -> None:
    """``store.put_files`` in a thread."""
    await _to_its_end(partial(store.put_files, files), committed)


async def _to_its_end(
    put: Callable[[], _T], committed: Callable[[_T], None] | None, stop: Callable[[], None] = lambda: None
) -> _T:
    """``put()`` in a thread; ``committed`` hears what came of it, also where the caller is cancelled."""
    writing = asyncio.ensure_future(asyncio.to_thread(put))
    try:
        return await asyncio.shield(writing)
    finally:
        stop()
        (done,) = await asyncio.gather(writing, return_exceptions=True)
        if committed is not None and not isinstance(done, BaseException):
            committed(done)


class _Pieces(Iterator[bytes]):
    """An asynchronous stream as an iterator for a thread, in pieces of a megabyte: each costs a change of threads."""

    SIZE = 2**20

    def __init__(self, chunks: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._chunks = chunks
        self._loop = loop
        self._next: Future[bytes] | None = None
        self._stopped = False

    def __next__(self) -> bytes:
        if self._stopped:
            raise CancelledError
        self._next = asyncio.run_coroutine_threadsafe(self._piece(), self._loop)
        piece = self._next.result()
        if not piece:
            raise StopIteration
        return piece

    async def _piece(self) -> bytes:
        parts, size = [], 0
        while size < self.SIZE and (chunk := await anext(self._chunks, b"")):
            parts.append(chunk)
            size += len(chunk)
        return b"".join(parts)

    def stop(self) -> None:
        """From the loop: nothing more will come."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()


async def in_thread(work: Callable[[], _T]) -> _T:
    """``work()`` in a thread. A cancelled caller waits for it all the same: it uses our descriptors."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
    except OSError as exc:
        raise ArtifactError(f"artifacts cannot be read: {exc}") from exc
