"""The one way in which the host opens and lists what a kernel may have written.

Everything below ``artifacts/`` and ``state/`` is hostile: reached from a directory descriptor, component by component,
never through a link, regular files only, bounded, and looked at again after it was opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
_BIG_FOLDER = 2**20
"""Bytes of a folder itself; ext4's keep the size they once had, and to find nothing in them takes longer and longer."""
UNSEEN = "the rest was not looked at"
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
    """Device, inode, size, mtime, ctime (ns): another value, another content. No kernel can forge its ctime.

    That of a file which is root's alone is left out: no kernel can touch it, and each name it gets or loses renews it.
    """
    ctime = 0 if status.st_uid == 0 and _taken(status) else status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, ctime)


def _taken(status: os.stat_result) -> bool:
    """Whether the host, run by root, has taken this file from its kernel."""
    return status.st_uid == 0 == os.geteuid() and status.st_mode & 0o7777 == 0o400


def printable(path: bytes | str) -> str:
    """``path`` as text that any JSON writer takes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def adopted(status: os.stat_result) -> bool:
    """Whether this second name of a file is our own doing: a root-owned 0400 blob that a dead host did not finish.

    A kernel cannot make such a file: it is not root.
    """
    return status.st_nlink == 2 and _taken(status)


class Below:
    """What lies below the hostile folder ``dir_fd``; a context manager, of one thread.

    The folder that was needed last stays open, for what lies together comes together. Whatever it is called by now, no
    link led to it, and from what is mounted into its container no kernel can move it away.
    """

    def __init__(self, dir_fd: int) -> None:
        self._root = self._fd = dir_fd
        self._folder = ""

    def __enter__(self) -> Below:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd != self._root:
            os.close(self._fd)
        self._fd, self._folder = self._root, ""

    def parent(self, path: str) -> tuple[int, str]:
        """A descriptor of the folder that holds ``path``, and the base name.

        Raises UntrustedPath for a link on the way or a path that leads out; FileNotFoundError.
        """
        folder, slash, name = path.rpartition("/")
        if name in _NOT_PLAIN or "\0" in path or (slash and not folder):
            raise _not_plain(path)
        if folder != self._folder:
            self.close()
            if folder:
                self._open(folder.split("/"), path)
                self._folder = folder
        return self._fd, name

    def _open(self, parts: list[str], path: str) -> None:
        if len(parts) > MAX_DEPTH or not _NOT_PLAIN.isdisjoint(parts):
            raise _not_plain(path)
        for part in parts:
            try:
                below = os.open(part, FOLDER, dir_fd=self._fd)
            except OSError as exc:
                self.close()
                if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise UntrustedPath(f"{printable(path)!r}: {printable(part)!r} is a link or no folder") from None
                raise
            if self._fd != self._root:
                os.close(self._fd)
            self._fd = below

    def open(self, path: str, *, finish_adopted: bool = False) -> tuple[int, os.stat_result]:
        """A read-only descriptor of the regular file ``path``, whatever the kernel does meanwhile, and its ``fstat``.

        ``finish_adopted`` also lets a file pass whose second name is our own (:func:`adopted`). Raises UntrustedPath
        (link, special file, hard link, way out), ArtifactRefused (replaced while it was opened, or leased),
        FileNotFoundError. Never blocks.
        """
        parent, name = self.parent(path)
        # Looked at first: opening a device may already do something.
        before = os.stat(name, dir_fd=parent, follow_symlinks=False)
        reason = refusal_of(before)
        if reason is not None and not (finish_adopted and adopted(before)):
            raise UntrustedPath(f"{printable(path)!r} is {reason}")
        try:
            fd = os.open(name, _FILE, dir_fd=parent)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENXIO):
                raise UntrustedPath(f"{printable(path)!r} was replaced while it was opened") from None
            if exc.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EPERM):
                raise ArtifactRefused(f"{printable(path)!r} cannot be opened: {os.strerror(exc.errno)}") from None
            raise
        try:
            after = os.fstat(fd)
            if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
                raise ArtifactRefused(f"{printable(path)!r} was replaced while it was opened")
            reason = refusal_of(after)
            if reason is not None and not (finish_adopted and adopted(after)):
                raise UntrustedPath(f"{printable(path)!r} is {reason}")
        except BaseException:
            os.close(fd)
            raise
        return fd, after

    def stat(self, path: str) -> os.stat_result:
        """``lstat`` of ``path``. Raises UntrustedPath (a link on the way), OSError."""
        parent, name = self.parent(path)
        return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def remove(self, path: str, identity: tuple[int, ...]) -> bool:
        """Unlink ``path`` if it is still the file of that :func:`file_identity`, and can be; whether it was.

        A folder may have been put in its place, and where the kernel has the host's uid it can make folders read-only.
        """
        try:
            parent, name = self.parent(path)
            if file_identity(os.stat(name, dir_fd=parent, follow_symlinks=False)) != identity:
                return False
            os.unlink(name, dir_fd=parent)
        except (OSError, UntrustedPath):
            return False
        return True


_NOT_PLAIN = frozenset(("", ".", ".."))


def _not_plain(path: str) -> UntrustedPath:
    return UntrustedPath(f"{printable(path)!r} is not a plain relative path")


def open_untrusted(dir_fd: int, path: bytes | str, *, max_bytes: int | None = None) -> int:
    """A read-only descriptor of the regular file ``path`` below ``dir_fd``.

    Raises as :meth:`Below.open`, and ArtifactRefused for more than ``max_bytes``. Never blocks.
    """
    with Below(dir_fd) as below:
        fd, status = below.open(os.fsdecode(path))
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(fd)
        raise ArtifactRefused(f"{printable(path)!r} has {status.st_size} bytes; at most {max_bytes} are taken")
    return fd


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


def is_empty(dir_fd: int) -> bool:
    """Whether nothing lies in a folder; False too where that cannot be seen (no descriptor left, say), or not at once:
    a scan sees."""
    try:
        if os.fstat(dir_fd).st_size > _BIG_FOLDER:
            return False
        with os.scandir(dir_fd) as entries:
            return next(entries, None) is None
    except OSError:
        return False


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
        yield Refusal(".", f"more than {max_entries} entries; {UNSEEN}")


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
            if not is_text(entry.name):
                yield _refusal(path, "a name that is not valid UTF-8", status)
            elif stat.S_ISDIR(status.st_mode):
                if depth <= 0:
                    yield _refusal(path, f"a folder more than {MAX_DEPTH} levels deep", status)
                    continue
                try:
                    below = os.open(entry.name, FOLDER, dir_fd=fd)
                except OSError as exc:
                    if exc.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE):
                        why = f"a folder that cannot be opened: {os.strerror(exc.errno)}"
                        yield _refusal(path, why, status)
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
                    yield _refusal(path, reason, status)


def _refusal(path: str, reason: str, status: os.stat_result) -> Refusal:
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return Refusal(printable(path), reason, size, file_identity(status))


def is_text(name: bytes | str) -> bool:
    """Whether ``name`` is valid UTF-8."""
    if name.isascii():
        return True
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
