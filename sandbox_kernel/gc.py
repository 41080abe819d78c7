"""Removing what nobody holds any more.

Ours is told by labels and places, never by names: nothing of anybody else's is touched.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.directory import SessionLock
from sandbox_kernel.errors import EngineError, SandboxError, SessionHeld, SessionNotFound
from sandbox_kernel.pool import FOLDER
from sandbox_kernel.provisioning import egress, local, orphans
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.network import remove_unused
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, runtime_base
from sandbox_kernel.provisioning.survey import lock_path, survivors
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.snapshot import read_metadata
from sandbox_kernel.tree import remove_tree

if TYPE_CHECKING:
    from sandbox_kernel.manager import SessionManager

YOUNG_S = 120.0
"""A runtime folder without a container may belong to one that is just being made; it is left alone for so long."""


@dataclass(frozen=True)
class _Left:
    """A session that is not stopped and that no process holds."""

    settings: Settings
    """The manager's, with the session's own storage and engine."""
    kept: bool
    """Left alive on purpose."""


async def collect(manager: SessionManager, *, everything: bool) -> list[str]:
    """See :meth:`SessionManager.gc`."""
    removed: list[str] = []
    settings = manager.settings
    for session_id, left in sorted((await _unheld(manager)).items()):
        if left.kept and not everything:
            continue
        async with type(manager)(left.settings) as other:
            try:
                await other.stop(session_id)
            except SessionHeld:
                continue  # by a process that took it up meanwhile
            except SessionNotFound:
                pass  # its container was gone; what was left of it is removed
            except SandboxError as exc:  # the others are cleaned up all the same
                removed.append(f"session {session_id}: NOT stopped: {exc}")
                continue
        removed.append(f"session {session_id}: stopped, its container removed")
    if settings.engine != "local":
        removed += await _remains(manager, everything=everything)
        removed += await asyncio.to_thread(_orphans, settings.sessions_root)
        removed += await asyncio.to_thread(_locks, settings)
    return removed


async def _unheld(manager: SessionManager) -> dict[str, _Left]:
    root, settings = manager.settings.sessions_root, manager.settings.model_copy(update={"pool_size": 0})
    found: dict[str, _Left] = {}
    for survivor in await survivors(settings):
        if SessionLock.holder(survivor.lock) is None and not (root / survivor.session_id).exists():
            tmpfs = settings.model_copy(update={"session_storage": SessionStorage.TMPFS})
            found[survivor.session_id] = _Left(tmpfs, kept=survivor.kept and survivor.alive)
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        metadata = read_metadata(folder)[0] if not folder.name.startswith(".") else None
        ours = metadata is not None and metadata.get("client_session") and not metadata.get("stopped_at")
        if ours and metadata is not None and SessionLock.holder(folder / ".lock") is None:
            engine = "local" if metadata.get("engine") == "local" else "docker"
            bind = settings.model_copy(update={"session_storage": SessionStorage.BIND, "engine": engine})
            found[folder.name] = _Left(bind, kept=bool(metadata.get("kept_alive")) and _lives(metadata))
    return {session_id: left for session_id, left in found.items() if session_id not in manager.sessions}


def _lives(metadata: dict[str, object]) -> bool:
    container_id = str(metadata.get("container_id"))
    if metadata.get("engine") == "local":
        return local.lives(container_id)
    with suppress(EngineError):
        return bool(Engine.shared().inspect(container_id)["State"]["Running"])
    return False


async def _remains(manager: SessionManager, *, everything: bool) -> list[str]:
    """Containers of this root's sessions that no record knows of any more, or that have ended."""
    kept = set() if everything else {session_id for session_id, left in (await _unheld(manager)).items() if left.kept}
    removed = []
    for survivor in await survivors(manager.settings):
        locks = (survivor.lock, manager.settings.sessions_root / survivor.session_id / ".lock")
        held = any(SessionLock.holder(lock) is not None for lock in locks)
        if not held and survivor.session_id not in kept:
            await asyncio.to_thread(orphans.remove, Engine.shared(), survivor.container_id)
            removed.append(f"container {survivor.container_id[:12]}: left of session {survivor.session_id}")
    return removed


def _locks(settings: Settings) -> list[str]:
    """Locks of sessions without a directory that nobody holds."""
    removed = []
    for path in sorted(lock_path(settings, "any").parent.glob(lock_path(settings, "*").name)):
        # Whoever opens it now waits for us, then sees that the file is gone and makes another.
        with suppress(SessionHeld), SessionLock(path):
            path.unlink()
            removed.append(f"lock {path.name}: nobody holds it")
    return removed


def _ours(folder: Path) -> bool:
    """Whether it has the form of a runtime directory."""
    if folder.is_symlink() or not folder.is_dir() or re.fullmatch(r"[0-9a-f-]{12,36}", folder.name) is None:
        return False
    return {entry.name for entry in folder.iterdir()} <= {"boot", "s", "session"}


def _orphans(root: Path) -> list[str]:
    removed = []
    engine = Engine.shared()
    removed += [f"container {container[:12]}: its program is gone" for container in orphans.sweep(engine)]
    kernels = {str((entry.get("Labels") or {}).get("sandbox-kernel.kernel")) for entry in engine.containers()}
    for folder in sorted(runtime_base().iterdir()):
        if folder.name in kernels or not _ours(folder) or time.time() - folder.stat().st_mtime < YOUNG_S:
            continue
        RuntimeDirectory(folder.name, folder).remove()
        removed.append(f"runtime folder {folder.name}: its container is gone")
    pool = root / FOLDER
    for folder in sorted(pool.iterdir()) if pool.is_dir() else ():
        if folder.name not in kernels and SessionLock.holder(folder / ".lock") is None:
            remove_tree(folder)
            removed.append(f"folder {FOLDER}/{folder.name}: its spare kernel is gone")
    removed += egress.sweep(engine)
    removed += [f"network {network}: nothing uses it" for network in remove_unused(engine)]
    return removed
