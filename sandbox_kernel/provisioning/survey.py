"""Which kernels of a sessions root live on the engine, whoever started them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.runtime import runtime_base, session_of
from sandbox_kernel.settings import Settings


@dataclass(frozen=True)
class Survivor:
    """A session's container as the engine lists it."""

    session_id: str
    container_id: str
    kernel_id: str
    image: str
    alive: bool
    kept: bool
    """It is to outlive the process that started it."""
    runtime: Path
    """Its kernel's runtime directory."""
    lock: Path
    """The lock of a session that has no directory (TMPFS)."""


def lock_path(settings: Settings, session_id: str) -> Path:
    """The lock of a session without a directory: in the runtime folder, one per sessions root and id."""
    folder = runtime_base() / "locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{root_hash(settings.sessions_root)}-{session_id}.lock"


async def survivors(settings: Settings) -> list[Survivor]:
    """All of this sessions root; none when no engine answers or ``engine="local"``."""
    if settings.engine == "local":
        return []
    with suppress(EngineError):
        return await asyncio.to_thread(_survivors, settings)
    return []


async def survivor_of(settings: Settings, session_id: str) -> Survivor | None:
    """The container of one session, the living one first."""
    found = [survivor for survivor in await survivors(settings) if survivor.session_id == session_id]
    return next(iter(sorted(found, key=lambda survivor: not survivor.alive)), None)


def _survivors(settings: Settings) -> list[Survivor]:
    found = []
    for entry in Engine.shared().containers(root=root_hash(settings.sessions_root)):
        labels = entry.get("Labels") or {}
        session_id = session_of(labels)
        if session_id:
            found.append(
                Survivor(
                    session_id=session_id,
                    container_id=entry["Id"],
                    kernel_id=labels.get("sandbox-kernel.kernel", ""),
                    image=entry.get("Image", ""),
                    alive=entry.get("State") in ("running", "paused"),
                    kept=labels.get("sandbox-kernel.keep") == "1",
                    runtime=Path(labels.get("sandbox-kernel.runtime", "")),
                    lock=lock_path(settings, session_id),
                )
            )
    return found
