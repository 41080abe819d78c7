"""Reading the end of a long log."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import Bench, Measurement, in_turns

GB = 10**9


async def viewer(bench: Bench) -> list[Measurement]:
    """``python -m viewer FOLDER --limit 10`` on a log of 1 GB and on one of 1 kB: whole processes."""
    large, small = bench.folder / "large", bench.folder / "small"
    await asyncio.to_thread(_make, large, GB)
    await asyncio.to_thread(_make, small, 1000)
    os.sync()  # a gigabyte on its way to the disk would slow both, and not evenly
    samples = await in_turns(
        {"large": partial(asyncio.to_thread, _show, large), "small": partial(asyncio.to_thread, _show, small)},
        bench.repetitions,
    )
    peaks = [await asyncio.to_thread(_peak, folder) for folder in (large, small)]
    shutil.rmtree(large)
    note = f"peak memory {peaks[0]:.1f} MB, on 1 kB {peaks[1]:.1f} MB"
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


def _show(folder: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "viewer", str(folder), "--limit", "10"], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def _peak(folder: Path) -> float:
    """MB at the peak, as the process itself sees it: what its parent is told counts the parent's memory too."""
    code = "import sys, viewer; viewer.main(sys.argv[1:]); sys.stderr.write(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, str(folder), "--limit", "10"]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
