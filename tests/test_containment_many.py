"""100,000 files at once: taken exactly once each, as the work of the cell that wrote them, and nobody else waits."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from attacked import events, folder, usable

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.artifacts.sweep import SWEEP_S
from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.timeout(400)]

NUMBER = 100_000


def files(number: int) -> Iterator[tuple[str, bytes]]:
    """Empty ones in one folder, equal ones in many, distinct ones far below, a few to a folder, distinct ones in one."""
    for n in range(number // 5):
        yield f"empty-{n}", b""
        yield f"equal/{n // 100}/{n}", b"the same bytes"
        yield "deep/" + "d/" * 50 + f"{n // 500}/{n}", b"far below %d" % n
        yield f"folders/{n // 10}/{n}", b"%d of a thousand" % (n % 1000)
        yield f"distinct/{n}", b"distinct %d" % n


WRITE = f"""
import os
from collections.abc import Iterator
{inspect.getsource(files)}
for path, data in files({NUMBER}):
    path = "artifacts/" + path
    try:
        file = open(path, "xb", buffering=0)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path))
        file = open(path, "xb", buffering=0)
    with file:
        file.write(data)
"""


class Others:
    """How another session, the event loop and the memory of the host process fare meanwhile."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.cells: list[float] = []
        self.late: list[float] = []
        self.memory = [resident()]

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._run_cells()), group.create_task(self._tick())]
            yield
            for task in tasks:
                task.cancel()

    async def _run_cells(self) -> None:
        while True:
            began = time.monotonic()
            assert (await self._session.execute("pass")).success
            self.cells.append(time.monotonic() - began)
            await asyncio.sleep(0.05)

    async def _tick(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            self.late.append(time.monotonic() - began - 0.01)
            self.memory.append(resident())

    def __str__(self) -> str:
        cells, late = sorted(self.cells), sorted(self.late)
        return (
            f"{len(cells)} cells of another session: median {cells[len(cells) // 2] * 1e3:.1f} ms, slowest "
            f"{cells[-1] * 1e3:.0f} ms; the event loop late by {late[int(len(late) * 0.99)] * 1e3:.0f} ms (99 %), "
            f"{late[-1] * 1e3:.0f} ms at most; memory +{max(self.memory) - self.memory[0]:.0f} MB"
        )


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def holds_files(session: Session) -> bool:
    return any(names for _, _, names in os.walk(folder(session) / "artifacts"))


async def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path / "sessions")) as manager:
        hostile, other = await asyncio.gather(manager.start("hostile"), manager.start("other"))
        others = Others(other)
        async with others.at_work():
            began = time.monotonic()
            result = await hostile.execute(WRITE, timeout=120)
            closing = time.monotonic() - began - result.duration_s
            assert result.status == "ok", result
            assert closing < SWEEP_S + 10, f"{closing:.1f} s"
            began = time.monotonic()
            following = await hostile.execute("open('artifacts/later', 'w').write('1')")
            took = time.monotonic() - began
            assert took < 10, f"{took:.1f} s"
            assert [artifact.path for artifact in following.artifacts] == ["later"], "the rest is not this cell's"
            async with asyncio.timeout(240):
                while await asyncio.to_thread(holds_files, hostile):
                    await asyncio.sleep(0.2)
        print(others)
        assert sorted(others.cells)[len(others.cells) // 2] < 0.1, str(others)
        assert max(others.cells) < 5, str(others)
        assert sorted(others.late)[int(len(others.late) * 0.99)] < 0.25, str(others)
        assert max(others.memory) - others.memory[0] < 250, "a kilobyte for each artifact in the result, and some"
        assert len(str(result)) < 64_000
        assert {artifact.execution_count for artifact in result.artifacts} == {1}
        await each_is_an_artifact_once(hostile)
        await the_record_can_be_looked_at(folder(hostile))
        await usable(hostile)
    assert not holds_files(hostile)
    assert os.listdir(tmp_path / "sessions/.store/tmp") == [".lock"]
    subprocess.run(["rm", "-rf", tmp_path / "sessions"], check=True)  # pytest would keep them for three runs


async def each_is_an_artifact_once(session: Session) -> None:
    """In the store and in the log, with the bytes that were written."""
    stored = await session.artifacts()
    made = {artifact.path: (artifact.execution_count, artifact.version, artifact.sha256) for artifact in stored}
    assert made.pop("later")[:2] == (2, 1)
    assert made == {path: (1, 1, sha256(data).hexdigest()) for path, data in files(NUMBER)}
    assert len(stored) == NUMBER + 1
    logged = [artifact["id"] for line in events(session, "artifacts_created") for artifact in line["artifacts"]]
    assert len(logged) == len(set(logged)) == NUMBER + 1
    assert set(logged) == {artifact.id for artifact in stored}
    assert events(session, "artifact_refused") == []


async def the_record_can_be_looked_at(session_folder: Path) -> None:
    with (session_folder / "session.log").open("rb") as log:
        assert max(map(len, log)) < 4 * 2**20
    for options, most in (((), 4), (("--json",), 64), (("--limit", "5"), 4)):
        command = [sys.executable, "-m", "viewer", str(session_folder), *options]
        shown = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=30)
        assert shown.returncode == 0, shown.stderr
        assert len(shown.stdout) < most * 2**20
