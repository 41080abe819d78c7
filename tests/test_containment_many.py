"""100,000 files at once: taken exactly once each, as the work of the cell that wrote them, and nobody else waits."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from attacked import events, folder, usable

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.artifacts.sweep import SWEEP_S
from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.timeout(400)]

NUMBER = 100_000
WRITE = f"""
import os
os.chdir("/session/artifacts")
def put(path, data):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
    os.write(fd, data)
    os.close(fd)
quarter = {NUMBER} // 4
for n in range(quarter):
    put(f"flat-{{n}}", b"")
for n in range(quarter):
    if n % 100 == 0: os.makedirs(f"wide/{{n // 100}}")
    put(f"wide/{{n // 100}}/{{n}}", b"equal" * 50)
for n in range(quarter):
    if n % 500 == 0: os.makedirs(deep := "deep" + "/down" * 40 + f"/{{n // 500}}")
    put(f"{{deep}}/{{n}}", b"%d" % n)
for n in range(quarter):
    if n % 10 == 0: os.makedirs(f"folders/{{n // 10}}")
    put(f"folders/{{n // 10}}/{{n}}", b"%d" % (n % 1000))
os.chdir("/session")
"""


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        hostile, other = await asyncio.gather(manager.start("hostile"), manager.start("other"))
        slowest, taken = 0.0, False

        async def others_work() -> None:
            nonlocal slowest
            while not taken:
                began = time.monotonic()
                await other.execute("pass")
                slowest = max(slowest, time.monotonic() - began)

        before = resident()
        working = asyncio.create_task(others_work())
        began = time.monotonic()
        result = await hostile.execute(WRITE, timeout=120)
        closing = time.monotonic() - began - result.duration_s
        assert result.status == "ok", result
        assert closing < SWEEP_S + 10, f"{closing:.1f} s"
        assert len(str(result)) < 64_000
        began = time.monotonic()
        following = await hostile.execute("open('artifacts/later', 'w').write('1')")
        took = time.monotonic() - began
        assert took < 10, f"{took:.1f} s"
        assert [artifact.path for artifact in following.artifacts] == ["later"]
        await everything_taken(hostile)
        taken = True
        await working
        assert slowest < 5, f"{slowest:.1f} s"
        assert resident() - before < 400

        made = {artifact.path: artifact.execution_count for artifact in await hostile.artifacts()}
        assert made.pop("later") == 2
        assert len(made) == NUMBER
        assert set(made.values()) == {1}
        lines = events(hostile, "artifacts_created")
        logged = [artifact["path"] for line in lines for artifact in line["artifacts"]]
        assert len(logged) == len(set(logged)) == NUMBER + 1
        with (folder(hostile) / "session.log").open("rb") as log:
            assert max(map(len, log)) < 16 * 2**20
        await usable(hostile)


async def everything_taken(session: Session) -> None:
    """Until no file is left in ``artifacts/``."""

    def left() -> int:
        return sum(len(files) for _, _, files in os.walk(folder(session) / "artifacts"))

    async with asyncio.timeout(240):
        while await asyncio.to_thread(left):
            await asyncio.sleep(0.2)
