"""The audit chain: any change of the log is found, and the line that was changed is named."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.audit import Verdict, verify
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.errors import RecordError
from sandbox_kernel.record import Recorder


def written(root: Path, count: int) -> SessionDirectory:
    """A session whose log has ``count`` lines."""
    directory = SessionDirectory(root, "conv")
    directory.create(os.getuid(), os.getgid())
    with Recorder.open(directory) as record:
        record.started("abc", 9001)
        for n in range(count - 1):
            record.finish(f"m{n}", code=f"print({n})", status="ok", stdout=f"{n}\n")
    return directory


def put(directory: SessionDirectory, lines: list[bytes]) -> Verdict:
    directory.log.write_bytes(b"".join(line + b"\n" for line in lines))
    return verify(directory.path)


@pytest.fixture(scope="module")
def sample() -> Iterator[tuple[SessionDirectory, bytes]]:
    with tempfile.TemporaryDirectory() as root:
        directory = written(Path(root), 8)
        yield directory, directory.log.read_bytes()


Sample = tuple[SessionDirectory, bytes]


def test_an_untouched_log_is_intact(sample: Sample) -> None:
    directory, data = sample
    directory.log.write_bytes(data)
    assert verify(directory.path) == Verdict(True, 8, None, "intact: 8 lines")


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_changed_byte_is_found_and_its_line_named(sample: Sample, place: int, byte: int) -> None:
    directory, data = sample
    place %= len(data)
    if data[place] == byte or (data[place] == 10 and place < len(data) - 1) or byte == 10:
        return  # joined and split lines have their own tests
    directory.log.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
    verdict = verify(directory.path)
    assert verdict.intact is False
    assert verdict.first_bad_line == data[:place].count(b"\n") + 1


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6))
def test_split_and_joined_lines_are_found(sample: Sample, place: int) -> None:
    directory, data = sample
    place %= len(data)
    split = data[:place] + b"\n" + data[place:]
    ends = [at for at, value in enumerate(data) if value == 10]
    end = ends[place % len(ends)]
    for changed in (split, data[:end] + data[end + 1 :]):
        directory.log.write_bytes(changed)
        assert verify(directory.path).intact is False


@pytest.mark.parametrize("n", range(8))
def test_a_removed_line_is_found(sample: Sample, n: int) -> None:
    directory, data = sample
    lines = data.splitlines()
    verdict = put(directory, lines[:n] + lines[n + 1 :])
    assert (verdict.intact, verdict.first_bad_line) == (False, n + 1)


@pytest.mark.parametrize("n", range(8))
def test_an_inserted_line_is_found(sample: Sample, n: int) -> None:
    directory, data = sample
    lines = data.splitlines()
    bare = b'{"timestamp": "2024-01-15T10:30:00", "event": "note"}'
    for line in (bare, lines[(n + 3) % 8], lines[n]):
        verdict = put(directory, [*lines[:n], line, *lines[n:]])
        assert verdict.intact is False
        assert verdict.first_bad_line in ((n + 1, n + 2) if line == lines[n] else (n + 1,))


@pytest.mark.parametrize("n", range(7))
def test_swapped_lines_and_cut_ends_are_found(sample: Sample, n: int) -> None:
    directory, data = sample
    lines = data.splitlines()
    swapped = [*lines[:n], lines[n + 1], lines[n], *lines[n + 2 :]]
    assert put(directory, swapped).first_bad_line == n + 1
    verdict = put(directory, lines[: n + 1])
    assert (verdict.intact, verdict.first_bad_line) == (False, n + 2)


def test_a_cut_end_is_still_found_after_the_session_went_on(tmp_path: Path) -> None:
    directory = written(tmp_path, 8)
    lines = directory.log.read_bytes().splitlines(keepends=True)
    directory.log.write_bytes(b"".join(lines[:5]))
    with Recorder.open(directory) as record:
        record.append("more")
    verdict = verify(directory.path)
    assert (verdict.intact, verdict.first_bad_line) == (False, 6)
    assert "8 lines" in verdict.reason


def test_a_log_removed_or_changed_under_a_running_recorder_is_found(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    with Recorder.open(directory) as record:
        directory.log.unlink()
        record.append("after")
    assert [json.loads(line)["event"] for line in directory.log.read_bytes().splitlines()] == ["log_broken", "after"]
    assert verify(directory.path).intact is False
    directory.log.unlink()
    assert verify(directory.path).first_bad_line == 1


def test_lines_after_the_recorded_head_are_in_order(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    record = Recorder.open(directory)
    record.append("one")
    record.append("two")
    verdict = verify(directory.path)  # as after a crash: the head was not written again
    assert (verdict.intact, verdict.lines, verdict.after_head) == (True, 5, 2)
    record._log.close()
    record._journal.close()
    with Recorder.open(directory) as again:
        again.append("three")
    assert verify(directory.path) == Verdict(True, 6, None, "intact: 6 lines")


def test_a_torn_line_is_found_then_kept_and_marked(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    with directory.log.open("ab") as file:
        file.write(b'{"timestamp": "2026-')
    verdict = verify(directory.path)
    assert (verdict.intact, verdict.first_bad_line) == (False, 4)
    with Recorder.open(directory) as record:
        record.append("more")
    lines = directory.log.read_bytes().splitlines()
    assert lines[3] == b'{"timestamp": "2026-'
    assert json.loads(lines[4])["event"] == "log_repaired"
    verdict = verify(directory.path)
    assert verdict.intact
    assert "1 torn" in verdict.reason
    lines[2] = lines[2].replace(b"print(1)", b"print(9)")
    assert put(directory, lines).intact is False


def test_a_whole_line_that_lacks_only_its_newline_is_no_damage(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    directory.log.write_bytes(directory.log.read_bytes()[:-1])
    with Recorder.open(directory) as record:
        record.append("more")
    assert verify(directory.path) == Verdict(True, 4, None, "intact: 4 lines")


def test_a_log_without_a_chain_says_so_and_is_sealed_when_continued(tmp_path: Path) -> None:
    directory = SessionDirectory(tmp_path, "conv")
    directory.create(os.getuid(), os.getgid())
    line = b'{"timestamp": "2024-01-15T10:30:00", "event": "code_execution", "code": "%d", "success": true}\n'
    directory.log.write_bytes(b"".join(line % n for n in range(3)))
    assert verify(directory.path).intact is None
    assert "no chain" in verify(directory.path).reason
    with Recorder.open(directory) as record:
        record.append("more")
    assert verify(directory.path).intact
    directory.log.write_bytes(directory.log.read_bytes().replace(b'"code": "0"', b'"code": "7"'))
    assert verify(directory.path).intact is False


def test_a_chain_taken_out_of_the_log_is_found(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    bare = [json.loads(line) for line in directory.log.read_bytes().splitlines()]
    for entry in bare:
        del entry["prev"], entry["seq"]
    assert put(directory, [json.dumps(entry).encode() for entry in bare]).intact is False


def test_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"session\.log"):
        verify(tmp_path)
