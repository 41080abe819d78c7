"""The host process that the crash campaign kills: it opens a session and does what its plan says.

What it did it appends to a side file, a line at a time, so that the books can be compared with what really happened.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from campaigns.cells import CellPlan, tag_of
from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.record import Recorder
from sandbox_kernel.session import Session


@dataclass(frozen=True)
class Plan:
    """One life of a host process. ``steps``: cells, and the words ``restart``, ``interrupt``, ``stop``, ``start``."""

    root: Path
    session_id: str
    notes: Path
    steps: tuple[CellPlan | str, ...]
    spares: int
    """Warm kernels it keeps."""


class Notes:
    """The side file: each line is one ``write`` of one process, so a kill leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def add(self, **fields: Any) -> None:
        os.write(self._descriptor, json.dumps(fields).encode() + b"\n")


def live(plan: Plan, line: Connection) -> None:
    """Run a plan; tells ``line`` the number of each step as it begins (0: the session is opened), then waits."""
    asyncio.run(_live(plan, line))


async def _live(plan: Plan, line: Connection) -> None:
    notes = Notes(plan.notes)
    accept = Recorder.accept

    def accepted(self: Recorder, msg_id: str, code: str, **fields: Any) -> None:
        accept(self, msg_id, code, **fields)
        notes.add(accepted=msg_id, tag=tag_of(code))

    Recorder.accept = accepted  # type: ignore[method-assign]
    line.send(0)
    settings = Settings(sessions_root=plan.root, interrupt_grace_s=1.0, pool_size=plan.spares)
    async with SessionManager(settings) as manager:
        session = await manager.start(plan.session_id)
        for number, step in enumerate(plan.steps, start=1):
            line.send(number)
            try:
                session = await _step(manager, session, step, plan, notes)
            except SandboxError as exc:
                notes.add(failed=f"{type(exc).__name__}: {exc}", step=step if isinstance(step, str) else step.tag)
        line.send(-1)
        await asyncio.Event().wait()


async def _step(manager: SessionManager, session: Session, step: CellPlan | str, plan: Plan, notes: Notes) -> Session:
    if isinstance(step, CellPlan):
        if step.kind == "loop":
            call = asyncio.create_task(session.execute(step.code, timeout=step.timeout))
            await asyncio.sleep(0.2)
            with suppress(SandboxError):
                await session.interrupt()
            result = await call
        elif step.kind in ("slow", "flood"):
            events = [event async for event in session.stream(step.code, timeout=step.timeout)]
            result = events[-1].result  # type: ignore[union-attr]
        else:
            result = await session.execute(step.code, timeout=step.timeout)
        notes.add(returned=result.msg_id, tag=step.tag, status=result.status, files=len(result.artifacts))
    elif step == "restart":
        await session.restart()
    elif step == "interrupt":
        await session.interrupt()
    elif step == "stop":
        await manager.stop(plan.session_id)
    elif step == "start":
        return await manager.start(plan.session_id)
    return session
