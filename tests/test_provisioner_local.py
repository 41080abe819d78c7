"""engine="local": the same supervisor without a container."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kernels import client_of, evaluate, spec

from sandbox_kernel.errors import EngineError, KernelStartError
from sandbox_kernel.provisioning.host import kernel_host
from sandbox_kernel.provisioning.local import LocalHostProvisioner, NoIsolation


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[LocalHostProvisioner]:
    wanted = spec(tmp_path, engine="local")
    made = kernel_host(wanted)
    assert isinstance(made, LocalHostProvisioner)
    yield made
    path = made.runtime_dir
    await made.remove()
    assert path is None or not path.exists()


async def test_it_warns_runs_restarts_and_dies(host: LocalHostProvisioner) -> None:
    with pytest.warns(NoIsolation, match="WITHOUT isolation"):
        info = await host.launch()
    async with client_of(info) as client:
        assert await evaluate(client, "import os; x = 1; print(sorted(os.listdir()))") == "['artifacts', 'state']\n"
        orphan = int(await evaluate(client, "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"))
    async with client_of(await host.restart_in_place()) as client:
        assert await evaluate(client, "print('x' in globals())") == "False\n"
        assert not Path(f"/proc/{orphan}").exists()
        assert await host.poll() is None
        client.execute("import os; os.kill(os.getpid(), 11)")
        death = await asyncio.wait_for(host.wait_dead(), 10)
    assert (death.cause, death.signal) == ("signal", "SIGSEGV")
    assert await host.wait() == 139
    with pytest.raises(EngineError):
        await host.restart_in_place()


@pytest.mark.filterwarnings("ignore::sandbox_kernel.provisioning.local.NoIsolation")
async def test_it_outlives_its_host_object(host: LocalHostProvisioner, tmp_path: Path) -> None:
    async with client_of(await host.launch()) as client:
        await evaluate(client, "x = 41")
    container = host.container_id
    assert container is not None
    host.detach()
    async with client_of(await host.attach(container)) as client:
        assert await evaluate(client, "print(x + 1)") == "42\n"
        client.execute("import os; os._exit(5)")
        death = await asyncio.wait_for(host.wait_dead(), 10)
    assert "code 5" in death.message
    with pytest.raises(EngineError, match="has ended"):
        await host.attach(container)
    with pytest.raises(EngineError, match="no kernel of"):
        await host.attach("0123456789ab")


@pytest.mark.filterwarnings("ignore::sandbox_kernel.provisioning.local.NoIsolation")
async def test_ending_it_ends_what_its_cells_started(host: LocalHostProvisioner) -> None:
    async with client_of(await host.launch()) as client:
        child = int(
            await evaluate(
                client, "import subprocess as s; print(s.Popen(['sleep', '600'], start_new_session=True).pid)"
            )
        )
    supervisor = host.pid
    await host.remove()
    assert not Path(f"/proc/{child}").exists()
    assert not Path(f"/proc/{supervisor}").exists()


@pytest.mark.filterwarnings("ignore::sandbox_kernel.provisioning.local.NoIsolation")
async def test_commands_run_beside_it(host: LocalHostProvisioner) -> None:
    async with client_of(await host.launch()):
        stream = await host.exec_stream(["python3", "-c", "print(input()[::-1])"])
        await stream.write(b"abc\n")
        stream.close_stdin()
        answer = b""
        while chunk := await stream.read(10):
            answer += chunk
        assert answer == b"cba\n"
        await stream.close()
        with pytest.raises(EngineError):
            await host.exec_stream(["/no/such/program"])


@pytest.mark.filterwarnings("ignore::sandbox_kernel.provisioning.local.NoIsolation")
async def test_a_failed_start_leaves_nothing(host: LocalHostProvisioner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(KernelStartError, match="encodings"):
        await host.launch()
    assert host.runtime_dir is not None
    assert not os.path.exists(host.runtime_dir)
