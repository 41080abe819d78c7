"""The artifact store: blobs named by their SHA-256, and a catalog that says which session made which file.

    <root>/store.sqlite · <root>/blobs/ab/<sha256> · <root>/tmp/

Order of an ingest, so that a death at any point loses nothing and doubles nothing: bytes into ``tmp/`` → synced → named
in ``blobs/`` → rows committed → names in ``artifacts/`` removed. A row keeps the identity (inode, times) of the file it
was taken from: a file whose row is there is only removed. A blob without a row is found by its file, or by a repair.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import BinaryIO

from sandbox_kernel.artifacts.blobs import BlobFolder, store_reason
from sandbox_kernel.artifacts.catalog import Catalog, Latest, Row
from sandbox_kernel.artifacts.checking import Problem, check_store, open_catalog, rebuilt_catalog
from sandbox_kernel.artifacts.intake import CHUNK, Taken, never, take, type_of, write_all
from sandbox_kernel.artifacts.stored import Artifacts, Kind, StoredArtifacts
from sandbox_kernel.errors import ArtifactError, ArtifactRefused
from sandbox_kernel.events import Artifact, utc_now
from sandbox_kernel.untrusted import Found, Refusal, file_identity, remove_untrusted

MANY = 16
"""Files in one batch above which small ones too are adopted, not copied: freeing a copied file's blocks is slow."""

__all__ = ["ArtifactStore", "Ingested", "Problem"]


@dataclass(slots=True)
class Ingested:
    """What became of a batch of files."""

    created: list[Artifact] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    """They stay where they are."""
    waiting: list[str] = field(default_factory=list)
    """Paths that are still open, or changing."""


