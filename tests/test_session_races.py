"""Two things at once to one session: each waits where it must, nothing is left, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from attacked import attacked, events, folder, until, usable
from jupyter_client.asynchronous.client import AsyncKernelClient

from sandbox_kernel import SessionManager, SessionStorage, Settings
from sandbox_kernel.errors import EngineUnavailable, RecordFull, SandboxError, SessionClosed
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.session import Session
from sandbox_kernel.testing import just_before

pytestmark = pytest.mark.usefixtures("image")

STUBBORN = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"


def left(engine: docker.DockerClient, root: Path) -> list[str]:
    """Names of the containers of a sessions root."""
    entries = engine.api.containers(all=True, filters={"label": f"sandbox-kernel.root={root_hash(root)}"})
    return [entry["Names"][0] for entry in entries]


async def running(session: Session) -> None:
    await until(lambda: any(cell.running for cell in session._feed.cells.values()))


async def test_two_who_give_a_cell_up_restart_its_kernel_once(tmp_path: Path) -> None:
    async with attacked(tmp_path, interrupt_grace_s=0.5) as session:
        call = asyncio.create_task(session.execute(STUBBORN, timeout=30))
        await running(session)
        await asyncio.gather(session.interrupt(), session.interrupt())
        assert (await call).status == "interrupted"
        await session.execute("mine = 1")
        await asyncio.sleep(0.3)  # a second restart would have begun by now
        assert (await session.execute("mine")).result == "1"
        assert len(events(session, "kernel_restarted")) == 1


async def test_a_restart_that_nobody_waits_for_goes_on(tmp_path: Path) -> None:
    async with attacked(tmp_path) as session:
        call = asyncio.create_task(session.execute("import time; time.sleep(600)", timeout=None))
        await running(session)
        descriptors = len(os.listdir("/proc/self/fd"))
        with suppress(TimeoutError):
            await asyncio.wait_for(session.restart(), 0.02)
        assert (await asyncio.wait_for(call, 10)).status == "interrupted"
        await usable(session)
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


@pytest.mark.parametrize("detach", [False, True], ids=["stop", "detach"])
async def test_left_while_its_next_kernel_starts(tmp_path: Path, engine: docker.DockerClient, detach: bool) -> None:
    async with attacked(tmp_path) as session:
        engine.api.kill(session.container_id)
        await until(lambda: events(session, "kernel_died"))
        call = asyncio.create_task(session.execute("1", timeout=30))
        await asyncio.sleep(0.05)  # it waits for the kernel that is on its way
        await (session.detach() if detach else session.stop())
        with pytest.raises(SessionClosed):
            await asyncio.wait_for(call, 10)
        assert left(engine, tmp_path / "sessions") == []
        assert (json.loads((folder(session) / "session_metadata.json").read_bytes())["stopped_at"] is None) == detach
        await asyncio.sleep(1)  # what was on its way would be here by now
        assert left(engine, tmp_path / "sessions") == []


async def test_stopped_while_it_restarts(tmp_path: Path, engine: docker.DockerClient) -> None:
    async with attacked(tmp_path) as session:
        call = asyncio.create_task(session.restart())
        await asyncio.sleep(0.01)
        await session.stop()
        with pytest.raises(SandboxError):
            await asyncio.wait_for(call, 10)
        assert left(engine, tmp_path / "sessions") == []
        assert events(session)[-1]["event"] == "session_stopped"


async def test_who_waits_for_a_cell_hears_that_the_session_was_let_go_of(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.start("conv")
        call = asyncio.create_task(session.execute("import time; time.sleep(1.5); 'through'", timeout=30))
        await running(session)
        await session.detach()
        with pytest.raises(SessionClosed, match="goes on"):
            await asyncio.wait_for(call, 5)
        again = await manager.get("conv")
        await until(lambda: not again.busy)
        (line,) = events(again, "code_execution")
        assert (line["status"], line["result"]) == ("ok", "'through'")


async def test_a_kernel_that_closed_its_sockets_ends_a_cell_without_limit(tmp_path: Path) -> None:
    code = (
        "import gc, zmq, time\nfor o in gc.get_objects():\n"
        "    if type(o).__module__.startswith('zmq') and isinstance(o, zmq.Socket): o.close(linger=0)\ntime.sleep(600)"
    )
    async with attacked(tmp_path, start_timeout_s=4) as session:
        result = await asyncio.wait_for(session.execute(code, timeout=None), 20)
        assert result.status == "kernel_died"
        assert result.death is not None
        assert result.death.cause == "unresponsive"
        await usable(session)


async def test_a_full_disk_while_the_next_kernel_starts(tmp_path: Path, engine: docker.DockerClient) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        async with attacked(disk) as session:
            await usable(session)
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            engine.api.kill(session.container_id)
            began = time.monotonic()
            refused: list[SandboxError] = []

            async def tried() -> bool:
                try:
                    await session.execute("1", timeout=5)
                except SandboxError as exc:
                    refused.append(exc)
                return bool(refused)

            while not await tried():
                assert time.monotonic() - began < 15
            assert isinstance(refused[0], RecordFull)
            ballast.unlink()
            while True:
                with suppress(RecordFull):  # what could not be written then is told now
                    if (await session.execute("6 * 7", timeout=5)).result == "42":
                        break
            assert time.monotonic() - began < 20
            await usable(session)
        assert left(engine, disk / "sessions") == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


async def test_a_cell_that_was_swept_away_and_not_sent_again_has_its_line(tmp_path: Path) -> None:
    def gone() -> None:
        raise EngineUnavailable("no engine any more")

    async with attacked(tmp_path) as session:
        client = AsyncKernelClient()
        client.load_connection_file(str(session.connection_file))
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=20)
            client.execute("import time; time.sleep(0.5); 1/0")
            await running(session)
            call = asyncio.create_task(session.execute("'swept'"))
            await until((folder(session) / ".pending").read_bytes)
            with just_before("kernel_wanted", gone), pytest.raises(EngineUnavailable):
                await call
        finally:
            client.stop_channels()
        await session.stop()
        (line,) = [line for line in events(session, "code_execution") if line["code"] == "'swept'"]
        assert line["status"] == "aborted"
        assert (folder(session) / ".pending").read_bytes() == b""
    assert events(session)[-1]["event"] == "session_stopped"


@pytest.mark.parametrize(("storage", "slow"), [(SessionStorage.BIND, 0.9), (SessionStorage.TMPFS, 1.3)])
async def test_cells_sent_all_at_once_have_each_their_own_artifacts(
    tmp_path: Path, storage: SessionStorage, slow: float
) -> None:
    """As JupyterLab's Run All: the kernel is done with several before the books of the first are closed."""
    async with attacked(tmp_path, session_storage=storage) as session:
        client = AsyncKernelClient()
        client.load_connection_file(str(session.connection_file))
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=20)
            with just_before("blobs_placed", lambda: time.sleep(slow)):
                # The first sleep is as long as a busy machine's host may be late to hear that the cell has begun.
                code = "import time; time.sleep(0.4); open('artifacts/{0}', 'w').write('{0}'); time.sleep(0.3)"
                sent = {client.execute(code.format(number)): str(number) for number in range(4)}
                await until(lambda: len(session.store.list("victim")) == 4, 30)
        finally:
            client.stop_channels()
        assert {artifact.msg_id: artifact.path for artifact in session.store.list("victim")} == sent


