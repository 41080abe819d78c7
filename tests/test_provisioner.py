"""The container kernel on the real engine: what it may do, whom it answers, restart, streams."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import stat
import time
from pathlib import Path

import docker
import docker.errors
import pytest
import zmq
import zmq.asyncio
from kernels import client_of, evaluate, everything_gone, kernel, spec

from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.network import PRIVATE, remove_unused

pytestmark = pytest.mark.usefixtures("image")

TRANSPORTS = pytest.mark.parametrize("transport", ["ipc", "tcp"])


INSIDE = """
import ctypes, errno, json, os, resource, socket, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *arguments):
    ctypes.set_errno(0)
    return errno.errorcode.get(ctypes.get_errno()) if libc.syscall(number, *arguments) == -1 else None
def connect(address):
    try:
        socket.create_connection(address, timeout=3)
    except OSError as exc:
        return errno.errorcode.get(exc.errno, type(exc).__name__)
def write(path):
    try:
        open(path, "w")
    except OSError as exc:
        return errno.errorcode[exc.errno]
def resolve():
    try:
        socket.getaddrinfo("pypi.org", 443)
    except OSError as exc:
        return "refused"
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "cap": status["CapEff"], "bounding": status["CapBnd"],
    "nnp": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "io_uring": refused(425, 1, ctypes.create_string_buffer(256)), "userns": refused(272, 0x10000000),
    "keyctl": refused(250, 0, 0, 0), "ptrace": refused(101, 0, 0, 0, 0),
    "root": write("/x"), "etc": write("/etc/passwd"), "boot": write("/opt/sandbox-kernel/boot/options.json"),
    "connect": connect(("1.1.1.1", 53)), "resolve": resolve(),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "core": resource.getrlimit(resource.RLIMIT_CORE), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "fsize": resource.getrlimit(resource.RLIMIT_FSIZE)[0], "cwd": os.getcwd(), "home": os.environ["HOME"],
    "tmp": os.statvfs("/session").f_blocks * os.statvfs("/session").f_frsize,
    "parent": os.environ.get("JPY_PARENT_PID"),
    "leaked": [name for name in os.environ if "SECRET_OF_THE_HOST" in name],
}))
"""


@TRANSPORTS
async def test_a_kernel_is_confined(
    tmp_path: Path, engine: docker.DockerClient, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    wanted = spec(tmp_path, transport=transport, memory_limit="256m", pids_limit=64, cpus=0.5, tmpfs_size="32m")
    async with kernel(wanted) as (host, client):
        found = json.loads(await evaluate(client, INSIDE))
        document = engine.api.inspect_container(host.container_id)
        assert stat.S_IMODE(host.runtime_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(host.connection_file.stat().st_mode) == 0o600
    assert (found["uid"], found["gid"]) == ((1000, 1000) if os.geteuid() == 0 else (os.geteuid(), os.getegid()))
    assert found["groups"] in ([], [found["gid"]])
    assert (int(found["cap"], 16), int(found["bounding"], 16)) == (0, 0)
    assert (found["nnp"], found["seccomp"]) == ("1", "2")
    assert [found[name] for name in ("io_uring", "userns", "keyctl", "ptrace")] == ["EPERM"] * 4
    assert [found[name] for name in ("root", "etc", "boot")] == ["EROFS"] * 3
    assert found["connect"] in ({"ENETUNREACH"} if transport == "ipc" else {"EHOSTUNREACH", "TimeoutError"})
    assert found["resolve"] == "refused"
    assert found["interfaces"] == (["lo"] if transport == "ipc" else ["lo", "eth0"])
    assert found["core"] == [0, 0]
    assert found["nofile"] == 8192
    assert found["fsize"] == wanted.settings.max_session_artifacts_bytes
    assert (found["cwd"], found["home"], found["tmp"]) == ("/session", "/session", 32 * 2**20)
    assert found["parent"] is None
    assert found["leaked"] == []
    limits = document["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["PidsLimit"]) == (2**28, 2**28, 64)
    assert limits["NanoCpus"] == 5 * 10**8
    assert limits["LogConfig"]["Config"]["max-size"] == "1m"
    assert document["Config"]["Labels"]["sandbox-kernel.session"] == "conv"
    everything_gone(engine, wanted)


@TRANSPORTS
async def test_published_on_loopback_only(tmp_path: Path, engine: docker.DockerClient, transport: str) -> None:
    async with kernel(spec(tmp_path, transport=transport)) as (host, _):
        ports = engine.api.inspect_container(host.container_id)["NetworkSettings"]["Ports"]
        published = [binding for bindings in ports.values() for binding in bindings or ()]
        if transport == "ipc":
            assert (host.host_port, published) == (None, [])
        else:
            assert {binding["HostIp"] for binding in published} == {"127.0.0.1"}
            assert len(published) == 5
            assert host.host_port == host.connection_info["shell_port"]


@TRANSPORTS
async def test_curve_keys_decide_who_is_answered(tmp_path: Path, transport: str) -> None:
    async with kernel(spec(tmp_path, transport=transport)) as (host, client):
        context = zmq.asyncio.Context.shadow(zmq.Context.instance())
        info = host.connection_info
        port = info["hb_port"]
        url = f"ipc://{info['ip']}-{port}" if transport == "ipc" else f"tcp://{info['ip']}:{port}"

        async def echoed(server_key: bytes | None) -> bool:
            socket = context.socket(zmq.REQ)
            socket.linger = 0
            if server_key is not None:
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = server_key
            try:
                socket.connect(url)
                await socket.send(b"ping")
                return bool(await asyncio.wait_for(socket.recv(), 2) == b"ping")
            except TimeoutError:
                return False
            finally:
                socket.close()

        without, wrong, right = await asyncio.gather(
            echoed(None), echoed(zmq.curve_keypair()[0]), echoed(info["curve_publickey"].encode())
        )
        assert (without, wrong, right) == (False, False, True)
        assert await evaluate(client, "print(1)") == "1\n"


@TRANSPORTS
async def test_interrupt_and_restart_in_place(tmp_path: Path, transport: str) -> None:
    started = time.perf_counter()
    async with kernel(spec(tmp_path, transport=transport)) as (host, client):
        cold = time.perf_counter() - started
        await evaluate(client, "x = 1")
        msg_id = client.execute("import time; print('going', flush=True); time.sleep(60)")
        while (await client.get_iopub_msg(timeout=10))["header"]["msg_type"] != "stream":
            pass
        await host.send_signal(signal.SIGINT)
        reply = await client.get_shell_msg(timeout=10)
        assert reply["parent_header"]["msg_id"] == msg_id
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        container = host.container_id
        started = time.perf_counter()
        info = await host.restart_in_place()
        async with client_of(info) as fresh:
            warm = time.perf_counter() - started
            assert await evaluate(fresh, "print('x' in globals())") == "False\n"
        assert host.container_id == container
        assert warm < cold


async def test_exec_stream(tmp_path: Path) -> None:
    payload = secrets.token_bytes(3_000_000)
    async with kernel(spec(tmp_path)) as (host, _):
        code = (
            "import sys; d = sys.stdin.buffer.read(3000000); sys.stderr.write('seen'); sys.stdout.buffer.write(d[::-1])"
        )
        async with await host.exec_stream(["python3", "-c", code]) as stream:
            await stream.write(payload)
            assert await stream.readexactly(len(payload)) == payload[::-1]
            assert await stream.read() == b""
            assert stream.stderr == "seen"
            assert await stream.exit_code() == 0
        async with await host.exec_stream(["cat"]) as stream:
            stream.close_stdin()
            assert await stream.read() == b""


async def test_an_engine_that_does_not_see_our_files_gets_them_sent(
    tmp_path: Path, engine: docker.DockerClient
) -> None:
    shared = Engine.shared()
    before, shared.shares_files = shared.shares_files, False  # as after SourceMissing
    try:
        wanted = spec(tmp_path)
        async with kernel(wanted) as (host, client):
            assert host.transport == "tcp"
            assert await evaluate(client, "open('/opt/sandbox-kernel/launch.py').read(1); print(1)") == "1\n"
            code = "import os; print(os.access('/opt/sandbox-kernel/boot/options.json', os.W_OK))"
            assert await evaluate(client, code) == "False\n"
            mounts = engine.api.inspect_container(host.container_id)["Mounts"]
            volumes = [mount["Name"] for mount in mounts if mount["Type"] == "volume"]
            assert len(volumes) == 1
    finally:
        shared.shares_files = before
    with pytest.raises(docker.errors.NotFound):
        engine.api.inspect_volume(volumes[0])


async def test_secrets_reach_the_kernel_and_no_inspection(tmp_path: Path, engine: docker.DockerClient) -> None:
    secret = secrets.token_hex(16)
    base = spec(tmp_path)
    wanted = ContainerSpec(
        settings=base.settings, kernel_id=base.kernel_id, session_id="conv", root=tmp_path, secrets={"API_KEY": secret}
    )
    async with kernel(wanted) as (host, client):
        assert await evaluate(client, "import os; print(os.environ['API_KEY'])") == secret + "\n"
        assert secret not in json.dumps(engine.api.inspect_container(host.container_id))
        assert secret not in repr(wanted)


async def test_libraries_work_under_the_seccomp_profile(tmp_path: Path) -> None:
    code = """
