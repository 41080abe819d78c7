"""Attacks on the container from inside a real session: privileges, limits, what can be seen, what can be killed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from attacked import ask, attacked, events, folder, run, usable

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.audit import verify
from sandbox_kernel.session import Session

OWN_PLACES = ["/session", "/tmp", *([] if os.geteuid() == 0 else ["/run/kernel"]), "/dev/shm"]
"""The folder of the sockets is the host's again when they are there, where that may give it away."""

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    async with attacked(tmp_path_factory.mktemp("c")) as session:
        yield session


class TestPrivileges:
    async def test_capabilities_and_seccomp(self, victim: Session) -> None:
        setup = "lines = dict(l.split(':', 1) for l in open('/proc/self/status'))"
        status = await ask(victim, "{k: v.strip() for k, v in lines.items()}", setup)
        assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")] == [0] * 5
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
        assert "0" not in status["Uid"].split() + status["Gid"].split()

    async def test_every_process_is_confined(self, victim: Session) -> None:
        """Also init and the supervisor: code that gets hold of them wins nothing."""
        setup = """
import os
def status(pid):
    try:
        fields = dict(l.split(':', 1) for l in open(f'/proc/{pid}/status'))
    except OSError:
        return None
    return [fields['Uid'].split()[0], fields['CapEff'].strip(), fields['NoNewPrivs'].strip(), fields['Seccomp'].strip()]
"""
        seen = await ask(victim, "[status(p) for p in os.listdir('/proc') if p.isdigit()]", setup)
        assert len(seen) >= 3
        for uid, caps, no_new, seccomp in filter(None, seen):
            assert uid != "0" and int(caps, 16) == 0 and no_new == "1" and seccomp == "2"

    @pytest.mark.parametrize(
        "call",
        [
            "libc.syscall(425, 8, buf)",  # io_uring_setup
            "libc.unshare(0x10000000)",  # CLONE_NEWUSER
            "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
            "libc.setuid(0)",
            "libc.ptrace(16, 1, None, None)",
            "libc.syscall(321, 5, buf, 120)",  # bpf
            "libc.syscall(298, buf, 0, -1, -1, 0)",  # perf_event_open
            "libc.syscall(250, 0, 0, 0)",  # keyctl
            "libc.syscall(304, -100, buf, 0)",  # open_by_handle_at
            "libc.sethostname(b'x', 1)",
            "libc.chroot(b'/tmp')",
            "libc.syscall(323, 0)",  # userfaultfd
            "libc.mknod(b'/session/dev', 0o20666, 0x103)",
            "libc.mknod(b'/session/artifacts/dev', 0o60666, 0x800)",
        ],
    )
    async def test_system_calls_that_are_refused(self, victim: Session, call: str) -> None:
        setup = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nbuf = ctypes.create_string_buffer(256)"
        assert await ask(victim, f"[{call}, ctypes.get_errno()]", setup) in ([-1, 1], [-1, 13], [-1, 38])

    async def test_nothing_but_its_own_places_can_be_written(self, victim: Session) -> None:
        setup = """
import os
def writable():
    for top in ('/', '/etc', '/usr', '/var', '/root', '/home', '/opt', '/opt/sandbox-kernel', '/opt/sandbox-kernel/boot',
                '/run', '/dev', '/sys', '/data', '/proc/sys/kernel', '/session', '/tmp', '/run/kernel', '/dev/shm'):
        try:
            name = os.path.join(top, 'probe')
            open(name, 'w').close(); os.unlink(name); yield top
        except OSError:
            pass
"""
        assert await ask(victim, "list(writable())", setup) == OWN_PLACES
        assert await ask(victim, "os.access('/opt/sandbox-kernel/launch.py', os.W_OK)", "import os") is False
        assert "uid=0" not in await run(victim, "!su -c id 2>&1 < /dev/null; sudo -n id 2>&1; id")


