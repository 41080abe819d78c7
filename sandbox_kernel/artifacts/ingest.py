"""The ingest of what a scan has found, batch after batch: bytes taken, synced, named, recorded, and the files removed.

While the disk writes one batch the next one is taken. More threads than the one that waits for the disk would not help:
what an ingest does is Python, and short calls of the Linux kernel.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from sandbox_kernel.artifacts.blobs import BlobFolder, Named, store_reason
from sandbox_kernel.artifacts.catalog import Catalog, Latest, Row
from sandbox_kernel.artifacts.intake import BIG, Taken, take
from sandbox_kernel.artifacts.stored import Artifacts, Kind
from sandbox_kernel.errors import ArtifactRefused
from sandbox_kernel.events import Artifact, utc_now
from sandbox_kernel.untrusted import Below, Found, Refusal, file_identity

MANY = 16
"""Files in one batch above which small ones too are adopted, not copied: freeing a copied file's blocks is slow."""
_THREADS = 3
"""One waits for the disk, and two hash what is big."""


@dataclass(slots=True)
class Ingested:
    """What became of a batch of files."""

    created: list[Artifact] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    """They stay where they are."""
    waiting: list[str] = field(default_factory=list)
    """Paths that are still open, or changing; or are recorded and could not be removed."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The session, and the cell where it is known, that artifacts are recorded under."""

    session_id: str
    execution_count: int | None
    msg_id: str | None


@dataclass(slots=True)
class Allowance:
    """How much a session may still bring."""

    max_artifact_bytes: int
    max_session_bytes: int
    left: int

    def reason(self, size: int) -> str | None:
        """Why ``size`` bytes are too many; None: they are not."""
        if size > self.max_artifact_bytes:
            return f"has {size} bytes or more; max_artifact_bytes is {self.max_artifact_bytes}"
        if size > self.left:
            return f"would take the session past max_session_artifacts_bytes ({self.max_session_bytes})"
        return None


