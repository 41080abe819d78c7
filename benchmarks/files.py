"""Artifacts: written by a cell, taken by the observer, hashed and committed when the cell's result is there."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

from benchmarks.cells import session
from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import RawKernel
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.artifacts.sweep import batches
from sandbox_kernel.untrusted import FOLDER, Found, scan_untrusted

WRITE = """
import os
for _n in range(100):
    with open(f"artifacts/{_n}.bin", "wb") as _f: _f.write(os.urandom(10_000))
_block = os.urandom(1_000_000)
with open("artifacts/large.bin", "wb") as _f:
    for _n in range(200): _f.write(_n.to_bytes(4, "big") + _block)
"""


async def written_and_ingested(bench: Bench) -> list[Measurement]:
    """100 files of 10 kB and one of 200 MB, in a session; beside the raw kernel that only writes them."""
    async with RawKernel(bench.image) as raw, session(bench) as ours:

        async def once() -> float:
            async def run() -> None:
                result = await ours.execute(WRITE)
                assert result.success, result
                assert len(result.artifacts) == 101, len(result.artifacts)

            took = await timed(run)
            await asyncio.to_thread(_empty_store, ours.store)
            return took

        async def only_written() -> float:
            await raw.run("import shutil, os; [os.remove(f'artifacts/{n}') for n in os.listdir('artifacts')]")
            return await raw.run(WRITE)

        large = os.urandom(10**6) * 200

        async def only_hashed() -> float:
            return await timed(lambda: asyncio.to_thread(hashlib.sha256, large))

        samples = await in_turns({"ours": once, "raw": only_written, "hash": only_hashed}, bench.few)
    hashed, written = (statistics.median(samples[name]) for name in ("hash", "raw"))
    note = f"SHA-256 of the 200 MB alone takes {hashed * 1e3:.0f} ms, {hashed / written:.2f} times the baseline"
    row, baseline = "100 small + one 200 MB, ingested", "writing them to a bind mount"
    return [Measurement(row, "ms", samples["ours"], samples["raw"], baseline, 2.0, note=note)]


def _empty_store(store: ArtifactStore) -> None:
    """The bytes only, so that the disk does not fill; the catalog may grow."""
    for blob in (store.root / "blobs").glob("*/*"):
        blob.unlink()


async def ingest_alone(bench: Bench) -> list[Measurement]:
    """The store by itself, beside ``sha256sum`` of the same bytes."""
    one, many = bench.folder / "one", bench.folder / "many"
    found = []
    for row, folder, count, size, target in (
        ("one 1 GB file, ingested", one, 1, 10**9, 1.2),
        ("10,000 files of 10 kB, ingested", many, 10_000, 10_000, 3.0),
    ):
        samples = await in_turns(
            {
                "ours": partial(asyncio.to_thread, _ingest, folder, count, size),
                "sum": partial(asyncio.to_thread, _sha256sum, folder, count, size),
            },
            max(3, bench.few // 3) if count == 1 else bench.few,
        )
        found.append(Measurement(row, "ms", samples["ours"], samples["sum"], "sha256sum of the same bytes", target))
    return found


def _make(folder: Path, count: int, size: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    block = hashlib.sha256(str(time.time_ns()).encode()).digest() * 32_000  # ~1 MB, other bytes every time
    for number in range(count):
        with (folder / f"{number}.bin").open("wb") as file:
            left = size
            head = number.to_bytes(8, "big")
            while left:
                piece = (head + block)[:left]
                file.write(piece)
                left -= len(piece)


def _ingest(folder: Path, count: int, size: int) -> float:
    _make(folder, count, size)
    with ArtifactStore.open(folder.parent / "store") as store:
        descriptor = os.open(folder, FOLDER)
        try:
            began = time.perf_counter()
            files = (item for item in scan_untrusted(descriptor) if isinstance(item, Found))
            ingest = store.ingest("bench", descriptor, ended=True)
            made = sum(len(result.created) for result in ingest.batches(batches(files)))
            took = time.perf_counter() - began
        finally:
            os.close(descriptor)
        assert made == count, (made, count)
    shutil.rmtree(folder.parent / "store")
    return took


def _sha256sum(folder: Path, count: int, size: int) -> float:
    _make(folder, count, size)
    names = [str(path) for path in folder.iterdir()]
    began = time.perf_counter()
    subprocess.run(
        ["xargs", "-0", "sha256sum", "--"], input="\0".join(names), text=True, check=True, capture_output=True
    )
    took = time.perf_counter() - began
    shutil.rmtree(folder)
    return took
