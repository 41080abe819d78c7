"""Closing the books after a host process died.

What is known then: ``.pending`` (what was sent and has no line), ``state/cells.jsonl`` (the hook's own journal of cells
that began and ended: written by the kernel, so a hint and no proof) and, if the kernel lives, the kernel itself.

The Feed adopts the pending cells before it listens, so that what they still print is theirs. Each ends in one way: by
the Feed, the journal, or the kernel's answer to a request that came after it (its shell is first in, first out).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import datetime
from typing import Any

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import KernelGone, RecordError
from sandbox_kernel.events import KernelDeath, utc_now
from sandbox_kernel.feed import REPLY_GRACE_S, Cell, Feed, origin_of
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.logfile import iter_log_backwards
from sandbox_kernel.message import count_of
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.workspace import Workspace, known_names

NOTE = "ran while no host process was attached: what it printed then is not known"
SETTLE_S = 2.0
"""How long a session that is taken over waits for the lines of cells that have ended."""
MAX_ID = 1_000
"""Characters of a msg_id, as in the messages of a kernel (:mod:`sandbox_kernel.message`)."""
Entry = dict[str, Any]
Journal = dict[str, Entry]


def log_unlogged(ledger: Ledger, store: ArtifactStore) -> None:
    """Write the ``artifacts_created`` lines that a death kept from being written; those that stand are only noted."""
    left = store.unlogged(ledger.session_id)
    if not left:
        return
    missing = {artifact.id for artifact in left}
    if isinstance(ledger.recorder, Recorder):
        missing -= _logged(ledger.recorder, missing)
    store.mark_logged([artifact.id for artifact in left if artifact.id not in missing])
    if missing:
        ledger.created([artifact for artifact in left if artifact.id in missing])


def _logged(recorder: Recorder, wanted: set[str]) -> set[str]:
    """Which of these artifacts have their line, looking back to the start before the last: files may come first."""
    found: set[str] = set()
    starts = 0
    for entry in iter_log_backwards(recorder.directory.log):
        if entry.get("event") == "artifacts_created" and isinstance(entry.get("artifacts"), list):
            found |= wanted.intersection(row.get("id") for row in entry["artifacts"] if isinstance(row, dict))
        starts += entry.get("event") == "session_started"
        if starts == 2 or found == wanted:
            break
    return found


def may_run(recorder: Recorder, lines: list[Entry]) -> list[str]:
    """Cells that a living kernel may be running, the likeliest last: until they have ended their files stay."""
    begun = [
        msg_id for msg_id, entry in _by_cell(lines).items() if not entry.get("ended_at") and not recorder.seen(msg_id)
    ]
    return [cell.msg_id for cell in recorder.pending()[:1]] + begun[-1:]


class Takeover:
    """The books of one session that a dead process left open."""

    def __init__(
        self, ledger: Ledger, recorder: Recorder | NoRecorder, workspace: Workspace, feed: Feed, client_session: str
    ) -> None:
        """Adopts the pending cells."""
        self._ledger, self._recorder, self._workspace, self._feed = ledger, recorder, workspace, feed
        self._client_session = client_session
        self._limits: dict[str, float | None] = {}
        for cell in recorder.pending():
            feed.adopt(cell.msg_id, cell.code, started_at=_when(cell.timestamp))
            limit = cell.fields.get("timeout")
            self._limits[cell.msg_id] = float(limit) if isinstance(limit, int | float) else None

    # -- the kernel lives ------------------------------------------------------------------

    async def join(self, lifecycle: Lifecycle) -> None:
        """The Feed listens by now: those that run go on under their time limits, the others get their line."""
        journal = await self._journal()
        self._feed.on_adopted_idle = lambda cell: _spawn(lifecycle, self._close(cell))
        for msg_id, entry in journal.items():
            cell = self._feed.cells.get(msg_id)
            if cell is None and not entry.get("ended_at") and not self._known(msg_id):
                # Another client's, which began before we listened.
                cell = self._feed.adopt(
                    msg_id, str(entry.get("code", "")), started_at=None, origin=origin_of(_header(entry))
                )
            if cell is None or not cell.adopted or cell.running:
                continue
            _learn(cell, entry)
            if not entry.get("ended_at"):
                self._ledger.started(cell)
        self._write_strangers(journal)
        count = max([count_of(entry.get("execution_count")) or 0 for entry in journal.values()], default=0)
        self._feed.execution_count = max(self._feed.execution_count, count)
        for cell in list(self._feed.cells.values()):
            if cell.adopted:
                self._resume(cell, lifecycle)
        adopted = [cell for cell in self._feed.cells.values() if cell.adopted]
        if adopted:
            settling = lifecycle.tasks.spawn(self._settle(lifecycle, adopted))
            if all((journal.get(cell.msg_id) or {}).get("ended_at") for cell in adopted):
                # Nothing runs: a cell that was sent now would come before them, and take the files they made.
                await asyncio.wait({settling}, timeout=SETTLE_S)

    def _resume(self, cell: Cell, lifecycle: Lifecycle) -> None:
        if cell.idle:
            _spawn(lifecycle, self._close(cell))
            return
        limit = self._limits.get(cell.msg_id)
        if limit is not None:
            spent = (utc_now() - cell.started_at).total_seconds()
            # At least a moment: its end may be on its way. The clock may have jumped.
            lifecycle.watch(cell, min(limit, max(0.5, limit - max(0.0, spent))))

    async def _settle(self, lifecycle: Lifecycle, adopted: list[Cell]) -> None:
        """End the adopted cells whose end nobody saw, once the kernel has answered what came after them."""
        kernel = lifecycle.kernel
        if kernel is None:
            return
        with suppress(KernelGone):
            await kernel.caught_up()
        if lifecycle.kernel is not kernel:
            return  # it was replaced, which ended its cells
        journal = await self._journal()
        for cell in adopted:
            self._conclude(cell, journal.get(cell.msg_id))
        while self._feed.unrecorded:  # noqa: ASYNC110 - the ledger tells nobody; once in a session
            await asyncio.sleep(0.005)

    async def _close(self, cell: Cell) -> None:
        """The kernel is done with an adopted cell; its journal says so a moment later."""
        deadline = asyncio.get_running_loop().time() + REPLY_GRACE_S
        while True:
            entry = (await self._journal()).get(cell.msg_id)
            if (entry or {}).get("ended_at") or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)  # until its line is there
        self._conclude(cell, entry)

    def _conclude(self, cell: Cell, entry: Entry | None) -> None:
        if cell.msg_id not in self._feed.cells:
            return
        reply = None
        if entry is not None and entry.get("ended_at"):
            _learn(cell, entry)
            reply = _reply(entry)
            if entry.get("status") == "interrupted" and not entry.get("ename"):
                cell.verdict = cell.verdict or "interrupted"
            self._time(cell, entry)
        elif cell.idle and not cell.running:
            reply = {"status": "aborted"}
        self._feed.conclude(cell, reply)

    def _time(self, cell: Cell, entry: Entry) -> None:
        began, ended = _when(entry.get("started_at")), _when(entry.get("ended_at"))
        if began is not None and ended is not None:
            cell.started = asyncio.get_running_loop().time() - max(0.0, (ended - began).total_seconds())

    # -- the kernel is gone ----------------------------------------------------------------

    async def bury(self, death: KernelDeath | None) -> None:
        """Nothing lives: every accepted cell gets its line, and the log says what happened."""
        journal = await self._journal()
        lost = await known_names(self._workspace)
        if death is not None:
            self._ledger.append("kernel_died", **death.model_dump(), lost_names=lost)
        for cell in [cell for cell in self._feed.cells.values() if cell.adopted]:
            entry = journal.get(cell.msg_id)
            if entry is not None and entry.get("ended_at"):
                self._conclude(cell, entry)
                continue
            self._ledger.notes[cell.msg_id] = {"state_preserved": False, "lost_names": lost, "death": death}
            if entry is not None:
                _learn(cell, entry)
            self._feed.abandon(cell, "kernel_died" if entry is not None else "unknown")
        self._write_strangers(journal)

    # -- other clients' --------------------------------------------------------------------

    def _known(self, msg_id: str) -> bool:
        return self._feed.knows(msg_id) or self._recorder.seen(msg_id)

    def _write_strangers(self, journal: Journal) -> None:
        """Cells that other clients ran from beginning to end while nobody listened."""
        for msg_id, entry in journal.items():
            ours = entry.get("session") == self._client_session
            if ours or not entry.get("ended_at") or self._known(msg_id):
                continue
            began, ended = _when(entry.get("started_at")), _when(entry.get("ended_at"))
            reply = _reply(entry)
            error = {"name": reply["ename"], "value": reply["evalue"], "traceback": ""} if reply.get("ename") else None
            status = entry.get("status")
            line: dict[str, Any] = {
                "code": str(entry.get("code", "")),
                "success": status == "ok",
                "stdout": "",
                "stderr": "",
                "status": status if status in ("ok", "error", "interrupted", "aborted") else "unknown",
                "error": error,
                "execution_count": count_of(entry.get("execution_count")),
                "origin": origin_of(_header(entry)),
                "duration_s": max(0.0, (ended - began).total_seconds()) if began and ended else None,
                "outputs": [],
                "note": NOTE,
            }
            with suppress(RecordError):
                self._ledger.write(msg_id, **self._ledger.masked_tree(line))

    async def _journal(self) -> Journal:
        """By msg_id: the line of the end where there is one, with what the line of the start said."""
        return _by_cell(await self._workspace.read_journal())


def _by_cell(lines: list[Entry]) -> Journal:
    cells: Journal = {}
    for line in lines:
        msg_id = line.get("msg_id")
        if isinstance(msg_id, str) and 0 < len(msg_id) <= MAX_ID:
            cells[msg_id] = {**cells.get(msg_id, {}), **line}
    return cells


def _spawn(lifecycle: Lifecycle, work: Any) -> None:
    lifecycle.tasks.spawn(work)


def _learn(cell: Cell, entry: Entry) -> None:
    """What the kernel's journal knows of an adopted cell that had begun before we listened."""
    if not cell.running:
        cell.running = True
        cell.note = NOTE
        cell.execution_count = count_of(entry.get("execution_count"))
        began = _when(entry.get("started_at"))
        if began is not None:
            cell.started_at = began


def _reply(entry: Entry) -> dict[str, Any]:
    """The journal's word on an ended cell in the form of its reply."""
    said = entry.get("status")
    if entry.get("ename"):
        return {
            "status": "error",
            "ename": str(entry["ename"])[:200],
            "evalue": str(entry.get("evalue", ""))[:2000],
        }
    return {"status": said if said in ("ok", "aborted") else "error"}


def _header(entry: Entry) -> dict[str, Any]:
    return {"session": entry.get("session", ""), "username": entry.get("username", "")}


def _when(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None else None
