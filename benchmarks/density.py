"""Many sessions at once on one machine."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil

from benchmarks.cells import checked
from benchmarks.measure import Bench, Measurement, quantile
from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.session import Session

COUNTS = (1, 10, 50, 100, 200)
EVERY_S = 10.0
MEMORY_LIMIT = "128m"
AT_ONCE = 4
"""Containers started side by side."""


def _manager(bench: Bench, name: str) -> SessionManager:
    return SessionManager(Settings(sessions_root=bench.folder / name, image=bench.image, memory_limit=MEMORY_LIMIT))


async def _open(manager: SessionManager, count: int) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            await checked(await manager.start(), "x = 1")

    await asyncio.gather(*(one() for _ in range(count - len(manager.sessions))))


def _rss() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


async def memory(bench: Bench) -> list[Measurement]:
    """What one more open session takes of the host process's memory, after 50 cells in each.

    In a process of its own: memory that other rows have freed would be used again, and not show.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return await asyncio.get_running_loop().run_in_executor(alone, _memory_now, bench)


def _memory_now(bench: Bench) -> list[Measurement]:
    return asyncio.run(_memory(bench))


async def _memory(bench: Bench) -> list[Measurement]:
    more = 5 if bench.quick else 20
    async with _manager(bench, "memory") as manager:
        await _open(manager, 2)
        await _work(list(manager.sessions.values()))
        before = _rss()
        known = set(manager.sessions)
        await _open(manager, 2 + more)
        await _work([one for name, one in manager.sessions.items() if name not in known])
        per_session = (_rss() - before) / more
    return [Measurement("host memory per open session", "MB", [max(0.0, per_session)], target=1.0)]


async def _work(sessions: list[Session]) -> None:
    for number in range(50):
        await asyncio.gather(*(checked(one, f"y{number} = {number}\nprint(y{number})") for one in sessions))


async def density(bench: Bench) -> list[Measurement]:
    """A cell every 10 s in each of 1, 10, 50, 100 and 200 sessions; the p95 of ``pass``."""
    found: list[Measurement] = []
    alive = 0
    kernels = 0.0
    async with _manager(bench, "density") as manager:
        free = psutil.virtual_memory().available
        for count in COUNTS[:2] if bench.quick else COUNTS:
            try:
                await _open(manager, count)
            except SandboxError as exc:
                found.append(Measurement(f"pass, {count} sessions open", "ms", [0.0], note=f"not reached: {exc}"))
                break
            alive = len(manager.sessions)
            kernels = (free - psutil.virtual_memory().available) / 2**20 / alive
            took = await _every(list(manager.sessions.values()), EVERY_S, rounds=2 if bench.quick or count >= 50 else 4)
            note = f"p95 {1000 * quantile(took, 0.95):.1f} ms; {kernels:.0f} MB of the machine each"
            found.append(Measurement(f"pass, {count} sessions open, a cell every 10 s each", "ms", took, note=note))
    if not bench.quick:
        note = f"memory_limit {MEMORY_LIMIT}; by memory alone {20 * 1024 / max(kernels, 1):.0f} would fit in 20 GiB"
        found.append(Measurement("sessions open at once", "", [float(alive)], target=200, at_least=True, note=note))
    return found


async def _every(sessions: list[Session], period_s: float, *, rounds: int) -> list[float]:
    took: list[float] = []

    async def one(session: Session) -> None:
        await asyncio.sleep(random.uniform(0, period_s))  # they did not all begin at once
        for _ in range(rounds):
            began = time.perf_counter()
            await checked(session, "pass")
            took.append(time.perf_counter() - began)
            await asyncio.sleep(period_s)

    await asyncio.gather(*(one(session) for session in sessions))
    return took
