"""``gc`` removes what nobody holds any more, and nothing of anybody else's."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from hosts import killed

from sandbox_kernel import SessionManager, SessionStorage, Settings
from sandbox_kernel.gc import YOUNG_S
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.provisioning.runtime import runtime_base
from sandbox_kernel.provisioning.survey import lock_path
from sandbox_kernel.snapshot import read_metadata

pytestmark = pytest.mark.usefixtures("image")


def containers(engine: docker.DockerClient, root: Path) -> list[str]:
    found = engine.api.containers(all=True, filters={"label": f"sandbox-kernel.root={root_hash(root)}"})
    return [entry["Labels"].get("sandbox-kernel.session", "") for entry in found]


async def started(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    await session.execute("open('artifacts/a.txt', 'w').write('a')")
    say()


async def starting(manager: SessionManager, say: Callable[[], None]) -> None:
    call = asyncio.create_task(manager.start("conv"))
    while not await manager.list():
        await asyncio.sleep(0.001)  # until something of it can be seen: some moment of the start
    say()
    await call


@pytest.mark.parametrize("storage", list(SessionStorage))
@pytest.mark.parametrize("work", [started, starting])
async def test_what_a_killed_process_left(
    tmp_path: Path, engine: docker.DockerClient, storage: SessionStorage, work: Callable[..., None]
) -> None:
    await killed(work, tmp_path, session_storage=storage)  # type: ignore[arg-type]
    kernel = (read_metadata(tmp_path / "conv")[0] or {}).get("kernel_id")
    # Whoever tidies up need not know how the sessions were stored.
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        await manager.gc()
        assert containers(engine, tmp_path) == []
        assert all(info.status == "stopped" for info in await manager.list())
        if work is started:
            assert [artifact.path for artifact in manager._store.list("conv")] == ["a.txt"]  # type: ignore[union-attr]
        assert not list(lock_path(manager.settings, "conv").parent.glob(f"{root_hash(tmp_path)}-*"))
        again = await manager.gc()
        assert [line for line in again if "conv" in line] == []
    assert (kernel is not None) == (storage is SessionStorage.BIND)
    assert kernel is None or not (runtime_base() / kernel).exists()


async def test_a_container_that_ended_unseen(tmp_path: Path, engine: docker.DockerClient) -> None:
    for storage in SessionStorage:
        await killed(started, tmp_path / storage, session_storage=storage)
        (entry,) = engine.api.containers(filters={"label": f"sandbox-kernel.root={root_hash(tmp_path / storage)}"})
        engine.api.kill(entry["Id"])
        async with SessionManager(Settings(sessions_root=tmp_path / storage)) as manager:
            await manager.gc()
        assert containers(engine, tmp_path / storage) == []
        assert not Path(entry["Labels"]["sandbox-kernel.runtime"]).exists()


async def test_sessions_left_alive_on_purpose_go_only_with_all(tmp_path: Path, engine: docker.DockerClient) -> None:
    settings = Settings(sessions_root=tmp_path, stop_on_exit=False)
    async with SessionManager(settings) as manager:
        await manager.start("kept")
    async with SessionManager(settings) as manager:
        await manager.gc()
        assert containers(engine, tmp_path) == ["kept"]
        assert any("kept" in line for line in await manager.gc(all=True))
        assert containers(engine, tmp_path) == []


async def test_what_a_living_process_holds_stays(tmp_path: Path, engine: docker.DockerClient) -> None:
    for storage in SessionStorage:
        settings = Settings(sessions_root=tmp_path / storage, session_storage=storage)
        async with SessionManager(settings) as holder, SessionManager(settings) as other:
            session = await holder.start("held")
            await other.gc(all=True)
            await holder.gc(all=True)
            assert (await session.execute("1 + 1")).result == "2"


@pytest.fixture
def theirs(engine: docker.DockerClient, image: str, tmp_path: Path) -> Iterator[Callable[[], bool]]:
    """Things of somebody else's that look like ours; tells whether they are all still there."""
    label = {"sandbox-kernel.session": "conv"}  # not the one that says it is ours
    name = f"sandbox-kernel-conv-{root_hash(tmp_path)}"
    container = engine.api.create_container(image, ["true"], name=name, labels=label)["Id"]
    network = engine.networks.create(f"sandbox-kernel-{secrets.token_hex(4)}")
    folders = [runtime_base() / name for name in (f"notes-{secrets.token_hex(4)}", secrets.token_hex(6))]
    file = runtime_base() / secrets.token_hex(6)
    for folder in folders:
        folder.mkdir()
        (folder / "precious.txt").write_text("theirs")
    file.write_text("theirs")
    long_ago = folders[0].stat().st_mtime - 10 * YOUNG_S
    for path in (*folders, file):
        os.utime(path, (long_ago, long_ago))

    def there() -> bool:
        engine.api.inspect_container(container)
        network.reload()
        return file.read_text() == "theirs" and all((f / "precious.txt").read_text() == "theirs" for f in folders)

    yield there
    engine.api.remove_container(container)
    network.remove()
    file.unlink()
    for folder in folders:
        (folder / "precious.txt").unlink()
        folder.rmdir()


async def test_nothing_of_anybody_else_s_is_touched(tmp_path: Path, theirs: Callable[[], bool]) -> None:
    ours = runtime_base() / secrets.token_hex(6)
    for folder in (ours, ours / "boot", ours / "s"):
        folder.mkdir()
    young = runtime_base() / secrets.token_hex(6)
    young.mkdir()
    long_ago = ours.stat().st_mtime - 10 * YOUNG_S
    os.utime(ours, (long_ago, long_ago))
    try:
        async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
            await manager.gc(all=True)
        assert theirs()
        assert not ours.exists()
        assert young.exists()
    finally:
        young.rmdir()


@pytest.mark.parametrize("how", [{"session_storage": "TMPFS"}, {"engine": "local"}])
@pytest.mark.filterwarnings("ignore:.*WITHOUT isolation")
async def test_what_is_kept_on_purpose_is_kept_in_every_storage(tmp_path: Path, how: dict[str, Any]) -> None:
    settings = Settings(sessions_root=tmp_path, stop_on_exit=False, **how)
    async with SessionManager(settings) as first:
        await (await first.start("kept")).execute("x = 1")
    async with SessionManager(settings) as second:
        assert [info.status for info in await second.list()] == ["detached"]
        await second.gc()
        session = await second.get("kept")
        assert (await session.execute("x")).result == "1"
        await second.stop("kept")


async def test_a_session_that_cannot_be_stopped_keeps_nothing_else(tmp_path: Path, engine: docker.DockerClient) -> None:
    await killed(started, tmp_path)
    broken = tmp_path / "a-broken"
    broken.mkdir()
    (broken / "session_metadata.json").write_text('{"client_session": "x", "container_id": "gone"}')
    (broken / "session.log").mkdir()
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        lines = await manager.gc()
        assert any("a-broken: NOT stopped" in line and "session.log" in line for line in lines), lines
        assert containers(engine, tmp_path) == []
