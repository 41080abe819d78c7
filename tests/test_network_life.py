"""The egress proxy's life: it comes and goes with its kernel, outlives the host process with it, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import EngineError, ImageNotFound
from sandbox_kernel.provisioning import egress
from sandbox_kernel.provisioning.egress import sweep
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.session import Session

if TYPE_CHECKING:
    import docker
    from networks import Internet

pytest_plugins = ["networks"]

ASK = """
import os, socket
def ask(target):
    address, port = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
    proxy = socket.create_connection((address, int(port)), 10)
    proxy.sendall(f"CONNECT {target} HTTP/1.1\\r\\n\\r\\n".encode())
    return proxy, int(proxy.recv(4096).split()[1])
"""


def traffic(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "session.log").read_text().splitlines()]
    return [entry for entry in entries if entry["event"].startswith("network_")]


async def asked(session: Session, code: str) -> str:
    result = await session.execute(ASK + code, timeout=60)
    assert result.success, (result.error, result.status)
    return result.stdout.strip()


def ours(engine: docker.DockerClient) -> set[str]:
    label = {"label": "sandbox-kernel.egress"}
    proxies = engine.containers.list(all=True, filters=label)
    return {str(entry.name) for entry in [*proxies, *engine.networks.list(filters=label)]}


def kernel_id(folder: Path) -> str:
    return str(json.loads((folder / "session_metadata.json").read_text())["kernel_id"])


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
async def test_start_death_and_stop(internet: Internet, tmp_path: Path, transport: str) -> None:
    before = ours(internet.client)
    settings = Settings(sessions_root=tmp_path, network=["public.test", "public.test:9"], transport=transport)
    async with SessionManager(settings) as manager:
        session = await manager.start("s")
        first = kernel_id(tmp_path / "s")
        assert ours(internet.client) - before == {f"sandbox-kernel-{first}", f"sandbox-kernel-{first}-egress"}
        internet.join(first)
        assert await asked(session, "print(ask('public.test:443')[1], ask('unlisted.test:443')[1])") == "200 403"
        assert (await session.execute("os._exit(3)")).status == "kernel_died"
        # The next kernel has a proxy of its own, and no more than one is there.
        assert await asked(session, "print(ask('unlisted.test:443')[1])") == "403"
        assert len(ours(internet.client) - before) == 2
        internet.join(kernel_id(tmp_path / "s"))
        # A tunnel that is open when the session stops has its line all the same, be its other end deaf.
        assert await asked(session, "kept = ask('public.test:443'); print(kept[1])") == "200"
        stuck = "deaf = ask('public.test:9'); deaf[0].settimeout(1)\n"
        stuck += "try:\n    while True: deaf[0].send(bytes(65536))\nexcept OSError: print(deaf[1])"
        assert await asked(session, stuck) == "200"
        await session.stop()
    assert ours(internet.client) == before
    found = [(line["event"], line["host"]) for line in traffic(tmp_path / "s")]
    let, refused = ("network_connection", "public.test"), ("network_refused", "unlisted.test")
    assert sorted(found) == sorted([let, refused, refused, let, let])
    assert max(line.get("bytes_sent", 0) for line in traffic(tmp_path / "s")) > 10_000
    assert [json.loads(line)["event"] for line in (tmp_path / "s/session.log").read_text().splitlines()][
        -1
    ] == "session_stopped"


async def test_sessions_do_not_meet(internet: Internet, tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path, network=["public.test"])) as manager:
        one, two = await asyncio.gather(manager.start("one"), manager.start("two"))
        serve = "import http.server, threading\nserver = http.server.HTTPServer(('0.0.0.0', 8080), None)\n"
        serve += "print(socket.gethostbyname(socket.gethostname()), os.environ['HTTP_PROXY'][7:].split(':')[0])"
        served = (await asked(one, serve)).split()
        reach = f"""
def reach(place):
    with socket.socket() as tcp:
        tcp.settimeout(1)
        return tcp.connect_ex(place)
