"""The blobs: files named by the SHA-256 of their bytes, and the room where they are made.

    blobs/ab/<sha256>     complete, synced, never written again
    tmp/<owner>/          of one living process; `.lock` is flocked by it

A blob gets its name only after its bytes are on the disk, so that what bears a name can be trusted after a power cut.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import secrets
import stat
import weakref
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sandbox_kernel.untrusted import FOLDER

_SYNC_EACH = 8
"""Up to so many new blobs are synced one by one; above, the whole file system at once, unless four times as many files
have bytes that are blobs already: those would be written too, and freeing what was written is slow."""
_LINK = re.compile(r"link-(\d+)-(\d+)-([0-7]+)-\d+")
_libc = ctypes.CDLL(None, use_errno=True)

Named = tuple[str | None, str]
"""A file's name in ``tmp/`` and the SHA-256 of its bytes; None: it has its name as a blob already."""


class BlobFolder:
    """``blobs/`` and ``tmp/`` below one root. Thread-safe; any number of processes may share the root."""

    def __init__(self, root: Path) -> None:
        """Makes the folders and clears what dead processes left in ``tmp/``. Raises OSError."""
        self.root = root
        self.blobs = root / "blobs"
        self._prefix = str(self.blobs)
        self._tmp_root = root / "tmp"
        for folder in (root, self.blobs, self._tmp_root):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.device = root.stat().st_dev
        self._prefixes = {entry.name for entry in self.blobs.iterdir()}
        self._numbers = itertools.count()
        with self.exclusive():
            self._recover()
            self._tmp = self._tmp_root / f"{os.getpid()}-{secrets.token_hex(4)}"
            self._tmp.mkdir(mode=0o700)
            self._lock_fd = os.open(self._tmp / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self.tmp_fd = os.open(self._tmp, FOLDER)
        _held.add(self)

    def close(self) -> None:
        """Remove this process's room in ``tmp/``."""
        with self.exclusive():
            _clear(self._tmp)
        os.close(self.tmp_fd)
        self._release()

    def _release(self) -> None:
        _held.discard(self)
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only one process at a time is in here (opening, closing, repairing)."""
        fd = os.open(self._tmp_root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def recover(self) -> None:
        """Clear what processes that died since the opening left in ``tmp/``. Raises OSError."""
        with self.exclusive():
            self._recover()

    def _recover(self) -> None:
        for folder in self._tmp_root.iterdir():
            if not folder.is_dir():
                continue
            try:
                fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process lives
            else:
                _clear(folder)
            finally:
                os.close(fd)

    # -- paths -----------------------------------------------------------------------------

    def path(self, sha256: str) -> Path:
        return Path(self._name(sha256))

    def _name(self, sha256: str) -> str:
        return f"{self._prefix}/{sha256[:2]}/{sha256}"  # ten times as quick as a Path

    def exists(self, sha256: str) -> bool:
        """Whether the blob is there; then its ctime is renewed, so that a repair does not take it for an orphan."""
        name = self._name(sha256)
        if not os.access(name, os.F_OK):  # an exception per new blob would cost more than the rest
            return False
        with contextlib.suppress(FileNotFoundError):
            # Not utime: the mtime of an adopted file is part of its identity.
            os.chmod(name, 0o400)  # noqa: PTH101 (a Path takes ten times as long)
            return True
        return False

    def all(self) -> Iterator[Path]:
        """Every blob."""
        for prefix in sorted(self.blobs.iterdir()):
            if prefix.is_dir():
                yield from sorted(prefix.iterdir())

    # -- making ----------------------------------------------------------------------------

    def new_name(self, link_of: os.stat_result | None = None) -> str:
        """A free name in ``tmp_fd``; that of a hard link remembers whose the file was, for :func:`_clear`."""
        number = next(self._numbers)
        if link_of is None:
            return str(number)
        return f"link-{link_of.st_uid}-{link_of.st_gid}-{stat.S_IMODE(link_of.st_mode):o}-{number}"

    def create(self) -> tuple[str, int]:
        """A new file in ``tmp/``: name and write descriptor. Raises OSError."""
        name = self.new_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return name, os.open(name, flags, 0o400, dir_fd=self.tmp_fd)

    def drop(self, name: str) -> None:
        """Take a file out of ``tmp/`` again."""
        _drop(name, self.tmp_fd)

    @contextlib.contextmanager
    def writing(self) -> Iterator[int]:
        """What :meth:`sync` is to be given, from before the bytes are written. Raises OSError.

        Linux tells each descriptor once that something was lost since it was opened. If all used one, who syncs first
        would hear of another's loss, and that one never.
        """
        fd = os.open(".", FOLDER, dir_fd=self.tmp_fd)
        try:
            yield fd
        finally:
            os.close(fd)

    def place(self, files: Sequence[Named], since: int | None = None) -> None:
        """Sync ``files`` and give them their names, which are synced too. Raises OSError.

        ``since``: see :meth:`writing`; where there are but a few each is synced by itself.
        """
        fresh = self.fresh(files)
        self.sync(fresh, (), len(files) - len(fresh), since)
        self.name(files, fresh)
        self.sync((), files, len(files) - len(fresh), since)

    def fresh(self, files: Iterable[Named]) -> set[str]:
        """The names in ``tmp/`` of those whose bytes are no blob yet; of equal ones the first."""
        names: dict[str, str] = {}
        for name, sha256 in files:
            if name is not None and sha256 not in names and not self.exists(sha256):
                names[sha256] = name
        return set(names.values())

    def name(self, files: Sequence[Named], synced: Container[str]) -> None:
        """Give ``files`` their names as blobs, where their bytes have none; ``synced``: see :meth:`fresh`.

        Raises OSError.
        """
        prefixes = {sha256[:2] for _, sha256 in files} - self._prefixes
        for prefix in prefixes:
            (self.blobs / prefix).mkdir(mode=0o700, exist_ok=True)
        if prefixes:
            _fsync(self._prefix)  # the folder's own name is on the disk before a blob's
            self._prefixes |= prefixes
        for name, sha256 in files:
            if name is None:
                continue
            if name not in synced:
                if self.exists(sha256):
                    # Not `drop`: an adopted file stays root's until its record is committed and its name is removed.
                    os.unlink(name, dir_fd=self.tmp_fd)
                    continue
                _fsync(name, self.tmp_fd)  # its blob was there when `fresh` looked
            # Should another process have placed the same bytes meanwhile: one takes the other's place.
            os.rename(name, self._name(sha256), src_dir_fd=self.tmp_fd)

    def sync(self, names: Collection[str], named: Iterable[Named], spare: int, since: int | None) -> None:
        """Have on the disk the bytes of ``names`` in ``tmp/``, and the names that ``named`` have as blobs.

        ``spare``: how many more files there are, with bytes that are blobs already. ``since``: see :meth:`writing`.
        Raises OSError.
        """
        # Those that were spare too: another process may have placed their bytes, and not yet synced the name.
        folders = {sha256[:2] for _, sha256 in named}
        if since is not None and len(names) + len(folders) > max(_SYNC_EACH, spare // 4):
            if _libc.syncfs(since) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return
        for name in names:
            _fsync(name, self.tmp_fd)
        for folder in folders:
            _fsync(f"{self._prefix}/{folder}")

    def put(self, blobs: Mapping[str, bytes]) -> None:
        """Have these bytes as blobs, by their SHA-256. Raises OSError."""
        files: list[Named] = []
        try:
            with self.writing() as since:
                for sha256, data in blobs.items():
                    if self.exists(sha256):
                        files.append((None, sha256))  # whoever placed it may not have synced its name yet
                        continue
                    name, fd = self.create()
                    files.append((name, sha256))
                    with os.fdopen(fd, "wb") as file:
                        file.write(data)
                self.place(files, since)
        except BaseException:
            for temporary, _ in files:
                if temporary is not None:
                    with contextlib.suppress(OSError):  # it may have its name as a blob by now
                        self.drop(temporary)
            raise


def _fsync(path: str, dir_fd: int | None = None) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_held: weakref.WeakSet[BlobFolder] = weakref.WeakSet()


def _close_after_fork() -> None:
    # A child that outlives us must not keep our room: what lies in it would not be given back until it ends.
    for blobs in list(_held):
        blobs._release()


os.register_at_fork(after_in_child=_close_after_fork)


def _clear(folder: Path) -> None:
    """Remove a room in ``tmp/``."""
    fd = os.open(folder, FOLDER)
    try:
        for file in folder.iterdir():
            if file.name != ".lock":
                _drop(file.name, fd)
    finally:
        os.close(fd)
    (folder / ".lock").unlink(missing_ok=True)
    folder.rmdir()


def _drop(name: str, dir_fd: int) -> None:
    """Unlink a file of ``tmp/``; a hard link to a kernel's file gives that file back to its owner first."""
    match = _LINK.fullmatch(name)
    if match is not None and os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_uid == 0 == os.geteuid():
        # By name, which nobody else can reach: when no descriptor is left the file must not stay root's either.
        os.chown(name, int(match[1]), int(match[2]), dir_fd=dir_fd)
        os.chmod(name, int(match[3], 8), dir_fd=dir_fd)
    os.unlink(name, dir_fd=dir_fd)


def store_reason(exc: OSError) -> str:
    """Why the store could not take something, for a person: ``no space left on device``, ..."""
    return f"the artifact store cannot take it: {(exc.strerror or str(exc)).lower()}"
