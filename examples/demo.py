"""The main job, end to end: an analysis in a container session, and the record it leaves.

    python examples/demo.py && python -m viewer sessions/conv

Starting it again appends to the same record.
"""

from __future__ import annotations

import asyncio
import sys

from sandbox_kernel import SandboxError, SessionManager, SessionStorage, Settings

LOAD = """
import numpy as np
import pandas as pd

rng = np.random.default_rng(7)
days = pd.date_range("2024-01-01", periods=366)
season = 10 - 9 * np.cos(2 * np.pi * np.arange(366) / 366)
weather = pd.DataFrame({"day": days, "celsius": (season + rng.normal(0, 2.5, 366)).round(1)})
weather.head()
"""

SUMMARIZE = """
monthly = weather.groupby(weather["day"].dt.month_name(), sort=False)["celsius"].agg(["mean", "min", "max"]).round(1)
monthly.to_csv("artifacts/monthly.csv")
print(monthly)
warmest = monthly["mean"].idxmax()
"""

FAIL = """
limit = float("19.2 °C")  # a number it is not: a cell may fail, the session goes on
"""

PLOT = """
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
axes.plot(weather["day"], weather["celsius"], linewidth=0.6, alpha=0.6, label="day")
axes.plot(weather["day"], weather["celsius"].rolling(30, center=True).mean(), label="30 days")
axes.set(title=f"The warmest month is {warmest}", ylabel="°C")
axes.legend()
figure.savefig("artifacts/weather.png", dpi=120)
plt.close(figure)
"""

ASK = """
f"{warmest}: {monthly.loc[warmest, 'mean']} °C on average, {len(weather)} days"
"""

CELLS = {"load": LOAD, "summarize": SUMMARIZE, "fail on purpose": FAIL, "plot": PLOT, "ask": ASK}


async def main() -> None:
    settings = Settings(session_storage=SessionStorage.BIND, sessions_root="sessions")
    async with SessionManager(settings) as manager:
        session = await manager.start("conv")
        print(f"session {session.id} runs in container {(session.container_id or '-')[:12]}")
        for name, code in CELLS.items():
            result = await session.execute(code.strip(), timeout=120)
            print(f"\n--- {name}: {result.status} after {result.duration_s:.2f} s")
            print(result if result.error is None else f"{result.error.name}: {result.error.value}")
            if result.success == (name == "fail on purpose"):
                raise SystemExit(f"this cell was to end otherwise:\n{result}")
        state = await session.state()
        print("\nvariables:", ", ".join(f"{name} ({variable.type})" for name, variable in state.variables.items()))
        print("artifacts:", ", ".join(f"{made.path} ({made.size_bytes} bytes)" for made in await session.artifacts()))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except SandboxError as exc:
        sys.exit(f"demo: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
