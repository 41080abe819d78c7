"""The recorder: the document's files field by field, exactly one line per cell, and what a full disk does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.audit import verify
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import RecordError, RecordFull
from sandbox_kernel.events import Artifact, utc_now
from sandbox_kernel.logfile import read_log
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.snapshot import read_metadata

DOCUMENT = Path(__file__).parent / "data" / "bind-mode-session-logging.md"


def document_blocks() -> list[str]:
    return re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def document_log() -> dict[str, dict[str, Any]]:
    entries = [json.loads(line) for line in document_blocks()[0].splitlines()]
    return {entry["event"]: entry for entry in entries}


@pytest.fixture
def directory(tmp_path: Path) -> SessionDirectory:
    directory = SessionDirectory(tmp_path / "sessions", "conv")
    directory.create(os.getuid(), os.getgid())
    return directory


def events(directory: SessionDirectory) -> list[dict[str, Any]]:
    log = read_log(directory.log)
    assert log.problems == []
    return log.entries


def artifact(**fields: Any) -> Artifact:
    known = {
        "id": "art_123", "filename": "plot.png", "path": "plots/plot.png", "size_bytes": 15432, "sha256": "0" * 64,
        "content_type": "image/png", "session_id": "conv", "created_at": utc_now(),
    }  # fmt: skip
    return Artifact(**(known | fields))


def test_every_event_has_the_documents_fields_first_and_of_its_types(directory: SessionDirectory) -> None:
    with Recorder.open(directory) as record:
        record.started("abc123", 9001, image="sandbox:latest")
        record.accept("m1", "import pandas as pd\nprint('Hello')")
        record.finish("m1", status="ok", origin="sandbox-kernel", outputs=[], stdout="Hello\n", execution_count=1)
        record.artifacts_created([artifact()])
        record.stopped("abc123")
    written = events(directory)
    wanted = document_log()
    assert [entry["event"] for entry in written] == list(wanted)
    for entry in written:
        example = wanted[entry["event"]]
        assert list(entry)[: len(example)] == list(example)
        for name, value in example.items():
            assert type(entry[name]) is type(value), name
            if name not in ("timestamp", "artifacts"):
                assert entry[name] == value
        moment = datetime.fromisoformat(entry["timestamp"])
        assert moment.utcoffset() is not None
        assert moment.utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    example_artifact = wanted["artifacts_created"]["artifacts"][0]
    assert list(written[2]["artifacts"][0].items())[: len(example_artifact)] == list(example_artifact.items())
    assert {"path", "sha256", "content_type", "version"} <= set(written[2]["artifacts"][0])
    assert {"execution_count", "msg_id", "status", "origin", "outputs"} <= set(written[1])


def test_metadata_has_the_documents_fields_in_its_order(directory: SessionDirectory) -> None:
    example = json.loads(document_blocks()[1])
    with Recorder.open(directory) as record:
        record.update_metadata(**dict(reversed(example.items())))
    text = directory.metadata.read_text()
    assert list(json.loads(text))[: len(example)] == list(example)
    assert json.loads(text).items() >= example.items()
    assert text.startswith('{\n  "session_id": "conv",\n')


def test_metadata_keep_what_others_wrote(directory: SessionDirectory) -> None:
    with Recorder.open(directory) as record:
        record.update_metadata(image="a")
        theirs = json.loads(directory.metadata.read_text())
        directory.metadata.write_text(json.dumps(theirs | {"their_field": [1]}))
        record.update_metadata(image="b")
        assert json.loads(directory.metadata.read_text()).items() >= {"their_field": [1], "image": "b"}.items()


def test_metadata_soon_are_there_soon_and_at_close(directory: SessionDirectory) -> None:
    with Recorder.open(directory) as record:
        record.update_metadata(execution_count=0)
        record.metadata_soon(execution_count=1)
        deadline = threading.Event()
        for _ in range(100):
            if (read_metadata(directory.path)[0] or {})["execution_count"] == 1:
                break
            deadline.wait(0.05)
        else:
            pytest.fail("metadata were not written within 5 s")
        record.metadata_soon(execution_count=2)
    assert (read_metadata(directory.path)[0] or {})["execution_count"] == 2


def test_the_count_of_cells_survives_a_crash_before_the_metadata_were_written(directory: SessionDirectory) -> None:
    record = Recorder.open(directory)
    record.started("abc", None)
    record.update_metadata(execution_count=3)
    for n in range(4):
        record.finish(f"m{n}", code="pass", status="ok")
    record._log.close()
    record._journal.close()
    with Recorder.open(directory) as again:
        assert again.metadata["execution_count"] == 7
        assert again.seen("m0")
        assert not again.seen("m9")
    with Recorder.open(directory) as again:
        assert again.metadata["execution_count"] == 7


def test_a_cell_is_written_once(directory: SessionDirectory) -> None:
    with Recorder.open(directory) as record:
        record.started("abc", None)
        record.accept("m1", "1")
        assert [cell.msg_id for cell in record.pending()] == ["m1"]
        record.finish("m1", status="ok")
        record.finish("m1", status="ok")
        record.finish("foreign", code="2", status="error")
        assert record.seen("m1")
        assert not record.seen("m2")
        assert record.pending() == []
    with Recorder.open(directory) as record:
        record.finish("m1", status="ok")
        record.finish("foreign", code="2", status="ok")
        record.accept("m3", "3")
        record.retract("m3")
    cells = [(entry["msg_id"], entry["code"], entry["success"]) for entry in events(directory)[1:]]
    assert cells == [("m1", "1", True), ("foreign", "2", False)]
    assert directory.pending.read_bytes() == b""


def test_what_was_in_flight_is_known_after_a_crash(directory: SessionDirectory) -> None:
    record = Recorder.open(directory)
    record.started("abc", None)
    record.accept("m1", "1", origin="me")
    record.accept("m2", "2")
    record.accept("m3", "3")
    record.finish("m2", status="ok")
    # A crash between the log's line and .pending: put the journal back as it was before.
    journal = directory.pending.read_bytes().replace(b'{"done": "m2"}\n', b"")
    directory.pending.write_bytes(journal + b'{"msg_id": "torn", "co')
    again = Recorder.open(directory)
    assert [(cell.msg_id, cell.code) for cell in again.pending()] == [("m1", "1"), ("m3", "3")]
    assert again.pending()[0].fields == {"origin": "me"}
    assert again.seen("m2")
    again.finish("m2", status="ok")
    again.finish("m1", status="unknown")
    again.close()
    record._log.close()
    record._journal.close()
    cells = [entry for entry in events(directory) if entry["event"] == "code_execution"]
    assert [cell["msg_id"] for cell in cells] == ["m2", "m1"]


_CELLS = """
import sys
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.record import Recorder
record = Recorder.open(SessionDirectory(sys.argv[1], "conv"))
for cell in record.pending():
    record.finish(cell.msg_id, status="unknown")
