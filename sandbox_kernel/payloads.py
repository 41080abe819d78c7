"""What of a cell's output is too big for its line, or no text: it goes into the store, and the log refers to it."""

from __future__ import annotations

import asyncio
from hashlib import sha256

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import ArtifactError
from sandbox_kernel.events import Artifact
from sandbox_kernel.feed import Cell
from sandbox_kernel.late import Append
from sandbox_kernel.masking import Masker
from sandbox_kernel.outputs import Output, for_log

FEW = 20
"""Outputs that are quickly dealt with."""


def is_light(outputs: list[Output]) -> bool:
    """Few texts, for which :meth:`Payloads.keep_displays` needs no thread."""
    return len(outputs) <= FEW and all(output.get("data", {}).keys() <= {"text/plain"} for output in outputs)


class Payloads:
    """Puts them into the store. ``lost``: gets what could not be kept, and why."""

    def __init__(self, session_id: str, store: ArtifactStore, mask: Masker | None, append: Append) -> None:
        self._session_id, self._store, self._mask, self._append = session_id, store, mask, append

    def keep_displays(self, outputs: list[Output], lost: list[str]) -> list[Output]:
        """``outputs`` for the log, what they refer to put into the store (blocks)."""
        blobs: dict[str, bytes] = {}

        def keep(data: bytes) -> str:
            digest = sha256(data).hexdigest()
            blobs[digest] = data
            return digest

        logged = for_log(outputs if self._mask is None else self._mask.tree(outputs), keep)
        if blobs:
            try:
                self._store.put_blobs(blobs)
            except ArtifactError as exc:  # what the store does not take must not cost the cell its line
                lost.append(f"the bytes of its pictures could not be kept: {exc}")
        return logged

    async def store_spools(self, cell: Cell, lost: list[str]) -> list[Artifact]:
        """The whole of each output that was cut, as artifacts of kind ``output``."""
        stored = []
        for spool in cell.collector.take_spools():
            file = spool.whole()
            if file is None:
                lost.append(f"the whole output could not be kept: {spool.error and spool.error.strerror}")
                continue
            with file:
                source = file if self._mask is None else self._mask.stream(file)
                try:
                    stored.append(
                        await asyncio.to_thread(
                            self._store.put_stream,
                            self._session_id,
                            f"cell-{cell.execution_count or 0}-{spool.filename}",
                            source,
                            kind="output",
                            execution_count=cell.execution_count,
                            msg_id=cell.msg_id,
                            content_type=spool.content_type,
                        )
                    )
                except ArtifactError as exc:
                    lost.append(f"the whole output could not be kept: {exc}")
                    self._append("artifact_refused", path=spool.filename, reason=str(exc))
        return stored
