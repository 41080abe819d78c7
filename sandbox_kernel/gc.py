"""Removing what nobody holds any more.

Ours is told by labels and places, never by names: nothing of anybody else's is touched.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.directory import SessionLock
from sandbox_kernel.errors import EngineError, SessionHeld, SessionNotFound
from sandbox_kernel.pool import FOLDER
from sandbox_kernel.provisioning import orphans
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, runtime_base
from sandbox_kernel.provisioning.survey import survivors
from sandbox_kernel.snapshot import read_metadata

if TYPE_CHECKING:
    from sandbox_kernel.manager import SessionManager

YOUNG_S = 120.0
"""A runtime folder without a container may belong to one that is just being made; it is left alone for so long."""


async def collect(manager: SessionManager, *, everything: bool) -> list[str]:
    """See :meth:`SessionManager.gc`."""
    removed: list[str] = []
    root = manager.settings.sessions_root
    for session_id, kept in sorted((await _unheld(manager)).items()):
        if kept and not everything:
            continue
        with suppress(SessionHeld, SessionNotFound):
            await manager.stop(session_id)
        removed.append(f"session {session_id}: stopped, its container removed")
    if manager.settings.engine != "local":
        removed += await asyncio.to_thread(_orphans, root)
    return removed


async def _unheld(manager: SessionManager) -> dict[str, bool]:
    """Sessions that are not stopped and that no process holds: id -> left alive on purpose."""
    root = manager.settings.sessions_root
    found: dict[str, bool] = {}
    for survivor in await survivors(manager.settings):
        if SessionLock.holder(survivor.lock) is None and not (root / survivor.session_id).exists():
            found[survivor.session_id] = False
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        metadata = read_metadata(folder)[0] if not folder.name.startswith(".") else None
        ours = metadata is not None and metadata.get("client_session") and not metadata.get("stopped_at")
        if ours and metadata is not None and SessionLock.holder(folder / ".lock") is None:
            found[folder.name] = bool(metadata.get("kept_alive")) and _lives(metadata)
    return {session_id: kept for session_id, kept in found.items() if session_id not in manager.sessions}


def _lives(metadata: dict[str, object]) -> bool:
    with suppress(EngineError):
        return bool(Engine.shared().inspect(str(metadata.get("container_id")))["State"]["Running"])
    return False


def _orphans(root: Path) -> list[str]:
    removed = []
    engine = Engine.shared()
    removed += [f"container {container[:12]}: its program is gone" for container in orphans.sweep(engine)]
    kernels = {str((entry.get("Labels") or {}).get("sandbox-kernel.kernel")) for entry in engine.containers()}
    for folder in sorted(runtime_base().iterdir()):
        if folder.name == "locks" or folder.name in kernels or time.time() - folder.stat().st_mtime < YOUNG_S:
            continue
        RuntimeDirectory(folder.name, folder).remove()
        removed.append(f"runtime folder {folder.name}: its container is gone")
    pool = root / FOLDER
    for folder in sorted(pool.iterdir()) if pool.is_dir() else ():
        if folder.name not in kernels and SessionLock.holder(folder / ".lock") is None:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(f"folder {FOLDER}/{folder.name}: its spare kernel is gone")
    for network in engine.networks():
        if engine.remove_network(network):
            removed.append(f"network {network}: nothing uses it")
    return removed
