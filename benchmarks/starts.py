"""From nothing to a first result."""

from __future__ import annotations

import asyncio

from benchmarks.cells import checked, session
from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import RawKernel
from sandbox_kernel import SessionManager, Settings

DOCKER_RUN = "first result of the bare kernel by docker run"


async def starts(bench: Bench) -> list[Measurement]:
    """Cold, out of the pool, and restarted inside a session; beside ``docker run`` of the bare kernel."""

    async def raw() -> float:
        kernel = RawKernel(bench.image)
        try:
            return float(await kernel.call(kernel.first_result_now, "1 + 1"))
        finally:
            await kernel.close()

    def settings(name: str, **more: int) -> Settings:
        return Settings(sessions_root=bench.folder / name, image=bench.image, **more)

    async with (
        SessionManager(settings("cold")) as cold,
        SessionManager(settings("warm", pool_size=1)) as warm,
        session(bench) as restarted,
    ):

        async def start(manager: SessionManager) -> float:
            async def first() -> None:
                await checked(await manager.start(), "1 + 1")

            took = await timed(first)
            await asyncio.gather(*(one.stop() for one in manager.sessions.values()))
            return took

        async def claim() -> float:
            await warm.pool.full()
            took = await start(warm)
            await warm.pool.full()  # what it makes anew is not to slow the next measurement
            return took

        async def restart() -> float:
            async def again() -> None:
                await restarted.restart()
                await checked(restarted, "1 + 1")

            return await timed(again)

        samples = await in_turns(
            {"raw": raw, "cold": lambda: start(cold), "claim": claim, "restart": restart}, bench.repetitions
        )
    base = samples["raw"]
    return [
        Measurement("claim from the pool to first result", "ms", samples["claim"], base, DOCKER_RUN, 0.03),
        Measurement("cold start to first result", "ms", samples["cold"], base, DOCKER_RUN, 1.0),
        Measurement("restart to first result", "ms", samples["restart"], samples["cold"], "cold start", 0.3),
    ]
