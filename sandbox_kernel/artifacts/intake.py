"""Intake: how the bytes of one hostile file become a blob.

While its cell runs a file is copied, and taken only if nothing changed meanwhile. After the cell it is adopted without
copying where that is safe: hard-linked into the store, made root's and read-only, and then asked of the Linux kernel
(a read lease) that nobody has it open for writing, mappings included. Then nobody can change the bytes any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mimetypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from sandbox_kernel.artifacts.blobs import BlobFolder, store_reason
from sandbox_kernel.errors import ArtifactRefused, UntrustedPath
from sandbox_kernel.untrusted import Below, Found, Refusal, adopted, file_identity

CHUNK = 2**20
_ADOPT_FROM = CHUNK
"""Smaller files are copied unless they are many: so a kernel that opens its file again is not turned away."""
BIG = 8 * CHUNK
"""From this size on, the disk writes while the processor hashes, and both while other files are taken."""

_TYPES = {
    ".parquet": "application/vnd.apache.parquet",
    ".feather": "application/vnd.apache.arrow.file",
    ".arrow": "application/vnd.apache.arrow.file",
    ".ipynb": "application/x-ipynb+json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".npy": "application/x-npy",
    ".pkl": "application/x-pickle",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"PAR1", "application/vnd.apache.parquet"),
    (b"ARROW1", "application/vnd.apache.arrow.file"),
    (b"SQLite format 3\x00", "application/vnd.sqlite3"),
    (b"\x89HDF\r\n\x1a\n", "application/x-hdf5"),
)
_STARTS = tuple(magic for magic, _ in _MAGIC)


@dataclass(slots=True)
class Taken:
    """Bytes that are in ``tmp/`` under the name ``temporary``, or a blob already (None)."""

    path: str
    sha256: str
    size_bytes: int
    content_type: str
    identity: tuple[int, ...]
    temporary: str | None
    hashing: Future[tuple[str, bytes]] | None = None
    """Of a big file, what :meth:`hashed` waits for."""

    def hashed(self) -> None:
        """``sha256`` and ``content_type`` are known from now on. Raises OSError."""
        if self.hashing is not None:
            self.sha256, head = self.hashing.result()
            self.content_type = type_of(self.path, head)


def type_of(path: str, head: bytes) -> str:
    """The MIME type by the name's suffix, else by the first bytes."""
    suffix = f".{path.rpartition('.')[2].lower()}"
    known = _TYPES.get(suffix) or mimetypes.types_map.get(suffix)
    if known is not None:
        return known
    if head.startswith(_STARTS):
        return next(name for magic, name in _MAGIC if head.startswith(magic))
    try:
        head[:512].decode("utf-8")
    except UnicodeDecodeError as exc:
        if exc.start < len(head) - 3:  # else the head ends within a character
            return "application/octet-stream"
    return "application/octet-stream" if b"\0" in head else "text/plain"


def open_for_writing(fd: int) -> bool | None:
    """Whether anybody has the file open for writing, shared mappings included; None: this file system cannot tell."""
    try:
        # A breaker's signal would be SIGIO, which ends a process; SIGURG is ignored by default.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as exc:
        return True if exc.errno in (errno.EAGAIN, errno.EBUSY) else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def never() -> bool:
    """Nothing is given up."""
    return False


def take(
    blobs: BlobFolder,
    below: Below,
    found: Found,
    *,
    ended: bool,
    force: bool = False,
    many: bool = False,
    give_up: Callable[[], bool] = never,
    threads: Executor | None = None,
) -> Taken | Refusal | None:
    """The bytes of ``found``; a Refusal (a full store too); or None: gone, still open, or changing, so not now.

    ``ended``: its cell has ended, so it may be adopted. ``force``: nobody is left who could close it.
    ``many``: one of very many, so that quickness counts. While ``give_up()``, nothing is copied. ``threads`` hash what
    is big and adopted.
    """
    identity = file_identity(found.status)
    try:
        fd, status = below.open(found.path, finish_adopted=True)
    except FileNotFoundError:
        return None
    except (UntrustedPath, ArtifactRefused) as exc:
        return Refusal(found.path, str(exc), found.status.st_size, identity)
    except OSError as exc:
        return Refusal(found.path, store_reason(exc), found.status.st_size, identity)
    try:
        if file_identity(status) != identity:
            return None  # changed since it was found, by somebody who runs on: it is seen again when it is closed
        if adopted(status) and (taken := _finish(blobs, fd, found.path, status)) is not None:
            return taken
        writing = open_for_writing(fd)
        if writing and not force:
            return None
        if ended and _adoptable(blobs, status, writing, many):
            taken = _adopt(blobs, fd, found.path, status, threads)
            if taken is not None:
                return taken
        return _copy(blobs, fd, found.path, status, force=force, give_up=give_up)
    except OSError as exc:
        return Refusal(found.path, store_reason(exc), found.status.st_size, identity)
    finally:
        os.close(fd)