class TestSight:
    async def test_the_host_is_not_visible(self, victim: Session) -> None:
        files = ["/proc/1/root/etc/hostname", "/proc/kcore", "/proc/sysrq-trigger", "/proc/kmsg", "/dev/mem", "/dev/vda",
                 "/dev/sda", "/dev/kmsg", "/proc/keys", "/sys/firmware/acpi/tables", "/sys/kernel/debug/x",
                 "/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"]  # fmt: skip
        setup = f"""
def opens(path):
    try:
        with open(path, 'rb') as f: return bool(f.read(10))
    except OSError: return False
found = [p for p in {files!r} if opens(p)]
"""
        assert set(await ask(victim, "found", setup)) <= {"/proc/1/root/etc/hostname"}
        assert (await run(victim, "print(open('/proc/1/root/etc/hostname').read())")).strip() == "sandbox"
        pids = await ask(victim, "sorted(int(p) for p in os.listdir('/proc') if p.isdigit())", "import os")
        assert len(pids) < 30, "only the container's own processes"

    async def test_paths_of_the_host_and_other_sessions_are_not_there(self, victim: Session) -> None:
        async with SessionManager(Settings(sessions_root=folder(victim).parent)) as manager:
            other = await manager.start("neighbour")
            await other.execute("open('artifacts/theirs.txt', 'w').write('theirs'); private = 1")
            paths = [folder(other), folder(other) / "state/python_state.json", folder(victim) / "session.log"]
            paths += [other.connection_file, Path("/run/sandbox-kernel"), victim.store.root]
            assert (
                await ask(victim, f"[os.path.exists(p) for p in {[str(p) for p in paths]!r}]", "import os")
                == [False] * 6
            )
            mounts = await run(victim, "print(open('/proc/self/mountinfo').read())")
            assert "neighbour" not in mounts
            names = await ask(victim, "sorted(os.listdir('/run/kernel'))", "import os")
            assert names == [f"k-{n}" for n in range(1, 6)], "its own sockets only"
            # Abstract sockets belong to a network, and it has none of the host's.
            assert "docker" not in await run(victim, "print(open('/proc/net/unix').read())")

    async def test_no_network(self, victim: Session) -> None:
        with socket.create_server(("0.0.0.0", 0)) as server:
            port = server.getsockname()[1]
            server.settimeout(0.2)
            setup = """
import socket
def reach(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close(); return True
    except OSError: return False
hosts = ['127.0.0.1', '172.17.0.1', '10.0.0.1', '169.254.169.254', '8.8.8.8']
"""
            assert await ask(victim, f"[reach(h, {port}) for h in hosts]", setup) == [False] * 5
            assert await ask(victim, "[n for _, n in socket.if_nameindex()]", "import socket") == ["lo"]
            with pytest.raises(TimeoutError):
                server.accept()

    async def test_environment_and_command_lines_tell_nothing(self, victim: Session) -> None:
        seen = await run(
            victim,
            "import os\nprint(dict(os.environ))\n!cat /proc/*/cmdline /proc/*/environ 2>/dev/null | tr '\\0' ' '",
        )
        info = json.loads(victim.connection_file.read_text())
        for word in (info["key"], info["curve_secretkey"], str(folder(victim).parent)):
            assert word not in seen


class TestRecord:
    async def test_the_record_cannot_be_reached_to_be_changed(self, victim: Session) -> None:
        before = (folder(victim) / "session.log").read_bytes()
        await run(victim, """
import os, subprocess
for top in ('/session', '/session/artifacts', '/session/state'):
    for name in ('session.log', 'session_metadata.json', '.pending', '.lock'):
        for up in ('', '../', '../../'):
            for act in (os.unlink, lambda p: os.truncate(p, 0), lambda p: os.rename(p, p + '.old')):
                try: act(os.path.join(top, up, name))
                except OSError: pass
for act in (lambda: os.rename('/session/state', '/session/gone'), lambda: os.rmdir('/session/artifacts'),
            lambda: os.rename('/session/artifacts', '/session/a2'), lambda: os.symlink('/etc', '/session/state/../python_state.json')):
    try: act()
    except OSError as e: print(e.errno)
os.path.lexists('/session/python_state.json') and os.unlink('/session/python_state.json')
""")  # fmt: skip
        assert (folder(victim) / "session.log").read_bytes().startswith(before)
        assert (folder(victim) / "python_state.json").readlink() == Path("state/python_state.json")
        verdict = verify(folder(victim))
        assert verdict.intact is not False, verdict
        await usable(victim)

    async def test_files_named_like_the_record_are_artifacts_only(self, victim: Session) -> None:
        result = await victim.execute(
            "for n in ('session.log', 'session_metadata.json', '.lock'): open(f'artifacts/{n}', 'w').write('forged')\n"
            "open('state/session.log', 'w').write('forged')"
        )
        assert sorted(a.path for a in result.artifacts) == [".lock", "session.log", "session_metadata.json"]
        assert b"forged" not in (folder(victim) / "session_metadata.json").read_bytes()
        assert len(events(victim, "session_started")) == 1


