"""``make crash``: SIGKILL of the process that holds a session, at random moments; afterwards the books must balance.

A round: a host process (:mod:`campaigns.host`) opens a session, mostly one that the round before left alive, and works;
it is killed up to 0.4 s after one of its steps has begun, now and then together with its container. Then this process
takes the session over, waits until the kernel is idle, lets go, and compares the books (:mod:`campaigns.books`).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import docker
from jupyter_core.paths import jupyter_runtime_dir

from campaigns.books import Books, Figures, unwritten
from campaigns.cells import CellPlan, cell
from campaigns.host import Plan, live
from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import SandboxError, SessionHeld
from sandbox_kernel.pool import FOLDER as POOL
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.provisioning.engine import MANAGED
from sandbox_kernel.provisioning.runtime import runtime_base
from sandbox_kernel.snapshot import read_metadata

LANES = 3
"""Rounds under way at once, each in a session of its own; the store is shared by all."""
LIFE = 15
"""Rounds until a lane begins another session; every second one is stopped then, the others are left for `gc`."""
KINDS = {
    "quick": 4, "files": 5, "slow": 5, "big": 2, "shared": 3, "error": 1, "loop": 1, "flood": 1, "picture": 1,
    "death": 1,
}  # fmt: skip
SETTLED_S = 30.0


class Campaign:
    """All rounds over one sessions root."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.settings = Settings(sessions_root=root, stop_on_exit=False, interrupt_grace_s=1.0)
        self.chance = random.Random(seed)
        self.books: dict[str, Books] = {}
        self.figures: dict[str, Figures] = {}
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.refused = 0
        self.rounds = 0
        self.engine = docker.from_env()
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["campaigns.host"])
        self.store = ArtifactStore.open(self.settings.store_path)
        self.networks = {network.id for network in self.engine.networks.list(filters={"label": MANAGED})}

    # -- one round -------------------------------------------------------------------------

    def plan(self, session_id: str, number: int, chance: random.Random) -> Plan:
        """What the host process is to do."""
        kinds = chance.choices(list(KINDS), list(KINDS.values()), k=chance.randrange(1, 6))
        steps: list[CellPlan | str] = [cell(f"{session_id}.{number}.{n}", kind, chance) for n, kind in enumerate(kinds)]
        if chance.random() < 0.08:
            steps.insert(chance.randrange(len(steps) + 1), "restart")
        if number % LIFE == LIFE - 1 or chance.random() < 0.07:
            steps += ["stop", "start"]
        books = self.books[session_id]
        books.plans |= {step.tag: step for step in steps if isinstance(step, CellPlan)}
        return Plan(self.root, session_id, books.notes, tuple(steps), spares=int(chance.random() < 0.15))

    async def round(self, lane: int, number: int, manager: SessionManager, chance: random.Random) -> None:
        session_id = f"lane{lane}-{number // LIFE}"
        folder = self.root / session_id
        if session_id not in self.books:
            self.books[session_id] = Books(folder, self.root.parent / f"{session_id}.notes", self.store)
        plan = self.plan(session_id, number, chance)
        # Opening comes first in every life, stopping in few: neither shall crowd out the other steps.
        rare = ["start", "stop"] if "stop" in plan.steps else ["start"]
        step = chance.choices(range(len(plan.steps) + 1), [0.5, *(2 if s in rare else 1 for s in plan.steps)])[0]
        delay = chance.uniform(0, 0.9 if step == 0 and number % LIFE == 0 else 0.4)
        what = "start" if step == 0 else plan.steps[step - 1]
        self.kills[what if isinstance(what, str) else what.kind] += 1
        await self.life(plan, step, delay, manager, check_held=chance.random() < 0.15)
        late = unwritten(folder, plan.notes)
        if late:
            self.problems.append(f"{session_id}: execute() returned before the line was in the log: {late}")
        fate = chance.random()
        if fate < 0.12:
            self.kills["with its container"] += 1
            await asyncio.to_thread(self.end_container, folder, remove=fate < 0.04)
        await self.settle(session_id, manager)
        self.figures[session_id] = await asyncio.to_thread(self.books[session_id].check)
        found = self.figures[session_id].problems
        self.problems += [f"round {number} of lane {lane}, killed in {what!s:.60}: {problem}" for problem in found]
        self.rounds += 1
        if number % LIFE == LIFE - 1 and number // LIFE % 2:
            await manager.stop(session_id)

    async def life(self, plan: Plan, step: int, delay: float, manager: SessionManager, *, check_held: bool) -> None:
        """Run a host process until its time has come."""
        ours, theirs = self.processes.Pipe()
        process = self.processes.Process(target=live, args=(plan, theirs))
        await asyncio.to_thread(process.start)
        theirs.close()
        with closing(ours), closing(process), _killed(process):
            reached = -2
            deadline = time.monotonic() + 60
            while reached not in (step, -1):
                if not await asyncio.to_thread(ours.poll, max(0.0, deadline - time.monotonic())):
                    self.problems.append(f"{plan.session_id}: step {step} of {plan.steps} was not reached in 60 s")
                    break
                try:
                    reached = ours.recv()
                except EOFError:
                    self.problems.append(f"{plan.session_id}: the host process ended by itself")
                    break
            await asyncio.sleep(delay)  # the moment of the kill
            if check_held and step > 0 and isinstance(plan.steps[step - 1], CellPlan):
                try:
                    await manager.get(plan.session_id)
                    self.problems.append(f"{plan.session_id}: a second manager was let in while the first lives")
                except SessionHeld:
                    self.refused += 1

    def end_container(self, folder: Path, *, remove: bool) -> None:
        """The container dies as well."""
        container = (read_metadata(folder)[0] or {}).get("container_id")
        with suppress(docker.errors.APIError):
            if container and remove:
                self.engine.api.remove_container(container, force=True)
            elif container:
                self.engine.api.kill(container)

    async def settle(self, session_id: str, manager: SessionManager) -> None:
        """Take the session over, wait until nothing runs and nothing lies about, and let go."""
        try:
            session = await manager.start(session_id)
        except SandboxError as exc:
            self.problems.append(
                f"{session_id}: cannot be taken over: {exc!r}\n{await asyncio.to_thread(self.outputs)}"
            )
            session = await manager.start(session_id)
        artifacts = self.root / session_id / "artifacts"
        deadline = time.monotonic() + SETTLED_S
        while session.busy or any(artifacts.iterdir()):
            if time.monotonic() > deadline:
                self.problems.append(f"{session_id}: not idle after {SETTLED_S:g} s")
                break
            await asyncio.sleep(0.02)
        await session.detach()

    def outputs(self) -> str:
        """What the containers of this campaign printed last."""
        label = f"sandbox-kernel.root={root_hash(self.root)}"
        entries = self.engine.api.containers(all=True, filters={"label": label})
        return "\n".join(
            f"{entry['Names'][0]} ({entry['Status']}): {self.engine.api.logs(entry['Id'], tail=10)!r}"
            for entry in entries
        )

    # -- all of them -----------------------------------------------------------------------

    async def run(self, rounds: int) -> None:
        chances = [random.Random(self.chance.random()) for _ in range(LANES)]
        async with SessionManager(self.settings) as manager:

            async def lane(index: int) -> None:
                for number in range(rounds // LANES + (index < rounds % LANES)):
                    await self.round(index, number, manager, chances[index])

            try:
                await asyncio.gather(*map(lane, range(LANES)))
            finally:  # after Ctrl-C too
                removed = await manager.gc(all=True)
                self.store.close()
        print(f"gc: {len(removed)} things removed")

    def left(self) -> dict[str, int]:
        """What is left of the campaign on the machine after ``gc --all``."""
        kernels = {kernel for books in self.books.values() for kernel in books.kernels}
        label = f"sandbox-kernel.root={root_hash(self.root)}"
        names = {path.name for path in runtime_base().iterdir()}
        store = self.settings.store_path
        rooms = [room for room in (store / "tmp").iterdir() if room.name != ".lock"]
        spares = list((self.root / POOL).glob("*"))
        temporary = [*rooms, *spares, *self.root.glob("*/.session_metadata.json.*"), *self.root.glob("*/.pending.*")]
        files = [Path(jupyter_runtime_dir(), f"kernel-{kernel}.json") for kernel in kernels]
        ours = self.engine.networks.list(filters={"label": MANAGED}, greedy=True)
        return {
            "containers": len(self.engine.api.containers(all=True, filters={"label": label})),
            "runtime folders": len(kernels & names),
            "networks": len([n for n in ours if n.id not in self.networks and not n.attrs["Containers"]]),
            "lock files": len(list((runtime_base() / "locks").glob(f"{root_hash(self.root)}-*"))),
            "temporary files": len(temporary),
            "connection files": sum(path.exists() for path in files),
        }


@contextmanager
def _killed(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """By SIGKILL, whatever happens: it waits for nothing else."""
    try:
        yield
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3))
    print(f"crash: {arguments.rounds} rounds, SEED={seed}", flush=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    campaign = Campaign(folder / "sessions", seed)
    try:
        asyncio.run(campaign.run(arguments.rounds))
    except KeyboardInterrupt:
        print(f"stopped after {campaign.rounds} rounds; their containers are removed, their sessions are in {folder}")
        return 130
    took = time.monotonic() - began
    left = campaign.left()
    totals = {
        name: sum(getattr(found, name) for found in campaign.figures.values())
        for name in ("cells", "artifacts", "lost", "doubled")
    }
    statuses = sum((found.statuses for found in campaign.figures.values()), Counter[str]())
    print(f"killed in: {dict(campaign.kills)}; second managers refused: {campaign.refused}")
    print(f"cells ended: {dict(statuses)}")
    for problem in campaign.problems[:40]:
        print(f"PROBLEM: {problem}")
    print(
        f"rounds {campaign.rounds}, "
        + ", ".join(f"{name} {count}" for name, count in totals.items())
        + ", left: "
        + ", ".join(f"{name} {count}" for name, count in left.items())
        + f" ({took:.0f} s, {took / max(1, campaign.rounds):.2f} s a round, SEED={seed})"
    )
    balanced = not campaign.problems and not any(left.values()) and campaign.rounds == arguments.rounds
    if balanced and not totals["lost"] and not totals["doubled"]:
        shutil.rmtree(folder)
        return 0
    print(f"the books do not balance; everything is kept in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
