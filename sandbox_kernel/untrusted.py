"""The one way in which the host opens and lists what a kernel may have written.

Everything below ``artifacts/`` and ``state/`` is hostile: reached from a directory descriptor, component by component,
never through a link, regular files only, bounded, and looked at again after it was opened.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ArtifactRefused, UntrustedPath

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags for opening a folder that may have been swapped for a link."""
# O_NONBLOCK: neither a FIFO nor a lease that the kernel took on its own file can make the host wait.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

MAX_DEPTH = 64
MAX_ENTRIES = 200_000
"""Entries that one scan looks at: half a second. Whoever leaves more there waits for it at each of its cells."""
MAX_REFUSALS = 10_000
"""Refusals that one scan tells of one by one; a kernel can make links as quickly as files."""
_SHOWN = 1_000


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file below a hostile folder: its path (POSIX, valid UTF-8) and what ``lstat`` said."""

    path: str
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that is not taken, and why. ``path`` is printable text (undecodable bytes as ``\\xff``), cut in the
    middle where it is long."""

    path: str
    reason: str
    size_bytes: int = 0
    identity: tuple[int, ...] = ()
    """Changes when the thing changes; see :func:`file_identity`."""

    def __post_init__(self) -> None:
        if len(self.path) > _SHOWN:
            cut = f"{self.path[: _SHOWN // 2]}[...]{self.path[-_SHOWN // 2 :]}"
            object.__setattr__(self, "path", cut)


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size, mtime, ctime (ns): another value, another content. No kernel can forge its ctime."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def printable(path: bytes | str) -> str:
    """``path`` as text that any JSON writer takes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def adopted(status: os.stat_result) -> bool:
    """Whether this second name of a file is our own doing: a root-owned 0400 blob that a dead host did not finish.

    A kernel cannot make such a file: it is not root.
    """
    return status.st_nlink == 2 and status.st_uid == 0 == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o400


@contextlib.contextmanager
def parent_of(dir_fd: int, path: bytes | str) -> Iterator[tuple[int, bytes]]:
    """A descriptor of the folder that holds ``path`` below ``dir_fd``, and the base name.

    Raises UntrustedPath for a link on the way or a path that leads out; FileNotFoundError.
    """
    parts = os.fsencode(path).split(b"/")
    if len(parts) > MAX_DEPTH + 1 or any(part in (b"", b".", b"..") or b"\0" in part for part in parts):
        raise UntrustedPath(f"{printable(path)!r} is not a plain relative path")
    fd = dir_fd
    try:
        for part in parts[:-1]:
            try:
                below = os.open(part, FOLDER, dir_fd=fd)
            except OSError as exc:
                if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise UntrustedPath(f"{printable(path)!r}: {printable(part)!r} is a link or no folder") from None
                raise
            if fd != dir_fd:
                os.close(fd)
            fd = below
        yield fd, parts[-1]
    finally:
        if fd != dir_fd:
            os.close(fd)


def open_untrusted(
    dir_fd: int, path: bytes | str, *, max_bytes: int | None = None, finish_adopted: bool = False
) -> int:
    """A read-only descriptor of the regular file ``path`` below ``dir_fd``, whatever the kernel does meanwhile.

    ``finish_adopted`` also lets a file pass whose second name is our own (:func:`adopted`).
    Raises UntrustedPath (link, special file, hard link, way out), ArtifactRefused (more than ``max_bytes``, or replaced
    while it was opened, or leased), FileNotFoundError. Never blocks.
    """
    with parent_of(dir_fd, path) as (parent, name):
        return _open_checked(parent, name, printable(path), max_bytes, finish_adopted)


def _open_checked(parent: int, name: bytes, shown: str, max_bytes: int | None, finish_adopted: bool) -> int:
    # Looked at first: opening a device may already do something.
    before = os.stat(name, dir_fd=parent, follow_symlinks=False)
    reason = refusal_of(before)
    if reason is not None and not (finish_adopted and adopted(before)):
        raise UntrustedPath(f"{shown!r} is {reason}")
    try:
        fd = os.open(name, _FILE, dir_fd=parent)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            raise UntrustedPath(f"{shown!r} was replaced while it was opened") from None
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EPERM):
            raise ArtifactRefused(f"{shown!r} cannot be opened: {os.strerror(exc.errno)}") from None
        raise
    try:
        after = os.fstat(fd)
        if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
            raise ArtifactRefused(f"{shown!r} was replaced while it was opened")
        reason = refusal_of(after)
        if reason is not None and not (finish_adopted and adopted(after)):
            raise UntrustedPath(f"{shown!r} is {reason}")
        if max_bytes is not None and after.st_size > max_bytes:
            raise ArtifactRefused(f"{shown!r} has {after.st_size} bytes; at most {max_bytes} are taken")
    except BaseException:
        os.close(fd)
        raise
    return fd


def stat_untrusted(dir_fd: int, path: bytes | str) -> os.stat_result:
    """``lstat`` of ``path`` below ``dir_fd``. Raises UntrustedPath (a link on the way), OSError."""
    with parent_of(dir_fd, path) as (parent, name):
        return os.stat(name, dir_fd=parent, follow_symlinks=False)


def remove_untrusted(dir_fd: int, path: str, identity: tuple[int, ...]) -> bool:
    """Unlink ``path`` below ``dir_fd`` if it is still the file of that :func:`file_identity`; whether it was."""
    try:
        with parent_of(dir_fd, path) as (parent, name):
            if file_identity(os.stat(name, dir_fd=parent, follow_symlinks=False)) != identity:
                return False
            os.unlink(name, dir_fd=parent)
    except (FileNotFoundError, UntrustedPath):
        return False
    return True


def read_untrusted(dir_fd: int, path: bytes | str, *, max_bytes: int) -> bytes:
    """The content of ``path`` below ``dir_fd``, at most ``max_bytes``. Raises as :func:`open_untrusted`."""
    fd = open_untrusted(dir_fd, path, max_bytes=max_bytes)
    with os.fdopen(fd, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ArtifactRefused(f"{printable(path)!r} grew past {max_bytes} bytes while it was read")
    return data


def refusal_of(status: os.stat_result) -> str | None:
    """Why a thing of this ``lstat`` is never read: ``"a link"``, ``"a FIFO"``, ...; None for a plain regular file."""
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return None if status.st_nlink == 1 else f"a hard link ({status.st_nlink} names)"
    for test, what in (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISDIR, "a folder"),
    ):
        if test(mode):
            return what
    return "no regular file"


OnFolder = Callable[[str, int], object]


@dataclass
class _Count:
    left: int
    refusals: int = 0


def scan_untrusted(
    dir_fd: int, *, max_entries: int = MAX_ENTRIES, max_depth: int = MAX_DEPTH, on_folder: OnFolder | None = None
) -> Iterator[Found | Refusal]:
    """Everything below ``dir_fd``, never through a link: regular files as Found, all else but folders as Refusal.

    Past ``max_entries`` or ``max_depth`` a Refusal names what was left out; what vanishes meanwhile is left out.
    ``on_folder`` gets each sub-folder's path and descriptor before it is listed. One scan of a ``dir_fd`` at a time.
    """
    count = _Count(max_entries)
    for item in _scan(dir_fd, "", count, max_depth, on_folder):
        if isinstance(item, Refusal):
            count.refusals += 1
            if count.refusals > MAX_REFUSALS:
                continue
        yield item
    if count.refusals > MAX_REFUSALS:
        yield Refusal(".", f"{count.refusals - MAX_REFUSALS} more that are not taken")
    if count.left < 0:
        yield Refusal(".", f"more than {max_entries} entries; the rest was not looked at")


def _scan(fd: int, prefix: str, count: _Count, depth: int, on_folder: OnFolder | None) -> Iterator[Found | Refusal]:
    with os.scandir(fd) as entries:
        for entry in entries:
            count.left -= 1
            if count.left < 0:
                return
            path = prefix + entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            identity = file_identity(status)
            if not is_text(entry.name):
                yield Refusal(printable(path), "a name that is not valid UTF-8", status.st_size, identity)
            elif stat.S_ISDIR(status.st_mode):
                if depth <= 0:
                    yield Refusal(printable(path), f"a folder more than {MAX_DEPTH} levels deep", 0, identity)
                    continue
                try:
                    below = os.open(entry.name, FOLDER, dir_fd=fd)
                except OSError as exc:
                    if exc.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE):
                        why = f"a folder that cannot be opened: {os.strerror(exc.errno)}"
                        yield Refusal(printable(path), why, 0, identity)
                    continue  # swapped for a link or gone since: the next scan sees what it is now
                try:
                    if on_folder is not None:
                        on_folder(path, below)
                    yield from _scan(below, path + "/", count, depth - 1, on_folder)
                finally:
                    os.close(below)
            else:
                reason = refusal_of(status)
                if reason is None or adopted(status):
                    yield Found(path, status)
                else:
                    yield Refusal(printable(path), reason, status.st_size, identity)


def remove_tree(path: Path) -> None:
    """Remove a folder that a kernel could write, with all below it, however deep. What cannot be removed stays.

    Folders are moved to the top before they are emptied, so that it takes neither recursion nor a descriptor per level;
    no link is followed.
    """
    try:
        top = os.open(path, FOLDER)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        return
    try:
        names = (f".removed-{secrets.token_hex(16)}".encode() for _ in itertools.repeat(None))
        folders = _emptied(top, top, names)
        while folders:
            name = folders.pop()
            with contextlib.suppress(OSError):
                folder = os.open(name, FOLDER, dir_fd=top)
                try:
                    folders += _emptied(folder, top, names)
                finally:
                    os.close(folder)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        path.rmdir()


def _emptied(folder: int, top: int, names: Iterator[bytes]) -> list[bytes]:
    """Unlink what is in ``folder``; its folders get new names in ``top``, which are returned."""
    moved = []
    with os.scandir(folder) as entries:
        found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        with contextlib.suppress(OSError):
            if is_folder:
                new = next(names)
                os.rename(name, new, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(new)
            else:
                os.unlink(name, dir_fd=folder)
    return moved


def is_text(name: bytes | str) -> bool:
    """Whether ``name`` is valid UTF-8."""
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
