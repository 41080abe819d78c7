"""``artifacts_created``: the lines that tell of artifacts, however many, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import ArtifactError, RecordError
from sandbox_kernel.events import Artifact
from sandbox_kernel.record import NoRecorder, Recorder

PER_LINE = 250
"""Artifacts in one line, which others wait for; and a path may be 16 kB long, a line no longer than readers take."""


class Announcements:
    """Those of one session."""

    def __init__(
        self,
        recorder: Recorder | NoRecorder,
        store: ArtifactStore,
        masked: Callable[[Artifact], Artifact],
        failed: Callable[[RecordError], None],
    ) -> None:
        """``failed``: a line could not be written."""
        self._recorder = recorder
        self._store = store
        self._masked = masked
        self._failed = failed
        self._held = False
        self._unwritten: deque[Artifact] = deque()
        self._unmarked: list[str] = []
        self._writing: asyncio.Task[None] | None = None
        self._marking: asyncio.Task[None] | None = None

    def hold(self) -> None:
        """Nothing is written before :meth:`release`: the line of their cell comes first."""
        self._held = True

    async def release(self) -> None:
        """Write what was held. Not sooner than it is written does this return."""
        self._held = False
        await self._write()

    def add(self, artifacts: Iterable[Artifact]) -> None:
        """Announce them, now where they are few."""
        # The whole of an output is named by its cell's line.
        self._unwritten.extend(artifact for artifact in artifacts if artifact.kind != "output")
        if not self._held and self._unwritten:
            self._write_line()
            if self._unwritten and _over(self._writing):
                self._writing = asyncio.create_task(self._write())

    async def settle(self) -> None:
        """Everything is written and marked."""
        await self._write()
        if self._writing is not None:
            await self._writing
        if self._marking is not None:
            await self._marking

    async def _write(self) -> None:
        while self._unwritten and not self._held:
            self._write_line()
            await asyncio.sleep(0)  # others have their turn

    def _write_line(self) -> None:
        artifacts = [self._unwritten.popleft() for _ in range(min(PER_LINE, len(self._unwritten)))]
        try:
            self._recorder.artifacts_created([self._masked(artifact) for artifact in artifacts])
        except RecordError as exc:
            # Their rows are not marked: who opens the session next writes their line.
            self._unwritten.clear()
            self._failed(exc)
            return
        self._unmarked += [artifact.id for artifact in artifacts]
        if _over(self._marking):
            self._marking = asyncio.create_task(self._mark())

    async def _mark(self) -> None:
        """In a thread: the catalog may be waiting for the disk, or for another session's files."""
        while self._unmarked:
            ids, self._unmarked = self._unmarked, []
            with suppress(ArtifactError):  # who opens the session next finds the line, and marks them then
                await asyncio.to_thread(self._store.mark_logged, ids)


def _over(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()
