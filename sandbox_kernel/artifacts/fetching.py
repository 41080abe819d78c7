"""The bytes of one file on their way out of a container: those that were listed, or none."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from sandbox_kernel.artifacts.agent import Agent, Missing, RemoteFile, RemoteFileInfo
from sandbox_kernel.artifacts.feeding import Cell, put_chunks
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import ArtifactNotFound, ArtifactRefused
from sandbox_kernel.events import Artifact


class Changed(Exception):
    """The file changed while it was read."""


async def unchanged(content: RemoteFile, file: RemoteFileInfo, force: bool) -> AsyncIterator[bytes]:
    """The bytes; at their end an exception instead of an end when they are not those of the file that was listed."""
    if (content.ino, content.size, content.mtime_ns) != file.identity and not force:
        raise Changed
    async for chunk in content.chunks():
        yield chunk
    if content.changed and not force:
        raise Changed


async def export_file(
    agent: Agent, store: ArtifactStore, session_id: str, path: str | os.PathLike[str], cell: Cell = (None, None)
) -> Artifact:
    """``path`` of the container as an artifact of kind ``export``; for BIND too: ``/data``, ``/tmp`` are not shared.

    ``cell``: msg_id and execution_count to record. Raises ArtifactNotFound, ArtifactRefused (no regular file, too big,
    changed while it was read), AgentGone, TypeError.
    """
    path = os.fsdecode(path)
    try:
        if "\0" in path:
            raise Missing
        async with agent.export(path, limit=store.max_artifact_bytes) as content:
            return await put_chunks(store, session_id, path.strip("/"), _steady(content), "export", cell)
    except Missing as exc:
        raise ArtifactNotFound(f"{path!r} cannot be exported: there is no such file in the container") from exc
    except ArtifactRefused as exc:
        raise ArtifactRefused(f"{path!r} cannot be exported: {exc}") from None


async def _steady(content: RemoteFile) -> AsyncIterator[bytes]:
    async for chunk in content.chunks():
        yield chunk
    if content.changed:
        raise ArtifactRefused("it changed while it was read; export it once it is complete")
