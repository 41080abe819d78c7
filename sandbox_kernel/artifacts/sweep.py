"""What the sweeps of a session share, whether they look into a folder (Observer) or a container (RemoteSpool)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sandbox_kernel.events import Artifact
from sandbox_kernel.untrusted import Found, Refusal

MAX_QUIET_S = 60.0
SWEEP_S = 30.0
"""Longest sweep at a cell's end: its caller waits. Of very many files the rest is taken afterwards."""
_BATCH_FILES = 1000
_BATCH_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that lies in ``artifacts/``; ``reason`` says why it will never be taken, None: it will be."""

    path: str
    size_bytes: int
    reason: str | None


class SweepBooks:
    """What has been made by which cell, how often each file was taken, and which refusals were told."""

    def __init__(self) -> None:
        self._made: dict[str, list[Artifact]] = {}
        self._versions: dict[str, int] = {}
        self._told: set[int] = set()

    def cell_started(self, msg_id: str, *, fresh: bool) -> None:
        """``fresh``: it was not known to run; files are counted anew."""
        if fresh:
            self._versions.clear()
        self._made.setdefault(msg_id, [])

    def created(self, artifact: Artifact, *, running: bool) -> None:
        """``running``: a cell runs, which may write the file again."""
        if running:
            self._versions[artifact.path] = self._versions.get(artifact.path, 0) + 1
        if artifact.msg_id in self._made:
            self._made[artifact.msg_id].append(artifact)

    def cell_finished(self, msg_id: str) -> list[Artifact]:
        """All that the cell made; it is forgotten."""
        return self._made.pop(msg_id, [])

    def quiet(self, path: str, first: float) -> float:
        """Seconds that a file must be left alone before it is taken: ``first``, twice as long per further version."""
        return min(MAX_QUIET_S, first * float(2 ** min(self._versions.get(path, 0), 10)))

    def news(self, refused: Sequence[Refusal], *, all_of_them: bool) -> list[Refusal]:
        """Those that were not told yet. ``all_of_them``: what is not among them holds no more."""
        marks = {hash((refusal.path, refusal.reason, refusal.identity)): refusal for refusal in refused}
        fresh = [refusal for mark, refusal in marks.items() if mark not in self._told]
        self._told = set(marks) if all_of_them else self._told | set(marks)
        return fresh


def batches(found: Iterable[Found]) -> Iterator[list[Found]]:
    """Groups of one transaction each, within each the oldest file first."""
    batch: list[Found] = []
    size = 0
    for item in found:
        batch.append(item)
        size += item.status.st_size
        if len(batch) >= _BATCH_FILES or size >= _BATCH_BYTES:
            yield sorted(batch, key=_age)
            batch, size = [], 0
    if batch:
        yield sorted(batch, key=_age)


def _age(found: Found) -> tuple[int, str]:
    return found.status.st_mtime_ns, found.path
