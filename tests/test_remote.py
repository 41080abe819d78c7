"""The spool of a session whose artifacts/ the host cannot see, against the real agent, in and out of a container."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from streams import AGENT, Opener, in_container

from sandbox_kernel.artifacts.agent import Agent, AgentGone, is_plain_path
from sandbox_kernel.artifacts.fetching import export_file
from sandbox_kernel.artifacts.remote import RemoteSpool
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.errors import ArtifactNotFound, ArtifactRefused
from sandbox_kernel.events import Artifact

LIAR = Path(__file__).with_name("lying_agent.py")


class Place:
    """A spool over the agent as a process of this machine."""

    def __init__(self, folder: Path, **store: int) -> None:
        self.artifacts, self.state = folder / "artifacts", folder / "state"
        self.artifacts.mkdir()
        self.state.mkdir()
        self.store = ArtifactStore.open(folder / "store", **store)
        self.created: list[Artifact] = []
        self.refused: list[tuple[str, str]] = []
        self.opener = Opener(arguments=["--artifacts", str(self.artifacts), "--state", str(self.state)])

    def spool(self) -> RemoteSpool:
        return RemoteSpool(
            self.opener,
            self.store,
            "s",
            on_created=self.created.extend,
            on_refused=lambda refused: self.refused.extend((r.path, r.reason) for r in refused),
        )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    here = Place(tmp_path)
    yield here
    here.store.close()


async def until(condition: Callable[[], Any], wait_s: float = 10) -> None:
    async with asyncio.timeout(wait_s):
        while not condition():
            await asyncio.sleep(0.02)


# --- cells ------------------------------------------------------------------------------------


async def test_a_cells_files_are_its_artifacts_and_are_gone_afterwards(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        (place.artifacts / "sub").mkdir()
        (place.artifacts / "sub" / "a.txt").write_text("one")
        (place.artifacts / "Ümlaut\n.txt").write_text("one")
        made = await spool.cell_finished("m1")
        assert {(a.path, a.filename, a.execution_count, a.msg_id, a.version) for a in made} == {
            ("sub/a.txt", "a.txt", 1, "m1", 1),
            ("Ümlaut\n.txt", "Ümlaut\n.txt", 1, "m1", 1),
        }
        assert made[0].sha256 == hashlib.sha256(b"one").hexdigest() == made[1].sha256
        assert [p for p in place.artifacts.rglob("*") if p.is_file()] == []
        assert place.created == made
        spool.cell_started("m2", 2)
        (place.artifacts / "sub" / "a.txt").write_text("two")
        (again,) = await spool.cell_finished("m2")
        assert (again.version, again.execution_count) == (2, 2)
        assert place.store.read(again.id) == b"two"
        assert await spool.drain() == []
    assert place.refused == []


async def test_taken_while_the_cell_runs_and_removed_only_at_its_end(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        path = place.artifacts / "early.txt"
        path.write_text("early")
        await until(lambda: place.created)
        assert path.exists()
        (made,) = await spool.cell_finished("m1")
        assert made == place.created[0]
        assert not path.exists()


async def test_a_file_rewritten_after_it_was_taken_is_a_second_version(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        path = place.artifacts / "x"
        path.write_text("1")
        await until(lambda: place.created)
        path.write_text("22")
        made = await spool.cell_finished("m1")
        assert [(a.version, place.store.read(a.id)) for a in made] == [(1, b"1"), (2, b"22")]


async def test_not_removed_while_the_next_cell_already_runs(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        path = place.artifacts / "x"
        path.write_text("1")
        spool.cell_started("m2", 2)
        (made,) = await spool.cell_finished("m1")
        assert made.msg_id == "m1"
        assert path.exists()
        assert await spool.cell_finished("m2") == []
        assert not path.exists()


async def test_cells_that_wait_for_their_books_to_be_closed_keep_their_files(place: Place) -> None:
    async with place.spool() as spool:
        for number in (1, 2, 3):
            spool.cell_started(f"m{number}", number)
            await asyncio.sleep(0.02)  # file times are a few milliseconds coarse
            (place.artifacts / f"of-{number}").write_text(str(number))
            await asyncio.sleep(0.02)
            spool.cell_ended(f"m{number}")
        spool.cell_started("m4", 4)
        await asyncio.sleep(0.02)
        (place.artifacts / "of-4").write_text("4")
        await until(lambda: place.created)  # early
        assert {artifact.path: artifact.execution_count for artifact in place.created} == {"of-4": 4}
        for number in (1, 2, 3, 4):
            made = await spool.cell_finished(f"m{number}")
            assert [(artifact.path, artifact.execution_count) for artifact in made] == [(f"of-{number}", number)]
        assert not any(place.artifacts.iterdir())


async def test_a_file_that_cannot_be_removed_keeps_no_other_in_the_container(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for number in range(3):
        (place.artifacts / f"{number}").write_text(str(number))
    stuck = place.artifacts / "1"
    subprocess.run(["mount", "--bind", stuck, stuck], check=True)
    try:
        async with place.spool() as spool:
            spool.cell_started("m1", 1)
            assert len(await spool.cell_finished("m1")) == 3
            assert os.listdir(place.artifacts) == ["1"]
            assert place.refused == []
    finally:
        subprocess.run(["umount", stuck], check=True)


async def test_an_open_file_is_left_to_its_writer(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        with (place.artifacts / "open.log").open("w") as file:
            file.write("half")
            file.flush()
            assert await spool.cell_finished("m1") == []
            assert [w.path for w in await spool.waiting()] == ["open.log"]
            file.write(" whole")
        await until(lambda: place.created)
        assert place.store.read(place.created[0].id) == b"half whole"
        await until(lambda: not (place.artifacts / "open.log").exists())
        with (place.artifacts / "forever.log").open("w") as file:
            file.write("last words")
            file.flush()
            (made,) = await spool.drain()
            assert place.store.read(made.id) == b"last words"


async def test_a_pass_cell_costs_one_round_trip(place: Place) -> None:
    async with place.spool() as spool:
        await spool.cell_finished("m0")
        await spool.drain()
        stream = place.opener.opened[0]
        sent = []
        write = stream.write
        stream.write = lambda data: (sent.append(data), write(data))[1]  # type: ignore[method-assign]
        spool.cell_started("m1", 1)
        await spool.cell_finished("m1")
        assert len(sent) == 1


# --- what is refused --------------------------------------------------------------------------


async def test_what_is_no_regular_file_is_refused_once_and_stays(place: Place, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host")
    (place.artifacts / "link").symlink_to(secret)
    (place.artifacts / "folder-link").symlink_to(tmp_path)
    os.mkfifo(place.artifacts / "fifo")
    (place.artifacts / "hard").hardlink_to(secret)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.artifacts / "sock"))
        (place.artifacts / "fine").write_text("fine")
        bad = os.fsencode(place.artifacts) + b"/\xff\x1b[31m"
        with open(bad, "w"):
            pass
        async with place.spool() as spool:
            for number in range(2):
                spool.cell_started(f"m{number}", number)
                await spool.cell_finished(f"m{number}")
    assert [a.path for a in place.created] == ["fine"]
    assert sorted(path for path, _ in place.refused) == ["\\xff\x1b[31m", "fifo", "folder-link", "hard", "link", "sock"]
    assert len(list(place.artifacts.iterdir())) == 6
    assert secret.read_text() == "host"


async def test_too_big_is_refused_unread_and_stays(tmp_path: Path) -> None:
    place = Place(tmp_path, max_artifact_bytes=1000)
    with (place.artifacts / "sparse").open("wb") as file:
        file.truncate(2**40)
    (place.artifacts / "small").write_text("s")
    async with place.spool() as spool:
        for number in range(2):
            spool.cell_started(f"m{number}", number)
            await spool.cell_finished(f"m{number}")
        assert [(w.path, w.reason is None) for w in await spool.waiting()] == [("sparse", False)]
    assert [a.path for a in place.created] == ["small"]
    assert place.refused == [("sparse", f"has {2**40} bytes; max_artifact_bytes is 1000")]
    assert (place.artifacts / "sparse").exists()
    place.store.close()


async def test_very_many_that_are_refused_are_told_of_one_by_one_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.listed.MAX_REFUSALS", 5)
    place = Place(tmp_path, max_artifact_bytes=3)
    for number in range(30):
        (place.artifacts / f"{number}").write_text("four")
    async with place.spool() as spool:
        for number in (1, 2):
            spool.cell_started(f"m{number}", number)
            assert await spool.cell_finished(f"m{number}") == []
    assert len(place.refused) == 6
    assert place.refused[-1] == (".", "25 more that are not taken")
    place.store.close()


async def test_a_full_session_refuses_and_keeps_the_file(tmp_path: Path) -> None:
    place = Place(tmp_path, max_session_bytes=2500)
    for name in "abc":
        (place.artifacts / name).write_bytes(b"x" * 1000)
    async with place.spool() as spool:
        made = await spool.cell_finished("m1")
        assert len(made) == 2
        assert len(await spool.waiting()) == 1
    assert len(list(place.artifacts.iterdir())) == 1
    assert "max_session_artifacts_bytes" in place.refused[0][1]
    place.store.close()


# --- deaths -----------------------------------------------------------------------------------


async def test_a_killed_agent_is_started_again(place: Place) -> None:
    async with place.spool() as spool:
        await spool.cell_finished("m0")
        place.opener.opened[0].process.send_signal(signal.SIGKILL)
        (place.artifacts / "a").write_text("a")
        (made,) = await spool.cell_finished("m1")
        assert made.path == "a"
        assert len(place.opener.opened) == 2


async def test_stored_before_the_host_died_is_only_removed(place: Place) -> None:
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        (place.artifacts / "a").write_text("a")
        await until(lambda: place.created)
    async with place.spool() as spool:  # a new host
        spool.launched()
        (place.artifacts / "b").write_text("b")
        made = await spool.cell_finished("m2")
    assert [a.path for a in made] == ["b"]
    assert list(place.artifacts.iterdir()) == []
    assert len(place.store.list("s")) == 2


async def test_the_same_bytes_under_the_same_name_are_a_version_in_the_next_session(place: Place) -> None:
    for number in (1, 2):
        async with place.spool() as spool:
            spool.cell_started("m", 1)
            (place.artifacts / "a").write_text("a")
            (made,) = await spool.cell_finished("m")
            assert made.version == number


async def test_what_lies_there_at_the_launch_is_taken_without_a_cell(place: Place) -> None:
    (place.artifacts / "a").write_text("a")
    async with place.spool() as spool:
        spool.launched()
        await until(lambda: place.created and not list(place.artifacts.iterdir()))


async def test_a_gone_container_is_told_once_and_raises_nothing(place: Place) -> None:
    place.opener._arguments = []
    place.opener._script = Path("/nonexistent/agent.py")
    async with place.spool() as spool:
        assert await spool.cell_finished("m1") == []
        assert await spool.cell_finished("m2") == []
        assert await spool.drain() == []
        with pytest.raises(AgentGone):
            await spool.read_state()
    assert [path for path, _ in place.refused] == ["."]


async def test_a_cancelled_sweep_leaves_nothing_half_done(place: Place) -> None:
    (place.artifacts / "big").write_bytes(os.urandom(30_000_000))
    async with place.spool() as spool:
        sweep = asyncio.create_task(spool.cell_finished("m1"))
        await until(lambda: any((place.store.root / "tmp").glob("*/[0-9]*")))
        sweep.cancel()
        await asyncio.gather(sweep, return_exceptions=True)
        assert place.created == []
        assert not any((place.store.root / "tmp").glob("*/[0-9]*"))
        (made,) = await spool.cell_finished("m2")
        assert made.size_bytes == 30_000_000


async def test_a_file_that_keeps_changing_is_never_stored_torn(place: Place) -> None:
    path = place.artifacts / "x"
    stop = False

    def scribble() -> None:
        n = 0
        while not stop:
            n = (n + 1) % 200
            with path.open("r+b" if path.exists() else "wb") as file:
                for _ in range(20):
                    file.write(bytes([n]) * 50_000)

    writer = asyncio.create_task(asyncio.to_thread(scribble))
    async with place.spool() as spool:
        for number in range(20):
            spool.cell_started(f"m{number}", number)
            await spool.cell_finished(f"m{number}")
        stop = True
        await writer
        await spool.cell_finished("last")
    assert place.created
    for artifact in place.created:
        assert len(set(place.store.read(artifact.id))) == 1, artifact


# --- state and export -------------------------------------------------------------------------


async def test_state_and_export(place: Place, tmp_path: Path) -> None:
    (place.state / "python_state.json").write_text('{"variables": {}}')
    (place.state / "link").symlink_to("/etc/hostname")
    (place.state / "big").write_bytes(b"x" * 1001)
    outside = tmp_path / "clean.parquet"
    outside.write_bytes(b"PAR1" + b"z" * 3_000_000)
    async with place.spool() as spool:
        assert await spool.read_state() == b'{"variables": {}}'
        for name in ("missing", "link", "../store/store.sqlite", "/etc/hostname"):
            with pytest.raises(ArtifactRefused):
                await spool.read_state(name)
        with pytest.raises(ArtifactRefused, match="1001"):
            await spool.read_state("big", limit=1000)
        spool.cell_started("m7", 7)
        artifact = await spool.export(str(outside))
        assert (artifact.kind, artifact.filename, artifact.execution_count) == ("export", "clean.parquet", 7)
        assert place.store.read(artifact.id) == outside.read_bytes()
        with pytest.raises(ArtifactNotFound, match="no such file"):
            await spool.export("/nonexistent")
        with pytest.raises(ArtifactNotFound, match="no such file"):
            await spool.export("/etc/hostname\0")
        for path in (str(tmp_path), "/dev/zero", "/proc/cpuinfo"):  # the last says that it has no bytes
            with pytest.raises(ArtifactRefused, match="cannot be exported"):
                await spool.export(path)
        with pytest.raises(TypeError, match="int"):
            await spool.export(5)  # type: ignore[arg-type]
        assert (await spool.export(outside)).version == 2


async def test_a_sweep_ends_in_time_and_the_rest_is_taken_afterwards(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.SWEEP_S", 0.2)
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.TOGETHER", 5)
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        for number in range(1000):
            (place.artifacts / f"{number}").write_text(str(number))
        began = time.monotonic()
        made = await spool.cell_finished("m1")
        assert time.monotonic() - began < 5
        assert len(made) < 1000
        await until(lambda: len(place.created) == 1000, 60)
        await until(lambda: not any(place.artifacts.iterdir()))
        assert {artifact.msg_id for artifact in place.created} == {"m1"}


async def test_the_next_cell_does_not_wait_for_what_the_last_one_left(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.SWEEP_S", 0.1)
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.TOGETHER", 5)
    async with place.spool() as spool:
        spool.cell_started("m1", 1)
        for number in range(500):
            (place.artifacts / f"{number}").write_text(str(number))
        assert len(await spool.cell_finished("m1")) < 500
        monkeypatch.setattr("sandbox_kernel.artifacts.remote.SWEEP_S", 30.0)
        made = {}
        for number in (2, 3):
            spool.cell_started(f"m{number}", number)
            (place.artifacts / f"of-{number}").write_text("")
            made[number] = [artifact.path for artifact in await spool.cell_finished(f"m{number}")]
        assert made == {2: ["of-2"], 3: ["of-3"]}
        assert any(place.artifacts.iterdir()), "the rest is still being taken"
        await until(lambda: not any(place.artifacts.iterdir()), 60)
        owners = {artifact.path: artifact.execution_count for artifact in place.created}
        assert owners == {str(number): 1 for number in range(500)} | {"of-2": 2, "of-3": 3}
        assert len(place.created) == 502


async def test_what_cannot_be_fetched_before_the_end_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.LAST_SWEEP_S", 0.1)
    monkeypatch.setattr("sandbox_kernel.artifacts.remote.TOGETHER", 5)
    async with place.spool() as spool:
        for number in range(1000):
            (place.artifacts / f"{number}").write_text(str(number))
        taken = len(await spool.drain())
        assert [reason for _, reason in place.refused] == [f"{1000 - taken} files could not be fetched within 0 s"]


async def test_small_files_past_the_sessions_size_are_refused_one_by_one(tmp_path: Path) -> None:
    place = Place(tmp_path, max_session_bytes=10)
    async with place.spool() as spool:
        for number in range(5):
            (place.artifacts / f"{number}").write_text("four")
        spool.cell_started("m1", 1)
        assert len(await spool.cell_finished("m1")) == 2
        assert len(place.refused) == 3
        assert all("max_session_artifacts_bytes" in reason for _, reason in place.refused)
        assert len(list(place.artifacts.iterdir())) == 3
    place.store.close()


# --- lies -------------------------------------------------------------------------------------

LIES = [
    "silence", "dies", "no line end", "not json", "no object", "deep", "huge body", "negative body", "float body",
    "long number", "way out", "odd types", "endless pages", "short file", "other file", "giant file", "refusals",
    "removes nothing", "errors", "line by the byte", "body by the byte", "file by the byte", "pages without end",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_no_lie_of_the_agent_does_harm(lie: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.opener = Opener(script=LIAR, arguments=["--lie", lie])
    spool = place.spool()
    spool._agent._timeout_s = spool._asking._timeout_s = 0.5
    began = time.monotonic()
    async with spool:
        for number in range(2):
            spool.cell_started(f"m{number}", number)
            await spool.cell_finished(f"m{number}")
        with pytest.raises((AgentGone, ArtifactRefused)):
            await spool.read_state()
        with pytest.raises((AgentGone, ArtifactRefused)):
            await spool.export("/data/x")
    assert time.monotonic() - began < 20
    assert {a.path for a in place.created} <= {"a.bin"}
    assert all(is_plain_path(a.path) for a in place.created)
    assert all(len(path) <= 4096 and len(reason) <= 5000 for path, reason in place.refused)
    assert len(place.refused) <= 1000
    if lie != "removes nothing":
        assert place.created == []
    else:
        assert len(place.created) == 1
    place.store.close()


@pytest.mark.parametrize(
    "path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\0b", "\ud800", "x" * 5000, None, 3]
)
def test_paths_that_no_listing_may_have(path: object) -> None:
    assert not is_plain_path(path)


# --- in a container ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A container as a TMPFS session's, that sleeps."""
    client = docker.from_env()
    name = f"sandbox-kernel-test-remote-{uuid.uuid4().hex[:8]}"
    owned = "uid=1000,gid=1000"
    made = client.containers.run(
        "sandbox-base:trixie",
        ["python3", "-c", "import time; time.sleep(600)"],
        name=name,
        labels={"sandbox-kernel.test": "remote"},
        detach=True,
        init=True,
        user="1000:1000",
        network_mode="none",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        mem_limit="1g",
        pids_limit=64,
        tmpfs={"/session": f"rw,exec,nosuid,nodev,mode=0700,size=512m,{owned}", "/tmp": "rw,size=64m"},
        volumes={str(AGENT.parent): {"bind": "/opt/sandbox-kernel", "mode": "ro"}},
    )
    try:
        run(name, "mkdir -p /session/artifacts /session/state")
        yield name
    finally:
        made.remove(force=True)
        client.close()


