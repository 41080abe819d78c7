"""One cell after the other in a session with everything on: record, hook, observer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import RawKernel
from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.session import Session

RAW = "raw jupyter_client, stock ipykernel"
LINES = "\n".join(f"a{n} = [{n}] * 3\nb{n} = sum(a{n})" for n in range(50))
"""A cell of 100 lines."""
BIG = """
import numpy as np, pandas as pd
for _n in range(1000):
    globals()[f"v{_n}"] = [_n, str(_n)] if _n % 2 else _n
array = np.ones(25_000_000)
frame = pd.DataFrame({"a": np.arange(1_000_000), "b": np.random.rand(1_000_000)})
table = {str(_n): _n for _n in range(100_000)}
"""


@contextlib.asynccontextmanager
async def session(bench: Bench, **settings: Any) -> AsyncIterator[Session]:
    """A session of its own manager."""
    values = {"sessions_root": bench.folder / "sessions", "image": bench.image, **settings}
    async with SessionManager(Settings(**values)) as manager:
        yield await manager.start()


async def checked(ours: Session, code: str) -> None:
    result = await ours.execute(code)
    assert result.success, result


async def small(bench: Bench) -> list[Measurement]:
    """``pass`` and 100 lines, beside the same cell in the raw kernel."""
    found = []
    async with RawKernel(bench.image) as raw, session(bench) as ours:
        for row, code in (('execute("pass")', "pass"), ("a 100-line cell", LINES)):
            steps = {"ours": partial(timed, partial(checked, ours, code)), "raw": partial(raw.run, code)}
            samples = await in_turns(steps, bench.repetitions * 10, warm_up=20)
            found.append(Measurement(row, "ms", samples["ours"], samples["raw"], RAW, 0.6))
    return found


async def big(bench: Bench) -> list[Measurement]:
    """A namespace that is costly to describe, beside a session whose namespace is empty."""
    async with session(bench) as empty, session(bench) as full:
        await checked(full, BIG)
        assert (await full.state()).variables["array"]
        replies: dict[str, list[float]] = {"empty": [], "full": []}
        lags: list[float] = []
        for number in range(bench.repetitions * 3):
            for name, one in (("empty", empty), ("full", full)):
                took, lag = await _with_lag(one, number)
                replies[name].append(took)
                if name == "full":
                    lags.append(lag)
        samples = await in_turns(
            {name: partial(_next_at_once, one) for name, one in (("empty", empty), ("full", full))},
            bench.repetitions * 3,
            warm_up=5,
        )
    return [
        Measurement("a cell with a big namespace", "ms", replies["full"], replies["empty"], "empty namespace", 1.1),
        Measurement("state file replaced after idle", "ms", lags, target=0.008),
        Measurement("a next cell sent at once", "ms", samples["full"], samples["empty"], "empty namespace", 1.1),
    ]


async def _with_lag(one: Session, number: int) -> tuple[float, float]:
    """Seconds of a cell that changes one variable, and from its end to its state file."""
    began = time.perf_counter()
    await checked(one, f"changed = {number}")
    ended = time.perf_counter()
    assert one.directory is not None
    path, count = one.directory / "state" / "python_state.json", one.execution_count
    while _count(path) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.0002)  # the file is what is waited for
    return ended - began, time.perf_counter() - ended


def _count(path: Path) -> int:
    """The cell after which a state file was written: it stands on the last line of half a megabyte."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1000))
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
            return int(json.loads(b"{" + last)["execution_count"] or 0)
    return 0


async def _next_at_once(one: Session) -> float:
    await checked(one, "changed = 0")
    return await timed(lambda: checked(one, "pass"))
