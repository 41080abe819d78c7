"""Finding a session that runs: to hold it, or to be one more client of a kernel that another process holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import SessionNotFound
from sandbox_kernel.lab import LabTarget
from sandbox_kernel.manager import SessionManager
from sandbox_kernel.provisioning.attach import AttachProvisioner, read_connection_file
from sandbox_kernel.provisioning.runtime import RuntimeDirectory
from sandbox_kernel.provisioning.survey import survivor_of
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.snapshot import read_metadata

if TYPE_CHECKING:
    from sandbox_kernel.session import Session


async def settings_of(settings: Settings, session_id: str) -> Settings | None:
    """``settings``, with storage and engine of the living session of that id; None where none lives.

    Only looks: nothing is made. Raises InvalidSessionId.
    """
    metadata = read_metadata(SessionDirectory(settings.sessions_root, session_id).path)[0]
    if metadata is not None and not metadata.get("stopped_at"):
        engine = metadata.get("engine") if metadata.get("engine") == "local" else settings.engine
        return settings.model_copy(update={"session_storage": SessionStorage.BIND, "engine": engine})
    survivor = await survivor_of(settings, session_id)
    if survivor is not None and survivor.alive:
        return settings.model_copy(update={"session_storage": SessionStorage.TMPFS})
    return None


@asynccontextmanager
async def living(settings: Settings, session_id: str) -> AsyncIterator[Session]:
    """The living session of that id, whatever it was started with; left alive afterwards.

    Raises SessionNotFound saying how to start it, SessionHeld.
    """
    missing = SessionNotFound(
        f"no living session {session_id!r} in {settings.sessions_root}; "
        f"start it: sandbox-kernel run --session {session_id}"
    )
    as_started = await settings_of(settings, session_id)
    if as_started is None:
        raise missing  # before there is a manager, which would make a store
    async with SessionManager(as_started) as manager:
        try:
            session = await manager.get(session_id)
        except SessionNotFound:
            raise missing from None
        yield session


def recorded_target(settings: Settings, session_id: str) -> LabTarget:
    """How to reach the kernel of a session that another process holds: from its metadata. Raises SessionNotFound."""
    folder = SessionDirectory(settings.sessions_root, session_id).path
    metadata = read_metadata(folder)[0] or {}
    kernel_id, container_id = metadata.get("kernel_id"), metadata.get("container_id")
    if not (isinstance(kernel_id, str) and isinstance(container_id, str)) or metadata.get("stopped_at"):
        raise SessionNotFound(f"session {session_id!r} leaves no record in {settings.sessions_root}: ask its holder")
    notebooks = notebook_dir(settings, session_id)
    return LabTarget(session_id, RuntimeDirectory(kernel_id).connection_file, notebooks, container_id)


def notebook_dir(settings: Settings, session_id: str) -> Path:
    """Where JupyterLab keeps the notebook of a session."""
    return settings.sessions_root / ".lab" / session_id


def attachment(settings: Settings, session_id: str) -> AttachProvisioner:
    """A client of a kernel that another process holds. Raises SessionNotFound, ConnectionFileError."""
    target = recorded_target(settings, session_id)
    client = AttachProvisioner(connection_file=str(target.connection_file), container=target.container_id)
    client.connection_info = read_connection_file(target.connection_file)
    return client