first = int(sys.argv[2])
for n in range(first, first + 100000):
    record.accept(f"m{n}", "x" * 2000)
    print(n, flush=True)
    record.finish(f"m{n}", status="ok", stdout="y" * 5000)
    record.metadata_soon(execution_count=n)
"""


def test_sigkill_at_any_moment_leaves_each_accepted_cell_exactly_once(directory: SessionDirectory) -> None:
    accepted: list[int] = []
    for round_ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", _CELLS, str(directory.root), str(round_ * 100_000)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        accepted += [int(process.stdout.readline()) for _ in range(20 + 17 * round_)]
        process.send_signal(signal.SIGKILL)
        accepted += [int(line) for line in process.stdout.read().splitlines() if line]
        process.wait()
        process.stdout.close()
    with Recorder.open(directory) as record:
        for cell in record.pending():
            record.finish(cell.msg_id, status="unknown")
    written = [e["msg_id"] for e in read_log(directory.log).entries if e["event"] == "code_execution"]
    assert len(set(written)) == len(written)
    assert {f"m{n}" for n in accepted} <= set(written)
    assert verify(directory.path).intact


def test_text_that_utf8_lacks_and_odd_values_stay_one_line_of_strict_json(directory: SessionDirectory) -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    with Recorder.open(directory) as record:
        record.append(
            "odd",
            text="a\udc80\u2028\u202e\x9b\x7f\n",
            nan=float("nan"),
            raw=b"\xff",
            nested=nested,
            keys={1: 2, (3,): 4},
        )
    data = directory.log.read_bytes()
    assert data.count(b"\n") == 1
    assert not re.search("[\x7f-\x9f\u2028\u202e]", data.decode())

    def refuse(name: str) -> None:
        raise ValueError(name)

    entry = json.loads(data, parse_constant=refuse)
    assert entry["text"] == "a\\udc80\u2028\u202e\x9b\x7f\n"
    assert entry["nan"] == "nan"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A tmpfs of 64 kB, so that the disk is really full."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """The file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


def test_a_full_disk_leaves_the_log_whole_and_loses_no_finished_cell(small_disk: Path) -> None:
    directory = SessionDirectory(small_disk, "conv")
    directory.create(os.getuid(), os.getgid())
    record = Recorder.open(directory)
    record.started("abc", None)
    record.accept("m1", "1")
    ballast = fill(small_disk)
    with pytest.raises(RecordFull, match=r"session\.log"):
        record.finish("m1", status="ok", stdout="y" * 30_000)
    assert [entry["event"] for entry in events(directory)] == ["session_started"]
    with pytest.raises(RecordFull):
        record.accept("m2", "2")
    ballast.unlink()
    record.accept("m3", "3")
    record.finish("m3", status="ok")
    record.close()
    assert [entry.get("msg_id") for entry in events(directory)] == [None, "m1", "m3"]
    assert verify(directory.path).intact


