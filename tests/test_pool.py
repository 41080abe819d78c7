"""The pool on the real engine: what a claimed session has, and that no spare is used twice or left behind."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import docker
import pytest
import pytest_asyncio

from sandbox_kernel import SessionManager, SessionStorage, Settings
from sandbox_kernel.errors import LimitExceeded
from sandbox_kernel.pool import FOLDER, Pool
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.provisioning.memory import check_memory
from sandbox_kernel.session import Session
from sandbox_kernel.settings import DatasetAccess

pytestmark = pytest.mark.usefixtures("image")


class Pooled:
    """A manager with a pool, and the engine's view of its sessions root."""

    def __init__(self, manager: SessionManager, engine: docker.DockerClient) -> None:
        self.manager, self.engine = manager, engine
        self.root = manager.settings.sessions_root

    @property
    def pool(self) -> Pool:
        return self.manager.pool

    def containers(self) -> dict[str, dict[str, Any]]:
        return containers(self.engine, self.root)

    async def start(self, session_id: str) -> tuple[Session, bool]:
        """A session, and whether its kernel is one that was there before."""
        before = self.containers()
        session = await self.manager.start(session_id)
        return session, session.container_id in before


def containers(engine: docker.DockerClient, root: Path) -> dict[str, dict[str, Any]]:
    """The engine's description of each container of a sessions root."""
    entries = engine.api.containers(all=True, filters={"label": f"sandbox-kernel.root={root_hash(root)}"})
    return {entry["Id"]: engine.api.inspect_container(entry["Id"]) for entry in entries}


def targets(container: dict[str, Any]) -> dict[str, bool]:
    """Where something is mounted, and whether it is read-only."""
    return {mount["Target"]: mount.get("ReadOnly", False) for mount in container["HostConfig"]["Mounts"]}


@pytest_asyncio.fixture
async def pooled(tmp_path: Path, engine: docker.DockerClient) -> AsyncIterator[Pooled]:
    settings = Settings(sessions_root=tmp_path / "s", pool_size=1, memory_limit="300m", pids_limit=77)
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        yield Pooled(manager, engine)
    assert containers(engine, tmp_path / "s") == {}
    assert list((tmp_path / "s" / FOLDER).iterdir()) == []


