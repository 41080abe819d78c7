"""Attacks by way of files: what a real session leaves in ``artifacts/``, ``state/`` and in place of its sockets."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from attacked import SECRET, attacked, events, folder, run, until, usable

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.asyncio(loop_scope="module")]

# What a terminal acts on: all controls but newline, and bidirectional overrides.
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    root = tmp_path_factory.mktemp("f")
    (root / "host.txt").write_text(SECRET)
    (root / "folder").mkdir()
    (root / "folder/inner.txt").write_text(SECRET)
    async with attacked(
        root, max_artifact_bytes="64m", max_session_artifacts_bytes="512m", tmpfs_size="128m"
    ) as session:
        yield session


def host_file(session: Session) -> Path:
    return folder(session).parent.parent / "host.txt"


def view(session: Session, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "viewer", str(folder(session)), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


async def nothing_leaked(session: Session) -> None:
    """The host's file is where and what it was, and its content is nowhere in what the session left."""
    assert host_file(session).read_text() == SECRET
    assert (folder(session).parent.parent / "folder/inner.txt").read_text() == SECRET
    for artifact in await session.artifacts():
        if artifact.size_bytes < 2**20:
            assert SECRET.encode() not in await session.read_artifact(artifact.id)
    assert SECRET.encode() not in (folder(session) / "session.log").read_bytes()


