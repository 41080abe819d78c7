"""Closing the books after a host process died.

What is known then: ``.pending`` (what was sent and has no line), ``state/cells.jsonl`` (the hook's own journal of cells
that began and ended: written by the kernel, so a hint and no proof) and, if the kernel lives, the kernel itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import RecordError, SandboxError
from sandbox_kernel.feed import Feed, origin_of
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.workspace import Workspace

NOTE = "ran while no host process was attached: what it printed then is not known"
Ended = dict[str, dict[str, Any]]


def log_unlogged(ledger: Ledger, store: ArtifactStore) -> None:
    """Write the ``artifacts_created`` lines that a death kept from being written."""
    left = store.unlogged(ledger.session_id)
    if left:
        ledger.created(left)


async def close_books(
    ledger: Ledger,
    recorder: Recorder | NoRecorder,
    workspace: Workspace,
    feed: Feed,
    lifecycle: Lifecycle,
    client_session: str,
) -> None:
    """The kernel lives: cells that have ended get their line, the one that runs is adopted by the Feed.

    A request that the kernel has not begun with may still be in its queue. Whether it is shows when the kernel answers
    a request that came after it (its shell is first in, first out); until then such a cell is adopted too.
    """
    journal = _latest(await workspace.read_journal())
    pending = {cell.msg_id: cell for cell in recorder.pending()}
    for msg_id, cell in pending.items():
        known = journal.get(msg_id)
        if known is not None and known.get("ended_at"):
            _write(recorder, known, code=cell.code, origin="sandbox-kernel")
        else:
            began = _when((known or {}).get("started_at")) or _when(cell.timestamp)
            adopted = feed.adopt(msg_id, cell.code, started_at=began)
            adopted.running = known is not None
    _strangers(recorder, journal, client_session)
    count = max([known.get("execution_count") or 0 for known in journal.values()], default=0)
    feed.execution_count = max(feed.execution_count, count)
    if feed.cells:
        lifecycle.spawn(_settle(recorder, workspace, feed, lifecycle))


async def _settle(recorder: Recorder | NoRecorder, workspace: Workspace, feed: Feed, lifecycle: Lifecycle) -> None:
    """Wait until the kernel has answered what came after the adopted cells, then end those nobody saw end."""
    adopted = list(feed.cells.values())
    kernel = lifecycle.kernel
    if kernel is None:
        return
    with suppress(asyncio.CancelledError):
        await kernel.request("shell", "kernel_info_request")
    journal = _latest(await workspace.read_journal())
    for cell in adopted:
        known = journal.get(cell.msg_id)
        if cell.msg_id not in feed.cells:
            continue
        if known is not None and known.get("ended_at"):
            cell.execution_count = _int(known.get("execution_count"))
            feed.abandon(cell, _status(known))
        else:
            feed.abandon(cell, "unknown")


async def container_gone(
    ledger: Ledger, recorder: Recorder | NoRecorder, workspace: Workspace, client_session: str, why: str
) -> None:
    """The container is gone as well: every accepted cell gets its line, and the log says what happened."""
    journal = _latest(await workspace.read_journal())
    for cell in recorder.pending():
        known = journal.get(cell.msg_id)
        if known is not None and known.get("ended_at"):
            _write(recorder, known, code=cell.code, origin="sandbox-kernel")
        else:
            status: Literal["kernel_died", "unknown"] = "kernel_died" if known is not None else "unknown"
            recorder.finish(
                cell.msg_id, code=cell.code, success=False, stdout="", status=status, origin="sandbox-kernel", note=NOTE
            )
    _strangers(recorder, journal, client_session)
    recorder.append("kernel_died", cause="removed", message=f"the container was gone when the host came back: {why}")
    with suppress(SandboxError):
        await ledger.watch.drain() if ledger.watch is not None else None


def _strangers(recorder: Recorder | NoRecorder, journal: Ended, client_session: str) -> None:
    """Cells that other clients ran while nobody listened."""
    for msg_id, known in journal.items():
        if not known.get("ended_at") or known.get("session") == client_session or recorder.seen(msg_id):
            continue
        header = {"session": known.get("session", ""), "username": known.get("username", "")}
        _write(recorder, known, code=str(known.get("code", "")), origin=origin_of(header))


def _latest(lines: list[dict[str, Any]]) -> Ended:
    """The journal by msg_id: the line of the end where there is one, with what the line of the start said."""
    cells: Ended = {}
    for line in lines:
        msg_id = line.get("msg_id")
        if isinstance(msg_id, str) and msg_id:
            cells[msg_id] = {**cells.get(msg_id, {}), **line}
    return cells


def _write(recorder: Recorder | NoRecorder, known: dict[str, Any], *, code: str, origin: str) -> None:
    status = _status(known)
    began, ended = _when(known.get("started_at")), _when(known.get("ended_at"))
    error = None
    if known.get("ename"):
        error = {"name": str(known["ename"])[:200], "value": str(known.get("evalue", ""))[:2000], "traceback": ""}
    with suppress(RecordError):
        recorder.finish(
            str(known["msg_id"]),
            code=code,
            success=status == "ok",
            stdout="",
            stderr="",
            status=status,
            error=error,
            execution_count=_int(known.get("execution_count")),
            origin=origin,
            duration_s=(ended - began).total_seconds() if began and ended else None,
            outputs=[],
            note=NOTE,
        )


def _status(known: dict[str, Any]) -> Literal["ok", "error", "interrupted", "aborted", "unknown"]:
    said = known.get("status")
    if said in ("ok", "error", "interrupted", "aborted"):
        return said  # type: ignore[no-any-return]
    return "unknown"


def _when(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None