def run(container: str, command: str) -> str:
    done = subprocess.run(
        ["docker", "exec", container, "sh", "-c", command], capture_output=True, text=True, check=True
    )
    return done.stdout


@contextlib.asynccontextmanager
async def spool_in(
    container: str, folder: Path
) -> AsyncIterator[tuple[RemoteSpool, ArtifactStore, list[tuple[str, str]]]]:
    refused: list[tuple[str, str]] = []
    with ArtifactStore.open(folder / "store") as store:
        async with RemoteSpool(
            in_container(container),
            store,
            "s",
            on_created=lambda _: None,
            on_refused=lambda found: refused.extend((r.path, r.reason) for r in found),
        ) as spool:
            yield spool, store, refused


async def test_300_mb_out_of_a_containers_tmpfs(container: str, tmp_path: Path) -> None:
    run(container, "head -c 300000000 /dev/urandom > /session/artifacts/big.bin")
    expected = run(container, "sha256sum /session/artifacts/big.bin").split()[0]
    async with spool_in(container, tmp_path) as (spool, store, refused):
        (made,) = await spool.cell_finished("m1")
        assert (made.size_bytes, made.sha256) == (300_000_000, expected)
        assert run(container, "ls -A /session/artifacts") == ""
        assert refused == []
        files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1_000_000]
        assert files == [store.blobs.path(expected)]


