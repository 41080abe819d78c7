"""How a container kernel ends, comes back, or does not start: on the real engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from kernels import client_of, evaluate, everything_gone, kernel, provisioner, spec

from sandbox_kernel.errors import ContainerConflict, EngineError, ImageNotFound, KernelStartError, SettingsError
from sandbox_kernel.provisioning.container import ContainerSpec, Mount
from sandbox_kernel.provisioning.runtime import runtime_base
from sandbox_kernel.provisioning.watch import Watcher

pytestmark = pytest.mark.usefixtures("image")

TRANSPORTS = pytest.mark.parametrize("transport", ["ipc", "tcp"])


@pytest.mark.parametrize(
    ("code", "cause", "exit_code", "signal_name"),
    [
        ("import os; os._exit(3)", "exit", 3, None),
        ("import ctypes; ctypes.string_at(0)", "signal", 139, "SIGSEGV"),
        ("x = bytearray(2**30)", "oom", 137, "SIGKILL"),
    ],
)
async def test_a_death_from_inside_is_explained(
    tmp_path: Path, code: str, cause: str, exit_code: int, signal_name: str | None
) -> None:
    async with kernel(spec(tmp_path, memory_limit="200m")) as (host, client):
        assert await host.poll() is None
        assert (await host.death()).cause == "unknown"
        client.execute(code)
        death = await asyncio.wait_for(host.wait_dead(), 20)
        assert (death.cause, death.exit_code, death.signal) == (cause, exit_code, signal_name)
        assert await host.poll() == exit_code
        assert await host.wait() == exit_code
        if cause == "oom":
            assert "200m" in death.message
        # The same object launches the next one, which the same keys open.
        async with client_of(await host.launch()) as fresh:
            assert await evaluate(fresh, "print(2)") == "2\n"


async def test_a_death_from_outside_is_explained(tmp_path: Path, engine: docker.DockerClient) -> None:
    async with kernel(spec(tmp_path)) as (host, _):
        assert host.container_id is not None
        engine.api.pause(host.container_id)
        assert (await asyncio.wait_for(host.wait_dead(), 10)).cause == "unresponsive"
        await host.unpause()
        waiting = asyncio.ensure_future(host.wait_dead())
        await host.pause()
        await host.unpause()
        assert not waiting.done()  # our own pause is none
        engine.api.kill(host.container_id)
        death = await asyncio.wait_for(waiting, 10)
        assert (death.cause, death.signal) == ("signal", "SIGKILL")
        with pytest.raises(EngineError):
            await host.restart_in_place()
    async with kernel(spec(tmp_path)) as (host, _):
        assert host.container_id is not None
        engine.api.remove_container(host.container_id, force=True)
        assert (await asyncio.wait_for(host.wait_dead(), 10)).cause == "removed"
        await host.kill()  # nobody to signal: done
    async with kernel(spec(tmp_path)) as (host, _):
        assert host.container_id is not None
        engine.api.pause(host.container_id)
        await host.wait_dead()
        async with client_of(await host.restart_in_place()) as fresh:  # the engine wakes it for the signal
            assert await evaluate(fresh, "print(1)") == "1\n"
        engine.api.pause(host.container_id)  # and removes it paused


@TRANSPORTS
async def test_attach_after_the_host_is_gone(tmp_path: Path, engine: docker.DockerClient, transport: str) -> None:
    wanted = spec(tmp_path, transport=transport)
    first = provisioner(wanted)
    async with client_of(await first.launch()) as client:
        await evaluate(client, "x = 41")
    container = first.container_id
    assert container is not None
    saved = json.loads(json.dumps(await first.get_provisioner_info(), default=bytes.decode))
    first.detach()
    assert first.has_process is False
    second = provisioner(wanted)
    async with client_of(await second.attach(container)) as client:
        assert await evaluate(client, "print(x + 1)") == "42\n"
        client.execute("import os; os._exit(4)")
        assert (await asyncio.wait_for(second.wait_dead(), 10)).exit_code == 4
    with pytest.raises(EngineError, match="has ended"):
        await provisioner(wanted).load_provisioner_info(saved)
    await second.remove()
    everything_gone(engine, wanted)
    with pytest.raises(EngineError):
        await provisioner(wanted).attach(container)


async def test_a_dead_container_of_the_session_is_replaced(tmp_path: Path, engine: docker.DockerClient) -> None:
    before, after = spec(tmp_path), spec(tmp_path)
    host = provisioner(before)
    await host.launch()
    assert host.container_id is not None
    with pytest.raises(ContainerConflict, match="still runs"):
        await provisioner(after).launch()
    everything_gone(engine, after)
    engine.api.kill(host.container_id)
    await host.wait()
    async with kernel(after) as (_, client):
        assert await evaluate(client, "print(1)") == "1\n"
    await host.remove()
    everything_gone(engine, before)


async def test_a_container_of_somebody_else_is_left_alone(
    tmp_path: Path, engine: docker.DockerClient, image: str
) -> None:
    wanted = spec(tmp_path)
    theirs = engine.api.create_container(image, ["true"], name=wanted.name)["Id"]
    try:
        with pytest.raises(ContainerConflict, match=wanted.name):
            await provisioner(wanted).launch()
        assert engine.api.inspect_container(theirs)["Id"] == theirs
        with pytest.raises(EngineError, match="not ours"):
            await provisioner(wanted).attach(theirs)
    finally:
        engine.api.remove_container(theirs)
    everything_gone(engine, wanted)


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        ({"image": "sandbox-kernel-test:absent"}, ImageNotFound, "sandbox-kernel image build"),
        ({"image": "sandbox-base:trixie"}, KernelStartError, "no ipykernel"),
        ({"runtime": "no-such-runtime", "transport": "ipc"}, EngineError, "no-such-runtime"),
        ({"cpus": 4096}, EngineError, "cpus=4096"),
    ],
)
async def test_a_failed_start_names_its_cause_and_leaves_nothing(
    tmp_path: Path, engine: docker.DockerClient, overrides: dict[str, Any], error: type[Exception], text: str
) -> None:
    wanted = spec(tmp_path, **overrides)
    host = provisioner(wanted)
    with pytest.raises(error, match=text):
        await host.launch()
    everything_gone(engine, wanted)
    assert Watcher.shared().watches() == []


async def test_a_missing_folder_is_named(tmp_path: Path, engine: docker.DockerClient) -> None:
    wanted = dataclasses.replace(spec(tmp_path), mounts=(Mount(tmp_path / "nowhere", "/data"),))
    with pytest.raises(EngineError, match=f"missing: {tmp_path}/nowhere"):
        await provisioner(wanted).launch()
    everything_gone(engine, wanted)
    async with kernel(spec(tmp_path)) as (host, _):
        assert host.transport == "ipc"  # it did not make us think that the engine is elsewhere


async def test_an_image_without_python_is_named(tmp_path: Path, engine: docker.DockerClient, image: str) -> None:
    empty = engine.api.import_image_from_data(b"\0" * 1024, repository="sandbox-kernel-test", tag="empty")
    wanted = spec(tmp_path, image="sandbox-kernel-test:empty")
    try:
        with pytest.raises(KernelStartError, match="python3"):
            await provisioner(wanted).launch()
    finally:
        engine.api.remove_image("sandbox-kernel-test:empty")
    assert empty
    everything_gone(engine, wanted)


@pytest.mark.parametrize("after_s", [0.005, 0.03, 0.1, 0.2])
async def test_a_cancelled_start_leaves_nothing(tmp_path: Path, engine: docker.DockerClient, after_s: float) -> None:
    wanted = spec(tmp_path)
    launching = asyncio.ensure_future(provisioner(wanted).launch())
    await asyncio.sleep(after_s)
    assert not launching.done(), "the machine is too fast for this test"
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    everything_gone(engine, wanted)


async def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    wanted = ContainerSpec(settings=spec(tmp_path).settings, kernel_id="k" * 100, session_id="long", root=tmp_path)
    with pytest.raises(SettingsError, match="XDG_RUNTIME_DIR"):
        await provisioner(wanted).launch()
    assert not (runtime_base() / wanted.kernel_id).exists()


async def test_a_runtime_folder_that_cannot_be_made_is_named(tmp_path: Path, engine: docker.DockerClient) -> None:
    wanted = spec(tmp_path)
    in_the_way = runtime_base() / wanted.kernel_id
    in_the_way.write_text("")
    try:
        with pytest.raises(EngineError, match=wanted.kernel_id):
            await provisioner(wanted).launch()
    finally:
        in_the_way.unlink(missing_ok=True)
    everything_gone(engine, wanted)
