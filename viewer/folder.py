"""Finding a session's folder and what lies in it. Reads only; nothing below ``artifacts/`` is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox_kernel.logfile import Problem
from sandbox_kernel.untrusted import FOLDER, Found, scan_untrusted

_FILES = ("session.log", "session_metadata.json", "python_state.json", "artifacts")
MAX_WAITING = 10_000
MAX_INGESTED = 10_000


class NoSession(Exception):
    """What was named is no session folder; the message says where was looked."""


def sessions_root() -> Path:
    """``SANDBOX_SESSIONS_ROOT``, else ``sessions``."""
    return Path(os.environ.get("SANDBOX_SESSIONS_ROOT") or "sessions").expanduser()


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a session given by path (also of a file in it) or by id. Raises NoSession."""
    given = Path(name)
    by_id = sessions_root() / given
    for path in (given, by_id) if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)) else (given,):
        folder = path.parent if path.name in _FILES[:3] else path
        try:
            if folder.is_dir() and any(os.path.lexists(folder / file) for file in _FILES):
                return folder
        except (OSError, ValueError) as exc:
            raise NoSession(f"{str(name)!r} is no session folder: {exc}") from None
    if given.is_dir():
        raise NoSession(f"{str(name)!r} is no session folder: it holds none of {', '.join(_FILES)}")
    where = f"neither {str(given)!r} nor {str(by_id)!r} is a folder" if given != by_id else "there is no such folder"
    raise NoSession(f"no session {str(name)!r}: {where}; name a folder like sessions/<id> (TMPFS leaves none)")


def waiting(folder: Path) -> tuple[list[dict[str, Any]], int, list[Problem]]:
    """What lies in ``artifacts/``: ``{"path", "size_bytes"}`` (at most ``MAX_WAITING``) of what is still to be
    ingested, how many there are, and what never will be, and why."""
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    count = 0
    try:
        descriptor = os.open(folder / "artifacts", FOLDER)
    except FileNotFoundError:
        return rows, count, problems
    except OSError as exc:
        return rows, count, [Problem("artifacts", exc.strerror or str(exc))]
    try:
        for found in scan_untrusted(descriptor):
            if isinstance(found, Found):
                count += 1
                if len(rows) < MAX_WAITING:
                    rows.append({"path": found.path, "size_bytes": found.status.st_size})
            elif len(problems) < MAX_WAITING:
                problems.append(Problem(f"artifacts/{found.path}", f"refused: {found.reason}"))
    finally:
        os.close(descriptor)
    rows.sort(key=lambda row: row["path"])
    return rows, count, problems


def ingested(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The artifacts that a log entry tells of."""
    artifacts = entry.get("artifacts")
    if entry.get("event") == "artifacts_created" and isinstance(artifacts, list):
        yield from (row for row in artifacts if isinstance(row, dict))