print([reach((address, port)) == 0 for address in {served} for port in (8080, 3128)],
      [ask(f"{{address}}:{{port}}")[1] for address in {served} for port in (80, 8080, 3128)])
"""
        assert await asked(two, reach) == f"{[False] * 4} {[403] * 6}"


HOLDER = """
import asyncio, sys
from sandbox_kernel import SessionManager, Settings
async def main():
    async with SessionManager(Settings(sessions_root=sys.argv[1], network=["public.test"])) as manager:
        session = await manager.start("s")
        print("started", flush=True)
        sys.stdin.readline()
        await session.execute(sys.argv[2])
        print("ran", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_the_host_dies_and_each_line_stands_once(internet: Internet, tmp_path: Path) -> None:
    before = ours(internet.client)
    # A thread goes on asking while nobody holds the session.
    code = ASK + (
        "import threading\nwanted, made = threading.Event(), 0\n"
        "def run():\n    global made\n    while not wanted.is_set():\n"
        "        ask(f'host{made}.test:443')[0].close()\n        made += 1\n        wanted.wait(0.02)\n"
        "thread = threading.Thread(target=run); thread.start()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ran\n"
        while len(traffic(tmp_path / "s")) < 10:
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    held = len(traffic(tmp_path / "s"))
    async with SessionManager(Settings(sessions_root=tmp_path, network=["public.test"])) as manager:
        session = await manager.get("s")
        made = int(await asked(session, "wanted.set(); thread.join(); print(made)"))
        await session.stop()
    found = traffic(tmp_path / "s")
    assert made > held
    assert [line["host"] for line in found] == [f"host{number}.test" for number in range(made)]
    assert len({(line["proxy"], line["at"]) for line in found}) == made
    assert ours(internet.client) == before


async def test_host_and_kernel_die_and_gc_leaves_nothing(internet: Internet, tmp_path: Path) -> None:
    before = ours(internet.client)
    code = ASK + "ask('gone.test:443')[0].close()"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)  # it sees nothing of what follows
        metadata = json.loads((tmp_path / "s/session_metadata.json").read_text())
        kernel = internet.client.containers.get(metadata["container_id"])
        python = "import os, urllib.request as r\ntry: r.urlopen('http://gone.test/')\nexcept OSError as e: print(e)"
        assert b"403" in kernel.exec_run(["python3", "-c", python]).output
        process.send_signal(signal.SIGKILL)
    kernel.kill()
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        await manager.gc()
    assert ours(internet.client) == before
    assert [line["host"] for line in traffic(tmp_path / "s")] == ["gone.test"]


def test_a_launch_that_was_cut_off_is_swept(engine: docker.DockerClient, egress_image: None) -> None:
    program = (
        "import os\nfrom sandbox_kernel.provisioning.egress import Egress\n"
        "from sandbox_kernel.provisioning.engine import Engine\nfrom sandbox_kernel.hosts import parse_hosts\n"
        "egress = Egress(Engine.shared(), 'feedfacecafe')\n"
        "egress.create(parse_hosts(['pypi.org']), published=False, labels={})\nprint('made', flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        made = {"sandbox-kernel-feedfacecafe", "sandbox-kernel-feedfacecafe-egress"}
        sweep(Engine.shared())
        assert made <= ours(engine)  # its maker lives
        os.kill(process.pid, signal.SIGKILL)
    assert len(sweep(Engine.shared())) >= 2
    assert not made & ours(engine)


async def test_a_proxy_that_does_not_start_leaves_nothing(
    engine: docker.DockerClient, image: str, egress_image: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ours(engine)
    async with SessionManager(Settings(sessions_root=tmp_path, network=["pypi.org"])) as manager:
        monkeypatch.setattr(egress, "configuration", lambda *_, **__: "http_access bungled\n")
        with pytest.raises(EngineError, match=r"egress proxy .* did not start"):
            await manager.start("s")
        monkeypatch.setattr(egress, "IMAGE", "no-such-egress:latest")
        with pytest.raises(ImageNotFound, match="image build --egress"):
            await manager.start("s")
    assert ours(engine) == before
