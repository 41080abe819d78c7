"""Checking the store's books: catalog against blobs, and what the session logs still know of a lost catalog."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sandbox_kernel.artifacts.blobs import BlobFolder
from sandbox_kernel.artifacts.catalog import Catalog, salvage, set_aside
from sandbox_kernel.events import BLOB_MIME, Artifact

CATALOG = "store.sqlite"
ORPHAN_AGE_S = 600.0
"""A younger blob without a row may belong to an ingest that is under way in another process."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not add up: where, what, and whether it was mended."""

    kind: Literal["catalog", "missing", "damaged", "orphan"]
    where: str
    what: str
    repaired: bool


def check_store(blobs: BlobFolder, catalog: Catalog, *, repair: bool) -> Iterator[Problem]:
    """Missing blobs, blobs whose bytes are not what their name says, blobs nobody refers to.

    ``repair`` moves damaged and orphaned blobs to ``set-aside/`` (a damaged one can then be ingested again); what is
    missing cannot be mended.
    """
    known = catalog.sizes()
    seen = set()
    aside = blobs.root / "set-aside"
    for path in blobs.all():
        name = path.name
        try:
            with path.open("rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == name
        except OSError as exc:
            yield Problem("damaged", str(path), f"cannot be read: {exc.strerror}", False)
            seen.add(name)
            continue
        if not sound:
            yield Problem("damaged", str(path), "its bytes are not those of its SHA-256", repair)
        elif name in known:
            seen.add(name)
            continue
        elif time.time() - path.stat().st_ctime < ORPHAN_AGE_S:
            continue  # asked now: reading it took a while, and an ingest that finds it there renews the time
        else:
            yield Problem("orphan", str(path), "no artifact and no picture refers to it", repair)
        if repair:
            aside.mkdir(exist_ok=True, mode=0o700)
            path.rename(aside / name)
    for sha256 in sorted(known.keys() - seen):
        yield Problem("missing", str(blobs.path(sha256)), f"the {known[sha256]} bytes of a record are not there", False)


def open_catalog(root: Path) -> Catalog:
    """The catalog of the store at ``root``, made anew when it is corrupt, or gone from a store that has blobs.

    Raises sqlite3.OperationalError, OSError.
    """
    path = root / CATALOG
    if not (path.exists() and path.stat().st_size) and any((root / "blobs").glob("*/*")):
        return rebuilt_catalog(root)
    try:
        return Catalog(path)
    except sqlite3.OperationalError:
        raise  # a full or read-only disk, not a corrupt file
    except sqlite3.DatabaseError:
        return rebuilt_catalog(root)


def rebuilt_catalog(root: Path) -> Catalog:
    """A new catalog from what the corrupt one still says, and from the logs of the sessions beside the store.

    It gets its name once it is whole: who dies before leaves it to the next one to begin anew.
    """
    path, fresh = root / CATALOG, root / f"{CATALOG}.new"
    for left in root.glob(f"{fresh.name}*"):
        left.unlink()
    catalog = Catalog(fresh)
    try:
        for known in (path, *sorted(root.glob(f"{CATALOG}.corrupt-*[0-9]"))):
            if known.exists():
                catalog.restore(salvage(known))
        for artifacts, pictures in logged_artifacts(root.parent):
            catalog.restore(artifacts)
            if pictures:
                catalog.add_pictures(pictures)
    finally:
        catalog.close()
    set_aside(path)
    fresh.rename(path)
    return Catalog(path)


def logged_artifacts(sessions_root: Path) -> Iterator[tuple[list[Artifact], list[tuple[str, int]]]]:
    """Per line of any ``session.log`` below ``sessions_root``: the artifacts and the pictures it names."""
    for log in sorted(sessions_root.glob("*/session.log")):
        if log.is_symlink() or log.parent.is_symlink():
            continue
        with contextlib.suppress(OSError), log.open("rb") as lines:
            for line in lines:
                if b"sha256" not in line:
                    continue
                with contextlib.suppress(ValueError, RecursionError):
                    yield _of_line(json.loads(line), log.parent.name)


def _of_line(entry: Any, session_id: str) -> tuple[list[Artifact], list[tuple[str, int]]]:
    if not isinstance(entry, dict):
        return [], []
    artifacts = []
    for rows, kind in ((entry.get("artifacts"), "file"), (entry.get("output_artifacts"), "output")):
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and "sha256" in row:
                defaults = {"session_id": session_id, "kind": kind, "created_at": entry.get("timestamp")}
                fields = defaults | {name: row[name] for name in Artifact.model_fields if name in row}
                fields.setdefault("path", fields.get("filename"))
                fields.setdefault("content_type", "application/octet-stream")
                with contextlib.suppress(ValueError):
                    artifacts.append(Artifact.model_validate(fields))
    return artifacts, list(_pictures(entry.get("outputs")))


def _pictures(outputs: Any) -> Iterator[tuple[str, int]]:
    for output in outputs if isinstance(outputs, list) else ():
        data = output.get("data") if isinstance(output, dict) else None
        blobs = data.get(BLOB_MIME) if isinstance(data, dict) else None
        for blob in blobs if isinstance(blobs, list) else [blobs]:
            if isinstance(blob, dict):
                sha256, size = blob.get("sha256"), blob.get("size_bytes")
                if isinstance(sha256, str) and isinstance(size, int):
                    yield sha256, size