class ArtifactStore(StoredArtifacts):
    """Open it with :meth:`open`. Blocking; for any thread, and for any number of processes at once."""

    def __init__(self, root: Path, blobs: BlobFolder, catalog: Catalog, max_artifact: int, max_session: int) -> None:
        super().__init__(root, blobs, catalog)
        self.max_artifact_bytes = max_artifact
        self.max_session_bytes = max_session

    @classmethod
    def open(
        cls, root: Path | str, *, max_artifact_bytes: int = 2 * 2**30, max_session_bytes: int = 20 * 2**30
    ) -> ArtifactStore:
        """The store at ``root``, made when it is not there; what dead processes left is cleared.

        A corrupt catalog is moved aside and made anew from what it still says and from the session logs beside it.
        Raises ArtifactError naming the folder and the cause.
        """
        root = Path(root).absolute()
        try:
            blobs = BlobFolder(root)
            with blobs.exclusive():
                catalog = open_catalog(root)
        except OSError as exc:
            raise ArtifactError(f"the artifact store {root} cannot be opened: {exc.strerror}") from exc
        except sqlite3.OperationalError as exc:
            raise ArtifactError(f"the artifact store {root} cannot be opened: {exc}") from exc
        return cls(root, blobs, catalog, max_artifact_bytes, max_session_bytes)

    def close(self) -> None:
        self.catalog.close()
        self.blobs.close()

    def __enter__(self) -> ArtifactStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- writing ---------------------------------------------------------------------------

    def put_blobs(self, blobs: Mapping[str, bytes]) -> None:
        """Keep pictures that a log refers to, by their SHA-256; one sync for all. Raises ArtifactRefused (no room)."""
        with _room():
            self.blobs.put(blobs)
        self.catalog.add_pictures((sha256, len(data)) for sha256, data in blobs.items())

    def put_bytes(
        self,
        session_id: str,
        path: str,
        data: bytes,
        *,
        kind: Kind,
        execution_count: int | None = None,
        msg_id: str | None = None,
        content_type: str | None = None,
    ) -> Artifact:
        """Record ``data`` as an artifact. Raises ArtifactRefused (too big, session full, no room)."""
        return self.put_stream(
            session_id,
            path,
            (data,),
            kind=kind,
            execution_count=execution_count,
            msg_id=msg_id,
            content_type=content_type,
        )

    def put_stream(
        self,
        session_id: str,
        path: str,
        source: BinaryIO | Iterable[bytes],
        *,
        kind: Kind,
        execution_count: int | None = None,
        msg_id: str | None = None,
        content_type: str | None = None,
    ) -> Artifact:
        """Record what ``source`` (a binary file or chunks) yields as an artifact; the memory used is one chunk.

        Raises ArtifactRefused (too big, session full, no room), and what ``source`` raises.
        """
        left = self.max_session_bytes - self.catalog.usage(session_id)
        with _room():
            name, fd = self.blobs.create()
        digest, head, size = new_sha256(), b"", 0
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for chunk in _chunks(source):
                    size += len(chunk)
                    reason = self._too_much(size, left)
                    if reason is not None:
                        raise ArtifactRefused(f"{path!r} {reason}")
                    digest.update(chunk)
                    head = head or chunk[:512]
                    with _room():
                        write_all(file.fileno(), chunk)
            taken = Taken(path, digest.hexdigest(), size, content_type or type_of(path, head), (), name)
            with _room():
                self.blobs.place([(name, taken.sha256)])
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self.blobs.drop(name)
            raise
        return self.catalog.add([(_draft(taken, session_id, kind, execution_count, msg_id), None)])[0]

    def _too_much(self, size: int, left: int) -> str | None:
        if size > self.max_artifact_bytes:
            return f"has {size} bytes or more; max_artifact_bytes is {self.max_artifact_bytes}"
        if size > left:
            return f"would take the session past max_session_artifacts_bytes ({self.max_session_bytes})"
        return None

    def ingest(
        self,
        session_id: str,
        dir_fd: int,
        found: Sequence[Found],
        *,
        ended: bool,
        force: bool = False,
        give_up: Callable[[], bool] = never,
        execution_count: int | None = None,
        msg_id: str | None = None,
        on_committed: Callable[[Artifacts], None] | None = None,
    ) -> Ingested:
        """Take files below the hostile folder ``dir_fd`` as artifacts: one transaction for all of them.

        ``ended``: the cell that wrote them has ended, so what is recorded is removed; ``force``: so has the kernel, so
        nothing is still open. While ``give_up()``, copying stops: what is not finished waits. ``on_committed`` is
        called before the files are removed. A store without room refuses.
        """
        result = Ingested()
        fresh: list[Taken] = []
        wanted: list[Found] = []
        touched: dict[str, str] = {}
        remove: list[tuple[str, tuple[int, ...]]] = []
        left = self.max_session_bytes - self.catalog.usage(session_id)
        known = self.catalog.latest(session_id, [item.path for item in found])
        for item in found:
            identity = file_identity(item.status)
            before = known.get(item.path)
            if before is not None and before[2] == _source(identity):
                remove.append((item.path, identity))
                continue
            reason = self._too_much(item.status.st_size, left)
            if reason is not None:
                result.refused.append(Refusal(item.path, reason, item.status.st_size, identity))
                continue
            left -= item.status.st_size
            wanted.append(item)
        many = len(wanted) > MANY
        for item in wanted:
            taken = take(self.blobs, dir_fd, item, ended=ended, force=force, many=many, give_up=give_up)
            if taken is None:
                result.waiting.append(item.path)
            elif isinstance(taken, Refusal):
                result.refused.append(taken)
            else:
                fresh.append(taken)
                before = known.get(item.path)
                if before is not None and _touched(before, taken):
                    touched[item.path] = before[0]
        try:
            self._record(result, session_id, dir_fd, fresh, touched, execution_count, msg_id)
        except ArtifactRefused as exc:
            result.refused += [Refusal(t.path, str(exc), t.size_bytes, t.identity) for t in fresh]
            fresh, result.created = [], []
        if result.created and on_committed is not None:
            on_committed(result.created)
        if ended:
            for path, identity in (*remove, *((taken.path, taken.identity) for taken in fresh)):
                remove_untrusted(dir_fd, path, identity)
        return result

    def _record(
        self,
        result: Ingested,
        session_id: str,
        dir_fd: int,
        fresh: Sequence[Taken],
        touched: dict[str, str],
        execution_count: int | None,
        msg_id: str | None,
    ) -> None:
        try:
            with _room():
                self.blobs.place((taken.temporary, taken.sha256) for taken in fresh if taken.temporary is not None)
        except ArtifactRefused:
            for taken in fresh:
                if taken.temporary is not None:
                    with contextlib.suppress(OSError):
                        self.blobs.drop(taken.temporary)
            raise
        finally:
            for taken in fresh:
                taken.settle(dir_fd)
        rows: list[Row] = []
        renewed: list[tuple[str, str]] = []
        for taken in fresh:
            source = _source(taken.identity)
            if taken.path in touched:
                renewed.append((source, touched[taken.path]))
            else:
                rows.append((_draft(taken, session_id, "file", execution_count, msg_id), source))
        if rows or renewed:
            result.created = self.catalog.add(rows, renewed=renewed)

    # -- the books -------------------------------------------------------------------------

    def recover(self) -> None:
        """Give back files that a process which has died was about to take; opening the store does it too."""
        with contextlib.suppress(OSError):
            self.blobs.recover()

    def unlogged(self, session_id: str) -> Artifacts:
        """Artifacts whose ``artifacts_created`` line may be missing, because a host died in between."""
        return self.catalog.list({"session_id": session_id, "logged": 0})

    def mark_logged(self, ids: Sequence[str]) -> None:
        """Their line is in the log. Raises ArtifactRefused when the catalog cannot be written."""
        if ids:
            self.catalog.mark_logged(ids)

    def usage(self, session_id: str) -> int:
        """Bytes of all artifacts of a session together."""
        return self.catalog.usage(session_id)

    def check(self, *, repair: bool = False) -> Sequence[Problem]:
        """Compare catalog and blobs, reading every blob; with ``repair`` mend what can be mended."""
        problems: list[Problem] = []
        if not self.catalog.sound():
            problems.append(Problem("catalog", str(self.catalog.path), "corrupt", repair))
            if repair:
                with self.blobs.exclusive():
                    self.catalog.close()
                    self.catalog = rebuilt_catalog(self.root)
        return [*problems, *check_store(self.blobs, self.catalog, repair=repair)]