def test_cells_that_end_while_the_disk_is_full_are_all_written_later(small_disk: Path) -> None:
    """Another client's cells too, of which nothing stands in ``.pending``; and each once."""
    directory = SessionDirectory(small_disk, "conv")
    directory.create(os.getuid(), os.getgid())
    record = Recorder.open(directory)
    record.started("abc", None)
    record.accept("ours", "1")
    ballast = fill(small_disk)
    for msg_id in ("ours", "theirs", "ours", "more", "more"):
        with pytest.raises(RecordFull):
            record.finish(msg_id, code="1", status="ok", stdout="y" * 10_000)
        assert not record.seen(msg_id)
    ballast.unlink()
    record.accept("next", "2")
    record.finish("next", status="ok")
    record.finish("more", code="1", status="ok")
    record.close()
    assert [entry.get("msg_id") for entry in events(directory)[1:]] == ["ours", "theirs", "more", "next"]


def test_what_waits_for_the_disk_is_bounded(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_kernel.record.WAITING_BYTES", 20_000)
    directory = SessionDirectory(small_disk, "conv")
    directory.create(os.getuid(), os.getgid())
    record = Recorder.open(directory)
    record.started("abc", None)
    record.accept("ours", "1")
    ballast = fill(small_disk)
    for msg_id in [*map(str, range(10)), "ours"]:
        with pytest.raises(RecordFull):
            record.finish(msg_id, code="1", status="ok", stdout="y" * 6_000)
    ballast.unlink()
    record.close()
    written = [entry.get("msg_id") for entry in events(directory) if entry["event"] == "code_execution"]
    assert written == ["0", "1", "2", "ours"], "those of others are bounded, an accepted one is kept"
    (lost,) = [entry for entry in events(directory) if entry["event"] == "cells_not_recorded"]
    assert lost["count"] == 7


def test_a_read_only_folder_is_an_error_that_says_so(small_disk: Path) -> None:
    directory = SessionDirectory(small_disk, "conv")
    directory.create(os.getuid(), os.getgid())
    Recorder.open(directory).close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RecordFull, match=r"session\.log.*read-only"):
        Recorder.open(directory)


def test_a_closed_record_says_so(directory: SessionDirectory) -> None:
    record = Recorder.open(directory)
    record.close()
    with pytest.raises(RecordError, match="closed"):
        record.append("late")


def test_a_file_that_cannot_be_written_is_named(directory: SessionDirectory) -> None:
    directory.log.mkdir()
    with pytest.raises(RecordError, match=r"session\.log"):
        Recorder.open(directory)
    directory.log.rmdir()
    directory.log.symlink_to("/etc/passwd")
    with pytest.raises(RecordError, match="symbolic link"):
        Recorder.open(directory)
    directory.log.unlink()
    os.mkfifo(directory.log)
    with pytest.raises(RecordError, match="not a regular file"):
        Recorder.open(directory)


@pytest.mark.parametrize("content", [b"", b"{torn", b"[1]", b"\xff\xfe"])
def test_corrupt_metadata_are_moved_aside_and_rebuilt(directory: SessionDirectory, content: bytes) -> None:
    with Recorder.open(directory) as record:
        record.started("abc123", 9001)
        record.finish("m1", code="1", status="ok")
    directory.metadata.write_bytes(content)
    with Recorder.open(directory) as record:
        assert record.metadata["container_id"] == "abc123"
        assert record.metadata["execution_count"] == 1
    assert (directory.path / "session_metadata.json.corrupt-1").read_bytes() == content
    assert events(directory)[-1]["event"] == "metadata_rebuilt"
    assert events(directory)[-1]["moved_to"] == "session_metadata.json.corrupt-1"
    assert verify(directory.path).intact


def test_what_is_in_flight_is_on_the_disk_within_a_second(
    directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    sync, both = os.fdatasync, threading.Event()

    def seen(descriptor: int) -> None:
        sync(descriptor)
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if synced == {"session.log", ".pending"}:
            both.set()

    monkeypatch.setattr(os, "fdatasync", seen)
    with Recorder.open(directory) as record:
        record.started("abc", None)
        record.accept("m1", "1")
        assert both.wait(1), synced


def test_fsync_durability_and_the_tmpfs_face(directory: SessionDirectory) -> None:
    with Recorder.open(directory, durability="fsync") as record:
        record.accept("m1", "1")
        record.finish("m1", status="ok")
        record.metadata_soon(execution_count=1)
        assert (read_metadata(directory.path)[0] or {})["execution_count"] == 1
    public = {name for name in dir(Recorder) if not name.startswith("_")} - {"open", "sync"}
    assert public <= set(dir(NoRecorder()))


def test_no_thread_and_no_descriptor_is_left(directory: SessionDirectory) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Recorder.open(directory) as record:
        record.started("abc", None)
        record.metadata_soon(a=1)
    assert set(os.listdir("/proc/self/fd")) == before
    left = [thread for thread in threading.enumerate() if thread.name == "sandbox-kernel-sync"]
    for thread in left:
        thread.join(5)
        assert not thread.is_alive()
    assert sorted(path.name for path in directory.path.iterdir()) == [
        ".pending", "artifacts", "python_state.json", "session.log", "session_metadata.json", "state",
    ]  # fmt: skip
