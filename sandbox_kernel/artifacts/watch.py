"""One inotify instance (watchdog's) for all sessions of a process: one thread, whatever the number of sessions.

watchdog's own recursive Observer is not used: it needs a thread per folder watched, and it walks a new folder by path,
through a link that a hostile kernel put in its place. Here a folder is watched by the descriptor it was scanned with.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, InotifyFD, Mask, WatchDescriptor

_MASK = Mask(
    InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_ONLYDIR
)
MAX_FOLDERS = 1000
"""Folders of one session that are watched; what lies in further ones is found when its cell ends."""

_lock = threading.Lock()
_shared: InotifyFD | None = None
_users = 0


def _acquire() -> InotifyFD:
    global _shared, _users
    with _lock:
        if _shared is None:
            _shared = InotifyFD()
            _shared.start()
        _users += 1
        return _shared


def _release() -> None:
    global _shared, _users
    with _lock:
        _users -= 1
        if _users == 0 and _shared is not None:
            _shared.stop()
            _shared.join()
            _shared = None


class FolderWatch:
    """The watched folders of one session. The callbacks come from watchdog's thread and must not block or raise."""

    def __init__(self, on_file: Callable[[bytes], None], on_folder: Callable[[], None]) -> None:
        """``on_file(path)``: a file was closed after writing, or moved in. ``on_folder()``: there is a new folder, or
        events were lost."""
        self._on_file = on_file
        self._on_folder = on_folder
        self._id = CallbackId(id(self))
        self._paths: dict[WatchDescriptor, bytes] = {}
        self._known: dict[tuple[int, int], WatchDescriptor] = {}
        self._inotify = _acquire()

    def add(self, path: str, fd: int) -> None:
        """Watch the open folder ``fd``, whose path below the root is ``path``; again: under its new path."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        prefix = os.fsencode(path) + b"/" if path else b""
        known = self._known.get(key)
        if known is not None and known in self._paths:
            self._paths[known] = prefix
            return
        if len(self._paths) >= MAX_FOLDERS:
            return
        try:
            wd = self._inotify.add_callback(f"/proc/self/fd/{fd}".encode(), _MASK, self, self._id)
        except OSError:
            return  # no watches left on this machine: the sweep at the cell's end is enough
        self._known[key] = wd
        self._paths[wd] = prefix

    def close(self) -> None:
        paths, self._paths = self._paths, {}
        self._inotify.remove_callbacks([(wd, self._id) for wd in paths])
        _release()

    # -- called by watchdog ------------------------------------------------------------------

    def on_event(self, event: InotifyEvent) -> None:
        prefix = self._paths.get(event.wd)
        if prefix is None:
            return
        if event.mask & InotifyConstants.IN_ISDIR:
            self._on_folder()
        elif event.mask & (InotifyConstants.IN_CLOSE_WRITE | InotifyConstants.IN_MOVED_TO):
            self._on_file(prefix + event.name)

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        self._paths.pop(wd, None)
        for key, known in list(self._known.items()):
            if known == wd:
                del self._known[key]

    def on_queue_overflow(self) -> None:
        self._on_folder()
