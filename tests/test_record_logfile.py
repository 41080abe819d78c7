"""The log reader: lenient on arbitrary bytes, from the end at a cost that does not grow, following what is appended."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel import logfile
from sandbox_kernel.errors import RecordError
from sandbox_kernel.jsonline import decode, encode
from sandbox_kernel.logfile import Problem, follow, read_log
from sandbox_kernel.snapshot import read_metadata, read_state

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
LINES = st.lists(
    st.binary(max_size=60) | st.dictionaries(st.text(max_size=5), JSON, max_size=3).map(encode) | st.just(b"[]"),
    max_size=12,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "session.log"


@settings(max_examples=300, deadline=None)
@given(lines=LINES, ended=st.booleans(), limit=st.integers(0, 12), block=st.integers(1, 70))
def test_any_bytes_are_read_and_the_tail_is_the_end_of_the_whole(
    scratch: Path, lines: list[bytes], ended: bool, limit: int, block: int
) -> None:
    scratch.write_bytes(b"\n".join(lines) + b"\n" * ended)
    whole = read_log(scratch)
    known, logfile._BLOCK = logfile._BLOCK, block
    try:
        tail = read_log(scratch, limit=limit)
    finally:
        logfile._BLOCK = known
    wanted = whole.entries[len(whole.entries) - limit :] if limit < len(whole.entries) else whole.entries
    assert list(map(repr, tail.entries)) == list(map(repr, wanted))
    if limit > len(whole.entries):
        assert len(tail.problems) == len(whole.problems)


@settings(max_examples=200, deadline=None)
@given(value=st.dictionaries(st.text(), JSON, max_size=4))
def test_what_is_encoded_is_one_line_and_decodes_to_itself(value: dict[str, Any]) -> None:
    line = encode(value)
    assert b"\n" not in line
    back = decode(line)
    if "nan" not in repr(value) and "inf" not in repr(value) and "\\ud" not in repr(value):
        assert back == value


def test_the_documents_log_and_stranger_ones(tmp_path: Path) -> None:
    log = tmp_path / "session.log"
    log.write_bytes(
        b'\xef\xbb\xbf{"timestamp": "2024-01-15T10:30:00", "event": "session_started", "container_id": "abc123"}\r\n'
        b'\n{"event": "something_new", "field": {"a": [1]}}\n'
        b'{"timestamp": 5, "event": null, "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
        b'{"code": "\xff\xfe"}\n'
        b'{"timestamp": "2024-01-15T10:30:0'
    )
    found = read_log(log)
    assert [entry.get("event") for entry in found.entries] == ["session_started", "something_new", None]
    assert found.entries[2] == {"code": "\\xff\\xfe"}
    assert [problem.where for problem in found.problems] == ["session.log, line 4", "session.log, line 6"]
    assert "torn" in found.problems[1].message
    tail = read_log(log, limit=1)
    assert [len(tail.entries), len(tail.problems)] == [1, 1]
    assert tail.end == log.read_bytes().rindex(b"\n") + 1


def test_a_line_too_long_is_skipped_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "MAX_LINE", 2**20)
    log = tmp_path / "session.log"
    with log.open("wb") as file:
        file.write(b'{"event": "first"}\n')
        file.truncate(300 * 2**20)
        file.seek(0, 2)
        file.write(b'\n{"event": "last"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for found in (read_log(log), read_log(log, limit=5)):
        assert found.entries[-1] == {"event": "last"}
        assert any("a line of" in problem.message for problem in found.problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_the_last_entries_of_a_huge_log_cost_no_more_than_those_of_a_small_one(tmp_path: Path) -> None:
    lines = b'{"event": "code_execution", "code": "pass"}\n' * 20
    small, huge = tmp_path / "small.log", tmp_path / "huge.log"
    small.write_bytes(lines)
    with huge.open("wb") as file:
        file.truncate(2**30)  # a hole of a gigabyte: reading it would take much longer than its end
        file.seek(0, 2)
        file.write(b"\n" + lines)

    def best(path: Path) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            assert len(read_log(path, limit=10).entries) == 10
            times.append(time.perf_counter() - start)
        return min(times)

    small_s, huge_s = best(small), best(huge)
    # A file longer than one block has a whole block read; a hole of a gigabyte would take some 100 ms.
    assert huge_s < small_s + 0.002


def test_garbage_is_not_searched_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "_GARBAGE", 2000)
    log = tmp_path / "session.log"
    log.write_bytes(b'{"event": "lost"}\n' + b"garbage\n" * 1000)
    found = read_log(log, limit=1)
    assert found.entries == []
    assert "nothing before them" in found.problems[0].message


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "session.log"
    if kind == "link":
        log.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(log)
    else:
        log.mkdir()
    for limit in (None, 1):
        with pytest.raises(RecordError, match=r"session\.log"):
            read_log(log, limit=limit)


def test_following_sees_whole_lines_and_survives_a_cut(tmp_path: Path) -> None:
    log = tmp_path / "session.log"
    log.write_bytes(b'{"n": 0}\n{"n": 1}\n')
    stop, seen = threading.Event(), []
    arrived = threading.Condition()

    def run() -> None:
        for found in follow(log, start=9, stop=stop, interval_s=0.01):
            with arrived:
                seen.append(found)
                arrived.notify()

    def wait_for(count: int) -> None:
        with arrived:
            assert arrived.wait_for(lambda: len(seen) >= count, 10), seen

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(1)
        with log.open("ab") as file:
            file.write(b'{"n": ')
            file.flush()
            stop.wait(0.05)
            assert len(seen) == 1
            file.write(b'2}\n{"n": 3}\n')
        wait_for(3)
        log.write_bytes(b'{"n": 4}\n')
        wait_for(5)
        log.unlink()
        stop.wait(0.05)
        log.write_bytes(b'{"n": 5}\n')
        wait_for(6)
    finally:
        stop.set()
        thread.join(10)
    entries = [found for found in seen if not isinstance(found, Problem)]
    assert entries == [{"n": n} for n in range(1, 6)]
    assert any(isinstance(found, Problem) and "cut" in found.message for found in seen)


# --- metadata and state -----------------------------------------------------------------------

STATE = b'{"timestamp": "2024-01-15T10:35:00", "variables": {"x": {"type": "list", "value": "[1]"}}}'


def hostile(folder: Path, kind: str) -> None:
    path = folder / "python_state.json"
    if kind == "link to a host file":
        path.symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**30)
    elif kind == "not JSON":
        path.write_bytes(b"\x00\xff{")
    elif kind == "a list":
        path.write_bytes(b"[]")
    elif kind == "deep":
        path.write_bytes(b"[" * 1_000_000)
    elif kind == "a number too long":
        path.write_bytes(b'{"a": ' + b"9" * 100_000 + b"}")
    elif kind == "a folder":
        path.mkdir()


KINDS = ["link to a host file", "fifo", "huge", "not JSON", "a list", "deep", "a number too long", "a folder"]


@pytest.mark.parametrize("place", ["top", "state"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_state_is_a_problem(tmp_path: Path, kind: str, place: str) -> None:
    if place == "state":
        (tmp_path / "state").mkdir()
        (tmp_path / "python_state.json").symlink_to("state/python_state.json")
        hostile(tmp_path / "state", kind)
    else:
        hostile(tmp_path, kind)
    state, problem = read_state(tmp_path)
    assert state is None
    assert isinstance(problem, Problem)
    assert "python_state.json" in problem.where


def test_state_is_read_in_both_places_and_may_be_missing(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (None, None)
    (tmp_path / "python_state.json").write_bytes(STATE)
    assert read_state(tmp_path) == (json.loads(STATE), None)
    (tmp_path / "python_state.json").unlink()
    (tmp_path / "state").mkdir()
    (tmp_path / "python_state.json").symlink_to("state/python_state.json")
    assert read_state(tmp_path) == (None, None)
    (tmp_path / "state" / "python_state.json").write_bytes(STATE)
    assert read_state(tmp_path) == (json.loads(STATE), None)
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    (tmp_path / "state").symlink_to("elsewhere")
    assert read_state(tmp_path)[0] is None


def test_metadata_that_are_missing_or_broken(tmp_path: Path) -> None:
    assert read_metadata(tmp_path) == (None, None)
    (tmp_path / "session_metadata.json").write_bytes(b"{")
    metadata, problem = read_metadata(tmp_path)
    assert metadata is None
    assert problem is not None
