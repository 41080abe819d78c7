"""``session_metadata.json`` and ``python_state.json`` as they stand in a session folder, ours or another program's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import RecordError, SandboxError
from sandbox_kernel.jsonline import decode
from sandbox_kernel.logfile import Problem, iter_log, open_regular
from sandbox_kernel.untrusted import FOLDER, read_untrusted

METADATA_LIMIT = 4 * 2**20
STATE_LIMIT = 4 * 2**20
"""Bytes; our hook writes 2 MB at most, and whoever reads it waits."""
STATE_LINK = "state/python_state.json"
"""The only link that is followed, and not by the file system: its target is opened as what it is, hostile."""

_METADATA_ORDER = (
    "session_id", "created_at", "last_used", "container_id", "host_port", "session_storage", "dataset_access", "image",
    "execution_count", "stopped_at", "final_execution_count",
)  # fmt: skip


def sorted_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The document's fields in its order, then all others."""
    return {name: metadata[name] for name in _METADATA_ORDER if name in metadata} | metadata


def _object(name: str, data: bytes) -> tuple[dict[str, Any] | None, Problem | None]:
    try:
        return decode(data), None
    except ValueError as exc:
        return None, Problem(name, f"not readable: {exc}")


def _read_bounded(path: Path, limit: int) -> tuple[dict[str, Any] | None, Problem | None]:
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None, None
    except (OSError, RecordError) as exc:
        return None, Problem(path.name, str(exc))
    if len(data) > limit:
        return None, Problem(path.name, f"longer than {limit} bytes; not read")
    return _object(path.name, data)


def read_metadata(folder: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    """What ``session_metadata.json`` says; ``(None, None)`` without one, ``(None, problem)`` when unreadable."""
    return _read_bounded(folder / "session_metadata.json", METADATA_LIMIT)


def read_state(folder: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    """What ``python_state.json`` says, ours (written by the kernel: hostile) or a plain file of another program.

    ``(None, None)`` where there is none; anything but a bounded regular JSON file is a problem, never an exception.
    """
    path = folder / "python_state.json"
    try:
        target = str(path.readlink())
    except FileNotFoundError:
        return None, None
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            return None, Problem(path.name, exc.strerror or str(exc))
        return _read_bounded(path, STATE_LIMIT)
    if target != STATE_LINK:
        return None, Problem(path.name, f"a link to {target!r}; only {STATE_LINK} is read")
    return read_state_folder(folder / "state")


def read_state_folder(state: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    """What ``python_state.json`` in a folder that the kernel can write says."""
    name = "python_state.json"
    try:
        descriptor = os.open(state, FOLDER)
        try:
            return _object(name, read_untrusted(descriptor, name, max_bytes=STATE_LIMIT))
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None, None
    except (OSError, SandboxError) as exc:
        return None, Problem(name, str(exc))


def rebuild_metadata(folder: Path, session_id: str) -> dict[str, Any]:
    """What of the metadata the log still knows. Reads the whole log; empty when there is none."""
    found: dict[str, Any] = {}
    count, stopped = 0, None
    for entry in iter_log(folder / "session.log"):
        if isinstance(entry, Problem):
            continue
        when, event = entry.get("timestamp"), entry.get("event")
        found.setdefault("created_at", when)
        found["last_used"] = when
        if event == "session_started":
            found |= {name: entry[name] for name in ("container_id", "host_port") if name in entry}
            stopped = None
        elif event == "session_stopped":
            stopped = when
        elif event == "code_execution":
            count += 1
    if not found:
        return {}
    found |= {"session_id": session_id, "session_storage": "BIND", "execution_count": count}
    if stopped is not None:
        found |= {"stopped_at": stopped, "final_execution_count": count}
    return sorted_metadata(found)
