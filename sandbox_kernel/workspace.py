"""Where a session's files are: a folder of the host (BIND) or the container's memory (TMPFS).

The rest of a session does not ask which.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from sandbox_kernel.artifacts.observer import Observer
from sandbox_kernel.artifacts.remote import RemoteSpool
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.events import PythonState, Variable
from sandbox_kernel.jsonline import decode
from sandbox_kernel.ledger import Watch
from sandbox_kernel.snapshot import read_state_folder
from sandbox_kernel.untrusted import FOLDER, read_untrusted

MAX_ENTRIES = 10_000
"""Variables and modules that are taken from a state; the hook writes at most 2,000 variables."""
NAME_LIMIT = 1_000
NEWEST, NEWEST_NAMES = 4, 100
"""Lines of the journal that may say what the state does not yet, and names in one."""


class Workspace(Protocol):
    """The files of one session."""

    watch: Watch
    path: Path | None
    """The session directory, None when there is none."""

    async def read_state(self) -> PythonState: ...
    async def read_journal(self, newest: int | None = None) -> list[dict[str, Any]]:
        """The hook's journal of cells, or its newest lines."""
        ...

    def forget_journal(self) -> None:
        """A new kernel begins its own; what cells of the one before did stands in the log."""


def parse_state(raw: dict[str, Any] | None) -> PythonState:
    """``python_state.json`` as far as it can be believed: entries of the wrong form are left out, and what is past
    ``MAX_ENTRIES`` (the event loop waits meanwhile)."""
    if not raw:
        return PythonState()
    variables = raw.get("variables")
    kept: dict[str, Variable] = {}
    for name, entry in islice(variables.items(), MAX_ENTRIES) if isinstance(variables, dict) else ():
        with suppress(ValidationError, TypeError):
            kept[str(name)] = Variable(**entry)
    modules = raw.get("imported_modules")
    fields = {name: value for name, value in raw.items() if name not in ("variables", "imported_modules")}
    names = [str(name)[:NAME_LIMIT] for name in modules[:MAX_ENTRIES]] if isinstance(modules, list) else []
    fields |= {"variables": kept, "imported_modules": names}
    try:
        return PythonState(**fields)
    except (ValidationError, TypeError):
        return PythonState(variables=kept, imported_modules=names)


class BindWorkspace:
    """The session directory on the host; the kernel writes into its ``artifacts/`` and ``state/``."""

    def __init__(self, directory: SessionDirectory, observer: Observer) -> None:
        self.watch: Watch = observer
        self.path: Path | None = directory.path
        self._directory = directory

    async def read_state(self) -> PythonState:
        raw, _ = read_state_folder(self._directory.state_dir)
        return parse_state(raw)

    async def read_journal(self, newest: int | None = None) -> list[dict[str, Any]]:
        if newest is not None:  # as quick as the state: a thread is late where the machine is busy
            return read_cells(self._directory.state_dir, newest)
        return await asyncio.to_thread(read_cells, self._directory.state_dir)

    def forget_journal(self) -> None:
        with suppress(OSError):
            descriptor = os.open(self._directory.state_dir, FOLDER)
            try:
                os.unlink(JOURNAL, dir_fd=descriptor)
            finally:
                os.close(descriptor)


class TmpfsWorkspace:
    """The container's memory, asked through the agent beside the kernel. The host's disk has only what was ingested."""

    def __init__(self, spool: RemoteSpool) -> None:
        self.watch: Watch = spool
        self.path: Path | None = None
        self._spool = spool

    async def read_state(self) -> PythonState:
        try:
            return parse_state(decode(await self._spool.read_state()))
        except (SandboxError, ValueError):
            return PythonState()

    async def read_journal(self, newest: int | None = None) -> list[dict[str, Any]]:
        try:
            return parse_cells(await self._spool.read_state(JOURNAL, limit=JOURNAL_LIMIT), newest)
        except SandboxError:
            return []

    def forget_journal(self) -> None:
        pass  # it went with its container


JOURNAL = "cells.jsonl"
JOURNAL_LIMIT = 4 * 2**20


def read_cells(state_dir: Path, newest: int | None = None) -> list[dict[str, Any]]:
    """The hook's journal of cells (``cells.jsonl``), as far as it can be read: the kernel may write anything."""
    try:
        descriptor = os.open(state_dir, FOLDER)
    except OSError:
        return []
    try:
        return parse_cells(read_untrusted(descriptor, JOURNAL, max_bytes=JOURNAL_LIMIT), newest)
    except (OSError, SandboxError):
        return []
    finally:
        os.close(descriptor)


def parse_cells(data: bytes, newest: int | None = None) -> list[dict[str, Any]]:
    """The lines that are JSON objects; of the ``newest`` lines only."""
    lines = []
    for line in data.splitlines() if newest is None else data.rsplit(b"\n", newest + 1)[1:]:
        with suppress(ValueError):
            lines.append(decode(line))
    return lines


async def known_names(workspace: Workspace) -> list[str]:
    """The variables there are. The state is some milliseconds behind, and its kernel may be gone: what it had no time
    to describe stands in the journal, with the cell that began meanwhile."""
    state, journal = await asyncio.gather(workspace.read_state(), workspace.read_journal(newest=NEWEST))
    names = set(state.variables)
    for entry in journal:
        newer = entry.get("names")
        with suppress(KeyError, TypeError, ValueError):
            began = datetime.fromisoformat(entry["started_at"]) if isinstance(newer, list) else None
            if began is not None and (state.timestamp is None or began > state.timestamp):
                names |= {name[:NAME_LIMIT] for name in newer[:NEWEST_NAMES] if isinstance(name, str)}
    return sorted(names)
