"""Removing a folder that a kernel could write."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sandbox_kernel.untrusted import FOLDER


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
