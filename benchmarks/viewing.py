"""Reading the end of a long log."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import Bench, Measurement, in_turns

GB = 10**9


async def viewer(bench: Bench) -> list[Measurement]:
    """``python -m viewer FOLDER --limit 10`` on a log of 1 GB and on one of 1 kB: whole processes."""
    large, small = bench.folder / "large", bench.folder / "small"
    await asyncio.to_thread(_make, large, GB)
    await asyncio.to_thread(_make, small, 1000)
    os.sync()  # a gigabyte on its way to the disk would slow both, and not evenly
    memory: dict[Path, list[float]] = {large: [], small: []}

    async def show(folder: Path) -> float:
        took, peak = await asyncio.to_thread(_show, folder)
        memory[folder].append(peak)
        return took

    samples = await in_turns({"large": lambda: show(large), "small": lambda: show(small)}, bench.repetitions)
    shutil.rmtree(large)
    note = f"peak memory {max(memory[large]):.1f} MB, on 1 kB {max(memory[small]):.1f} MB"
    row = "viewer --limit 10 on a 1 GB log"
    return [Measurement(row, "ms", samples["large"], samples["small"], "on a 1 kB log", 1.1, note=note)]


def _make(folder: Path, size: int) -> None:
    folder.mkdir()
    line = {
        "timestamp": "2026-01-01T00:00:00+00:00",
        "event": "code_execution",
        "code": "x = 1\n" * 10,
        "success": True,
    }
    text = json.dumps({**line, "stdout": "out\n" * 25, "execution_count": 1}).encode() + b"\n"
    with (folder / "session.log").open("wb") as file:
        for _ in range(max(1, size // len(text) // 1000)):
            file.write(text * min(1000, max(1, size // len(text))))
    (folder / "session_metadata.json").write_text(json.dumps({"session_id": folder.name, "execution_count": 1}))


def _show(folder: Path) -> tuple[float, float]:
    """Seconds, and MB at the peak."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "viewer", str(folder), "--limit", "10"], stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return took, used.ru_maxrss / 1024
