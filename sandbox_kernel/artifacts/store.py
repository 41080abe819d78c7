"""The artifact store: blobs named by their SHA-256, and a catalog that says which session made which file.

    <root>/store.sqlite · <root>/blobs/ab/<sha256> · <root>/tmp/

Order of an ingest, so that a death at any point loses nothing and doubles nothing: bytes into ``tmp/`` → synced → named
in ``blobs/`` → rows committed → names in ``artifacts/`` removed. A row keeps the identity (inode, times) of the file it
was taken from: a file whose row is there is only removed. A blob without a row is found by its file, or by a repair.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import BinaryIO

from sandbox_kernel.artifacts.blobs import BlobFolder
from sandbox_kernel.artifacts.catalog import Catalog
from sandbox_kernel.artifacts.checking import Problem, check_store, open_catalog, rebuilt_catalog
from sandbox_kernel.artifacts.ingest import Allowance, Ingest, Ingested, Origin, draft, room
from sandbox_kernel.artifacts.intake import CHUNK, Taken, never, type_of, write_all
from sandbox_kernel.artifacts.stored import Artifacts, Kind, StoredArtifacts
from sandbox_kernel.errors import ArtifactError, ArtifactRefused
from sandbox_kernel.events import Artifact

__all__ = ["ArtifactStore", "Ingested", "Problem"]


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
        with room():
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
        allowance = self._allowance(session_id)
        with room():
            name, fd = self.blobs.create()
        digest, head, size = new_sha256(), b"", 0
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for chunk in _chunks(source):
                    size += len(chunk)
                    reason = allowance.reason(size)
                    if reason is not None:
                        raise ArtifactRefused(f"{path!r} {reason}")
                    digest.update(chunk)
                    head = head or chunk[:512]
                    with room():
                        write_all(file.fileno(), chunk)
            taken = Taken(path, digest.hexdigest(), size, content_type or type_of(path, head), (), name)
            with room():
                self.blobs.place([(name, taken.sha256)])
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self.blobs.drop(name)
            raise
        return self.catalog.add([(draft(taken, Origin(session_id, execution_count, msg_id), kind), None)])[0]

    def put_files(self, files: Sequence[tuple[Origin, str, bytes]]) -> Sequence[Artifact | ArtifactRefused]:
        """Record small files ``(origin, path, bytes)`` of one session at once: what became of each, in their order."""
        allowance = self._allowance(files[0][0].session_id)
        done: dict[int, Artifact | ArtifactRefused] = {}
        for number, (_, path, data) in enumerate(files):
            reason = allowance.reason(len(data))
            if reason is None:
                allowance.left -= len(data)
            else:
                done[number] = ArtifactRefused(f"{path!r} {reason}")
        wanted = [number for number in range(len(files)) if number not in done]
        try:
            done |= zip(wanted, self._put_all([files[number] for number in wanted]), strict=True)
        except ArtifactRefused as exc:
            done |= dict.fromkeys(wanted, exc)
        return [done[number] for number in range(len(files))]

    def _put_all(self, files: Sequence[tuple[Origin, str, bytes]]) -> Artifacts:
        digests = [new_sha256(data).hexdigest() for _, _, data in files]
        with room():
            self.blobs.put({sha256: data for sha256, (_, _, data) in zip(digests, files, strict=True)})
        taken = (
            Taken(path, sha256, len(data), type_of(path, data[:512]), (), None)
            for sha256, (_, path, data) in zip(digests, files, strict=True)
        )
        return self.catalog.add(
            [(draft(one, origin, "file"), None) for one, (origin, _, _) in zip(taken, files, strict=True)]
        )

    def ingest(
        self,
        session_id: str,
        dir_fd: int,
        *,
        ended: bool,
        force: bool = False,
        give_up: Callable[[], bool] = never,
        execution_count: int | None = None,
        msg_id: str | None = None,
        on_committed: Callable[[Artifacts], None] | None = None,
    ) -> Ingest:
        """Takes files below the hostile folder ``dir_fd`` as artifacts: give them to its ``batch`` or ``batches``.

        ``ended``: the cell that wrote them has ended, so what is recorded is removed; ``force``: so has the kernel, so
        nothing is still open. While ``give_up()``, copying stops: what is not finished waits. ``on_committed`` is
        called before the files are removed, from any thread. A store without room refuses.
        """
        return Ingest(
            self.blobs,
            self.catalog,
            self._allowance(session_id),
            Origin(session_id, execution_count, msg_id),
            dir_fd,
            ended=ended,
            force=force,
            give_up=give_up,
            on_committed=on_committed,
        )

    def _allowance(self, session_id: str) -> Allowance:
        return Allowance(
            self.max_artifact_bytes, self.max_session_bytes, self.max_session_bytes - self.catalog.usage(session_id)
        )

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


def _chunks(source: BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if hasattr(source, "read"):
        while chunk := source.read(CHUNK):
            yield chunk
    else:
        yield from source
