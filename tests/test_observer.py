"""The observer with real files, a real store and real inotify."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.artifacts.catalog import Latest
from sandbox_kernel.artifacts.observer import Observer
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import ArtifactError
from sandbox_kernel.events import Artifact
from sandbox_kernel.untrusted import Found, Refusal, scan_untrusted

KERNEL = 1000 if os.geteuid() == 0 else os.geteuid()


class Bench:
    """One session: its folder, its observer, what was told."""

    def __init__(self, directory: SessionDirectory, store: ArtifactStore) -> None:
        self.folder = directory.artifacts
        self.store = store
        self.created: list[Artifact] = []
        self.refused: list[Refusal] = []
        self.observer = Observer(
            directory, store, directory.session_id, on_created=self.created.extend, on_refused=self.refused.extend
        )

    def write(self, path: str, data: bytes | str) -> Path:
        """A file as the kernel would write it."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data if isinstance(data, bytes) else data.encode())
        if os.geteuid() == 0:
            os.chown(target, KERNEL, KERNEL)
            os.chown(target.parent, KERNEL, KERNEL)
        return target

    async def until(self, condition: Callable[[], object], timeout: float = 10) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.02)

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if not p.is_dir())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(tmp_path / ".store", max_artifact_bytes=2**20 * 8) as opened:
        yield opened


@asynccontextmanager
async def session(tmp_path: Path, store: ArtifactStore, name: str = "s") -> AsyncIterator[Bench]:
    directory = SessionDirectory(tmp_path, name)
    directory.create(KERNEL, KERNEL)
    bench = Bench(directory, store)
    async with bench.observer:
        yield bench


@pytest.fixture
async def bench(tmp_path: Path, store: ArtifactStore) -> AsyncIterator[Bench]:
    async with session(tmp_path, store) as made:
        yield made


