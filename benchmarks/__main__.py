"""``python -m benchmarks [ROW ...] [--repetitions N] [--quick]``: the table of benchmarks/results/."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks import cells, density, files, floods, report, rivals, starts, viewing
from benchmarks.measure import Bench, Measurement

Rows = Callable[[Bench], Awaitable[list[Measurement]]]
ROWS: dict[str, Rows] = {
    "cells": cells.small,
    "big": cells.big,
    "starts": starts.starts,
    "flood": floods.flood,
    "artifacts": files.written_and_ingested,
    "ingest": files.ingest_alone,
    "viewer": viewing.viewer,
    "memory": density.memory,
    "rivals": rivals.rivals,
    "density": density.density,
}


async def _run(
    names: list[str], bench: Bench, written: Callable[[list[Measurement]], None]
) -> tuple[list[Measurement], int]:
    found: list[Measurement] = []
    failures = 0
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows = await ROWS[name](bench)
        except Exception:  # the other rows are worth having all the same
            traceback.print_exc()
            failures += 1
            continue
        for one in rows:
            if not one.ours:
                print(f"  {one.row}, {one.baseline_name}: left out, {one.note}", file=sys.stderr, flush=True)
                continue
            ratio = f"{one.ratio:.3f} x" if one.ratio is not None else f"{one.median:.4g}"
            print(f"  {one.row}: {ratio} {'' if one.met is not False else 'MISSED'}", file=sys.stderr, flush=True)
        found += rows
        written(found)
    return found, failures


def main() -> int:
    """Measure, write the table, print it. Exit code 1 when a row could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--repetitions", type=int, default=30, metavar="N", help="at least (default 30)")
    parser.add_argument("--quick", action="store_true", help="5 repetitions: to see that it runs, not to believe it")
    parser.add_argument("--image", default="sandbox:latest")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results, of a full run")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.rows) - set(ROWS))
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    repetitions = 5 if arguments.quick else arguments.repetitions
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    folder.chmod(0o755)
    bench = Bench(repetitions, repetitions, arguments.quick, folder, arguments.image)
    about = report.machine()
    output = arguments.output
    if output is None and not arguments.rows and not arguments.quick:
        output = report.RESULTS

    def written(found: list[Measurement]) -> None:
        if output is not None:  # after each row: a run that is cut short leaves what it has
            report.write(found, about, output)

    try:
        found, failures = asyncio.run(_run(arguments.rows or list(ROWS), bench, written))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report.markdown(found, about))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
