"""Kernels that are brought down from inside and from outside: the call ends with the cause, the next cell runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import KernelGone
from sandbox_kernel.logfile import Problem, iter_log
from sandbox_kernel.session import Session

pytestmark = pytest.mark.usefixtures("image")


def events(session: Session, kind: str) -> list[dict[str, Any]]:
    assert session.directory is not None
    found = [dict(line) for line in iter_log(session.directory / "session.log") if not isinstance(line, Problem)]
    return [line for line in found if line["event"] == kind]


@pytest.mark.parametrize(
    ("strike", "causes", "word"),
    [
        (lambda api, container: api.kill(container), ("signal",), "SIGKILL"),
        (lambda api, container: api.kill(container, "SIGTERM"), ("signal",), "SIGTERM"),
        # The engine kills first: whether the removal is known yet is a matter of milliseconds.
        (lambda api, container: api.remove_container(container, force=True), ("removed", "signal"), ""),
        (lambda api, container: api.pause(container), ("unresponsive",), "paused"),
    ],
    ids=["kill", "terminate", "remove", "pause"],
)
async def test_from_outside(
    tmp_path: Path, engine: docker.DockerClient, strike: Callable[[Any, Any], None], causes: tuple[str, ...], word: str
) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.start("conv")
        await session.execute("precious = 1")
        call = asyncio.create_task(session.execute("import time; print('on', flush=True); time.sleep(60)"))
        while not any(cell.running for cell in session._feed.cells.values()):
            await asyncio.sleep(0.01)  # until the kernel has begun with it
        before = session.container_id
        await asyncio.to_thread(strike, engine.api, before)
        began = time.monotonic()
        result = await call
        assert time.monotonic() - began < 2
        assert result.status == "kernel_died"
        assert result.death is not None
        assert result.death.cause in causes
        assert word in result.death.message
        assert "precious" in result.lost_names
        assert (await session.execute("1 + 1")).result == "2"
        assert session.container_id != before
        (line,) = events(session, "kernel_died")
        assert line["cause"] == result.death.cause
        assert events(session, "kernel_restarted")[-1]["lost_names"] == line["lost_names"]


async def test_no_restart_when_it_is_not_wanted(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path, restart_on_death=False)) as manager:
        session = await manager.start("conv")
        assert (await session.execute("import os; os._exit(7)")).status == "kernel_died"
        with pytest.raises(KernelGone, match="code 7"):
            await session.execute("1")
        await session.restart()
        assert (await session.execute("1 + 1")).result == "2"
