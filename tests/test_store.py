"""The artifact store: real files, real SQLite, and processes that are killed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from sandbox_kernel.artifacts.blobs import BlobFolder
from sandbox_kernel.artifacts.ingest import Origin, _source, draft
from sandbox_kernel.artifacts.intake import Taken, open_for_writing, take, type_of
from sandbox_kernel.artifacts.store import ArtifactStore, Ingested
from sandbox_kernel.errors import ArtifactError, ArtifactNotFound, ArtifactRefused
from sandbox_kernel.events import BLOB_MIME
from sandbox_kernel.untrusted import FOLDER, Below, Found, scan_untrusted

ROOT = os.geteuid() == 0
KERNEL = 1000 if ROOT else os.geteuid()


def put_blob(store: ArtifactStore, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    store.put_blobs({sha256: data})
    return sha256


class Bench:
    def __init__(self, root: Path) -> None:
        self.store_root = root / ".store"
        self.folder = root / "s" / "artifacts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.folder, FOLDER)
        self.store = ArtifactStore.open(self.store_root, max_artifact_bytes=8 * 2**20, max_session_bytes=16 * 2**20)

    def write(self, path: str, data: bytes) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        if os.geteuid() == 0:
            os.chown(target, KERNEL, KERNEL)
        return target

    def ingest(self, *, ended: bool = True, force: bool = False) -> Ingested:
        """In batches of 50, as far as there are more."""
        found = [item for item in scan_untrusted(self.fd) if isinstance(item, Found)]
        ingest = self.store.ingest("s", self.fd, ended=ended, force=force, execution_count=3, msg_id="m")
        made = Ingested()
        for result in ingest.batches(found[at : at + 50] for at in range(0, len(found), 50)):
            made.created += result.created
            made.refused += result.refused
            made.waiting += result.waiting
        return made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()
    os.close(made.fd)


# --- records and bytes ------------------------------------------------------------------------


def test_an_artifact_is_found_read_opened_and_saved(bench: Bench, tmp_path: Path) -> None:
    bench.write("d/plot.png", b"\x89PNG\r\n\x1a\n")
    (made,) = bench.ingest().created
    assert (made.path, made.filename, made.content_type, made.version) == ("d/plot.png", "plot.png", "image/png", 1)
    assert (made.session_id, made.execution_count, made.msg_id, made.kind) == ("s", 3, "m", "file")
    assert made.sha256 == hashlib.sha256(b"\x89PNG\r\n\x1a\n").hexdigest()
    assert bench.store.get(made.id) == made
    assert list(bench.store.list("s")) == list(bench.store.list()) == [made]
    assert not bench.store.list("other")
    with bench.store.open_artifact(made.id) as file:
        assert file.read() == bench.store.read(made.id) == b"\x89PNG\r\n\x1a\n"
    assert bench.store.save(made.id, tmp_path) == tmp_path / "plot.png"
    assert bench.store.save(made.id, tmp_path / "x").read_bytes() == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ArtifactError, match="nowhere"):
        bench.store.save(made.id, tmp_path / "nowhere" / "x")
    with pytest.raises(ArtifactNotFound, match="art_nothing"):
        bench.store.get("art_nothing")


def test_same_bytes_under_two_names_are_one_blob_and_two_records(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.write(name, b"same" * 2**19)
    made = bench.ingest().created
    assert len(made) == 2
    assert len(list(bench.store.blobs.all())) == 1
    assert os.listdir(bench.folder) == []


def test_put_stream_and_pictures(bench: Bench) -> None:
    whole = bench.store.put_stream("s", "cell-1-stdout.txt", io.BytesIO(b"x" * 3_000_000), kind="output", msg_id="m")
    assert (whole.size_bytes, whole.content_type, whole.kind) == (3_000_000, "text/plain", "output")
    export = bench.store.put_bytes("s", "clean.parquet", b"PAR1", kind="export")
    assert bench.store.put_bytes("s", "clean.parquet", b"PAR2", kind="export").version == 2
    assert [a.kind for a in bench.store.unlogged("s")] == ["export", "export"]
    bench.store.mark_logged([export.id])
    assert [a.version for a in bench.store.unlogged("s")] == [2]
    sha = put_blob(bench.store, b"picture")
    assert put_blob(bench.store, b"picture") == sha
    assert bench.store.read_blob(sha) == b"picture"
    for wrong in ("0" * 64, "../../store.sqlite"):
        with pytest.raises(ArtifactNotFound):
            bench.store.read_blob(wrong)


def test_what_is_too_much_is_refused_and_stays(bench: Bench) -> None:
    bench.write("big", b"x" * (8 * 2**20 + 1))
    result = bench.ingest()
    assert [(r.path, "max_artifact_bytes" in r.reason) for r in result.refused] == [("big", True)]
    assert os.listdir(bench.folder) == ["big"]
    (bench.folder / "big").unlink()
    for number in range(3):
        bench.write(f"{number}", os.urandom(6 * 2**20))
    result = bench.ingest()
    assert len(result.created) == 2
    assert "max_session_artifacts_bytes" in result.refused[0].reason
    assert len(os.listdir(bench.folder)) == 1
    with pytest.raises(ArtifactRefused, match="past max_session"):
        bench.store.put_stream("s", "x", iter([b"x" * 2**20] * 6), kind="export")
    assert os.listdir(bench.store.blobs.tmp_fd) == [".lock"]


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("a.CSV", b"", "text/csv"),
        ("a.parquet", b"", "application/vnd.apache.parquet"),
        ("noname", b"%PDF-1.7", "application/pdf"),
        ("noname", "naïve\n".encode() * 100, "text/plain"),
        ("noname", ("x" * 511 + "é").encode()[:512], "text/plain"),
        ("noname", b"\x00\x01", "application/octet-stream"),
        ("noname", b"\xff\xfeabcdef", "application/octet-stream"),
        (".hidden", b"text", "text/plain"),
    ],
)
def test_content_types(name: str, head: bytes, expected: str) -> None:
    assert type_of(name, head) == expected


# --- hostile and unlucky ----------------------------------------------------------------------


def test_open_for_writing_sees_descriptors_and_mappings(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "f"
    path.write_bytes(b"x" * 4096)
    fd = os.open(path, os.O_RDONLY)
    assert open_for_writing(fd) is False
    with path.open("r+b") as file:
        assert open_for_writing(fd) is True
        mapping = mmap.mmap(file.fileno(), 4096)
    assert open_for_writing(fd) is True
    mapping.close()
    assert open_for_writing(fd) is False
    os.close(fd)


def test_many_writers_opening_meanwhile_do_not_kill_the_host(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    opening = f"os.close(os.open({str(path)!r}, os.O_WRONLY | os.O_NONBLOCK))"
    code = f"import os\nwhile True:\n  try: {opening}\n  except OSError: pass"
    with subprocess.Popen(["python3", "-c", code]) as writer:
        try:
            deadline = time.monotonic() + 20
            seen: set[bool | None] = set()
            while time.monotonic() < deadline and len(seen) < 2:
                seen.add(open_for_writing(fd))
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                open_for_writing(fd)
        finally:
            writer.kill()
    assert seen == {True, False}
    os.close(fd)


@pytest.mark.skipif(not ROOT, reason="only root can take a file from its owner")
def test_an_adopted_blob_is_out_of_the_kernels_reach(bench: Bench) -> None:
    path = bench.write("big", b"x" * 2**21)
    inode = path.stat().st_ino
    (made,) = bench.ingest().created
    status = bench.store.blobs.path(made.sha256).stat()
    assert (status.st_ino, status.st_uid, stat.S_IMODE(status.st_mode), status.st_nlink) == (inode, 0, 0o400, 1)


def test_a_file_that_grows_while_it_is_read_is_not_taken_yet(bench: Bench) -> None:
    path = bench.write("log", b"x" * 2**20)
    stop = threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(b"y" * 1000)

    thread = threading.Thread(target=grow)
    thread.start()
    while path.stat().st_size == 2**20:
        time.sleep(0)  # until it writes
    try:
        for _ in range(5):
            assert bench.ingest(ended=False).created == []
    finally:
        stop.set()
        thread.join()
    bench.store.max_artifact_bytes = 2**40
    bench.store.max_session_bytes = 2**40
    (made,) = bench.ingest().created
    assert hashlib.sha256(bench.store.read(made.id)).hexdigest() == made.sha256
    assert set(bench.store.read(made.id)) == set(b"xy")


@pytest.mark.skipif(not ROOT, reason="only root adopts")
@pytest.mark.parametrize(("written", "at"), [(b"more", 2**21), (b"other", 0)])
def test_a_writer_that_closes_while_its_file_is_adopted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, written: bytes, at: int
) -> None:
    """It opens the file when the host has seen nobody write, and is gone when the host asks again."""
    data = bytearray(b"x" * 2**21)
    path = bench.write("big", data)
    writers: list[BinaryIO] = []

    def asked(fd: int) -> bool | None:
        if writers and not writers[0].closed:
            with writers[0] as writer:
                writer.seek(at)
                writer.write(written)
        answer = open_for_writing(fd)
        if not writers:
            writers.append(path.open("r+b", buffering=0))
        return answer

    monkeypatch.setattr("sandbox_kernel.artifacts.intake.open_for_writing", asked)
    bench.ingest()
    bench.ingest()
    (made,) = bench.store.list()
    data[at : at + len(written)] = written
    assert bench.store.read(made.id) == data
    assert bench.store.check() == []
    assert os.listdir(bench.folder) == []


@pytest.mark.skipif(not ROOT, reason="only root adopts")
def test_a_file_that_was_adopted_when_no_descriptor_is_left_is_its_kernels_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store.max_artifact_bytes = 2**40
    path = bench.write("big", b"x" * 10 * 2**20)
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []

    def asked(fd: int) -> bool | None:
        taken.append(fd)
        if len(taken) == 2:  # it is the host's now, and to be hashed beside others
            with open(os.devnull) as highest:
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), limits[1]))
        return open_for_writing(fd)

    monkeypatch.setattr("sandbox_kernel.artifacts.intake.open_for_writing", asked)
    try:
        (refusal,) = bench.ingest().refused
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.strerror(errno.EMFILE).lower() in refusal.reason
    status = path.stat()
    assert (status.st_uid, status.st_nlink, stat.S_IMODE(status.st_mode)) == (KERNEL, 1, 0o644)
    assert [artifact.path for artifact in bench.ingest().created] == ["big"]


@pytest.mark.skipif(not ROOT, reason="only root adopts")
def test_an_adopted_file_whose_blob_a_repair_has_set_aside_is_taken_all_the_same(bench: Bench) -> None:
    bench.write("big", b"x" * 2**21)
    (found,) = (item for item in scan_untrusted(bench.fd) if isinstance(item, Found))
    taken = take(bench.store.blobs, Below(bench.fd), found, ended=True)
    assert isinstance(taken, Taken)
    bench.store.blobs.place([(taken.temporary, taken.sha256)])  # and its row could not be committed
    (bench.store_root / "set-aside").mkdir()
    blob = bench.store.blobs.path(taken.sha256)
    blob.rename(bench.store_root / "set-aside" / blob.name)
    (made,) = bench.ingest().created
    assert bench.store.read(made.id) == b"x" * 2**21
    assert os.listdir(bench.folder) == []


def _in_a_read_only_folder(root: Path) -> None:
    if ROOT:
        os.setresgid(KERNEL, KERNEL, KERNEL)
        os.setresuid(KERNEL, KERNEL, KERNEL)
    bench = Bench(root)
    for number in range(120):
        bench.write(f"shut/{number}", b"%d" % number)
        bench.write(f"{number}", b"%d" % number)
    (bench.folder / "shut").chmod(0o500)
    result = bench.ingest()
    assert len(result.created) == 240
    assert len(result.waiting) == 120
    assert os.listdir(bench.folder) == ["shut"]
    assert bench.ingest().created == []
    (bench.folder / "shut").chmod(0o700)
    bench.ingest()
    assert os.listdir(bench.folder / "shut") == []
    assert len(bench.store.list()) == 240


def test_files_that_cannot_be_removed_keep_no_other_from_being_taken() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, KERNEL, KERNEL)
        child = multiprocessing.get_context("fork").Process(target=_in_a_read_only_folder, args=(Path(folder),))
        child.start()
        child.join(30)
        assert child.exitcode == 0


def test_a_disk_that_is_full_between_batches_loses_nothing(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=True)
    try:
        bench = Bench(small)
        for number in range(300):
            bench.write(f"{number}", b"%d" % number * 1000)
        filler = small / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(small).f_bavail * os.statvfs(small).f_bsize
            os.posix_fallocate(file.fileno(), 0, free - 150_000)  # enough for some of the rows
        result = bench.ingest()
        assert result.created
        assert result.refused
        assert len(result.created) + len(result.refused) == 300
        assert len(os.listdir(bench.folder)) == len(result.refused)
        filler.unlink()
        assert len(bench.ingest().created) == len(result.refused)
        assert os.listdir(bench.folder) == []
        assert len(bench.store.list("s")) == 300
        assert bench.store.check() == []
        bench.store.close()
        os.close(bench.fd)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_what_one_session_loses_is_not_told_to_another_only(tmp_path: Path) -> None:
    """The disk below the store's file system fails while two sessions write: both hear of it, whoever syncs first."""
    if not ROOT:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=True)
    try:
        (small / "disk").mkdir()
        with (small / "image").open("wb") as file:
            file.truncate(64 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", small / "image"], check=True)
        subprocess.run(["mount", "-o", "loop", small / "image", small / "disk"], check=True)
        try:
            blobs = BlobFolder(small / "disk" / "store")
            with blobs.writing() as one, blobs.writing() as other:
                names: dict[int, list[str]] = {one: [], other: []}
                for since in (one, other):
                    for _ in range(12):
                        name, fd = blobs.create()
                        os.write(fd, os.urandom(400_000))
                        os.close(fd)
                        names[since].append(name)
                for since in (one, other):
                    with pytest.raises(OSError, match=r"No space left on device|Input/output error"):
                        blobs.sync(names[since], (), 0, since)
            blobs.close()
        finally:
            subprocess.run(["umount", "-l", small / "disk"], check=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_full_disk_refuses_and_nothing_is_lost(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    try:
        folder = tmp_path / "artifacts"
        folder.mkdir()
        fd = os.open(folder, FOLDER)
        with ArtifactStore.open(small) as store:
            (folder / "big").write_bytes(os.urandom(3 * 2**20))
            (folder / "small").write_bytes(b"x")
            found = [item for item in scan_untrusted(fd) if isinstance(item, Found)]
            result = store.ingest("s", fd, ended=True).batch(found)
            assert [r.path for r in result.refused] == ["big"]
            assert os.strerror(errno.ENOSPC).lower() in result.refused[0].reason
            assert [a.path for a in result.created] == ["small"]
            assert os.listdir(folder) == ["big"]
            with pytest.raises(ArtifactRefused, match="no space"):
                put_blob(store, os.urandom(3 * 2**20))
            subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
            left = [item for item in found if item.path == "big"]
            assert [a.path for a in store.ingest("s", fd, ended=True).batch(left).created] == ["big"]
        os.close(fd)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_batch_after_batch(bench: Bench) -> None:
    """Equal files in one batch and in several, known ones, and empty ones among distinct ones."""
    bench.write("known", b"0")
    bench.ingest()
    for number in range(230):
        bench.write(f"{number}", b"%d" % (number % 120) if number % 7 else b"")
    bench.write("recorded", b"early")
    bench.ingest(ended=False)
    result = bench.ingest()
    assert (result.created, result.refused, result.waiting) == ([], [], [])
    assert os.listdir(bench.folder) == os.listdir(bench.store.blobs.tmp_fd)[1:] == []
    assert len(bench.store.list("s")) == 232
    for number in range(230):
        bench.write(f"again-{number}", b"%d" % (number % 170) if number % 7 else b"")
    made = bench.ingest().created
    assert len({artifact.path for artifact in made}) == len(made) == 230
    for artifact in made:
        number = int(artifact.path.removeprefix("again-"))
        assert bench.store.read(artifact.id) == (b"%d" % (number % 170) if number % 7 else b"")
    assert os.listdir(bench.folder) == []
    assert bench.store.check() == []


@pytest.mark.parametrize("others", [3, 100])
def test_big_files_among_others(bench: Bench, others: int) -> None:
    bench.store.max_artifact_bytes = bench.store.max_session_bytes = 2**30
    names = []
    for number in range(others):
        names.append(bench.write(f"{number}", b"%d" % number).name)
        if number % 40 == 1:
            names.append(bench.write(f"big-{number}", b"%d" % (number % 80) * 10 * 2**20).name)
    for number, name in enumerate(names):
        os.utime(bench.folder / name, ns=(number, number))
    made = bench.ingest().created
    in_one_batch = len(names) <= 50
    assert [artifact.path for artifact in made] == names if in_one_batch else len(made) == len(names)
    for artifact in made:
        number = int(artifact.path.removeprefix("big-"))
        expected = b"%d" % (number % 80) * 10 * 2**20 if artifact.path.startswith("big") else b"%d" % number
        assert bench.store.read(artifact.id) == expected
        assert artifact.content_type == "text/plain"
    assert os.listdir(bench.folder) == []
    assert bench.store.check() == []


def test_batches_that_are_not_waited_for_leave_their_files_as_they_were(bench: Bench) -> None:
    for number in range(200):
        bench.write(f"{number}", b"%d" % number)
    found = [item for item in scan_untrusted(bench.fd) if isinstance(item, Found)]
    results = bench.store.ingest("s", bench.fd, ended=True).batches(found[at : at + 50] for at in range(0, 200, 50))
    while not next(results).created:
        pass
    results.close()
    assert os.listdir(bench.store.blobs.tmp_fd) == [".lock"]
    assert len(bench.ingest().created) == 150
    assert os.listdir(bench.folder) == []
    assert len(bench.store.list("s")) == 200


# --- dying ------------------------------------------------------------------------------------


def _victim(root: Path, round_: int) -> None:
    """Writes files that a journal names before they appear, and ingests them: until it is killed."""
    bench = Bench(root)
    bench.store.max_session_bytes = 2**40
    chance = random.Random(round_)
    staging = root / "staging"
    with (root / "journal").open("a", buffering=1) as journal:
        for number in range(10_000):
            for part in range(chance.choice((1, 1, 5, 210))):
                size = chance.choice((0, 10, 5000)) if part else chance.choice((100, 2**20 + 5))
                data = f"{round_} {number} {part}".encode() + b"x" * size
                name = f"{round_}-{number}-{part}"
                staging.write_bytes(data)
                if ROOT:
                    os.chown(staging, KERNEL, KERNEL)
                journal.write(json.dumps([name, hashlib.sha256(data).hexdigest()]) + "\n")
                os.rename(staging, bench.folder / name)
            if chance.random() < 0.4:
                bench.ingest(ended=False)
            bench.ingest(ended=True)


def test_killed_at_any_moment_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    chance = random.Random(4711)
    context = multiprocessing.get_context("fork")
    for round_ in range(40):
        victim = context.Process(target=_victim, args=(tmp_path, round_))
        victim.start()
        victim.join(chance.uniform(0.02, 0.3))
        assert victim.pid is not None
        assert victim.exitcode is None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        victim.close()
    bench = Bench(tmp_path)
    bench.store.max_session_bytes = 2**40
    bench.ingest()
    expected = dict(json.loads(line) for line in (tmp_path / "journal").read_text().splitlines())
    records = [(a.path, a.sha256) for a in bench.store.list("s")]
    journal_only = expected.keys() - {path for path, _ in records}
    assert len(records) == len(set(records)) == len({path for path, _ in records})
    assert all(expected[path] == sha256 for path, sha256 in records)
    assert len(journal_only) <= 40  # announced, killed before it was there: one per round at most
    assert os.listdir(bench.folder) == []
    assert len(records) > 200
    assert [p for p in bench.store.check() if p.kind != "orphan"] == []
    assert len(os.listdir(bench.store_root / "tmp")) == 2
    bench.store.close()
    os.close(bench.fd)


@pytest.mark.skipif(not ROOT, reason="only root adopts")
@pytest.mark.parametrize("step", ["linked", "owned", "placed", "committed"])
def test_each_step_of_an_adoption_can_be_the_last(tmp_path: Path, step: str) -> None:
    bench = Bench(tmp_path)
    path = bench.write("big", b"x" * 2**21)
    (found,) = (item for item in scan_untrusted(bench.fd) if isinstance(item, Found))
    blobs = BlobFolder(bench.store_root)
    if step in ("linked", "owned"):
        name = blobs.new_name(link_of=path.stat())
        os.link(path, name, dst_dir_fd=blobs.tmp_fd)
        if step == "owned":
            os.chown(path, 0, 0)
            os.chmod(path, 0o400)
    else:
        taken = take(blobs, Below(bench.fd), found, ended=True)
        assert isinstance(taken, Taken)
        assert taken.temporary is not None
        blobs.place([(taken.temporary, taken.sha256)])
        if step == "committed":
            bench.store.catalog.add([(draft(taken, Origin("s", 3, "m"), "file"), _source(taken.identity))])
    os.close(blobs._lock_fd)  # dead
    os.close(blobs.tmp_fd)
    bench.store.close()
    bench.store = ArtifactStore.open(bench.store_root)
    if step in ("linked", "owned"):
        status = path.stat()
        assert (status.st_uid, status.st_nlink, stat.S_IMODE(status.st_mode)) == (KERNEL, 1, 0o644)
    assert [a.path for a in bench.ingest().created] == ([] if step == "committed" else ["big"])
    assert bench.ingest().created == []
    assert os.listdir(bench.folder) == []
    assert len(bench.store.list()) == 1
    bench.store.close()
    os.close(bench.fd)


def test_a_recorded_file_that_was_not_removed_is_only_removed(bench: Bench) -> None:
    bench.write("a", b"x")
    assert len(bench.ingest(ended=False).created) == 1
    assert os.listdir(bench.folder) == ["a"]
    assert bench.ingest(ended=True).created == []
    assert os.listdir(bench.folder) == []


# --- the books --------------------------------------------------------------------------------


def test_check_finds_and_mends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gone", "damaged", "fine"):
        bench.write(name, name.encode())
    made = {a.path: a for a in bench.ingest().created}
    put_blob(bench.store, b"picture")
    assert bench.store.check() == []
    bench.store.blobs.path(made["gone"].sha256).unlink()
    damaged = bench.store.blobs.path(made["damaged"].sha256)
    damaged.chmod(0o600)
    damaged.write_bytes(b"other")
    orphan = hashlib.sha256(b"orphan").hexdigest()
    bench.store.blobs.put({orphan: b"orphan"})
    monkeypatch.setattr("sandbox_kernel.artifacts.checking.ORPHAN_AGE_S", -1.0)
    assert sorted(p.kind for p in bench.store.check()) == ["damaged", "missing", "missing", "orphan"]
    assert {p.repaired for p in bench.store.check(repair=True)} == {True, False}
    assert sorted(os.listdir(bench.store_root / "set-aside")) == sorted([made["damaged"].sha256, orphan])
    with pytest.raises(ArtifactNotFound, match="doctor"):
        bench.store.read(made["gone"].id)
    bench.write("again", b"damaged")
    bench.ingest()
    assert bench.store.read(made["damaged"].id) == b"damaged"
    assert [p.kind for p in bench.store.check()] == ["missing"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "cut off", "garbage", "middle"])
def test_a_corrupt_catalog_is_moved_aside_and_made_anew_from_the_logs(tmp_path: Path, damage: str) -> None:
    bench = Bench(tmp_path)
    for number in range(300):
        bench.write(f"{number}", str(number).encode())
    made = bench.ingest().created
    picture = put_blob(bench.store, b"picture")
    lines = [
        {"timestamp": "2024-01-15T10:30:20", "event": "artifacts_created", "artifacts": [a.model_dump(mode="json")]}
        for a in made
    ]
    output = {"output_type": "display_data", "data": {BLOB_MIME: {"sha256": picture, "size_bytes": 7}}, "metadata": {}}
    lines.append({"event": "code_execution", "outputs": [output], "artifacts": [made[0].id]})
    text = "\n".join(json.dumps(line) for line in lines) + "\nsha256 torn {"
    (tmp_path / "s" / "session.log").write_text(text)
    bench.store.close()
    path = bench.store_root / "store.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:5000])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "removed":
        path.unlink()
    elif damage == "cut off":  # the process that made it anew was killed
        path.rename(path.with_name("store.sqlite.corrupt-1"))
        path.with_name("store.sqlite.new").write_bytes(data[:5000])
        (tmp_path / "s" / "session.log").unlink()
    elif damage == "garbage":
        path.write_bytes(b"not a database" * 1000)
    else:
        data[8192:-4096] = os.urandom(len(data) - 12288)
        path.write_bytes(data)
    bench.store = ArtifactStore.open(bench.store_root)
    bench.store.check(repair=True)
    assert {a.id for a in bench.store.list("s")} == {a.id for a in made}
    assert bench.store.read(made[7].id) == made[7].path.encode()
    assert bench.store.usage("s") == sum(a.size_bytes for a in made)
    assert bench.store.check() == []
    assert len(list(bench.store_root.glob("store.sqlite.corrupt-*"))) >= (damage != "removed")
    assert not list(bench.store_root.glob("store.sqlite.new*"))
    bench.store.close()
    os.close(bench.fd)


_FORKS = """
import os, sys, time
from sandbox_kernel.artifacts.store import ArtifactStore
store = ArtifactStore.open(sys.argv[1])
name, _ = store.blobs.create()
if os.fork() == 0:
    print("forked", flush=True)  # the child says it: what it does at its birth is done
    os.close(1)
    sys.stdin.read()
    os._exit(0)
time.sleep(60)
"""


def test_a_dead_process_s_child_keeps_nothing_of_its_room(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FORKS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"forked\n"
        process.kill()
        process.wait()
        with ArtifactStore.open(tmp_path) as store:  # its child still lives
            assert [room for room in (tmp_path / "tmp").iterdir() if room.is_dir()] == [store.blobs._tmp]


def test_a_root_that_is_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"):
        ArtifactStore.open(tmp_path / "file")


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    with ArtifactStore.open(tmp_path) as one, ArtifactStore.open(tmp_path) as two:
        threads = [
            threading.Thread(target=lambda s=store: [s.put_bytes("s", "x", b"1", kind="export") for _ in range(30)])
            for store in (one, two, one)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [a.version for a in one.list("s")] == list(range(1, 91))