class TestLimits:
    async def test_a_fork_bomb(self, victim: Session) -> None:
        bomb = "import os\nfor _ in range(2000):\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
        result = await victim.execute(bomb, timeout=2)
        assert result.status in ("timeout", "error", "kernel_died", "ok", "interrupted")
        await usable(victim)
        assert await ask(victim, "len([p for p in os.listdir('/proc') if p.isdigit()])", "import os") <= 128

    async def test_a_shell_fork_bomb(self, victim: Session) -> None:
        result = await victim.execute(
            "import subprocess\nsubprocess.run(['bash', '-c', ':(){ :|:& };:; wait'])", timeout=3
        )
        assert result.status in ("timeout", "error", "kernel_died", "ok")
        await victim.restart()
        await usable(victim)

    async def test_memory(self, victim: Session) -> None:
        result = await victim.execute("b = []\nwhile True: b.append(bytearray(2**24))")
        assert result.status == "kernel_died" and result.death is not None and result.death.cause == "oom", result
        assert "400m" in result.death.message
        await usable(victim)

    async def test_processes_outside_the_kernel_hit_the_same_limit(self, victim: Session) -> None:
        code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'b=[]\\nwhile True: b.append(bytearray(2**24))']).returncode"
        result = await victim.execute(code)
        assert result.status == "kernel_died" or result.result == "-9", result
        await usable(victim)

    async def test_cpu(self, victim: Session) -> None:
        assert victim.settings.cpus == 1.0
        code = """
import os, time
pids = []
for _ in range(3):
    if not (pid := os.fork()):
        end = time.monotonic() + 2
        while time.monotonic() < end: pass
        os._exit(0)
    pids.append(pid)
used = sum(sum(os.wait4(pid, 0)[2][:2]) for pid in pids)
"""
        assert await ask(victim, "used", code) < 2.8, "three busy processes for 2 s on one cpu"

    async def test_file_size(self, tmp_path: Path) -> None:
        async with attacked(tmp_path, max_artifact_bytes="1m", max_session_artifacts_bytes="4m") as session:
            result = await session.execute("open('artifacts/big', 'wb').write(bytes(64 * 2**20))")
            assert result.error is not None and "File too large" in result.error.value
            await session.execute("import os\nos.truncate('artifacts/big', 0)\nos.unlink('artifacts/big')")
            # Larger than the store takes: it stays, the log says why.
            await session.execute("open('artifacts/refused', 'wb').write(bytes(3 * 2**20))")
            assert "max_artifact_bytes" in events(session, "artifact_refused")[-1]["reason"]
            # All together: nine files of 0.9 MB do not fit into 4 MB.
            result = await session.execute("for n in range(9): open(f'artifacts/{n}', 'wb').write(os.urandom(900_000))")
            assert len(result.artifacts) == 4
            assert session.store.usage("victim") <= 4 * 2**20
            assert "max_session_artifacts_bytes" in events(session, "artifact_refused")[-1]["reason"]
            await session.execute("!rm -f artifacts/*")
            await usable(session)

    async def test_full_tmpfs(self, victim: Session) -> None:
        code = "import os\nfor top in ('/session', '/tmp', '/dev/shm'):\n    try:\n        with open(top + '/fill', 'wb') as f:\n            while True: f.write(bytes(2**20))\n    except OSError as e: print(e.errno)"
        assert (await victim.execute(code)).stdout.split() == ["28"] * 3
        await usable(victim)
        assert (await victim.state()).variables
        await victim.restart()
        await usable(victim)
        await run(victim, "for top in ('/session', '/tmp', '/dev/shm'): open(top + '/fill', 'w').close()")

    async def test_descriptors_and_inodes(self, victim: Session) -> None:
        result = await victim.execute("kept = []\nwhile True: kept.append(open('/dev/null'))", timeout=30)
        assert result.error is not None and "Too many open files" in result.error.value
        await run(victim, "del kept")
        await usable(victim)
        code = "import os\nos.mkdir('/tmp/many')\ntry:\n    for n in range(100_000): os.mknod(f'/tmp/many/{n}')\nexcept OSError as e: print(e)"
        await victim.execute(code, timeout=10)
        await run(victim, "import shutil\nshutil.rmtree('/tmp/many', ignore_errors=True)")
        await usable(victim)