@dataclass(slots=True)
class _Batch:
    """Files that are taken, and not yet recorded."""

    result: Ingested = field(default_factory=Ingested)
    fresh: list[Taken] = field(default_factory=list)
    latest: dict[str, Latest] = field(default_factory=dict)
    """What was recorded of their paths before."""
    known: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Path and identity of files whose row is there already."""
    unsynced: set[str] = field(default_factory=set)
    """Names in ``tmp/`` of bytes that are no blob yet."""

    def refuse(self, exc: ArtifactRefused) -> None:
        """The store does not take what is fresh."""
        self.result.refused += [Refusal(t.path, str(exc), t.size_bytes, t.identity) for t in self.fresh]
        self.fresh = []


class Ingest:
    """Made by ``ArtifactStore.ingest``, for one look at one session's files."""

    def __init__(
        self,
        blobs: BlobFolder,
        catalog: Catalog,
        allowance: Allowance,
        origin: Origin,
        dir_fd: int,
        *,
        ended: bool,
        force: bool,
        give_up: Callable[[], bool],
        on_committed: Callable[[Artifacts], None] | None,
    ) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._allowance = allowance
        self._origin = origin
        self._below = Below(dir_fd)
        self._since = -1
        self._ended = ended
        self._force = force
        self._give_up = give_up
        self._on_committed = on_committed

    def batch(self, found: Sequence[Found]) -> Ingested:
        """One transaction for all of them."""
        with self._working() as threads:
            batch = self._taken(found, threads)
            with self._refusing(batch):
                self._blobs.place(_files(taken for taken in batch.fresh if taken.hashing is None), self._since)
            self._hashed(batch)
            with self._refusing(batch):
                self._blobs.place(_files(taken for taken in batch.fresh if taken.hashing is not None), self._since)
            return self._recorded(batch)

    def batches(self, batches: Iterable[Sequence[Found]]) -> Iterator[Ingested]:
        """A transaction for each, which waits for the disk while the next one is taken. To be iterated to the end."""
        ahead = iter(batches)
        first, second = next(ahead, ()), next(ahead, ())
        if not second:
            yield self.batch(first)
            return
        taken = named = new = _Batch()
        with self._working() as threads:
            synced: Future[None] = Future()
            synced.set_result(None)
            try:
                for found in chain((first, second), ahead, ((), ())):
                    new = self._taken(found, threads)
                    self._hashed(new)
                    # The bytes of `taken` and the names of `named` are on the disk with one and the same sync.
                    with self._refusing(taken, named):
                        synced.result()
                    with self._refusing(taken):
                        self._blobs.name(_files(taken.fresh), taken.unsynced)
                    new.unsynced = self._blobs.fresh(_files(new.fresh))
                    spare = len(new.fresh) - len(new.unsynced)
                    synced = threads.submit(self._blobs.sync, new.unsynced, _files(taken.fresh), spare, self._since)
                    recorded, named, taken = named, taken, new
                    yield self._recorded(recorded)
            except BaseException:
                self._give_back(taken.fresh)
                self._give_back(new.fresh)
                raise

    @contextlib.contextmanager
    def _working(self) -> Iterator[Executor]:
        with (
            self._below,
            self._blobs.writing() as self._since,
            ThreadPoolExecutor(_THREADS, "artifacts") as threads,  # none is begun before it is needed
        ):
            yield threads

    # -- taking ----------------------------------------------------------------------------

    def _taken(self, found: Sequence[Found], threads: Executor) -> _Batch:
        batch = _Batch(latest=self._catalog.latest(self._origin.session_id, [item.path for item in found]))
        wanted: list[Found] = []
        for item in found:
            before = batch.latest.get(item.path)
            size, identity = item.status.st_size, file_identity(item.status)
            if before is not None and before[2] == _source(identity):
                batch.known.append((item.path, identity))
            elif (reason := self._allowance.reason(size)) is not None:
                batch.result.refused.append(Refusal(item.path, reason, size, identity))
            else:
                self._allowance.left -= size
                wanted.append(item)
        many = len(wanted) > MANY
        for item in sorted(wanted, key=lambda item: item.status.st_size < BIG):  # the others while these are hashed
            taken = take(
                self._blobs,
                self._below,
                item,
                ended=self._ended,
                force=self._force,
                many=many,
                give_up=self._give_up,
                threads=threads,
            )
            if isinstance(taken, Taken):
                batch.fresh.append(taken)
                continue
            self._allowance.left += item.status.st_size
            if taken is None:
                batch.result.waiting.append(item.path)
            else:
                batch.result.refused.append(taken)
        return batch

    def _hashed(self, batch: _Batch) -> None:
        """Wait for the hashes of the big ones."""
        for taken in list(batch.fresh):
            try:
                taken.hashed()
            except OSError as exc:
                batch.fresh.remove(taken)
                self._give_back([taken])
                reason = store_reason(exc)
                batch.result.refused.append(Refusal(taken.path, reason, taken.size_bytes, taken.identity))

    def _give_back(self, fresh: Iterable[Taken]) -> None:
        for taken in fresh:
            if taken.temporary is not None:
                with contextlib.suppress(OSError):
                    self._blobs.drop(taken.temporary)

    # -- booking ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _refusing(self, *batches: _Batch) -> Iterator[None]:
        """Where the store has no room all of ``batches`` are refused."""
        try:
            with room():
                yield
        except ArtifactRefused as exc:
            for batch in batches:
                self._give_back(batch.fresh)
                batch.refuse(exc)

    def _recorded(self, batch: _Batch) -> Ingested:
        result = batch.result
        rows: list[Row] = []
        renewed: list[tuple[str, str]] = []
        for taken in sorted(batch.fresh, key=lambda taken: taken.identity[3]):  # by age, as they were found
            source, before = _source(taken.identity), batch.latest.get(taken.path)
            if before is not None and _touched(before, taken):
                renewed.append((source, before[0]))
            else:
                rows.append((draft(taken, self._origin, "file"), source))
        if rows or renewed:
            try:
                result.created = self._catalog.add(rows, renewed=renewed)
            except ArtifactRefused as exc:
                batch.refuse(exc)
        if result.created and self._on_committed is not None:
            self._on_committed(result.created)
        if self._ended:
            for path, identity in (*batch.known, *((taken.path, taken.identity) for taken in batch.fresh)):
                if not self._below.remove(path, identity):
                    result.waiting.append(path)
        return result


def _files(fresh: Iterable[Taken]) -> list[Named]:
    return [(taken.temporary, taken.sha256) for taken in fresh]


def _source(identity: tuple[int, ...]) -> str:
    return " ".join(map(str, identity))


def _touched(before: Latest, taken: Taken) -> bool:
    """Whether a known file has only got another ctime (chmod, a second name come and gone): no new version."""
    _, sha256, source = before
    return source is not None and sha256 == taken.sha256 and source.split()[:4] == _source(taken.identity[:4]).split()


def draft(taken: Taken, origin: Origin, kind: Kind) -> Artifact:
    """The artifact that ``taken`` becomes, its version not yet counted."""
    return Artifact.made(
        id=f"art_{secrets.token_hex(8)}",
        filename=taken.path.rpartition("/")[2],
        path=taken.path,
        size_bytes=taken.size_bytes,
        sha256=taken.sha256,
        content_type=taken.content_type,
        session_id=origin.session_id,
        execution_count=origin.execution_count,
        msg_id=origin.msg_id,
        version=1,
        kind=kind,
        created_at=utc_now(),
    )


@contextlib.contextmanager
def room() -> Iterator[None]:
    """The one place where the file system's errors become ArtifactRefused."""
    try:
        yield
    except OSError as exc:
        raise ArtifactRefused(store_reason(exc)) from exc
