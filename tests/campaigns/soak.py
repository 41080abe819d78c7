"""``make soak``: many sessions for long, with artifacts, interrupts, kernels that die and containers that are killed.

Afterwards nothing may be left: no container, no thread, no descriptor; and the memory of the host process must have
stayed flat once it was warm. Sessions run in waves, so that what each leaves behind adds up.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import docker
import zmq

from campaigns.books import log_of
from campaigns.cells import CellPlan, cell
from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.session import Session

KINDS = {
    "quick": 120,
    "files": 25,
    "shared": 25,
    "slow": 4,
    "big": 2,
    "error": 12,
    "flood": 3,
    "picture": 6,
    "death": 1,
}
EXPECTED = {"error": "error", "death": "kernel_died"}
LIBC = ctypes.CDLL(None)
INTERRUPT_EVERY = 25
KILL_EVERY = 90
"""Cells of a session between two ``docker kill`` from outside."""
GROWTH = 0.10
"""How much larger than the first the last third of the memory samples may be."""


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> Counter[str]:
    """What is open, by what it is; numbers of pipes and sockets left out."""
    found: Counter[str] = Counter()
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(entry.path)
            found[target.partition(":[")[0]] += 1
    return found


class Soak:
    """One run."""

    def __init__(self, root: Path, seed: int, cells: int) -> None:
        self.settings = Settings(sessions_root=root, interrupt_grace_s=2.0)
        self.seed, self.cells = seed, cells
        self.statuses: Counter[str] = Counter()
        self.problems: list[str] = []
        self.samples: list[float] = []
        self.engine = docker.from_env()
        self.kills = 0

    async def session(self, manager: SessionManager, index: int) -> None:
        """One session from its start to its stop."""
        chance = random.Random(f"{self.seed}-{index}")
        session = await manager.start(f"soak-{index}")
        for number in range(1, self.cells + 1):
            plan = cell(f"{session.id}.{number}", chance.choices(list(KINDS), list(KINDS.values()))[0], chance)
            if number % INTERRUPT_EVERY == 0:
                await self.interrupted(session)
            elif number % KILL_EVERY == 0:
                await self.killed(session)
            else:
                await self.ran(session, plan)
        await manager.stop(session.id)
        folder = self.settings.sessions_root / session.id
        lines = [line for line in log_of(folder) if line["event"] == "code_execution"]
        if len(lines) != self.cells or len({line["msg_id"] for line in lines}) != self.cells:
            self.problems.append(f"{session.id}: {len(lines)} lines for {self.cells} cells")
        left = list((folder / "artifacts").iterdir())
        if left:
            self.problems.append(f"{session.id}: still in artifacts/: {left[:3]}")

    async def ran(self, session: Session, plan: CellPlan) -> None:
        result = await session.execute(plan.code, timeout=60)
        self.statuses[result.status] += 1
        if result.status != EXPECTED.get(plan.kind, "ok"):
            self.problems.append(f"cell {plan.tag} ({plan.kind}) ended as {result.status}: {str(result)[-300:]}")
        missing = set(plan.files) - {artifact.path for artifact in result.artifacts}
        if missing and result.success:
            self.problems.append(f"cell {plan.tag}: {len(missing)} of its files are missing in the result")

    async def interrupted(self, session: Session) -> None:
        call = asyncio.create_task(session.execute("while True: pass", timeout=60))
        while not await session.interrupt():
            await asyncio.sleep(0.01)  # until the cell has been sent
        self.statuses[(await call).status] += 1

    async def killed(self, session: Session) -> None:
        call = asyncio.create_task(session.execute("import time; time.sleep(60)", timeout=60))
        while not any(cell.running for cell in session._feed.cells.values()):
            await asyncio.sleep(0.01)  # until it runs: after a death the kernel may be a new one that still starts
        await asyncio.to_thread(self.engine.api.kill, session.container_id)
        self.kills += 1
        status = (await call).status
        self.statuses[status] += 1
        if status != "kernel_died":
            self.problems.append(f"{session.id}: its container was killed, the cell ended as {status}")

    async def watch(self) -> None:
        while True:
            # What is held, not what malloc's arenas keep of the largest moment so far (floods that happen to meet).
            LIBC.malloc_trim(0)
            self.samples.append(resident())
            await asyncio.sleep(1)  # one sample a second

    async def run(self, sessions: int, at_once: int) -> None:
        """Waves of ``at_once`` sessions; the first one warms up."""
        async with SessionManager(self.settings) as manager:
            waves = [range(first, min(first + at_once, sessions)) for first in range(0, sessions, at_once)]
            watching: asyncio.Task[None] | None = None
            for number, wave in enumerate(waves):
                began = time.monotonic()
                await asyncio.gather(*(self.session(manager, index) for index in wave))
                gc.collect()
                took = time.monotonic() - began
                opened, threads = descriptors().total(), threading.active_count()
                print(
                    f"wave {number + 1}: {len(wave)} sessions in {took:.0f} s; {resident():.0f} MiB, "
                    f"{opened} descriptors, {threads} threads",
                    flush=True,
                )
                if watching is None:
                    watching = asyncio.create_task(self.watch())
            if watching is not None:
                watching.cancel()


def thirds(samples: list[float]) -> tuple[float, float]:
    """Median of the first and of the last third."""
    third = max(1, len(samples) // 3)
    return statistics.median(samples[:third]), statistics.median(samples[-third:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--cells", type=int, default=200, help="of each session")
    parser.add_argument("--at-once", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3))
    print(f"soak: {arguments.sessions} sessions of {arguments.cells} cells, SEED={seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder / "sessions", seed, arguments.cells)
    soak.engine.ping()
    threads, open_before = set(threading.enumerate()), descriptors()
    began = time.monotonic()
    try:
        asyncio.run(soak.run(arguments.sessions, arguments.at_once))
    except KeyboardInterrupt:
        print(f"stopped; the sessions are ended, their folders are in {folder}")
        return 130
    took = time.monotonic() - began
    gc.collect()
    return report(soak, folder, threads, open_before, took)


def report(soak: Soak, folder: Path, threads: set[threading.Thread], before: Counter[str], took: float) -> int:
    """Print the figures; 1 when something is left, grew, or went wrong."""
    deadline = time.monotonic() + 10
    while (alive := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        for thread in alive:
            thread.join(0.1)  # those that end by themselves when they have nothing left to do
    containers = soak.engine.api.containers(
        all=True, filters={"label": f"sandbox-kernel.root={root_hash(soak.settings.sessions_root)}"}
    )
    # Two pools belong to the process and wait for its next session: docker-py's connections and zmq's threads. Without
    # them nothing may be open.
    pooled = descriptors()
    soak.engine.close()
    Engine.shared()._api.close()
    zmq.Context.instance().term()
    opened = descriptors() - before
    first, last = thirds(soak.samples or [resident()])
    flat = last <= first * (1 + GROWTH)
    for problem in soak.problems[:40]:
        print(f"PROBLEM: {problem}")
    print(f"cells {soak.statuses.total()}, ended: {dict(soak.statuses)}; containers killed: {soak.kills}")
    print(
        f"left: containers {len(containers)}, threads {sorted(t.name for t in alive)}, descriptors {dict(opened)} "
        f"(with the process's two pools {(pooled - before).total()})"
    )
    print(f"memory held after warm-up: first third {first:.1f} MiB, last third {last:.1f} MiB ({took:.0f} s)")
    if soak.problems or containers or alive or opened or not flat:
        print(f"not as it should be; everything is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
