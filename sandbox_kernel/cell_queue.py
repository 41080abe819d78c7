"""The cells of a session's own callers: one after the other, each sent, waited for and, where it must be, given up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from sandbox_kernel.backlog import Backlog
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.events import CellEvent, Finished
from sandbox_kernel.feed import Cell, Feed
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.outcome import Outcome
from sandbox_kernel.record import NoRecorder, Recorder

MAX_SWEPT = 3
"""Times in a row that a cell is swept out of the kernel's queue with no other client's cell having failed."""


class CellQueue:
    """Takes cells in the order they are called in."""

    def __init__(
        self,
        recorder: Recorder | NoRecorder,
        ledger: Ledger,
        feed: Feed,
        lifecycle: Lifecycle,
        *,
        check_open: Callable[[], None],
    ) -> None:
        """``check_open()`` raises when no cell may be sent any more."""
        self._recorder, self._ledger, self._feed, self._lifecycle = recorder, ledger, feed, lifecycle
        self._check_open = check_open
        self._turn = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """A cell is running or waiting."""
        return self._turn.locked()

    async def run(self, code: str, limit: float | None, *, events: bool) -> AsyncGenerator[CellEvent, None]:
        """Run a cell of at most ``limit`` seconds; the last event is Finished, with ``events`` the others come too.

        Closing the generator early, or cancelling it, interrupts the cell.
        """
        async with self._turn:
            swept: str | None = None
            causeless, first = 0, math.inf
            lost: list[str] | None = None
            while True:
                failures = self._feed.foreign_failures
                backlog = self._feed.backlog() if events else None
                cell, outcome = await self._send(code, limit, backlog, swept)
                if lost is not None:
                    self._ledger.notes[cell.msg_id] = {"state_preserved": False, "lost_names": lost}
                timer = self._lifecycle.watch(cell, limit)
                try:
                    if backlog is not None:
                        with backlog:
                            async for event in backlog:
                                yield event
                    result = await outcome.result()
                finally:
                    if timer is not None:
                        timer.cancel()
                    if not outcome.closed:
                        # The caller was cancelled or left the loop: end the cell before the next one's turn.
                        await asyncio.shield(self._lifecycle.tasks.spawn(self._give_up(cell, outcome)))
                if result.status != "aborted":
                    yield Finished(msg_id=cell.msg_id, result=result)
                    return
                # Another client's failing cell swept ours out of the kernel's queue before it ran: send it again.
                swept = cell.msg_id
                now = asyncio.get_running_loop().time()
                first = min(first, now)
                causeless = 0 if failures != self._feed.foreign_failures else causeless + 1
                if causeless == MAX_SWEPT or (limit is not None and now - first > limit):
                    # It does so with all cells: hostile code can have it do that, and a caller must come back.
                    lost = await self._lifecycle.replace("would not run a cell")
                    causeless, first = 0, math.inf

    async def _send(
        self, code: str, limit: float | None, backlog: Backlog | None, instead_of: str | None
    ) -> tuple[Cell, Outcome]:
        self._check_open()
        if self._ledger.failure is not None:
            failure, self._ledger.failure = self._ledger.failure, None
            raise failure
        kernel = await self._lifecycle.ready()
        message = kernel.message(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
        )
        msg_id = message["header"]["msg_id"]
        self._recorder.accept(msg_id, self._ledger.masked(code), timeout=limit)
        if instead_of is not None:
            self._recorder.retract(instead_of)
        cell = self._feed.expect(msg_id, code, None if backlog is None else backlog.put)
        outcome = self._ledger.outcomes[msg_id] = Outcome(None if backlog is None else backlog.end)
        kernel.send_execute(message)
        return cell, outcome

    async def _give_up(self, cell: Cell, outcome: Outcome) -> None:
        await self._lifecycle.end_cell(cell, "interrupted")
        with suppress(SandboxError):
            await outcome.result()
