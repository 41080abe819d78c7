"""Data sets: the rule of ids, what a fetch function may give, the cache, and all modes in real containers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from streams import AGENT, in_container

from sandbox_kernel.artifacts.agent import ByteStream
from sandbox_kernel.dataset_cache import DatasetCache, check_dataset_id
from sandbox_kernel.datasets import Datasets, FetchDataset
from sandbox_kernel.errors import DatasetNotFound, DatasetRefused, SettingsError
from sandbox_kernel.local_datasets import LocalDatasets
from sandbox_kernel.provisioning.container import root_hash
from sandbox_kernel.settings import Settings

CSV = b"a,b\n1,2\n"
IMAGE = "sandbox-base:trixie"


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, /, **fields: Any) -> None:
        self.append((event, fields))


def settings(folder: Path, access: str, storage: str = "BIND", **more: Any) -> Settings:
    if access in ("LOCAL_RO", "HYBRID"):
        local = folder / "local"
        if not local.exists():
            (local / "sales").mkdir(parents=True)
            (local / "own.csv").write_bytes(CSV)
            (local / "sales" / "2023.csv").write_bytes(CSV * 2)
        more.setdefault("datasets_path", local)
    return Settings(
        dataset_access=access, session_storage=storage, sessions_root=folder / "sessions", image=IMAGE, **more
    )


def make(folder: Path, access: str, storage: str = "BIND", fetch: FetchDataset | None = None, **more: Any) -> Datasets:
    events = more.pop("on_event", Events())
    progress = more.pop("on_progress", None)
    found = settings(folder, access, storage, **more)
    return Datasets(found, "s", folder / "store", fetch, on_event=events, on_progress=progress)


# --- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good", ["a", "a.csv", "a/b.csv", "year=2024/part-0.parquet", "Umsätze 2024.csv", "_x", "x" * 240]
)
def test_ids_that_are_allowed(good: str) -> None:
    assert check_dataset_id(good) == good


@pytest.mark.parametrize(
    "bad",
    ["", "/", "/a",
     "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".staging/x", "a\\b", "a\0b", "a\nb", "\x1b[31m",
     "\ud800", "-a", "~", "x" * 241, "a/" * 16 + "b", None, 3, b"a"],
)  # fmt: skip
def test_ids_that_are_not(bad: object) -> None:
    with pytest.raises(DatasetRefused, match="not allowed"):
        check_dataset_id(bad)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["LOCAL_RO", "HYBRID"])
def test_a_missing_folder_is_named_before_anything_starts(tmp_path: Path, access: str) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        make(tmp_path, access, datasets_path=tmp_path / "nowhere", fetch=lambda _: b"")


@pytest.mark.parametrize("access", ["API", "HYBRID"])
async def test_a_missing_function_is_named_before_anything_starts(tmp_path: Path, access: str) -> None:
    with pytest.raises(SettingsError, match="fetch_dataset"):
        async with make(tmp_path, access):
            pass
    assert not (tmp_path / "store").exists()


async def test_a_stage_that_a_dead_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    async with make(tmp_path, "API", fetch=lambda _: CSV) as datasets:
        await datasets.select("x")
        stage = datasets.mounts()[0].source
    (stage / "sub").mkdir(parents=True)
    async with make(tmp_path, "NONE"):
        pass
    assert list((tmp_path / "store" / "datasets" / ".sessions").iterdir()) == []


async def test_none_refuses(tmp_path: Path) -> None:
    async with make(tmp_path, "NONE") as datasets:
        assert (datasets.mounts(), datasets.tmpfs(), await datasets.list()) == ((), {}, [])
        with pytest.raises(DatasetRefused, match="NONE"):
            await datasets.select("a")


# --- a folder ---------------------------------------------------------------------------------


async def test_local(tmp_path: Path) -> None:
    events = Events()
    async with make(tmp_path, "LOCAL_RO", on_event=events) as datasets:
        local = tmp_path / "local"
        (local / "inside").symlink_to("own.csv")
        (local / "out").symlink_to("/etc/passwd")
        (local / "out-folder").symlink_to("/etc")
        (local / ".hidden").write_text("x")
        assert [(d.id, d.size_bytes, d.status, d.path) for d in await datasets.list()] == [
            ("inside", 8, "LOADED", "/data/inside"),
            ("own.csv", 8, "LOADED", "/data/own.csv"),
            ("sales/2023.csv", 16, "LOADED", "/data/sales/2023.csv"),
        ]
        assert (await datasets.select("sales")).size_bytes == 16
        for bad in ("out", "out-folder/hostname"):
            with pytest.raises(DatasetRefused, match="link out of"):
                await datasets.select(bad)
        with pytest.raises(DatasetNotFound, match=r"own\.csv"):
            await datasets.select("other.csv")
        await datasets.select("own.csv")
        await datasets.select("own.csv")
    assert [fields["selected"] for _, fields in events] == [["sales"], ["own.csv", "sales"]]


def test_a_folder_of_very_many_files_is_linked_by_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_kernel.local_datasets.MAX_LISTED", 10)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(12):
            (tmp_path / folder / f"{number}").touch()
    (tmp_path / "top").touch()
    links = dict(LocalDatasets(tmp_path).links(Path("/x")))
    assert links["top"] == "/x/top"
    assert links["b"] == "/x/b"
    assert sum(path.startswith("a/") for path in links) == 9
    assert len(LocalDatasets(tmp_path).files()) == 10


# --- fetching ---------------------------------------------------------------------------------


async def chunks() -> AsyncIterator[bytes]:
    for _ in range(2):
        await asyncio.sleep(0)
        yield CSV


async def later(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


def answers(folder: Path) -> dict[str, Any]:
    (folder / "tree" / "sub").mkdir(parents=True)
    (folder / "tree" / "sub" / "x").write_bytes(CSV)
    (folder / "file").write_bytes(CSV)
    return {
        "bytes": lambda: CSV,
        "bytearray": lambda: bytearray(CSV),
        "nothing": lambda: b"",
        "path": lambda: folder / "file",
        "folder": lambda: folder / "tree",
        "file": lambda: io.BytesIO(CSV),
        "iterator": lambda: iter([CSV, b"", CSV]),
        "async iterator": chunks,
        "awaitable": lambda: later(CSV),
        "mapping": lambda: {"x.csv": CSV, "sub/y.csv": chunks()},
        "awaitable mapping": lambda: later({"x.csv": folder / "file"}),
    }


EXPECTED = {
    "nothing": b"", "iterator": CSV * 2, "async iterator": CSV * 2, "folder": {"sub/x": CSV},
    "mapping": {"x.csv": CSV, "sub/y.csv": CSV * 2}, "awaitable mapping": {"x.csv": CSV},
}  # fmt: skip


def content(path: Path) -> Any:
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


async def test_whatever_the_function_gives(tmp_path: Path) -> None:
    kinds = answers(tmp_path)
    async with make(tmp_path, "API", fetch=lambda name: kinds[name]()) as datasets:
        (mount,) = datasets.mounts()
        for name in kinds:
            dataset = await datasets.select(name)
            expected = EXPECTED.get(name, CSV)
            assert content(mount.source / name) == expected, dataset
            size = len(expected) if isinstance(expected, bytes) else sum(map(len, expected.values()))
            assert (dataset.status, dataset.size_bytes, dataset.source) == ("LOADED", size, "api")
        assert mount.read_only
        assert not list((tmp_path / "store" / "datasets" / ".tmp").iterdir())
        assert not list((tmp_path / "store" / "datasets" / ".locks").iterdir())
    assert not mount.source.exists()
    assert content(tmp_path / "store" / "datasets" / "bytes") == CSV


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda: "a,b\n1,2", "gave a str"),
        (lambda: None, "gave a NoneType"),
        (lambda: iter(["text"]), "gave a str"),
        (lambda: {"../../x": b"1"}, "not allowed"),
        (lambda: {"a": b"1", "a/b": b"2"}, "Error"),
        (lambda: Path("/nonexistent/file"), "nonexistent"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
async def test_what_cannot_be_a_data_set_fails_and_leaves_nothing(
    tmp_path: Path, answer: Callable[[], Any], text: str
) -> None:
    async with make(tmp_path, "API", fetch=lambda _: answer()) as datasets:
        dataset = await datasets.select("x")
        assert dataset.status == "FAILED"
        assert text in (dataset.error or "")
        assert list(datasets.mounts()[0].source.iterdir()) == []
        assert {p.name for p in (tmp_path / "store" / "datasets").iterdir()} == {".locks", ".sessions", ".tmp"}
        assert await datasets.list() == [dataset]


async def test_a_failed_fetch_can_be_tried_again_and_partial_files_are_never_seen(tmp_path: Path) -> None:
    tries = 0

    async def fetch(_: str) -> AsyncIterator[bytes]:
        nonlocal tries
        tries += 1
        return broken() if tries == 1 else chunks()

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 5_000_000
        assert (await datasets.list())[0].status == "PENDING"
        assert list(datasets.mounts()[0].source.iterdir()) == []
        raise OSError("the line went dead")

    events = Events()
    async with make(tmp_path, "API", fetch=fetch, on_event=events) as datasets:
        failed = await datasets.select("x")
        assert (failed.status, failed.error) == ("FAILED", "OSError: the line went dead")
        assert (await datasets.select("x")).status == "LOADED"
        assert [name for name, _ in events] == ["dataset_failed", "dataset_selected"]


async def test_many_at_once_fetch_once(tmp_path: Path) -> None:
    fetched: list[str] = []
    progress: list[int] = []

    def fetch(name: str) -> Iterator[bytes]:
        fetched.append(name)
        for _ in range(3):
            time.sleep(0.02)
            yield CSV

    async with (
        make(tmp_path, "API", fetch=fetch, on_progress=lambda _, size: progress.append(size)) as one,
        Datasets(settings(tmp_path, "API"), "t", tmp_path / "store", fetch, on_event=Events()) as two,
    ):
        found = await asyncio.gather(*(datasets.select("x") for datasets in (one, one, two, two)))
        assert {d.status for d in found} == {"LOADED"}
        assert fetched == ["x"]
        assert progress == [8, 16, 24]
        inodes = {(d.mounts()[0].source / "x").stat().st_ino for d in (one, two)}
        assert inodes == {(tmp_path / "store" / "datasets" / "x").stat().st_ino}


async def test_a_cancelled_caller_does_not_end_the_fetch(tmp_path: Path) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def fetch(_: str) -> bytes:
        begun.set()
        await go.wait()
        return CSV

    async with make(tmp_path, "API", fetch=fetch) as datasets:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await datasets.select("x")
        go.set()
        assert (await datasets.select("x")).status == "LOADED"
        begun.clear()
        go.clear()
        waiting = asyncio.create_task(datasets.select("y"))
        await begun.wait()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_process_killed_while_it_fetches_leaves_the_next_one_a_clean_start(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from sandbox_kernel.dataset_cache import DatasetCache
async def fetch(_):
    yield b"x" * 100_000
    print("half", flush=True)
    await asyncio.sleep(60)
asyncio.run(DatasetCache(Path(sys.argv[1])).fetch("a/b", fetch, lambda _: None))
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == b"half\n"
    cache = DatasetCache(tmp_path)
    second = asyncio.create_task(cache.fetch("a/b", lambda _: CSV, lambda _: None))
    await asyncio.sleep(0.2)
    assert not second.done()  # one at a time, across processes
    process.kill()
    await asyncio.to_thread(process.communicate)
    path = await second
    assert path.read_bytes() == CSV
    assert list((cache.root / ".tmp").iterdir()) == []


async def test_ids_that_contain_each_other(tmp_path: Path) -> None:
    async with make(tmp_path, "API", fetch=lambda _: CSV) as datasets:
        assert (await datasets.select("a/b")).status == "LOADED"
        inside = await datasets.select("a")
        assert inside.status == "FAILED"
        assert "cannot stand beside" in (inside.error or "")
        assert (await datasets.select("a/c")).status == "LOADED"


# --- in containers ----------------------------------------------------------------------------


class Box:
    """A container as a session's, with the data sets' mounts; sleeps."""

    def __init__(self, datasets: Datasets, folder: Path) -> None:
        self.client = docker.from_env()
        self.name = f"sandbox-kernel-test-data-{uuid.uuid4().hex[:8]}"
        volumes = {str(m.source): {"bind": m.target, "mode": "ro" if m.read_only else "rw"} for m in datasets.mounts()}
        self.container = self.client.containers.run(
            IMAGE,
            ["python3", "-c", "import time; time.sleep(600)"],
            name=self.name,
            labels={
                "sandbox-kernel.test": "data",
                "sandbox-kernel.managed": "1",
                "sandbox-kernel.session": "s",
                "sandbox-kernel.root": root_hash(folder / "sessions"),
            },
            detach=True,
            init=True,
            user="1000:1000",
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            mem_limit="1g",
            tmpfs={"/tmp": "size=16m"} | {target: f"rw,nosuid,nodev,{o}" for target, o in datasets.tmpfs().items()},
            volumes={str(AGENT.parent): {"bind": "/opt/sandbox-kernel", "mode": "ro"}, **volumes},
        )

    async def exec_stream(self, argv: list[str], *, user: str | None = None) -> ByteStream:
        return await in_container(self.name, user)(argv)

    async def python(self, code: str) -> str:
        """What ``code`` prints, run as the kernel's user."""
        done = await asyncio.to_thread(
            subprocess.run,
            ["docker", "exec", self.name, "python3", "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip() + done.stderr.strip().rpartition("\n")[2]

    def close(self) -> None:
        self.container.remove(force=True)
        self.client.close()


@contextlib.asynccontextmanager
async def boxed(datasets: Datasets, folder: Path) -> AsyncIterator[Box]:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(datasets)
        box = await asyncio.to_thread(Box, datasets, folder)
        stack.callback(box.close)
        datasets.connect(box.exec_stream)
        await datasets.launched(True)
        yield box


def read(path: str) -> str:
    return f"print(len(open({path!r}, 'rb').read()))"


ATTACKS = [
    "open('/data/new', 'w')",
    "open('/data/{id}', 'a')",
    "open('/data/{id}', 'r+b')",
    "import os; os.unlink('/data/{id}')",
    "import os; os.rename('/data/{id}', '/data/other')",
    "import os; os.chmod('/data/{id}', 0o777)",
    "import os; os.mkdir('/data/folder')",
    "import os; os.symlink('/etc', '/data/link')",
]


@pytest.mark.parametrize("storage", ["BIND", "TMPFS"])
@pytest.mark.parametrize("access", ["NONE", "LOCAL_RO", "API", "HYBRID"])
async def test_all_modes_in_a_container(tmp_path: Path, access: str, storage: str) -> None:
    def fetch(name: str) -> Any:
        return {"part/x": CSV, "y": CSV} if name == "many" else iter([CSV] * 3)

    datasets = make(tmp_path, access, storage, fetch=fetch if access in ("API", "HYBRID") else None)
    async with boxed(datasets, tmp_path) as box:
        if access == "NONE":
            assert "FileNotFound" in await box.python("import os; os.listdir('/data')")
            return
        local, api = access in ("LOCAL_RO", "HYBRID"), access in ("API", "HYBRID")
        if local:  # without being selected
            assert await box.python(read("/data/own.csv")) == "8"
            assert await box.python("import os; print(sorted(os.listdir('/data')))") == "['own.csv', 'sales']"
            (tmp_path / "local" / "added.csv").write_bytes(CSV)
            assert (await datasets.select("added.csv")).source == "local"
            assert await box.python(read("/data/added.csv")) == "8"
            (tmp_path / "local" / "out").symlink_to("/etc/passwd")
        if api:
            assert (await datasets.select("remote.csv")).size_bytes == 24
            assert await box.python(read("/data/remote.csv")) == "24"
            assert (await datasets.select("many")).size_bytes == 16
            assert await box.python(read("/data/many/part/x")) == "8"
        if access == "HYBRID":
            assert (await datasets.select("sales/2024.csv")).source == "api"
            assert (await datasets.select("sales/2023.csv")).source == "local"
            walk = "import os; print(sorted(os.path.join(d, n) for d, _, ns in os.walk('/data/sales') for n in ns))"
            assert await box.python(walk) == "['/data/sales/2023.csv', '/data/sales/2024.csv']"
        ids = {d.id for d in await datasets.list()}
        assert ids == ({"own.csv", "added.csv", "sales/2023.csv"} if local else set()) | (
            {"remote.csv", "many"} if api else set()
        ) | ({"sales/2024.csv"} if access == "HYBRID" else set())
        for attacked in (["own.csv"] if local else []) + (["remote.csv"] if api else []):
            for attack in ATTACKS:
                said = await box.python(attack.format(id=attacked))
                assert "Permission" in said or "Read-only" in said or "not permitted" in said, (attack, said)
        if storage == "TMPFS":
            assert not (tmp_path / "store").exists()


async def test_a_folder_that_changes_outside_is_the_one_inside(tmp_path: Path) -> None:
    datasets = make(tmp_path, "HYBRID", fetch=lambda _: CSV)
    async with boxed(datasets, tmp_path) as box:
        with (tmp_path / "local" / "own.csv").open("ab") as file:
            file.write(CSV)
        assert await box.python(read("/data/own.csv")) == "16"
        new = tmp_path / "local" / "new"
        new.write_bytes(CSV * 5)
        new.replace(tmp_path / "local" / "own.csv")  # another inode under the same name
        assert await box.python(read("/data/own.csv")) == "40"


@pytest.mark.parametrize("storage", ["BIND", "TMPFS"])
async def test_300_mb_streamed_in(tmp_path: Path, storage: str) -> None:
    piece = os.urandom(1_000_000)
    sizes: list[int] = []
    datasets = make(
        tmp_path, "API", storage, fetch=lambda _: (piece for _ in range(300)), on_progress=lambda _, n: sizes.append(n)
    )
    async with boxed(datasets, tmp_path) as box:
        dataset = await datasets.select("big.bin")
        assert (dataset.status, dataset.size_bytes) == ("LOADED", 300_000_000), dataset
        assert await box.python("import os; print(os.path.getsize('/data/big.bin'))") == "300000000"
        assert len(sizes) >= 300


async def test_tmpfs_too_small_fails_with_the_cause_and_stays_usable(tmp_path: Path) -> None:
    def fetch(name: str) -> Iterator[bytes]:
        return (b"x" * 1_000_000 for _ in range(100 if name == "big" else 1))

    datasets = make(tmp_path, "API", "TMPFS", fetch=fetch, memory_limit="64m")
    async with boxed(datasets, tmp_path) as box:
        big = await datasets.select("big")
        assert big.status == "FAILED"
        assert "No space left" in (big.error or "")
        assert (await datasets.select("small")).status == "LOADED"
        assert await box.python("import os; print(os.listdir('/data'))") == "['small']"


@pytest.mark.parametrize("storage", ["BIND", "TMPFS"])
async def test_the_next_host_finds_what_was_staged(tmp_path: Path, storage: str) -> None:
    fetched: list[str] = []

    def fetch(name: str) -> bytes:
        fetched.append(name)
        return CSV

    datasets = make(tmp_path, "API", storage, fetch=fetch)
    async with contextlib.AsyncExitStack() as stack:
        async with datasets:
            box = await asyncio.to_thread(Box, datasets, tmp_path)
            stack.callback(box.close)
            datasets.connect(box.exec_stream)
            await datasets.launched(True)
            await datasets.select("a/b.csv")
        async with make(tmp_path, "API", storage, fetch=fetch) as after:  # the container was left alive
            after.connect(box.exec_stream)
            await after.launched(False)
            assert [(d.id, d.status, d.size_bytes) for d in await after.list()] == [("a/b.csv", "LOADED", 8)]
            await after.select("a/b.csv")
            assert (await after.select("c")).status == "LOADED"
            assert await box.python(read("/data/a/b.csv")) == "8"
            assert await box.python(read("/data/c")) == "8"
    assert fetched == ["a/b.csv", "c"]


async def test_a_new_container_gets_what_was_selected(tmp_path: Path) -> None:
    datasets = make(tmp_path, "API", "TMPFS", fetch=lambda _: CSV)
    async with boxed(datasets, tmp_path):
        await datasets.select("x")
        other = await asyncio.to_thread(Box, datasets, tmp_path)
        try:
            datasets.connect(other.exec_stream)
            await datasets.launched(True)
            assert (await datasets.select("x")).status == "LOADED"
            assert await other.python(read("/data/x")) == "8"
        finally:
            other.close()


async def test_a_slow_fetch_holds_nothing_else_up(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def fetch(name: str) -> AsyncIterator[bytes]:
        return slow() if name == "slow" else chunks()

    async def slow() -> AsyncIterator[bytes]:
        yield CSV
        await go.wait()

    datasets = make(tmp_path, "HYBRID", "TMPFS", fetch=fetch)
    async with boxed(datasets, tmp_path) as box:
        waiting = asyncio.create_task(datasets.select("slow"))
        found = await asyncio.gather(*(datasets.select(f"quick/{number}") for number in range(5)))
        assert {d.status for d in found} == {"LOADED"}
        (tmp_path / "local" / "later.csv").write_bytes(CSV)
        assert {d.id: d.status for d in await datasets.list()}["slow"] == "PENDING"
        assert await box.python(read("/data/later.csv")) == "8"
        assert "FileNotFound" in await box.python(read("/data/slow"))
        go.set()
        assert (await waiting).status == "LOADED"
        assert await box.python("import os; print(sorted(os.listdir('/data')))") == (
            "['later.csv', 'own.csv', 'quick', 'sales', 'slow']"
        )


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()

    async def run() -> None:
        async with make(tmp_path, "API", fetch=lambda _: iter([CSV])) as datasets:
            await datasets.select("x")

    asyncio.run(run())
    assert threading.active_count() <= before