class TestArtifacts:
    async def test_links(self, victim: Session) -> None:
        target = host_file(victim)
        result = await victim.execute(f"""
import os
os.chdir('/session')
os.symlink({str(target)!r}, 'artifacts/file')
os.symlink({str(target.parent / "folder")!r}, 'artifacts/folder')
os.symlink('/nowhere/at/all', 'artifacts/dangling')
os.symlink('file', 'artifacts/chained')
os.symlink('..', 'artifacts/up')
os.symlink('loop', 'artifacts/loop')
os.symlink('../../session.log', 'artifacts/log')
os.symlink('/proc/self/environ', 'artifacts/environ')
os.makedirs('artifacts/deep/er')
os.symlink({str(target)!r}, 'artifacts/deep/er/file')
open('artifacts/good.txt', 'w').write('good')
""")
        assert [artifact.path for artifact in result.artifacts] == ["good.txt"]
        refused = {line["path"]: line["reason"] for line in events(victim, "artifact_refused")}
        names = {"file", "folder", "dangling", "chained", "up", "loop", "log", "environ", "deep/er/file"}
        assert names <= refused.keys() and {refused[name] for name in names} == {"a link"}
        await nothing_leaked(victim)
        await run(victim, "!rm -rf artifacts/*")
        await usable(victim)

    async def test_a_file_swapped_for_a_link_while_it_is_taken(self, victim: Session) -> None:
        code = f"""
import os, subprocess, sys
swap = '''
import os, time
end = time.monotonic() + 4
while time.monotonic() < end:
    for name in ("artifacts/swapped", "artifacts/dir/inner.txt"):
        try:
            os.makedirs("artifacts/dir", exist_ok=True)
            with open(name, "w") as f: f.write("mine")
            os.symlink({str(host_file(victim))!r}, "artifacts/l"); os.rename("artifacts/l", "artifacts/swapped")
            os.rename("artifacts/dir", "artifacts/d2"); os.symlink({str(host_file(victim).parent / "folder")!r}, "artifacts/dir")
            os.unlink("artifacts/dir")
        except OSError:
            os.path.islink("artifacts/dir") and os.unlink("artifacts/dir")
            subprocess.run(["rm", "-rf", "artifacts/d2"])
'''
swap = swap.replace("import os, time", "import os, subprocess, time")
child = subprocess.Popen([sys.executable, '-c', swap])
"""
        await run(victim, code)
        rounds = 0
        while (await run(victim, "print(child.poll() is None)")).strip() == "True":
            rounds += 1
        assert rounds > 20, "the sweeps met the swaps"
        await nothing_leaked(victim)
        await run(victim, "!rm -rf artifacts/*")
        await usable(victim)

    async def test_special_files_and_hard_links(self, victim: Session) -> None:
        result = await victim.execute("""
import os, socket
os.mkfifo('artifacts/fifo')
s = socket.socket(socket.AF_UNIX); s.bind('artifacts/socket')
open('artifacts/one', 'w').write('two names'); os.link('artifacts/one', 'artifacts/two')
for make in (lambda: os.mknod('artifacts/null', 0o20666, os.makedev(1, 3)), lambda: os.mknod('artifacts/disk', 0o60666, os.makedev(254, 0)),
             lambda: os.link('/etc/passwd', 'artifacts/passwd'), lambda: os.link('/opt/sandbox-kernel/boot/connection.json', 'artifacts/c')):
    try: make(); print('made')
    except OSError as e: print(e.errno)
""")
        assert "made" not in result.stdout and result.artifacts == []
        refused = {line["path"]: line["reason"] for line in events(victim, "artifact_refused")}
        assert (refused["fifo"], refused["socket"]) == ("a FIFO", "a socket")
        assert refused["one"] == refused["two"] == "a hard link (2 names)"
        await run(victim, "!rm -rf artifacts/*")
        await usable(victim)

    async def test_names(self, victim: Session) -> None:
        result = await victim.execute(r"""
import os
names = [b'new\nline', b'\x1b[2J\x1b]0;owned\x07clear', b'bad-\xff\xfe', b'x' * 255, 'ü'.encode() * 127, b' ', b'-rf', b'a"b', b"$(id)",
         '\u202efdp.exe'.encode(), b'con\x00'[:3], b'\\', b'..a', b'*', '\U0001f4a9'.encode()]
for name in names:
    os.close(os.open(b'artifacts/' + name, os.O_CREAT | os.O_WRONLY))
deep = b'artifacts'
for _ in range(80):
    deep += b'/d'
    os.mkdir(deep)
os.close(os.open(deep + b'/f', os.O_CREAT | os.O_WRONLY))
print(len(names))
""")
        paths = {artifact.path for artifact in result.artifacts}
        assert len(paths) == int(result.stdout) - 1, "all but the one that is no UTF-8"
        assert {"new\nline", "x" * 255, "-rf", "\u202efdp.exe"} <= paths
        refused = {line["path"]: line["reason"] for line in events(victim, "artifact_refused")}
        assert refused["bad-\\xff\\xfe"] == "a name that is not valid UTF-8"
        assert any("levels deep" in reason for reason in refused.values())
        for options in ((), ("--json",), ("--limit", "5")):
            shown = view(victim, *options)
            assert shown.returncode == 0, shown.stderr
            assert ACTING.search(re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)) is None
        target = folder(victim).parent.parent / "saved"
        target.mkdir()
        for artifact in result.artifacts:
            saved = await victim.save_artifact(artifact.id, target)
            assert saved.parent == target
        await run(victim, "!rm -rf artifacts/* artifacts/..a artifacts/.[a-z]*")
        await usable(victim)

    async def test_a_sparse_terabyte(self, victim: Session) -> None:
        began = time.monotonic()
        result = await victim.execute(
            "import os\ntry: open('artifacts/huge', 'wb').truncate(2**40)\nexcept OSError as e: print(e.strerror)\n"
            "open('artifacts/half', 'wb').truncate(500 * 2**20)"
        )
        assert time.monotonic() - began < 5
        assert [(artifact.path, artifact.size_bytes) for artifact in result.artifacts] == [("huge", 0)]
        assert "File too large" in result.stdout, "the limit of a file's size"
        assert "max_artifact_bytes" in {e["path"]: e["reason"] for e in events(victim, "artifact_refused")}["half"]
        await run(victim, "!rm -f artifacts/*")
        await usable(victim)

    async def test_a_file_changed_while_it_is_read(self, victim: Session) -> None:
        """What is recorded is a content the file had at one moment, under its own hash."""
        await run(victim, """
import subprocess, sys
writer = subprocess.Popen([sys.executable, '-c', '''
import os, time
end = time.monotonic() + 4
n = 0
while time.monotonic() < end:
    n = (n + 1) % 200
    with open("artifacts/torn.tmp", "wb") as f: f.write(bytes([n]) * (8 * 2**20))
    os.rename("artifacts/torn.tmp", "artifacts/torn")
    f = open("artifacts/held", "r+b" if os.path.exists("artifacts/held") else "wb")
    f.write(bytes([n]) * 2**20); f.close()
'''])
""")  # fmt: skip
        while (await run(victim, "print(writer.poll() is None)")).strip() == "True":
            pass
        torn = [a for a in await victim.artifacts() if a.path == "torn"]
        assert torn
        for artifact in torn:
            data = await victim.read_artifact(artifact.id)
            assert hashlib.sha256(data).hexdigest() == artifact.sha256
            assert len(set(data)) == 1 and len(data) == 8 * 2**20, "of one writing"
        for artifact in await victim.artifacts():
            if artifact.path == "held":
                assert hashlib.sha256(await victim.read_artifact(artifact.id)).hexdigest() == artifact.sha256
        await run(victim, "!rm -f artifacts/*")
        await usable(victim)

    async def test_leases_and_locks_hold_nobody_up(self, victim: Session) -> None:
        began = time.monotonic()
        await run(victim, """
import fcntl, os
kept = open('artifacts/leased', 'w+'); kept.write('x'); kept.flush()
fcntl.flock(kept, fcntl.LOCK_EX)
fcntl.lockf(kept, fcntl.LOCK_EX)
leased = os.open('artifacts/lease2', os.O_CREAT | os.O_RDWR)
try: fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError: pass
""")  # fmt: skip
        assert time.monotonic() - began < 5
        # Breaking its lease sends SIGIO to its holder, which ends of it: its own doing.
        await victim.execute("kept.close(); os.close(leased)")
        await usable(victim)

    async def test_permissions_taken_away(self, victim: Session) -> None:
        await run(victim, "import os\nopen('artifacts/closed', 'w').write('x'); os.chmod('artifacts/closed', 0)\n"
                          "os.mkdir('artifacts/shut'); open('artifacts/shut/f', 'w').write('y'); os.chmod('artifacts/shut', 0)")  # fmt: skip
        await run(victim, "os.chmod('artifacts', 0); os.chmod('state', 0)")
        await victim.state()
        assert view(victim).returncode == 0
        await run(victim, "os.chmod('artifacts', 0o700); os.chmod('state', 0o700)")
        await run(victim, "!chmod 700 artifacts/shut; rm -rf artifacts/*")
        await usable(victim)


