"""What is measured, and how: samples of two things taken in turns, so that whatever slows the machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = Callable[[], Awaitable[float]]
"""Does it once; the seconds it took."""


@dataclass
class Measurement:
    """One line of the table. ``target``: the largest ratio (or value, where there is no baseline) that is good."""

    row: str
    unit: str
    ours: list[float]
    """Empty where it was left out: ``note`` says why."""
    baseline: list[float] = field(default_factory=list)
    baseline_name: str = ""
    target: float | None = None
    at_least: bool = False
    """The target is the smallest value that is good."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ours)

    @property
    def p95(self) -> float:
        return quantile(self.ours, 0.95)

    @property
    def ratio(self) -> float | None:
        """Median to median; None without a baseline, or where it was left out."""
        return self.median / statistics.median(self.baseline) if self.baseline else None

    @property
    def met(self) -> bool | None:
        """None where no target is set, or where it was left out."""
        if self.target is None or not self.ours:
            return None
        value = self.median if self.ratio is None else self.ratio
        return value >= self.target if self.at_least else value <= self.target

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "unit": self.unit,
            "median": self.median if self.ours else None,
            "p95": self.p95 if self.ours else None,
            "repetitions": len(self.ours),
            "baseline": self.baseline_name or None,
            "baseline_median": statistics.median(self.baseline) if self.baseline else None,
            "baseline_p95": quantile(self.baseline, 0.95) if self.baseline else None,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
            "note": self.note,
            "samples": {"ours": self.ours, "baseline": self.baseline},
        }


@dataclass(frozen=True)
class Bench:
    """How thorough a run is, and where it may write."""

    repetitions: int
    """Of quick steps; a cell is repeated ten times as often."""
    few: int
    """Of steps that take seconds."""
    quick: bool
    folder: Path
    """For sessions and files; on the disk that the artifacts of users would be on."""
    image: str


async def in_turns(steps: dict[str, Step], repetitions: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """``repetitions`` samples of each step: one of each, then again, the first one last every other time."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repetitions + warm_up):
        for name in list(steps) if number % 2 else reversed(list(steps)):
            took = await steps[name]()
            if number >= warm_up:
                samples[name].append(took)
    return samples


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    """Seconds that ``work()`` took."""
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def quantile(samples: list[float], part: float) -> float:
    """The sample below which ``part`` of them lie."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]
