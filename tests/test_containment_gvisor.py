"""What is gVisor's own of sessions under it, tried for real. Attacks that are the same everywhere: ``make gvisor``.

``make gvisor`` runs them on an engine that knows gVisor, and there nothing is skipped (it sets SANDBOX_RUNTIME).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest
import pytest_asyncio
from attacked import ask, attacked, events, folder, run, until, usable
from jupyter_client.manager import AsyncKernelManager

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import SettingsError
from sandbox_kernel.lab import LabTarget, write_kernelspec
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image", "runsc"), pytest.mark.asyncio(loop_scope="module")]

DEVICES = {"null": (1, 3), "mem": (1, 1), "kmsg": (1, 11), "disk": (254, 0), "console": (5, 1), "tun": (10, 200)}


@pytest.fixture(scope="module")
def runsc(engine: docker.DockerClient) -> None:
    """The engine's runtime of that name. ``make gvisor`` asks for it, and then its absence is a failure."""
    if os.environ.get("SANDBOX_RUNTIME") != "runsc" and "runsc" not in Engine.shared().runtimes():
        pytest.skip("the engine has no runtime runsc; `make gvisor` runs these tests on one that has")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gvisor(tmp_path_factory: pytest.TempPathFactory, runsc: None) -> AsyncIterator[Session]:
    async with attacked(tmp_path_factory.mktemp("g"), runtime="runsc", memory_limit="512m") as session:
        yield session


async def test_it_is_gvisor_and_runs_pandas(gvisor: Session) -> None:
    assert "Starting gVisor" in await run(gvisor, "!dmesg")
    assert (await run(gvisor, "import pandas as pd; print(pd.DataFrame({'a': [1, 2]}).a.sum())")).strip() == "3"
    assert json.loads(gvisor.connection_file.read_text())["transport"] == "ipc", "what its arguments allow"
    await usable(gvisor)


async def test_every_process_is_confined(gvisor: Session) -> None:
    """Its ``/proc`` tells of no more than this; the filter of system calls is around gVisor itself."""
    setup = """
import os
def status(pid):
    fields = dict(l.split(':', 1) for l in open(f'/proc/{pid}/status'))
    return [fields['Uid'].split(), [int(fields[name], 16) for name in ('CapEff', 'CapPrm', 'CapInh', 'CapBnd')]]
"""
    seen = await ask(gvisor, "[status(pid) for pid in os.listdir('/proc') if pid.isdigit()]", setup)
    assert len(seen) >= 3
    for uids, capabilities in seen:
        assert "0" not in uids and capabilities == [0] * 4
    assert await ask(gvisor, "[n for _, n in socket.if_nameindex()]", "import socket") == ["lo"]


async def test_devices_it_makes_are_gvisors_own(gvisor: Session) -> None:
    """gVisor lets anybody make them in its tmpfs: they lead to its own devices, or nowhere."""
    setup = f"""
import os
def reads(name, device):
    path = f'/session/{{name}}'
    try:
        os.mknod(path, 0o20666, os.makedev(*device))
        with open(path, 'rb') as file:
            return len(file.read(16))
    except OSError as exc:
        return exc.strerror
found = {{name: reads(name, device) for name, device in {DEVICES!r}.items()}}
"""
    found = await ask(gvisor, "found", setup)
    assert found.pop("null") == 0
    assert all(isinstance(refusal, str) for refusal in found.values()), found