def _source(identity: tuple[int, ...]) -> str:
    return " ".join(map(str, identity))


def _touched(before: Latest, taken: Taken) -> bool:
    """Whether a known file has only got another ctime (chmod, a second name come and gone): no new version."""
    _, sha256, source = before
    return source is not None and sha256 == taken.sha256 and source.split()[:4] == _source(taken.identity[:4]).split()


def _draft(taken: Taken, session_id: str, kind: Kind, execution_count: int | None, msg_id: str | None) -> Artifact:
    # All of it is ours: checking each field again would be a fifth of an ingest of very many files.
    return Artifact.model_construct(
        id=f"art_{secrets.token_hex(8)}",
        filename=taken.path.rpartition("/")[2],
        path=taken.path,
        size_bytes=taken.size_bytes,
        sha256=taken.sha256,
        content_type=taken.content_type,
        session_id=session_id,
        execution_count=execution_count,
        msg_id=msg_id,
        version=1,
        kind=kind,
        created_at=utc_now(),
    )


def _chunks(source: BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if hasattr(source, "read"):
        while chunk := source.read(CHUNK):
            yield chunk
    else:
        yield from source


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """The one place where the file system's errors become ArtifactRefused."""
    try:
        yield
    except OSError as exc:
        raise ArtifactRefused(store_reason(exc)) from exc
