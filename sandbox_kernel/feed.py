"""The Feed: the one reader of a kernel's iopub channel in this process.

It turns messages into finished cells, whoever sent them. A cell we sent is finished when its reply has come on
shell AND idle on iopub, in whatever order; somebody else's when idle has come. An interrupt near a cell's end can
lose the reply (ipykernel), so idle alone finishes our cell too after :data:`REPLY_GRACE_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from sandbox_kernel.backlog import Backlog
from sandbox_kernel.events import CellError, CellEvent, Status, shorten, strip_ansi, utc_now
from sandbox_kernel.message import Message, count_of
from sandbox_kernel.outputs import NAME_LIMIT, OutputCollector, clean

REPLY_GRACE_S = 0.5
"""How long after idle the reply may still come."""
IDLE_GRACE_S = 5.0
"""After the reply, how long iopub may be silent: then its idle is lost (a message too large drops the connection)."""
REMEMBERED = 512
"""Finished cells remembered, so that what their threads print later is told whose it is."""
MAX_FOREIGN = 8
"""Cells of others that can run at once; a kernel can say of any number that they do, and each may hold output."""
MAX_UNRECORDED = 64
"""Ended cells that wait for their line; with more the kernel is not read, and what it says waits on its own side."""
OWN_ORIGIN = "sandbox-kernel"


class Cell:
    """One cell from its acceptance to its end."""

    def __init__(self, msg_id: str, code: str, origin: str, collector: OutputCollector, *, own: bool) -> None:
        self.msg_id = msg_id
        self.code = code
        self.origin = origin
        self.own = own
        self.collector = collector
        self.execution_count: int | None = None
        self.started_at: datetime = utc_now()
        self.started = time.monotonic()
        self.running = False
        """The kernel has begun with it."""
        self.duration_s = 0.0
        self.status: Status = "unknown"
        self.reply: Message | None = None
        self.idle = False
        self.verdict: Status | None = None
        """Set by whoever ended it (``timeout``, ``interrupted``): goes before what the kernel says."""
        self.finished = asyncio.Event()
        self.listener: Callable[[CellEvent], None] | None = None
        """Called with each event while the cell runs."""
        self.adopted = False
        """A process before us sent it, or let it run: how it ended is told by the kernel's own journal."""
        self.note: str | None = None
        """What the log is to say of it besides."""
        self.recorded: Callable[[], None] = lambda: None
        """To be called when it has its line, or will never have it."""
        self.overdue: asyncio.TimerHandle | None = None
        """Ends it without what is still missing; one for a cell, however often the kernel says that it has ended."""

    def end(self, status: Status) -> None:
        self.status = status
        self.duration_s = time.monotonic() - self.started
        self.finished.set()

    @property
    def error(self) -> CellError | None:
        if self.collector.error is not None:
            return self.collector.error
        content = self.reply["content"] if self.reply is not None else {}
        if content.get("status") == "error" and content.get("ename"):
            lines = content.get("traceback")
            traceback = "\n".join(clean(line) for line in lines) if isinstance(lines, list) else ""
            limit = self.collector.limit
            return CellError(
                name=clean(content["ename"])[:NAME_LIMIT],
                value=shorten(clean(content.get("evalue", "")), limit // 4),
                traceback=strip_ansi(shorten(traceback, limit // 2)),
            )
        return None


def origin_of(header: Message) -> str:
    """Who sent a request, from its header. Only ``session`` is reliable; the kind of client is told by habit.

    JupyterLab's services library (also in VS Code and Notebook) sends an empty ``username``, jupyter_client
    ``username``.
    """
    session = clean(header.get("session", ""))[:8] or "unknown"
    kind = {"": "jupyterlab", "username": "jupyter-client"}.get(str(header.get("username", "")), "client")
    return f"{kind}:{session}"


class Feed:
    """Reads iopub and shell messages handed in by :class:`~sandbox_kernel.kernel.Kernel` and tells of cells.

    All callbacks run on the event loop and must not block:
    ``on_started(cell)`` when the kernel begins with one, ``on_finished(cell)`` once per cell,
    ``on_late(msg_id, execution_count, name, text)`` for output after its cell's end.
    """

    def __init__(
        self,
        client_session: str,
        *,
        limit: int,
        spool_dir: Path,
        on_started: Callable[[Cell], None],
        on_finished: Callable[[Cell], None],
        on_late: Callable[[str | None, int | None, str, str], None],
    ) -> None:
        self._client_session = client_session
        self._limit = limit
        self._spool_dir = spool_dir
        self._on_started = on_started
        self._on_finished = on_finished
        self._on_late = on_late
        self.cells: dict[str, Cell] = {}
        """Those that have not ended, by msg_id."""
        self._past: OrderedDict[str, int | None] = OrderedDict()
        self.execution_count = 0
        """The highest count seen."""
        self.unrecorded = 0
        """Ended cells that wait for their line."""
        self.foreign_failures = 0
        """Cells of others that did not succeed: the kernel then sweeps out what waits."""
        self._heard = 0.0
        """When iopub last said anything."""
        self.on_adopted_idle: Callable[[Cell], None] | None = None
        """Called when the kernel is done with an adopted cell; ends in :meth:`conclude`."""

    def expect(self, msg_id: str, code: str, listener: Callable[[CellEvent], None] | None) -> Cell:
        """A cell of ours that is about to be sent."""
        cell = self.cells[msg_id] = Cell(msg_id, code, OWN_ORIGIN, self._collector(msg_id), own=True)
        cell.listener = listener
        return cell

    def adopt(self, msg_id: str, code: str, *, started_at: datetime | None, origin: str = OWN_ORIGIN) -> Cell:
        """A cell from before our time, whose end is still to come or not yet known."""
        cell = self.cells[msg_id] = Cell(msg_id, code, origin, self._collector(msg_id), own=False)
        cell.adopted = True
        if started_at is not None:
            cell.started_at = started_at
            # The clock may have jumped meanwhile.
            cell.started -= max(0.0, (utc_now() - started_at).total_seconds())
        return cell

    def conclude(self, cell: Cell, reply: Message | None) -> None:
        """End an adopted cell; ``reply``: what its reply said as far as the kernel's journal knows."""
        if cell.reply is None and reply is not None:
            cell.reply = {"content": reply}
        self._finish(cell)

    def knows(self, msg_id: str) -> bool:
        """Whether the cell runs, waits, or ended a short while ago."""
        return msg_id in self.cells or msg_id in self._past

    def backlog(self) -> Backlog:
        """For the events of a cell that somebody reads as they come."""
        return Backlog(self._limit, self._spool_dir)

    def _collector(self, msg_id: str) -> OutputCollector:
        return OutputCollector(msg_id, self._limit, self._spool_dir)

    # -- messages --------------------------------------------------------------------------

    def shell(self, message: Message) -> None:
        """A reply on the shell channel."""
        if message.get("msg_type") != "execute_reply":
            return
        cell = self.cells.get(_parent(message).get("msg_id", ""))
        if cell is None:
            return
        cell.reply = message
        count = count_of(message["content"].get("execution_count"))
        if count is not None:
            cell.execution_count = count
        if cell.idle:
            self._finish(cell)
        elif cell.overdue is None:
            cell.overdue = asyncio.get_running_loop().call_later(IDLE_GRACE_S, self._without_idle, cell)

    def _without_idle(self, cell: Cell) -> None:
        silent = time.monotonic() - self._heard
        if silent >= IDLE_GRACE_S:
            self._finish(cell)
        else:
            cell.overdue = asyncio.get_running_loop().call_later(IDLE_GRACE_S - silent, self._without_idle, cell)

    def iopub(self, message: Message) -> None:
        """A message of the iopub channel."""
        self._heard = time.monotonic()
        msg_type, content, parent = message.get("msg_type", ""), message["content"], _parent(message)
        msg_id = parent.get("msg_id")
        if msg_type == "status":
            self._status(content.get("execution_state"), msg_id)
            return
        if msg_type == "execute_input":
            self._input(content, parent)
            return
        cell = self.cells.get(msg_id) if msg_id else None
        if cell is None:
            self._late(msg_id, msg_type, content)
            return
        event = cell.collector.add(msg_type, content)
        if event is not None and cell.listener is not None:
            cell.listener(event)

    def _status(self, state: Any, msg_id: str | None) -> None:
        cell = self.cells.get(msg_id) if msg_id else None
        if cell is None or state != "idle":
            return
        again, cell.idle = cell.idle, True
        if cell.adopted and cell.reply is None:
            # Its error may have been published before we listened.
            if self.on_adopted_idle is not None and not again:
                self.on_adopted_idle(cell)
        elif not cell.own or cell.reply is not None:
            self._finish(cell)
        elif cell.overdue is None:
            cell.overdue = asyncio.get_running_loop().call_later(REPLY_GRACE_S, self._finish, cell)

    def _input(self, content: Message, parent: Message) -> None:
        msg_id = str(parent.get("msg_id", ""))
        cell = self.cells.get(msg_id)
        if cell is None:
            if not msg_id or msg_id in self._past or parent.get("session") == self._client_session:
                return
            foreign = [other for other in self.cells.values() if not other.own and not other.adopted]
            if len(foreign) >= MAX_FOREIGN:
                self.abandon(foreign[0], "unknown")
            code = shorten(clean(content.get("code", "")), self._limit)
            cell = self.cells[msg_id] = Cell(msg_id, code, origin_of(parent), self._collector(msg_id), own=False)
        count = count_of(content.get("execution_count"))
        if count is not None:
            cell.execution_count = count
            self.execution_count = max(self.execution_count, count)
        cell.running = True
        cell.started, cell.started_at = time.monotonic(), utc_now()
        self._on_started(cell)

    def _late(self, msg_id: str | None, msg_type: str, content: Message) -> None:
        """Output whose cell has ended (a thread's), or that belongs to no cell."""
        if msg_type == "stream":
            name, text = "stderr" if content.get("name") == "stderr" else "stdout", clean(content.get("text", ""))
        elif msg_type in ("display_data", "execute_result"):
            data = content.get("data")
            name, text = "display", clean(data.get("text/plain", "")) if isinstance(data, dict) else ""
        elif msg_type == "error":
            name, text = "error", f"{clean(content.get('ename', ''))}: {clean(content.get('evalue', ''))}"
        else:
            return
        if text:
            known = msg_id if msg_id in self._past else None
            self._on_late(known, self._past.get(known) if known else None, name, text)

    # -- the end ---------------------------------------------------------------------------

    def _finish(self, cell: Cell) -> None:
        if self.cells.pop(cell.msg_id, None) is not None:
            self._end(cell, _verdict(cell))

    def abandon(self, cell: Cell, status: Status) -> None:
        """End a cell whose kernel is gone or was killed."""
        if self.cells.pop(cell.msg_id, None) is not None:
            self._end(cell, cell.verdict or status)

    def _end(self, cell: Cell, status: Status) -> None:
        if cell.overdue is not None:
            cell.overdue.cancel()
        cell.end(status)
        self._remember(cell)
        self.foreign_failures += not cell.own and status != "ok"
        self.unrecorded += 1
        cell.recorded = self._recorded
        self._on_finished(cell)

    def _recorded(self) -> None:
        self.unrecorded -= 1

    @property
    def behind(self) -> bool:
        """So many cells wait for their line that the kernel is to be read no further."""
        return self.unrecorded > MAX_UNRECORDED

    def abandon_all(self, status: Status) -> None:
        for cell in list(self.cells.values()):
            self.abandon(cell, status)

    def _remember(self, cell: Cell) -> None:
        if cell.execution_count is not None:
            self.execution_count = max(self.execution_count, cell.execution_count)
        self._past[cell.msg_id] = cell.execution_count
        while len(self._past) > REMEMBERED:
            self._past.popitem(last=False)


def _parent(message: Message) -> Message:
    parent = message.get("parent_header")
    return parent if isinstance(parent, dict) else {}


def _verdict(cell: Cell) -> Status:
    """How the cell ended: what the reply says, else what was seen on iopub."""
    said = cell.reply["content"].get("status") if cell.reply is not None else None
    error = cell.error
    if cell.verdict == "timeout" or (cell.verdict is not None and (said != "ok" or error is not None)):
        return cell.verdict
    if said == "aborted":
        return "aborted"
    if said == "error" or error is not None:
        # An interrupt that nobody here asked for (Lab's Stop button) is one all the same.
        return "interrupted" if error is not None and error.name == "KeyboardInterrupt" else "error"
    if said == "ok" or (cell.idle and cell.running):
        return "ok"
    return "unknown"