STATES = {
    "not json": "open(P, 'w').write('{nope')",
    "a list": "open(P, 'w').write('[1, 2]')",
    "a gigabyte": "open(P, 'wb').truncate(2**30 - 1)",
    "deeply nested": "open(P, 'w').write('{\"variables\":' + '[' * 200_000)",
    "wrong types": "open(P, 'w').write('{\"variables\": {\"a\": 1, \"b\": {\"type\": [], \"value\": {}}}, \"imported_modules\": {}, \"timestamp\": {}, \"execution_count\": \"x\"}')",
    "a link to a host file": "os.path.lexists(P) and os.unlink(P); os.symlink(HOST, P)",
    "a link to a device": "os.path.lexists(P) and os.unlink(P); os.symlink('/dev/zero', P)",
    "a FIFO": "os.path.lexists(P) and os.unlink(P); os.mkfifo(P)",
    "a folder": "os.path.lexists(P) and os.unlink(P); os.mkdir(P)",
    "a huge number": "open(P, 'w').write('{\"execution_count\": 1' + '0' * 5000 + '}')",
    "not utf-8": "open(P, 'wb').write(b'{\"variables\": {\"\\xff\": {\"type\": \"\\xfe\", \"value\": \"\\x1b[2J\"}}}')",
    "half a character": "open(P, 'w').write('{\"variables\": {\"\\\\ud800\": {\"type\": \"\\\\ud800\", \"value\": \"\\\\ud800\"}}, \"imported_modules\": [\"\\\\ud800\"], \"msg_id\": \"\\\\ud800\"}')",
    "very many entries": "import json; json.dump({'variables': {str(n): {'type': '', 'value': ''} for n in range(50_000)}, 'imported_modules': [1] * 300_000} | {f'x{n}': 1 for n in range(50_000)}, open(P, 'w'))",
    "nothing": "os.path.lexists(P) and os.unlink(P)",
}  # fmt: skip


