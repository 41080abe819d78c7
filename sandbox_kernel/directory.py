"""The session directory: its layout, its lock, and how the host replaces its own files in it.

What the kernel may have written there is opened by :mod:`sandbox_kernel.untrusted` only; its names stand here too.
"""

# pathlib has neither descriptors nor "do not follow".
# ruff: noqa: PTH102, PTH105, PTH108, PTH115, PTH211

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import time
import weakref
from pathlib import Path
from types import TracebackType

from sandbox_kernel.errors import InvalidSessionId, SessionHeld, UntrustedPath
from sandbox_kernel.untrusted import FOLDER, Found, Refusal, open_untrusted, read_untrusted, scan_untrusted

__all__ = [
    "Found",
    "Refusal",
    "SessionDirectory",
    "SessionLock",
    "check_session_id",
    "open_untrusted",
    "read_untrusted",
    "replace_file",
    "scan_untrusted",
    "session_id_rule",
]

session_id_rule = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""The rule of session ids, as a regular expression."""


def check_session_id(session_id: str) -> str:
    """``session_id`` itself. Raises InvalidSessionId, naming the rule."""
    if not isinstance(session_id, str) or re.fullmatch(session_id_rule, session_id) is None:
        raise InvalidSessionId(f"session id {session_id!r} is not allowed; it must match {session_id_rule}")
    return session_id


class SessionDirectory:
    """The folder of one session: paths (all absolute) and layout, nothing of its content."""

    def __init__(self, root: Path | str, session_id: str) -> None:
        """Raises InvalidSessionId. Creates nothing."""
        self.session_id = check_session_id(session_id)
        self.root = Path(root).absolute()
        self.path = self.root / session_id
        self.log = self.path / "session.log"
        self.metadata = self.path / "session_metadata.json"
        self.state_link = self.path / "python_state.json"
        self.state_dir = self.path / "state"
        self.artifacts = self.path / "artifacts"
        self.pending = self.path / ".pending"
        self.lock = self.path / ".lock"

    def create(self, kernel_uid: int, kernel_gid: int) -> None:
        """Make the layout, or complete it. ``artifacts/`` and ``state/`` become the kernel's, mode 0700.

        Raises UntrustedPath when one of the folders is a link or no folder; OSError from the file system.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        _make_folder(self.path, 0o755, None)
        for folder in (self.artifacts, self.state_dir):
            _make_folder(folder, 0o700, (kernel_uid, kernel_gid) if os.geteuid() == 0 else None)
        target = "state/python_state.json"
        try:
            status = os.lstat(self.state_link)
        except FileNotFoundError:
            os.symlink(target, self.state_link)
            return
        if stat.S_ISLNK(status.st_mode) and os.readlink(self.state_link) == target:
            return
        if stat.S_ISDIR(status.st_mode):
            raise UntrustedPath(f"{self.state_link} is a folder; move it away")
        if stat.S_ISREG(status.st_mode) and not os.path.lexists(self.state_dir / "python_state.json"):
            # The document's plain form, written by another program: the snapshot stays readable where it was.
            os.replace(self.state_link, self.state_dir / "python_state.json")
        else:
            os.unlink(self.state_link)
        os.symlink(target, self.state_link)


def _make_folder(path: Path, mode: int, owner: tuple[int, int] | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
    try:
        fd = os.open(path, FOLDER)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise UntrustedPath(f"{path} is a link or no folder; move it away") from None
        raise
    try:
        if owner is not None:
            os.fchown(fd, *owner)
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


# --- the lock ---------------------------------------------------------------------------------

_held: weakref.WeakSet[SessionLock] = weakref.WeakSet()


def _close_after_fork() -> None:
    # A forked child must not keep its parent's session held.
    for lock in list(_held):
        lock._close()


class SessionLock:
    """``flock`` on a session's ``.lock``; dies with its holder and is not inherited by children.

    The file's content, ``<pid> <host>``, is for messages only.
    """

    PROBE_S = 0.2
    """How long :meth:`acquire` bears with a conflict: another process's :meth:`holder` locks for an instant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock. Raises SessionHeld (names the holder's pid), UntrustedPath for a link, OSError."""
        if self._fd is not None:
            return
        deadline = time.monotonic() + self.PROBE_S
        while True:
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
                os.close(fd)
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                pid, _, host = text.partition(" ")
                raise SessionHeld(
                    f"session {self.path.parent.name!r} is held by process {pid or 'unknown'} ({host or 'this host'}); "
                    "stop that process, or use another session id"
                ) from None
            if _same_file(os.fstat(fd), self.path):
                break
            os.close(fd)  # the folder was removed and made anew meanwhile
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; without effect when it is not held."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise UntrustedPath(f"{self.path} is a link; remove it") from None
            raise

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.close(fd)

    @staticmethod
    def holder(path: Path) -> int | None:
        """The pid of the living process that holds the lock at ``path``; None when nobody does. 0: it did not say."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pid = os.pread(fd, 200, 0).split(b" ")[0]
            return int(pid) if pid.isdigit() else 0
        finally:
            os.close(fd)

    def __enter__(self) -> SessionLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


os.register_at_fork(after_in_child=_close_after_fork)


def _same_file(status: os.stat_result, path: Path) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == (there.st_dev, there.st_ino)


# --- the host's own files ---------------------------------------------------------------------


def replace_file(path: Path, data: bytes, *, fsync: bool = False, mode: int = 0o644) -> None:
    """Put ``data`` at ``path`` at once or not at all; ``fsync``: it survives the machine's death. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