# --- the manager ------------------------------------------------------------------------------


async def test_a_session_that_has_become_busy_is_not_idle(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path, idle_timeout_s=4)) as manager:
        await asyncio.gather(manager.start("a"), manager.start("b"))  # on a busy machine seconds apart
        first, second = sorted(manager.sessions.values(), key=lambda session: session.last_used)
        await until(lambda: first.status == "stopped")  # its container is being removed, which takes a while
        assert (await second.execute("import time; time.sleep(0.8); 'ran'")).result == "'ran'"


async def test_started_while_it_stops(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.start("conv")
        first, second = asyncio.create_task(session.stop()), asyncio.create_task(manager.stop("conv"))
        await asyncio.sleep(0)
        again = await manager.start("conv")
        assert (await again.execute("1 + 1")).result == "2"
        await asyncio.gather(first, second)
        assert [line["event"] for line in events(again)][:2] == ["session_started", "session_stopped"]


async def test_a_start_that_the_managers_end_overtakes(tmp_path: Path, engine: docker.DockerClient) -> None:
    manager = SessionManager(Settings(sessions_root=tmp_path))
    async with manager:
        late = asyncio.create_task(manager.start("late"))
        await asyncio.sleep(0.1)
    assert (await asyncio.wait_for(late, 20)).status == "stopped"
    assert left(engine, tmp_path) == []
    with pytest.raises(SessionClosed):
        await manager.start("later")


async def test_a_spare_that_dies_before_it_is_ready(tmp_path: Path, engine: docker.DockerClient) -> None:
    killed: list[str] = []

    def kill() -> None:
        if not killed:
            label = f"sandbox-kernel.root={root_hash(tmp_path)}"
            killed.append(engine.api.containers(filters={"label": label})[0]["Id"])
            engine.api.kill(killed[0])

    with just_before("spare_warmed", kill):
        async with SessionManager(Settings(sessions_root=tmp_path, pool_size=1)) as manager:
            await asyncio.wait_for(manager.pool.full(), 10)
            await asyncio.wait_for(manager.pool.full(), 10)
            assert killed
            assert len(manager.pool) == 1
    assert left(engine, tmp_path) == []