class TestState:
    @pytest.mark.parametrize("name", ["python_state.json", "cells.jsonl"])
    @pytest.mark.parametrize("what", STATES)
    async def test_whatever_lies_there_is_read_in_bounded_time(self, victim: Session, what: str, name: str) -> None:
        """The hook is stopped, so that the forgery stays; then ``state()``, the viewer and a take-over read it."""
        path = f"/session/state/{name}"
        await run(victim, f"P, HOST = {path!r}, {str(host_file(victim))!r}\nimport os, threading, time")
        await victim.state()
        # In a thread, after the hook has written; then the hook is kept from writing again.
        code = f"""
def forge():
    time.sleep(0.1)
    try:
        {STATES[what]}
    except OSError as e: print(e)
    open('/session/state/forged', 'w').close()
threading.Thread(target=forge).start()
"""
        await run(victim, code)
        forged = folder(victim) / "state/forged"
        await until(forged.exists)  # the hook has written, the forger after it
        forged.unlink()
        began = time.monotonic()
        state = await victim.state()
        assert SECRET not in state.model_dump_json()
        assert len(await victim._workspace.read_journal()) < 100_000
        shown = view(victim)
        assert time.monotonic() - began < 8
        assert shown.returncode == 0, shown.stderr
        assert SECRET not in shown.stdout + shown.stderr
        assert ACTING.search(re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)) is None
        await run(
            victim,
            "import shutil\nshutil.rmtree(P) if os.path.isdir(P) and not os.path.islink(P) else os.path.lexists(P) and os.unlink(P)",
        )
        await run(victim, "recovered = 1")
        await until(lambda: (folder(victim) / "state/python_state.json").is_file())
        assert (await victim.state()).variables["recovered"].value == "1"

    async def test_the_folder_itself_cannot_be_swapped(self, victim: Session) -> None:
        out = await run(
            victim,
            "import os\nfor act in (lambda: os.rename('state', 's2'), lambda: os.rmdir('state'), lambda: os.rename('artifacts', 'a2')):\n    try: act(); print('done')\n    except OSError: pass",
        )
        assert "done" not in out

    async def test_terminal_codes_in_everything_the_viewer_prints(self, victim: Session) -> None:
        evil = "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202e\\r"
        await victim.execute(f"x = '{evil}'\nprint(x)\nimport sys; print(x, file=sys.stderr)\ndisplay(x)\nx")
        await victim.execute(f"raise type('{evil}', (Exception,), {{}})('{evil}')")
        await victim.execute(f"globals()['v{evil}'] = 1\n# \x1b[2J in the code itself \x9b1m")
        await victim.state()
        for options in ((), ("--json",)):
            shown = view(victim, *options)
            assert shown.returncode == 0 and "owned" in shown.stdout
            assert ACTING.search(re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)) is None
        assert ACTING.search((folder(victim) / "session.log").read_text()) is None


@contextlib.contextmanager
def bystander(path: Path) -> Iterator[socket.socket]:
    """A socket of the host that nobody may come to."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o777)
        server.listen(16)
        server.settimeout(0)
        yield server


def nobody_came(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return True
    return False


LINKS = """
import os
for n in range(1, 6):
    try:
        os.unlink('/run/kernel/k-%d' % n); os.symlink({!r}, '/run/kernel/k-%d' % n)
    except PermissionError as e:  # the folder is the host's, where that may give it away
        assert os.stat('/run/kernel').st_uid == 0
"""


class TestSockets:
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    async def test_their_folder_is_not_the_kernels(self, victim: Session) -> None:
        """It lies in the machine's own /run, which nobody may fill; also after a restart, by us or in Lab."""
        attack = """
import os
done = []
for act in (lambda: os.mkdir('/run/kernel/d'), lambda: open('/run/kernel/f', 'w'), lambda: os.unlink('/run/kernel/k-1'),
            lambda: os.chmod('/run/kernel', 0o777), lambda: os.rename('/run/kernel/k-1', '/run/kernel/k-9')):
    try: act(); done.append(1)
    except OSError: pass
print(done)
"""
        assert await run(victim, attack) == "[]\n"
        await victim.restart()
        assert await run(victim, attack) == "[]\n"
        await usable(victim)

    async def test_replaced_by_links_to_host_sockets_then_restarted(self, victim: Session, tmp_path: Path) -> None:
        with bystander(Path(f"/tmp/bystander-{os.getpid()}")) as server:
            try:
                links = LINKS.format(f"/tmp/bystander-{os.getpid()}")
                await run(victim, links)
                await usable(victim)  # the connection that stands is not affected
                await victim.restart()
                await usable(victim)
                await run(victim, links)
                await victim.execute("import os; os.kill(os.getpid(), 9)")
                await usable(victim)
                assert nobody_came(server)
            finally:
                os.unlink(f"/tmp/bystander-{os.getpid()}")

    async def test_replaced_and_then_taken_over(self, tmp_path: Path) -> None:
        settings = Settings(sessions_root=tmp_path / "sessions", stop_on_exit=False, start_timeout_s=5)
        name = f"/tmp/bystander2-{os.getpid()}"
        with bystander(Path(name)) as server:
            try:
                async with SessionManager(settings) as manager:
                    session = await manager.start("victim")
                    await run(session, LINKS.format(name))
                async with SessionManager(settings) as manager:
                    began = time.monotonic()
                    try:
                        session = await manager.start("victim")
                        await usable(session)
                    except Exception as exc:
                        assert "socket" in str(exc) or "not answer" in str(exc), exc
                    assert time.monotonic() - began < 15
                    await manager.stop("victim")
                assert nobody_came(server)
            finally:
                os.unlink(name)
