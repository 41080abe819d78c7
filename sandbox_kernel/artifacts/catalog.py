"""The catalog: which artifact is which blob, in SQLite (WAL), shared by all processes that use the store."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import ArtifactError, ArtifactRefused
from sandbox_kernel.events import Artifact

_SCHEMA = """
CREATE TABLE IF NOT EXISTS artifacts (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, session_id TEXT NOT NULL, path TEXT NOT NULL,
    version INTEGER NOT NULL, kind TEXT NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    content_type TEXT NOT NULL, execution_count INTEGER, msg_id TEXT, created_at TEXT NOT NULL,
    source TEXT,              -- identity of the file it was taken from: not taken twice
    logged INTEGER NOT NULL,  -- 0: the artifacts_created line may be missing
    UNIQUE (session_id, path, version));
CREATE INDEX IF NOT EXISTS artifacts_unlogged ON artifacts (session_id) WHERE logged = 0;
CREATE TABLE IF NOT EXISTS pictures (sha256 TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage (session_id TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
"""
_FIELDS = tuple(name for name in Artifact.model_fields if name != "filename")  # the last part of the path
assert _FIELDS[-1] == "created_at"
_COLUMNS = ", ".join(_FIELDS)
_INSERT = f"INSERT INTO artifacts ({_COLUMNS}, source, logged) VALUES ({', '.join('?' * (len(_FIELDS) + 2))})"

Latest = tuple[str, str, str | None]
"""Id, SHA-256 and source of an artifact."""

Row = tuple[Artifact, str | None]
"""An artifact, its version not yet counted, and the identity of the file it was taken from."""


class Catalog:
    """One SQLite connection, used by any thread, one at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it. Raises sqlite3.DatabaseError when it is corrupt."""
        self.path = path
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA cache_size = -2048")
            self._db.executescript(_SCHEMA)
            # A truncated file may have a sound first page: look at each table's root.
            self._db.execute("SELECT max(seq), max(id) FROM artifacts").fetchone()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """``durable``: what is committed outlives the machine's death, at the price of a sync."""
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError as exc:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise ArtifactRefused(f"the artifact store cannot record it: {exc} ({self.path})") from exc

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.ProgrammingError:
                raise ArtifactError(
                    f"the artifact store {self.path.parent} is closed, as its SessionManager is: "
                    "read artifacts before, or with `sandbox-kernel artifacts get`"
                ) from None
            except sqlite3.DatabaseError as exc:
                raise ArtifactError(f"the artifact catalog {self.path} cannot be read: {exc}") from exc

    # -- artifacts -------------------------------------------------------------------------

    def add(self, rows: Iterable[Row], *, renewed: Iterable[tuple[str, str]] = ()) -> list[Artifact]:
        """Commit ``rows`` at once, each with the next version of its path; gives them with that version.

        ``renewed``: ``(source, artifact id)`` of artifacts whose file was only touched. Raises ArtifactRefused.
        """
        drafts = list(rows)
        added: list[Artifact] = []
        usage: dict[str, int] = {}
        with self._transaction() as db:
            last = _versions(db, [draft for draft, _ in drafts])
            for draft, _ in drafts:
                key = (draft.session_id, draft.path)
                artifact = draft.model_copy(update={"version": last[key] + 1}) if key in last else draft
                last[key] = artifact.version
                usage[artifact.session_id] = usage.get(artifact.session_id, 0) + artifact.size_bytes
                added.append(artifact)
            db.executemany(
                _INSERT,
                # The whole of an output is named by its code_execution line, not by artifacts_created.
                ((*_values(a), source, int(a.kind == "output")) for a, (_, source) in zip(added, drafts, strict=True)),
            )
            db.executemany("UPDATE artifacts SET source = ? WHERE id = ?", renewed)
            _count(db, usage)
        return added

    def restore(self, artifacts: Iterable[Artifact]) -> int:
        """Put back artifacts of a lost catalog, as logged; how many were new."""
        restored = 0
        with self._transaction() as db:
            for artifact in artifacts:
                cursor = db.execute(_INSERT.replace("INSERT", "INSERT OR IGNORE", 1), (*_values(artifact), None, 1))
                if cursor.rowcount:
                    _count(db, {artifact.session_id: artifact.size_bytes})
                    restored += 1
        return restored

    def get(self, artifact_id: str) -> Artifact | None:
        rows = self._all(f"SELECT {_COLUMNS} FROM artifacts WHERE id = ?", (artifact_id,))
        return _artifact(rows[0]) if rows else None

    def list(self, where: dict[str, Any]) -> list[Artifact]:
        """The artifacts whose columns equal ``where``, oldest first."""
        condition = " AND ".join(f"{column} = ?" for column in where) or "1"
        query = f"SELECT {_COLUMNS} FROM artifacts WHERE {condition} ORDER BY seq"
        return [_artifact(row) for row in self._all(query, tuple(where.values()))]

    def latest(self, session_id: str, paths: Sequence[str]) -> dict[str, Latest]:
        """For each of ``paths`` the last version that was taken from a file of that path."""
        rows = self._all(
            # CROSS: one look-up for each path, whatever SQLite thinks of the sizes.
            "SELECT a.path, max(a.version), a.id, a.sha256, a.source"
            " FROM json_each(?) AS wanted CROSS JOIN artifacts AS a"
            " WHERE a.session_id = ? AND a.path = wanted.value AND a.kind = 'file' GROUP BY a.path",
            (json.dumps(paths), session_id),
        )
        return {path: (artifact_id, sha256, source) for path, _, artifact_id, sha256, source in rows}

    def mark_logged(self, ids: Sequence[str]) -> None:
        # Should the mark be lost, the line in the log is found when the session is opened again.
        with self._transaction(durable=False) as db:
            db.executemany("UPDATE artifacts SET logged = 1 WHERE id = ?", [(i,) for i in ids])

    def usage(self, session_id: str) -> int:
        """Bytes of all artifacts of the session."""
        rows = self._all("SELECT size_bytes FROM usage WHERE session_id = ?", (session_id,))
        return int(rows[0][0]) if rows else 0

    # -- blobs -----------------------------------------------------------------------------

    def add_pictures(self, pictures: Iterable[tuple[str, int]]) -> None:
        """Note blobs (SHA-256 and size) that a log refers to and no artifact."""
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO pictures VALUES (?, ?)", pictures)

    def sizes(self) -> dict[str, int]:
        """SHA-256 and size of every blob that is referred to."""
        return dict(self._all("SELECT sha256, size_bytes FROM artifacts UNION SELECT sha256, size_bytes FROM pictures"))

    def sound(self) -> bool:
        """Whether SQLite finds the file consistent."""
        try:
            return self._all("PRAGMA quick_check(1)") == [("ok",)]
        except ArtifactError:
            return False


def salvage(path: Path) -> Iterator[Artifact]:
    """The rows that can still be read from a corrupt catalog."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            for row in db.execute(f"SELECT {_COLUMNS} FROM artifacts"):
                with contextlib.suppress(ValueError):
                    yield _artifact(row)
    except sqlite3.DatabaseError:
        return


def set_aside(path: Path) -> Path:
    """Rename a corrupt catalog with its side files; never deletes it. Gives the new name."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _versions(db: sqlite3.Connection, drafts: Sequence[Artifact]) -> dict[tuple[str, str], int]:
    """The last version of each of these artifacts' (session, path), where there is one."""
    rows = db.execute(
        # CROSS: one look-up for each path, whatever SQLite thinks of the sizes.
        "SELECT a.session_id, a.path, max(a.version) FROM json_each(?) AS wanted CROSS JOIN artifacts AS a"
        " WHERE a.session_id = json_extract(wanted.value, '$[0]') AND a.path = json_extract(wanted.value, '$[1]')"
        " GROUP BY a.session_id, a.path",
        (json.dumps([(draft.session_id, draft.path) for draft in drafts]),),
    )
    return {(session_id, path): version for session_id, path, version in rows}


def _count(db: sqlite3.Connection, usage: dict[str, int]) -> None:
    db.executemany(
        "INSERT INTO usage VALUES (?, ?) ON CONFLICT DO UPDATE SET size_bytes = size_bytes + excluded.size_bytes",
        usage.items(),
    )


_texts_and_numbers = itemgetter(*_FIELDS[:-1])


def _values(artifact: Artifact) -> tuple[Any, ...]:
    return (*_texts_and_numbers(artifact.__dict__), artifact.created_at.isoformat())


def _artifact(row: tuple[Any, ...]) -> Artifact:
    fields = dict(zip(_FIELDS, row, strict=True))
    return Artifact(filename=fields["path"].rpartition("/")[2], **fields)