async def test_a_sweep_ends_in_time_and_the_rest_is_taken_afterwards(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.observer.SWEEP_S", 0.0)
    monkeypatch.setattr("sandbox_kernel.artifacts.sweep._BATCH_FILES", 10)
    bench.observer.cell_started("m1", 1)
    for number in range(100):
        bench.write(str(number), str(number))
    assert len(await bench.observer.cell_finished("m1")) == 10
    await bench.until(lambda: not bench.files())
    await bench.until(lambda: len(bench.created) == 100)
    assert {artifact.msg_id for artifact in bench.created} == {"m1"}


async def test_the_next_cell_does_not_wait_for_what_the_last_one_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.observer.SWEEP_S", 0.0)
    monkeypatch.setattr("sandbox_kernel.artifacts.sweep._BATCH_FILES", 10)
    bench.observer.cell_started("m1", 1)
    for number in range(300):
        last = bench.write(str(number), str(number))
    await bench.until(lambda: time.time() > last.stat().st_ctime + 0.3)
    made = {1: await bench.observer.cell_finished("m1")}
    for number in (2, 3):
        bench.observer.cell_started(f"m{number}", number)
        await asyncio.sleep(0)
        bench.write(f"of-{number}", "")
        made[number] = await bench.observer.cell_finished(f"m{number}")
    assert {n: len(artifacts) for n, artifacts in made.items()} == {1: 10, 2: 1, 3: 1}
    assert [artifact.path for n in (2, 3) for artifact in made[n]] == ["of-2", "of-3"]
    assert bench.files(), "the rest is still being taken"
    await bench.until(lambda: not bench.files() and len(bench.created) == 302)
    owners = {artifact.path: artifact.execution_count for artifact in bench.created}
    assert owners == {str(number): 1 for number in range(300)} | {"of-2": 2, "of-3": 3}


@pytest.mark.parametrize("gone", [False, True])
async def test_more_files_than_one_scan_looks_at_are_taken_by_several(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.observer.scan_untrusted", partial(scan_untrusted, max_entries=30))
    bench.observer.cell_started("m1", 1)
    for number in range(100):
        bench.write(str(number), str(number))
    if gone:
        await bench.observer.drain()
        assert not bench.files()
    else:
        assert len(await bench.observer.cell_finished("m1")) == 30
        await bench.until(lambda: not bench.files())
    await bench.until(lambda: len(bench.created) == 100)
    assert not bench.refused
    for number in range(100):
        os.symlink("x", bench.folder / str(number))
    bench.observer.cell_started("m2", 2)
    await bench.observer.cell_finished("m2")
    assert [r.path for r in bench.refused if "not looked at" in r.reason] == ["."], "what cannot be taken ends it"


async def test_a_cells_files_are_ingested_and_gone_when_it_has_finished(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    bench.write("plot.png", b"\x89PNG\r\n\x1a\n123")
    bench.write("sub/deep/data.csv", "a,b\n")
    bench.write("big.bin", os.urandom(3 * 2**20))
    made = await bench.observer.cell_finished("m1")
    assert sorted(a.path for a in made) == ["big.bin", "plot.png", "sub/deep/data.csv"]
    assert {a.filename for a in made} == {"plot.png", "data.csv", "big.bin"}
    assert all(a.msg_id == "m1" and a.execution_count == 1 and a.version == 1 for a in made)
    assert sorted(bench.created, key=str) == sorted(made, key=str)
    assert bench.files() == []
    assert (bench.folder / "sub/deep").is_dir()


async def test_a_file_is_ingested_while_its_cell_runs_and_removed_only_after(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    bench.write("a.txt", "one")
    await bench.until(lambda: bench.created)
    assert bench.files() == ["a.txt"]
    made = await bench.observer.cell_finished("m1")
    assert [(a.path, a.version) for a in made] == [("a.txt", 1)]
    assert len(bench.created) == 1
    assert bench.files() == []


async def test_a_rewritten_file_is_a_new_version(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    bench.write("a.txt", "one")
    await bench.until(lambda: bench.created)
    bench.write("a.txt", "two")
    made = await bench.observer.cell_finished("m1")
    assert [(a.version, bench.store.read(a.id)) for a in made] == [(1, b"one"), (2, b"two")]
    bench.observer.cell_started("m2", 2)
    bench.write("a.txt", "two")
    assert [a.version for a in await bench.observer.cell_finished("m2")] == [3]


async def test_a_touched_file_is_no_new_version(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    path = bench.write("a.txt", "one")
    await bench.until(lambda: bench.created)
    path.chmod(0o600)
    assert len(await bench.observer.cell_finished("m1")) == 1
    assert bench.files() == []


async def test_a_file_removed_by_its_cell_after_ingest_stays_recorded(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    path = bench.write("a.txt", "one")
    await bench.until(lambda: bench.created)
    path.unlink()
    (artifact,) = await bench.observer.cell_finished("m1")
    assert bench.store.read(artifact.id) == b"one"


@pytest.mark.parametrize("size", [5, 3 * 2**20])
async def test_a_file_still_open_is_left_to_its_writer(bench: Bench, size: int) -> None:
    bench.observer.cell_started("m1", 1)
    path = bench.write("a.bin", b"")
    with path.open("ab", buffering=0) as file:
        file.write(b"x" * size)
        assert await bench.observer.cell_finished("m1") == []
        status = path.stat()
        assert (status.st_uid, status.st_nlink, stat.S_IMODE(status.st_mode)) == (KERNEL, 1, 0o644)
        file.write(b"y")
    await bench.until(lambda: bench.created)
    assert bench.store.read(bench.created[0].id) == b"x" * size + b"y"
    await bench.until(lambda: bench.files() == [])
    assert bench.created[0].msg_id == "m1"


async def test_drain_takes_what_is_still_open(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    with bench.write("a.bin", b"").open("ab", buffering=0) as file:
        file.write(b"left open")
        await bench.observer.cell_finished("m1")
        (artifact,) = await bench.observer.drain()
    assert bench.store.read(artifact.id) == b"left open"
    assert bench.files() == []


async def test_files_in_a_new_folder_are_seen_while_the_cell_runs(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    bench.write("one/two/a.txt", "a")
    await bench.until(lambda: len(bench.created) == 1)
    bench.write("one/two/b.txt", "b")
    await bench.until(lambda: len(bench.created) == 2)
    os.rename(bench.folder / "one", bench.folder / "uno")
    bench.write("uno/two/c.txt", "c")
    made = await bench.observer.cell_finished("m1")
    assert "uno/two/c.txt" in {a.path for a in made}
    assert bench.files() == []


async def test_hostile_things_are_refused_once_and_the_rest_is_taken(bench: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    bench.observer.cell_started("m1", 1)
    os.symlink(secret, bench.folder / "link")
    os.symlink(tmp_path, bench.folder / "folderlink")
    os.mkfifo(bench.folder / "fifo")
    os.link(bench.write("first", "x"), bench.folder / "second")
    Path(os.fsdecode(os.fsencode(bench.folder) + b"/bad\xff")).write_text("x")
    with open(bench.write("sparse", b""), "r+b") as file:
        file.truncate(2**40)
    bench.write("na\nme\x1b[31m", "fine")
    bench.write("n" * 255, "fine")
    made = await bench.observer.cell_finished("m1")
    assert sorted(a.path for a in made) == ["na\nme\x1b[31m", "n" * 255]
    names = sorted(r.path for r in bench.refused)
    assert names == ["bad\\xff", "fifo", "first", "folderlink", "link", "second", "sparse"]
    for number in range(2, 4):
        bench.observer.cell_started(f"m{number}", number)
        await bench.observer.cell_finished(f"m{number}")
    assert len(bench.refused) == 7
    with open(bench.folder / "sparse", "r+b") as file:
        file.truncate(3)
    bench.observer.cell_started("m9", 9)
    assert [a.path for a in await bench.observer.cell_finished("m9")] == ["sparse"]
    assert secret.read_text() == "of the host"
    assert {w.path for w in await bench.observer.waiting() if w.reason} >= {"link", "fifo"}


async def test_undecodable_names_do_not_kill_the_observer(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    Path(os.fsdecode(os.fsencode(bench.folder) + b"/bad\xff")).write_text("x")
    await bench.until(lambda: bench.refused)
    bench.write("good", "x")
    await bench.until(lambda: bench.created)


async def test_many_files(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    for number in range(2500):
        bench.write(f"{number}", f"{number % 2000}")
    made = await bench.observer.cell_finished("m1")
    assert {a.path for a in made} == {str(number) for number in range(2500)}
    assert bench.files() == []
    assert len(made) == len(bench.created) == 2500
    assert not bench.refused


async def test_the_next_cell_keeps_its_files_while_the_last_is_closed(bench: Bench) -> None:
    bench.observer.cell_started("m1", 1)
    old = bench.write("old", "1")
    await bench.until(lambda: time.time() > old.stat().st_ctime + 0.3)
    bench.observer.cell_started("m2", 2)
    await bench.until(lambda: time.time() > old.stat().st_ctime + 0.35)
    bench.write("new", "2")
    assert [(a.path, a.execution_count) for a in await bench.observer.cell_finished("m1")] == [("old", 1)]
    assert bench.files() == ["new"]
    assert [(a.path, a.execution_count) for a in await bench.observer.cell_finished("m2")] == [("new", 2)]


async def test_a_cell_that_begins_while_the_last_is_closed_keeps_its_files(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, begun = threading.Event(), threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> Iterator[Found | Refusal]:
        swept.set()
        assert begun.wait(5)
        yield from scan_untrusted(*args, **kwargs)

    bench.observer.cell_started("m1", 1)
    bench.write("of-1", "1")
    await asyncio.sleep(0.3)  # more than the host's lateness
    monkeypatch.setattr("sandbox_kernel.artifacts.observer.scan_untrusted", slowly)
    closing = asyncio.create_task(bench.observer.cell_finished("m1"))
    await bench.until(swept.is_set)
    bench.observer.cell_started("m2", 2)
    bench.write("of-2", "2")
    begun.set()
    assert [artifact.path for artifact in await closing] == ["of-1"]
    assert bench.files() == ["of-2"]
    assert [artifact.path for artifact in await bench.observer.cell_finished("m2")] == ["of-2"]


async def ran(bench: Bench, number: int) -> None:
    """A cell that writes a file and ends; its books are not closed yet."""
    bench.observer.cell_started(f"m{number}", number)
    written = bench.write(f"of-{number}", str(number))
    await bench.until(lambda: time.time() > written.stat().st_ctime + 0.3)  # more than the host's lateness
    bench.observer.cell_ended(f"m{number}")


async def test_cells_that_wait_for_their_books_to_be_closed_keep_their_files(bench: Bench) -> None:
    for number in (1, 2, 3, 4):
        await ran(bench, number)
    for number in (1, 2, 3, 4):
        made = await bench.observer.cell_finished(f"m{number}")
        assert [(artifact.path, artifact.execution_count) for artifact in made] == [(f"of-{number}", number)]
    assert not bench.files()


async def test_what_a_waiting_cell_wrote_is_not_taken_as_the_running_ones(bench: Bench) -> None:
    await ran(bench, 1)
    bench.observer.cell_started("m2", 2)
    bench.write("a", "1")  # as late as the host may be told
    bench.observer.cell_ended("m2")
    bench.observer.cell_started("m3", 3)
    await asyncio.sleep(0.05)
    bench.write("b", "3")
    await bench.until(lambda: bench.created)  # early
    assert {artifact.path: artifact.execution_count for artifact in bench.created} == {"b": 3}
    for number in (1, 2, 3):
        await bench.observer.cell_finished(f"m{number}")
    assert {artifact.path: artifact.execution_count for artifact in bench.created} == {"of-1": 1, "a": 2, "b": 3}


async def test_a_clock_that_is_set_back_takes_no_file_from_a_running_cell(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr("sandbox_kernel.artifacts.turns.time.time", lambda: now() + 3600)
    bench.observer.cell_started("m1", 1)
    monkeypatch.setattr("sandbox_kernel.artifacts.turns.time.time", now)
    bench.observer.cell_started("m2", 2)
    bench.write("of-2", "2")
    await bench.observer.cell_finished("m1")
    assert bench.files() == ["of-2"]
    assert [artifact.path for artifact in await bench.observer.cell_finished("m2")] == ["of-2"]


async def test_a_sweep_that_fails_half_way_tells_what_it_has_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.artifacts.sweep._BATCH_FILES", 10)
    asked, latest = [], bench.store.catalog.latest

    def failing(session_id: str, paths: Sequence[str]) -> dict[str, Latest]:
        asked.append(paths)
        if len(asked) == 4:
            raise ArtifactError("the artifact catalog cannot be read")
        return latest(session_id, paths)

    monkeypatch.setattr(bench.store.catalog, "latest", failing)
    bench.observer.cell_started("m1", 1)
    for number in range(50):
        bench.write(str(number), str(number))
    made = await bench.observer.cell_finished("m1")
    assert made == bench.created
    assert len(made) == 10
    assert [(refusal.path, "cannot be read" in refusal.reason) for refusal in bench.refused] == [(".", True)]
    bench.observer.cell_started("m2", 2)
    assert len(await bench.observer.cell_finished("m2")) == 40
    assert not bench.files()


async def test_what_lies_there_before_is_ingested(tmp_path: Path, store: ArtifactStore) -> None:
    directory = SessionDirectory(tmp_path, "s")
    directory.create(KERNEL, KERNEL)
    bench = Bench(directory, store)
    bench.write("left/over", "x")
    async with bench.observer:
        await bench.until(lambda: bench.created)
        await bench.until(lambda: bench.files() == [])


async def test_an_empty_sweep_costs_nothing_and_leaves_nothing(tmp_path: Path, store: ArtifactStore) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    async with session(tmp_path, store) as bench:
        times = []
        for number in range(200):
            started = time.perf_counter()
            bench.observer.cell_started(f"m{number}", number)
            await bench.observer.cell_finished(f"m{number}")
            times.append(time.perf_counter() - started)
    assert sorted(times)[100] < 100e-6
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_folder_that_was_big_once_is_not_looked_through_on_the_event_loop(bench: Bench) -> None:
    first = bench.write("0" * 250, "")
    names = [bench.folder / f"{number:0250}" for number in range(1, 6000)]
    for name in names:
        os.link(first, name)
    for name in (first, *names):
        name.unlink()
    if bench.folder.stat().st_size < 2**20:
        pytest.skip("folders of this file system shrink")
    bench.observer.cell_started("m1", 1)
    assert bench.observer.settled("m1") is None
    assert await bench.observer.cell_finished("m1") == []


async def test_an_observer_that_cannot_watch_leaves_no_descriptor(tmp_path: Path, store: ArtifactStore) -> None:
    limits, before = resource.getrlimit(resource.RLIMIT_NOFILE), os.listdir("/proc/self/fd")
    directory = SessionDirectory(tmp_path, "s")
    directory.create(KERNEL, KERNEL)
    with open(os.devnull) as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 2, limits[1]))  # the folder, and no inotify
        try:
            with pytest.raises(OSError, match=r"inotify|open files"):
                async with Bench(directory, store).observer:
                    pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir("/proc/self/fd") == before


async def test_sessions_share_one_thread(tmp_path: Path, store: ArtifactStore) -> None:
    before = threading.active_count()
    async with session(tmp_path, store, "a") as a, session(tmp_path, store, "b") as b:
        assert threading.active_count() == before + 1
        a.observer.cell_started("m", 1)
        b.observer.cell_started("m", 1)
        a.write("x", "a")
        b.write("x", "b")
        await a.until(lambda: a.created and b.created)
        assert a.created[0].session_id == "a"
        assert b.store.read(b.created[0].id) == b"b"


async def test_a_folder_swapped_for_a_link_while_files_are_taken(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(20):
        (outside / f"{number}").write_text("host")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            try:
                os.rename(bench.folder / "d", bench.folder / "e")
                os.symlink(outside, bench.folder / "d")
                os.unlink(bench.folder / "d")
                os.rename(bench.folder / "e", bench.folder / "d")
            except OSError:
                continue

    for number in range(20):
        bench.write(f"d/{number}", "kernel")
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(30):
            bench.observer.cell_started(f"m{number}", number)
            for name in range(20):
                try:
                    bench.write(f"d/{name}", "kernel")
                except OSError:
                    continue
            await bench.observer.cell_finished(f"m{number}")
    finally:
        stop.set()
        thread.join()
    written = {bench.store.read(a.id) for a in bench.created}
    assert b"host" not in written
    assert sorted(os.listdir(outside)) == sorted(str(n) for n in range(20)) or all(
        (outside / name).read_text() in ("host", "kernel") for name in os.listdir(outside)
    )
