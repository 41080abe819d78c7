"""A host folder of data sets: what is in it, how large, and what links show it elsewhere.

The folder is its owner's, not the kernel's, but a link in it may lead anywhere: those that lead out are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sandbox_kernel.dataset_cache import check_dataset_id
from sandbox_kernel.errors import DatasetRefused

MAX_LISTED = 10_000
"""Files listed or linked one by one; of a larger folder the folders past them are linked as such."""


class LocalDatasets:
    """Reads ``root``, an absolute path, and nothing outside it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self) -> list[tuple[str, int]]:
        """``(id, bytes)`` of files, at most MAX_LISTED, but hidden ones and those whose name breaks the rule."""
        found = []
        for path, entry in self._walk():
            if entry.is_dir(follow_symlinks=False):
                continue
            try:
                size = self.size(check_dataset_id(path))
            except DatasetRefused:
                continue
            if size is not None and (self.root / path).is_file():
                found.append((path, size))
                if len(found) >= MAX_LISTED:
                    break
        return sorted(found)

    def size(self, dataset_id: str) -> int | None:
        """Bytes of a file, or of all files of a folder; None when there is none.

        Raises DatasetRefused for a link that leads out of the folder.
        """
        path = self.root / dataset_id
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            if path.is_symlink():
                raise DatasetRefused(f"data set {dataset_id!r} is a link to nothing") from None
            return None
        if not real.is_relative_to(self.root.resolve()):
            raise DatasetRefused(
                f"data set {dataset_id!r} is a link out of {self.root}; the container has no such file"
            )
        if real.is_file():
            return real.stat().st_size
        if real.is_dir():
            return sum(
                (Path(folder) / name).lstat().st_size
                for folder, _, names in os.walk(real)
                for name in names
                if not (Path(folder) / name).is_symlink()
            )
        raise DatasetRefused(f"data set {dataset_id!r} is neither a file nor a folder")

    def links(self, target: Path) -> list[tuple[str, str]]:
        """Symbolic links ``(path, target of the link)`` that together show the folder, itself at ``target``, elsewhere.

        Folders are made, files linked: so that fetched files may stand beside local ones, and a walk finds all.
        """
        found: dict[str, str] = {}
        for path, entry in self._walk():
            if not entry.is_dir(follow_symlinks=False):
                found[path] = str(target / path)
                if len(found) >= MAX_LISTED:
                    break
        else:
            return list(found.items())
        made = {path.partition("/")[0] for path in found}
        with os.scandir(self.root) as entries:
            found |= {entry.name: str(target / entry.name) for entry in entries if entry.name not in made}
        return list(found.items())

    def _walk(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Everything below the root that can be named, without following links; breadth first."""
        folders = [""]
        while folders:
            prefix = folders.pop(0)
            try:
                entries = sorted(os.scandir(self.root / prefix), key=lambda entry: entry.name)
            except OSError:
                continue  # unreadable, or gone since
            for entry in entries:
                path = f"{prefix}/{entry.name}" if prefix else entry.name
                if entry.name.startswith(".") or not entry.name.isprintable():
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                yield path, entry
