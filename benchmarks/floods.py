"""A kernel that prints as fast as it can."""

from __future__ import annotations

from benchmarks.cells import RAW, session
from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import RawKernel

LINES = 100_000
FLOOD = f"for _ in range({LINES}): print('x' * 99)"
SIZE = LINES * 100


async def flood(bench: Bench) -> list[Measurement]:
    """10 MB in lines of 100 characters. In ours every byte must be there; of the raw kernel it is counted."""
    received: list[int] = []
    async with RawKernel(bench.image) as raw, session(bench) as ours:

        async def ours_once() -> float:
            async def run() -> None:
                result = await ours.execute(FLOOD)
                assert result.success, result
                (whole,) = result.output_artifacts
                assert whole.size_bytes == SIZE, f"{SIZE - whole.size_bytes} bytes were lost"

            return await timed(run)

        async def raw_once() -> float:
            took, size = await raw.call(raw.run_now, FLOOD)
            received.append(size)
            return float(took)

        samples = await in_turns({"ours": ours_once, "raw": raw_once}, bench.few)
    lost = sum(size < SIZE for size in received)
    note = f"every byte stored; the raw client lost some in {lost} of {len(received)} runs" if lost else "nothing lost"
    return [Measurement("10 MB of prints", "ms", samples["ours"], samples["raw"], RAW, 1.0, note=note)]