async def test_the_host_is_not_visible(gvisor: Session) -> None:
    files = ["/proc/1/root/etc/shadow", "/proc/kcore", "/proc/kmsg", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda"]
    files += ["/run/docker.sock", "/run/containerd/containerd.sock", "/sys/firmware/acpi/tables"]
    assert await ask(gvisor, f"[path for path in {files!r} if os.access(path, os.R_OK)]", "import os") == []
    assert len(await ask(gvisor, "[pid for pid in os.listdir('/proc') if pid.isdigit()]", "import os")) < 30


async def test_special_files_and_hard_links(gvisor: Session) -> None:
    """A FIFO stays within gVisor; what appears on the host is refused there."""
    result = await gvisor.execute("""
import os, socket
os.mkfifo('artifacts/fifo')
s = socket.socket(socket.AF_UNIX); s.bind('artifacts/socket')
open('artifacts/one', 'w').write('two names'); os.link('artifacts/one', 'artifacts/two')
for make in (lambda: os.mknod('artifacts/null', 0o20666, os.makedev(1, 3)), lambda: os.mknod('artifacts/disk', 0o60666, os.makedev(254, 0)),
             lambda: os.link('/etc/passwd', 'artifacts/passwd'), lambda: os.link('/opt/sandbox-kernel/boot/connection.json', 'artifacts/c')):
    try: make(); print('made')
    except OSError as e: print(e.errno)
""")  # fmt: skip
    assert result.status == "ok" and "made" not in result.stdout and result.artifacts == []
    refused = {line["path"]: line["reason"] for line in events(gvisor, "artifact_refused")}
    assert refused == {"socket": "a socket", **dict.fromkeys(("one", "two"), "a hard link (2 names)")}
    assert sorted(os.listdir(folder(gvisor) / "artifacts")) == ["one", "socket", "two"]
    await run(gvisor, "!rm -rf artifacts/*")
    await usable(gvisor)


async def test_no_socket_of_the_host_is_reached(gvisor: Session) -> None:
    """Its own appear on the host (``--host-uds=create``); one of the host's in a folder of its own stays closed."""
    with socket.socket(socket.AF_UNIX) as server:
        place = folder(gvisor) / "state"
        server.bind(f"/proc/self/fd/{(opened := os.open(place, os.O_RDONLY))}/theirs")
        os.close(opened)
        (place / "theirs").chmod(0o777)
        server.listen()
        code = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('/session/state/theirs')"
        result = await gvisor.execute(code)
        assert result.error is not None and result.error.name in ("ConnectionRefusedError", "PermissionError"), result
    (place / "theirs").unlink()


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: pass"])
async def test_interrupt(gvisor: Session, code: str) -> None:
    result = await gvisor.execute(code, timeout=1)
    assert (result.status, result.state_preserved) == ("timeout", True)
    await usable(gvisor)


async def test_cpu(gvisor: Session, engine: docker.DockerClient) -> None:
    """gVisor's own account knows nothing of the limit: what the container took is asked of the engine."""

    def used() -> float:
        stats = engine.api.stats(gvisor.container_id, stream=False)
        return float(stats["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9

    before, began = await asyncio.to_thread(used), time.monotonic()
    burn = (
        "import subprocess, sys\nps = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(3)]"
    )
    await run(gvisor, f"{burn}\nimport time; time.sleep(2)\nfor p in ps: p.kill(); p.wait()")
    took = await asyncio.to_thread(used) - before
    assert took < 1.4 * (time.monotonic() - began), "three busy processes on one cpu"


async def test_out_of_memory_and_restart(gvisor: Session) -> None:
    result = await gvisor.execute("b = []\nwhile True: b.append(bytearray(2**24))")
    assert result.death is not None and result.death.cause == "oom", result
    await usable(gvisor)
    kept = gvisor.container_id
    await gvisor.restart()
    assert gvisor.container_id == kept, "a fork of the supervisor, not another container"
    await usable(gvisor)


async def test_paused_from_outside(gvisor: Session, engine: docker.DockerClient) -> None:
    """gVisor heeds no signal while it is paused: removing it took 14 s, and the next cell raised ContainerConflict."""
    call = asyncio.create_task(gvisor.execute("import time; time.sleep(60)"))
    await until(lambda: any(cell.running for cell in gvisor._feed.cells.values()))
    paused = gvisor.container_id
    await asyncio.to_thread(engine.api.pause, paused)
    began = time.monotonic()
    result = await call
    assert result.death is not None and result.death.cause == "unresponsive", result
    await usable(gvisor)
    assert time.monotonic() - began < 8
    assert events(gvisor, "kernel_died")[-1]["cause"] == "unresponsive"
    assert gvisor.container_id != paused


async def test_restarted_by_another_client_and_then_by_us(
    gvisor: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JupyterLab's restart closed the folder of the sockets to the kernel, and ours then took another container."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kept = str(gvisor.container_id)
    target = LabTarget("victim", gvisor.connection_file, tmp_path, kept)
    manager = AsyncKernelManager(kernel_name=write_kernelspec(target, tmp_path).name)
    await manager.start_kernel()
    await manager.restart_kernel()
    await manager.shutdown_kernel()
    await usable(gvisor)
    await gvisor.restart()
    assert gvisor.container_id == kept
    await usable(gvisor)


async def test_over_tcp(tmp_path: Path) -> None:
    """Where gVisor is given a network: ``auto`` takes it when the sockets of its containers do not reach the host."""
    async with attacked(tmp_path, runtime="runsc-network") as session:
        assert json.loads(session.connection_file.read_text())["transport"] == "tcp"
        assert "Starting gVisor" in await run(session, "!dmesg")
        await usable(session)
        await session.restart()
        await usable(session)


@pytest.mark.parametrize("wanted", [{"transport": "tcp"}, {"network": "full"}, {"network": ["pypi.org"]}])
async def test_what_needs_a_network_it_does_not_have_is_refused(tmp_path: Path, wanted: dict[str, object]) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path, runtime="runsc", **wanted)) as manager:
        with pytest.raises(SettingsError, match=f"no network.*{next(iter(wanted))}="):
            await manager.start("conv")
