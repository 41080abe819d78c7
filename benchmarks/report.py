"""The table and its plots, in ``benchmarks/results/``."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement

RESULTS = Path(__file__).parent / "results"
_SCALE = {"ms": 1000.0, "MB": 1.0, "": 1.0}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": f"{os.cpu_count()} x {model}",
        "memory_gib": round(total, 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        **{name: version(name) for name in ("jupyter_client", "ipykernel", "pyzmq", "docker")},
    }


def write(measurements: list[Measurement], about: dict[str, Any], folder: Path = RESULTS) -> Path:
    """``results.json``, ``results.md`` and two plots; the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": about, "measurements": [one.as_json() for one in measurements]}
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    table = folder / "results.md"
    table.write_text(markdown(measurements, about))
    plots(measurements, folder)
    return table


def markdown(measurements: list[Measurement], about: dict[str, Any]) -> str:
    """The table."""
    lines = ["# Benchmarks", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in about.items()]
    lines += ["", "Samples of both sides were taken in turns in one run; the ratio is that of the medians.", ""]
    lines += [
        "| measure | median | p95 | n | baseline | its median | ratio | target | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in measurements:
        if not one.ours:
            lines.append(f"| {one.row} | – | – | 0 | {one.baseline_name} | – | – | {_target(one)} | left out |")
            continue
        base = _value(statistics.median(one.baseline), one.unit) if one.baseline else "–"
        ratio = f"{one.ratio:.3f} ×" if one.ratio is not None else "–"
        met = {True: "yes", False: "**no**", None: "–"}[one.met]
        lines.append(
            f"| {one.row} | {_value(one.median, one.unit)} | {_value(one.p95, one.unit)} | {len(one.ours)} | "
            f"{one.baseline_name or '–'} | {base} | {ratio} | {_target(one)} | {met} |"
        )
    notes = [f"- {one.row}: {' '.join(one.note.split())}" for one in measurements if one.note]
    return "\n".join(
        [*lines, *(["", *notes] if notes else []), "", "![ratios](ratios.png)", "", "![samples](samples.png)", ""]
    )


def _value(value: float, unit: str) -> str:
    scaled = value * _SCALE[unit]
    return f"{scaled:.2f} {unit}" if abs(scaled) < 100 else f"{scaled:,.0f} {unit}"


def _target(one: Measurement) -> str:
    if one.target is None:
        return "–"
    sign = "≥" if one.at_least else "≤"
    return f"{sign} {one.target:g} ×" if one.baseline else f"{sign} {_value(one.target, one.unit)}"


def plots(measurements: list[Measurement], folder: Path) -> None:
    """Ratios against their targets; the samples of each pair."""
    compared = [one for one in measurements if one.ratio is not None]
    if not compared:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.5 * len(compared) + 1.5))
    places = range(len(compared))
    colours = ["tab:green" if one.met else "tab:red" if one.met is False else "tab:gray" for one in compared]
    axis.barh(places, [one.ratio or 0 for one in compared], color=colours)
    for place, one in zip(places, compared, strict=True):
        if one.target is not None:
            axis.plot([one.target, one.target], [place - 0.45, place + 0.45], color="black", linewidth=2)
    axis.set_yticks(places, [one.row for one in compared])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("ratio of the medians to the baseline (black: target)")
    figure.tight_layout()
    figure.savefig(folder / "ratios.png", dpi=120)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(len(compared), 1, figsize=(9, 1.1 * len(compared)), squeeze=False)
    for (axis,), one in zip(axes, compared, strict=True):
        scale = _SCALE[one.unit]
        pairs = [[value * scale for value in samples] for samples in (one.baseline, one.ours)]
        axis.boxplot(pairs, orientation="horizontal", showfliers=False, widths=0.7)
        axis.set_yticks([1, 2], ["baseline", "ours"], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{one.row} ({one.unit})", fontsize=8, loc="left", pad=2)
    figure.tight_layout()
    figure.savefig(folder / "samples.png", dpi=120)
    pyplot.close(figure)