import multiprocessing, subprocess, sqlite3, ssl, asyncio, threading
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq
pq.write_table(pa.table({"a": np.arange(1000)}), "t.parquet")
assert pd.read_parquet("t.parquet").a.sum() == 499500
assert np.linalg.svd(np.random.rand(200, 200))[1].size == 200
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.map(abs, [-1]) == [1]
assert subprocess.run(["sh", "-c", "echo $((6*7))"], capture_output=True, text=True).stdout == "42\\n"
sqlite3.connect("t.db").execute("create table t(x)")
import mmap, tempfile, fcntl
with open("lock", "w") as f: fcntl.flock(f, fcntl.LOCK_EX)
print("done")
"""
    async with kernel(spec(tmp_path)) as (_, client):
        assert await evaluate(client, code, timeout=60) == "done\n"


async def test_pids_and_tmpfs_are_bounded(tmp_path: Path) -> None:
    code = """
import os, signal, subprocess
made = []
try:
    while True:
        made.append(subprocess.Popen(["sleep", "60"]))
except OSError as exc:
    print(len(made) < 64, exc.errno)
for process in made: process.kill(); process.wait()
for folder in ("/session", "/tmp"):
    try:
        with open(folder + "/big", "wb") as f:
            for _ in range(64): f.write(bytes(2**20))
    except OSError as exc:
        print(exc.errno)
    os.unlink(folder + "/big")
"""
    async with kernel(spec(tmp_path, pids_limit=64, tmpfs_size="16m")) as (_, client):
        assert await evaluate(client, code) == "True 11\n28\n28\n"


def test_unused_network_is_removed(engine: docker.DockerClient) -> None:
    remove_unused(Engine.shared())
    names = [network.name for network in engine.networks.list()]
    in_use = [network.name for network in engine.networks.list(names=[PRIVATE]) if network.attrs.get("Containers")]
    assert (PRIVATE in names) is bool(in_use)