async def test_a_writer_in_the_container_is_seen_and_state_answers_meanwhile(container: str, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [
            "docker",
            "exec",
            "-i",
            container,
            "sh",
            "-c",
            "exec 3> /session/artifacts/held; echo half >&3; read x; echo end >&3",
        ],
        stdin=subprocess.PIPE,
    )
    run(
        container,
        "echo '{}' > /session/state/python_state.json; ln -s /etc/passwd /session/artifacts/link; echo d > /tmp/d",
    )
    async with spool_in(container, tmp_path) as (spool, store, refused):
        await until(lambda: "half" in run(container, "cat /session/artifacts/held || true"))
        assert await spool.cell_finished("m1") == []
        assert await spool.read_state() == b"{}\n"
        assert refused == [("link", "a symbolic link, not a file")]
        agent = Agent(in_container(container))
        assert (await export_file(agent, store, "s", "/tmp/d")).size_bytes == 2
        await agent.close()
        await asyncio.to_thread(writer.communicate, b"\n")
        (made,) = await spool.cell_finished("m2")
        assert store.read(made.id) == b"half\nend\n"


async def test_many_small_files_of_a_container(container: str, tmp_path: Path) -> None:
    run(container, "rm -rf /session/artifacts/*; cd /session/artifacts; for i in $(seq 300); do echo $i > f$i; done")
    async with spool_in(container, tmp_path) as (spool, _, _):
        assert len(await spool.cell_finished("m1")) == 300
        assert run(container, "ls -A /session/artifacts") == ""


async def test_code_that_kills_the_agent_loses_only_its_own_time(container: str, tmp_path: Path) -> None:
    run(container, "rm -rf /session/artifacts/*; echo 1 > /session/artifacts/a")
    async with spool_in(container, tmp_path) as (spool, _, _):
        await spool.cell_finished("m0")
        killer = "import os\nfor p in os.listdir('/proc'):\n  if p.isdigit() and p not in ('1', str(os.getpid())):\n"
        killer += "    c = open(f'/proc/{p}/cmdline').read()\n    if 'agent.py' in c: os.kill(int(p), 9)"
        subprocess.run(["docker", "exec", container, "python3", "-c", killer], check=True)
        run(container, "echo 2 > /session/artifacts/b")
        (made,) = await spool.cell_finished("m1")
        assert made.path == "b"