async def until(condition: Any, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come"
        await asyncio.sleep(0.02)


async def test_a_claimed_session_is_like_any_other(pooled: Pooled, tmp_path: Path) -> None:
    session, warm = await pooled.start("warm")
    assert warm
    result = await session.execute("x = 41\nopen('artifacts/made.txt', 'w').write('made')\nx + 1")
    assert (result.result, result.execution_count, result.status) == ("42", 1, "ok")
    assert [artifact.path for artifact in result.artifacts] == ["made.txt"]
    assert (await session.state()).variables["x"].value == "41"
    assert session.directory is not None
    assert (session.directory / "session.log").read_text().count("code_execution") == 1

    await pooled.pool.full()
    cold = await pooled.manager.start("cold", secrets={"TOKEN": "t-12345678"})
    assert len(pooled.pool) == 1
    found = pooled.containers()
    mine, other = found[session.container_id or ""], found[cold.container_id or ""]
    for name, value in mine["HostConfig"].items():
        if name != "Mounts":
            assert value == other["HostConfig"][name], name
    assert targets(mine) == targets(other)
    assert mine["Config"]["Env"] == other["Config"]["Env"]
    await until(lambda: "warm" in pooled.engine.api.inspect_container(session.container_id)["Name"])


async def test_one_tenant_each_and_cold_when_empty(pooled: Pooled) -> None:
    found = await asyncio.gather(*(pooled.manager.start(f"s{n}") for n in range(3)))
    assert len({session.container_id for session in found}) == 3
    for n, session in enumerate(found):
        assert (await session.execute(f"mine = {n}\nsorted(k for k in dir() if k == 'mine')")).success
    await asyncio.gather(*(session.stop() for session in found))
    await pooled.pool.full()
    again, warm = await pooled.start("s1")
    assert warm
    assert again.container_id not in {session.container_id for session in found}
    assert (await again.execute("mine")).status == "error"


async def test_what_is_not_alike_starts_cold(pooled: Pooled) -> None:
    session = await pooled.manager.start("secret", secrets={"API_TOKEN": "s3cr3t-value"})
    assert (await session.execute("import os; os.environ['API_TOKEN'][:2]")).result == "'s3'"
    assert len(pooled.pool) == 1
    left = pooled.root / "full" / "artifacts"
    left.mkdir(parents=True)
    (left / "left.txt").write_text("left by a process that died")
    session, warm = await pooled.start("full")
    assert not warm
    await session.execute("1")
    assert [artifact.path for artifact in await session.artifacts()] == ["left.txt"]


async def test_a_spare_that_died_is_not_handed_out(pooled: Pooled) -> None:
    (spare,) = pooled.containers()
    pooled.engine.api.kill(spare)
    await until(lambda: len(pooled.pool) == 0)
    session, warm = await pooled.start("a")
    assert not warm
    assert (await session.execute("1 + 1")).result == "2"
    await pooled.pool.full()
    await until(lambda: spare not in pooled.containers())


async def test_a_claimed_kernel_restarts_dies_and_comes_back(pooled: Pooled) -> None:
    session, warm = await pooled.start("a")
    assert warm
    await session.execute("x = 1")
    assert "x" in (await session.state()).variables
    assert await session.restart() == ["x"]
    assert (await session.execute("2 + 2")).result == "4"
    died = await session.execute("import os; os._exit(3)")
    assert died.status == "kernel_died"
    assert (await session.execute("3 + 3")).result == "6"


async def test_imports_are_done(tmp_path: Path) -> None:
    settings = Settings(sessions_root=tmp_path, pool_size=1, pool_imports=["fractions"])
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        session = await manager.start("a")
        assert (await session.execute("import sys; 'fractions' in sys.modules")).result == "True"


async def test_an_import_that_fails_is_told_once_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(sessions_root=tmp_path, pool_size=2, pool_imports=["pnadas", "fractions", "json.nothing"])
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        assert len(manager.pool) == 2
    (line,) = [record.getMessage() for record in caplog.records if "pool_imports" in record.getMessage()]
    assert "cannot import pnadas: ModuleNotFoundError: No module named 'pnadas'; json.nothing: " in line


async def test_tmpfs(tmp_path: Path, engine: docker.DockerClient) -> None:
    settings = Settings(sessions_root=tmp_path, pool_size=1, session_storage=SessionStorage.TMPFS)
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        (spare,) = containers(engine, tmp_path)
        session = await manager.start("memory")
        assert session.container_id == spare
        result = await session.execute("open('artifacts/a', 'w').write('abc')")
        assert [artifact.path for artifact in result.artifacts] == ["a"]
        assert [info.session_id for info in await manager.list()] == ["memory"]
    assert containers(engine, tmp_path) == {}


async def test_data_sets_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("a,b\n")
    settings = Settings(
        sessions_root=tmp_path / "s",
        pool_size=1,
        dataset_access=DatasetAccess.LOCAL_RO,
        datasets_path=tmp_path / "data",
    )
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        session = await manager.start("a")
        assert len(manager.pool) == 0
        assert (await session.execute("open('/data/a.csv').read()")).result == "'a,b\\n'"


def test_a_full_machine_says_so(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24637488 kB\nMemFree:   9000 kB\nMemAvailable:     102400 kB\n")
    with pytest.raises(LimitExceeded, match="100 MB of memory left"):
        check_memory(meminfo)
    meminfo.write_text("MemAvailable:    1024000 kB\n")
    check_memory(meminfo)
    check_memory(tmp_path / "nothing")


KILLED = """
import asyncio, os, signal, sys
from sandbox_kernel import SessionManager, Settings

async def main():
    settings = Settings(sessions_root=sys.argv[1], pool_size=1, stop_on_exit=False)
    async with SessionManager(settings) as manager:
        await manager.pool.full()
        session = await manager.start("kept")
        await session.execute("x = 'still here'")
        await manager.pool.full()
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_process_leaves_its_sessions_and_no_spares(tmp_path: Path, engine: docker.DockerClient) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(tmp_path))
    assert await process.wait() == -signal.SIGKILL
    assert len(containers(engine, tmp_path)) == 2
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        lines = await manager.gc()
        assert any("container" in line for line in lines), lines
        session = await manager.get("kept")
        assert list(containers(engine, tmp_path)) == [session.container_id]
        assert (await session.execute("x")).result == "'still here'"
        assert list((tmp_path / FOLDER).iterdir()) == []
    assert containers(engine, tmp_path) == {}
