"""The artifact store as the viewer uses it: listed read-only, and one artifact saved."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any, TextIO

from sandbox_kernel.errors import ArtifactNotFound, RecordError
from sandbox_kernel.logfile import Problem
from viewer.folder import MAX_INGESTED
from viewer.visible import size, visible


def stored_artifacts(store: Path | None, session_id: str) -> tuple[list[dict[str, Any]], Problem | None]:
    """The session's newest artifacts (at most ``MAX_INGESTED``) in the store, oldest first; none without a store.

    Straight from SQLite, opened read-only: looking must neither make a store nor wait for one, and the store's own room
    costs more to import than all of the viewer.
    """
    database = store / "store.sqlite" if store is not None else None
    if database is None or not database.is_file():
        return [], None
    # Without a journal beside it nobody is writing, and SQLite need not (and, read-only, cannot) make one.
    mode = "mode=ro" if database.with_name("store.sqlite-wal").exists() else "immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?{mode}", uri=True, timeout=2)) as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(
                "SELECT * FROM artifacts WHERE session_id = ? ORDER BY seq DESC LIMIT ?", (session_id, MAX_INGESTED)
            ).fetchall()
    except sqlite3.Error as exc:
        return [], Problem(str(database), f"cannot be read: {exc}; artifacts are listed from the log")
    hidden = {"seq", "source", "logged"}
    return [{name: row[name] for name in row.keys() if name not in hidden} for row in reversed(rows)], None  # noqa: SIM118


def save_artifact(
    store_path: Path, folder: Path, artifact_id: str, output: str | os.PathLike[str] | None, out: TextIO
) -> int:
    """Write an artifact's bytes to ``output`` (``-``: standard output; default: its own base name, never over a file).

    Raises ArtifactNotFound, RecordError when that name is taken, ArtifactError when it cannot be written.
    """
    if not (store_path / "store.sqlite").is_file():
        raise ArtifactNotFound(f"no artifact {artifact_id!r}: no artifact store at {store_path}; name it with --store")
    # Imported here: only who wants an artifact waits for it.
    from sandbox_kernel.artifacts.store import ArtifactStore

    with ArtifactStore.open(store_path) as store:
        artifact = store.get(artifact_id)
        session_id = folder.resolve().name
        if artifact.session_id != session_id:
            raise ArtifactNotFound(
                f"artifact {artifact_id!r} is one of session {artifact.session_id!r}, not {session_id!r}"
            )
        if output is not None and os.fspath(output) == "-":
            with store.open_artifact(artifact_id) as source:
                shutil.copyfileobj(source, sys.stdout.buffer)
            return 0
        name = _safe_name(artifact.filename)
        target = Path(name) if output is None else Path(output) / name if Path(output).is_dir() else Path(output)
        if output is None and os.path.lexists(target):
            raise RecordError(f"{target} is there already; name another file with -o")
        store.save(artifact_id, target)
    out.write(f"{visible(str(target))}  {size(artifact.size_bytes)}\n")
    return 0


def _safe_name(filename: str) -> str:
    """A base name that the kernel chose, made a file name of ours: no folder, nothing hidden, nothing invisible."""
    name = visible(filename).replace("/", "_").replace("\n", "_").lstrip(".-")
    return name or "artifact"