def _adoptable(blobs: BlobFolder, status: os.stat_result, writing: bool | None, many: bool) -> bool:
    # Where host and kernel share a uid the kernel could open the blob for writing again: copy.
    foreign = os.geteuid() == 0
    fitting = writing is False and status.st_dev == blobs.device
    return foreign and fitting and status.st_size >= (1 if many else _ADOPT_FROM)


def _adopt(blobs: BlobFolder, fd: int, path: str, status: os.stat_result, threads: Executor | None) -> Taken | None:
    """None when it cannot be linked or somebody opened it for writing meanwhile; then everything is as before."""
    name = blobs.new_name(link_of=status)
    try:
        # The open file itself, not its name: the name may have been swapped for something else since.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=blobs.tmp_fd, follow_symlinks=True)
    except OSError as exc:
        if exc.errno in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOENT):
            return None
        raise
    kept = False
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o400)
        if open_for_writing(fd) is not False:
            return None
        now = os.fstat(fd)  # only now: who had it open until a moment ago may have written to it
        if (now.st_size, now.st_mtime_ns, now.st_nlink) != (status.st_size, status.st_mtime_ns, 2):
            return None
        if threads is not None and status.st_size >= BIG:
            hashing = threads.submit(_hash_and_close, os.dup(fd), status.st_size)
            taken = Taken(path, "", status.st_size, "", file_identity(now), name, hashing)
        else:
            sha256, head = _hash(fd, status.st_size)
            taken = Taken(path, sha256, status.st_size, type_of(path, head), file_identity(now), name)
        kept = True
    finally:
        if not kept:
            blobs.drop(name)  # gives it back to its owner, too
    return taken


def _hash_and_close(fd: int, size: int) -> tuple[str, bytes]:
    try:
        return _hash(fd, size)
    finally:
        os.close(fd)


def _hash(fd: int, size: int) -> tuple[str, bytes]:
    """SHA-256 and first bytes, of a big file while the disk is already writing it. Raises OSError."""
    digest, head, offset = hashlib.sha256(), b"", 0
    with _syncing(fd) if size >= BIG else contextlib.nullcontext():
        while offset < size:
            data = os.pread(fd, min(CHUNK, size - offset), offset)
            if not data:
                break
            head = head or data[:512]
            digest.update(data)
            offset += len(data)
    return digest.hexdigest(), head


@contextlib.contextmanager
def _syncing(fd: int) -> Iterator[None]:
    failed: list[OSError] = []

    def sync() -> None:
        try:
            os.fsync(fd)
        except OSError as exc:  # Linux tells of a lost write once only
            failed.append(exc)

    thread = threading.Thread(target=sync)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]


def _finish(blobs: BlobFolder, fd: int, path: str, status: os.stat_result) -> Taken | None:
    """A file that a dead host had already made a blob, without living to record it."""
    sha256, head = _hash(fd, status.st_size)
    try:
        blob = blobs.path(sha256).stat()
    except FileNotFoundError:
        return None
    if (blob.st_dev, blob.st_ino) != (status.st_dev, status.st_ino):
        return None
    return Taken(path, sha256, status.st_size, type_of(path, head), file_identity(status), None)


def _copy(
    blobs: BlobFolder, fd: int, path: str, status: os.stat_result, *, force: bool, give_up: Callable[[], bool]
) -> Taken | None:
    """None when the file changed while it was read, or was given up."""
    digest, head, left, name, out = hashlib.sha256(), b"", status.st_size, "", -1
    kept = False
    try:
        while left > 0:
            data = os.read(fd, min(CHUNK, left))
            if not data or give_up():
                return None
            left -= len(data)
            head = head or data[:512]
            digest.update(data)
            if out < 0:
                if left == 0 and blobs.exists(digest.hexdigest()):
                    break  # small and known: nothing to write
                name, out = blobs.create()
            write_all(out, data)
        if not _unchanged(fd, status, force):
            return None
        sha256 = digest.hexdigest()
        if out < 0 and not blobs.exists(sha256):
            name, out = blobs.create()  # an empty file
        kept = True
        return Taken(path, sha256, status.st_size, type_of(path, head), file_identity(status), name or None)
    finally:
        if out >= 0:
            os.close(out)
            if not kept:
                blobs.drop(name)


def _unchanged(fd: int, status: os.stat_result, force: bool) -> bool:
    if file_identity(os.fstat(fd)) != file_identity(status):
        return False
    return force or not open_for_writing(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
