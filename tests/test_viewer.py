"""The viewer: everything the document names, folders of other programs, the command line."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from viewing import document_files, document_session, shown

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.directory import SessionDirectory
from sandbox_kernel.record import Recorder
from viewer import main, show

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return document_session(tmp_path)


GOLDEN = """\
Session conv
============
  session_id             conv
  created_at             2024-01-15T10:30:00
  last_used              2024-01-15T10:35:00
  container_id           abc123
  host_port              9001
  session_storage        BIND
  dataset_access         API
  image                  sandbox:latest
  execution_count        5
  stopped_at             2024-01-15T10:35:00
  final_execution_count  5

History
-------

2024-01-15T10:30:00  session_started  container_id=abc123  host_port=9001

2024-01-15T10:30:15  cell  ok
  >>> import pandas as pd
  ... print('Hello')
  stdout:
    Hello

2024-01-15T10:30:20  artifacts_created  artifact_count=1
  art_123  plot.png  15432 bytes

2024-01-15T10:35:00  session_stopped  container_id=abc123

State at 2024-01-15T10:35:00
----------------------------
  variables (2):
    df: DataFrame =
           A  B  C
        0  1  2  3
        1  4  5  6
    x: list = [1, 2, 3, 4, 5]
  imported modules (3):
    pandas, numpy, matplotlib.pyplot

Artifacts
---------
  ingested (1, from the log):
    art_123  plot.png  15432 bytes
  waiting in artifacts/ (1):
    data.csv  4 bytes
"""


def test_the_documents_session_as_plain_text(folder: Path) -> None:
    assert shown(folder) == GOLDEN


def test_in_a_terminal_the_same_is_there_in_colour(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(folder)
    assert "\x1b[" in text
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for part in ("session conv", "sandbox:latest", "import pandas as pd", "Hello", "DataFrame", "art_123", "data.csv"):
        assert part in bare
    assert re.search(r"print\('Hello'\) +│\n│ stdout ─+ │\n│ Hello ", bare), "code and output can be told apart"


def test_what_is_there_to_be_copied_is_in_one_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    artifact = {"id": "art_0123456789abcdef", "filename": "x" * 60, "size_bytes": 5, "content_type": "text/plain" * 3}
    with (folder / "session.log").open("a") as log:
        log.write(json.dumps({"event": "artifacts_created", "artifacts": [artifact]}) + "\n")
        log.write(json.dumps({"event": "session_stopped", "container_id": "c" * 64}) + "\n")
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown(folder))
    assert "art_0123456789abcdef" in bare.partition("ingested")[2]
    assert re.search(r"session_stopped *\n    container_id=c{63}", bare)
    assert max(map(len, bare.splitlines())) <= 80


def test_what_can_be_left_out(folder: Path) -> None:
    text = shown(folder, state=False, artifacts=False, limit=2)
    assert "State" not in text
    assert "Artifacts" not in text
    assert "session_stopped" in text
    assert "session_started" not in text
    assert "no entries" in shown(folder, limit=0)


def test_the_json_document_holds_the_files_as_they_are(folder: Path) -> None:
    log, metadata, state = document_files()
    assert json.loads(shown(folder, as_json=True)) == {
        "metadata": json.loads(metadata),
        "log": [json.loads(line) for line in log.splitlines()],
        "state": json.loads(state),
        "artifacts": {
            "waiting": [{"path": "data.csv", "size_bytes": 4}],
            "waiting_count": 1,
            "ingested": [{"id": "art_123", "filename": "plot.png", "size_bytes": 15432}],
        },
        "problems": [],
    }
    short = json.loads(shown(folder, as_json=True, limit=1, state=False, artifacts=False))
    assert [entry["event"] for entry in short["log"]] == ["session_stopped"]
    assert (short["state"], short["artifacts"]) == (None, None)


def test_folders_of_other_programs(folder: Path) -> None:
    state = {"timestamp": "x", "variables": {}, "imported_modules": [f"module_{n}" for n in range(2000)]}
    (folder / "python_state.json").write_text(json.dumps(state))
    with (folder / "session.log").open("a") as log:
        log.write('{"event": "gpu_warmed", "temperature": 61.5}\n')
        log.write('{"event": "code_execution", "code": "1/0", "error": "ZeroDivisionError: division by zero"}\n')
        log.write('{"timestamp": "2024-01-15T10:3')
    (folder / "session_metadata.json").write_text('{"session_id": "conv", "created_at": "2024-01-15T10:30:00"}')
    text = shown(folder)
    assert "gpu_warmed  temperature=61.5" in text
    assert re.search(r"cell  FAILED\n  >>> 1/0\n  error:\n    ZeroDivisionError: division by zero", text)
    assert "imported modules (2000):" in text
    assert "module_39, ... and 1960 more" in text
    assert "module_41" not in text
    assert "the last line is torn" in text
    document = json.loads(shown(folder, as_json=True))
    assert len(document["state"]["imported_modules"]) == 2000
    assert len(document["problems"]) == 1


def test_a_session_of_ours_with_all_there_is(tmp_path: Path) -> None:
    directory = SessionDirectory(tmp_path, "conv")
    directory.create(os.getuid(), os.getgid())
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "10%\r50%\r100%\n"},
        {"output_type": "display_data", "metadata": {}, "data": {
            "text/plain": "<Figure>",
            "application/vnd.sandbox-kernel.blob+json": {"sha256": "ab" * 32, "size_bytes": 20, "mime": "image/png"}}},
        {"output_type": "execute_result", "metadata": {}, "execution_count": 3, "data": {"text/plain": "forty-two"}},
    ]  # fmt: skip
    with Recorder.open(directory) as record:
        record.finish("m1", code="plot()", status="ok", origin="jupyterlab:1a2b3c4d", stdout="10%\r50%\r100%\n",
                      outputs=outputs, result="forty-two", execution_count=3, duration_s=0.25)  # fmt: skip
        record.finish("m2", code="while True: pass", status="timeout", origin="sandbox-kernel", execution_count=4,
                      duration_s=30.0, state_preserved=False, lost_names=["df"], truncated=True,
                      output_artifacts=[{"id": "art_9", "size_bytes": 5}])  # fmt: skip
    text = shown(directory.path, state=False)
    assert "[3]  ok  0.25 s  by jupyterlab:1a2b3c4d" in text
    assert "stdout:\n    100%\n" in text
    assert f"[image/png, 20 bytes, sha256 {'ab' * 32}]" in text
    assert text.count("forty-two") == 1
    assert "[4]  TIMEOUT  30 s" in text
    assert "variables lost: df" in text
    assert "the whole: art_9" in text


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "viewer", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_exit_codes_and_messages(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder).stdout == GOLDEN
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere", "no such session", "x" * 5000, "\0"):
        assert main([str(wrong)]) == 1
        message = capsys.readouterr().err
        assert "session" in message
        assert message.count("\n") == 1
    for flags in (["--limit", "-1"], ["--limit", "x"], ["--nonsense"], ["-o", "x"], ["--follow", "--verify"], []):
        assert main([*flags, *([str(folder)] if flags else [])]) == 2
    assert main(["--help"]) == 0


def test_an_id_is_looked_up_below_the_sessions_root(folder: Path) -> None:
    result = run("conv", env=os.environ | {"SANDBOX_SESSIONS_ROOT": str(folder.parent)})
    assert (result.returncode, result.stdout) == (0, GOLDEN)
    assert run(folder / "session.log").stdout == GOLDEN


def test_verify(tmp_path: Path, folder: Path) -> None:
    directory = SessionDirectory(tmp_path, "conv")
    directory.create(os.getuid(), os.getgid())
    with Recorder.open(directory) as record:
        record.started("abc", None)
        record.stopped("abc")
    assert run(directory.path, "--verify").stdout == "intact: 2 lines\n"
    directory.log.write_bytes(directory.log.read_bytes().replace(b"abc", b"abd", 1))
    result = run(directory.path, "--verify")
    assert (result.returncode, result.stdout) == (1, "NOT INTACT: line 1: it was changed\n")
    assert json.loads(run(directory.path, "--verify", "--json").stdout)["first_bad_line"] == 1
    assert run(folder, "--verify").returncode == 0
    assert "no chain" in run(folder, "--verify").stdout


def test_follow_shows_what_is_appended_and_ends_quietly(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "viewer", str(folder), "--follow", "--limit", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    until(process.stdout, "session_stopped")
    with (folder / "session.log").open("a") as log:
        log.write('{"event": "code_execution", "code": "fresh = 1", "success": true}\n')
    until(process.stdout, ">>> fresh = 1")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")


def until(stream: Any, text: str) -> None:
    for line in stream:
        if text in line:
            return
    pytest.fail(f"the output ended without {text!r}")


def test_a_reader_that_has_enough_is_no_error(folder: Path) -> None:
    with (folder / "session.log").open("a") as log:
        for _ in range(5000):
            log.write('{"event": "code_execution", "code": "pass", "success": true}\n')
    command = f"{sys.executable} -m viewer {folder} | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "Session conv\n", "")


def test_an_artifact_is_listed_from_the_store_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = SessionDirectory(tmp_path, "conv")
    directory.create(os.getuid(), os.getgid())
    with ArtifactStore.open(tmp_path / ".store") as store:
        kept = store.put_bytes("conv", "plots/plot.png", b"png", kind="file")
        hidden = store.put_bytes("other", "secret.txt", b"no", kind="file")
    with Recorder.open(directory) as record:
        record.started("abc", None)
    (row,) = json.loads(shown(directory.path, as_json=True))["artifacts"]["ingested"]
    assert (row["id"], row["path"], row["size_bytes"], row["sha256"]) == (kept.id, "plots/plot.png", 3, kept.sha256)
    assert f"{kept.id}  plots/plot.png  3 bytes" in shown(directory.path)
    monkeypatch.chdir(tmp_path)
    assert shown(directory.path, artifact=kept.id) == "plot.png  3 bytes\n"
    assert (tmp_path / "plot.png").read_bytes() == b"png"
    assert show(directory.path, artifact=kept.id) == 1  # never over a file that is there
    assert shown(directory.path, artifact=kept.id, output="other.png") == "other.png  3 bytes\n"
    assert run(directory.path, "--artifact", kept.id, "-o", "-").stdout == "png"
    assert run(directory.path, "--artifact", hidden.id).returncode == 1
    assert run(directory.path, "--artifact", "art_none").returncode == 1
    assert "--store" in run(directory.path, "--artifact", kept.id, "--store", "nowhere").stderr


def test_neither_pydantic_nor_an_engine_nor_rich_is_imported_for_plain_text(folder: Path) -> None:
    code = "import sys, viewer; viewer.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert not {"pydantic", "docker", "rich", "jupyter_client", "zmq"} & set(result.stderr.split())


def test_the_last_entries_of_a_huge_log_come_at_once(folder: Path) -> None:
    def cpu_s() -> float:
        """Of the cheapest of five: wall time on a shared machine says little."""
        spent = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert "session_stopped" in run(folder, "--limit", "4").stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(spent)

    small = cpu_s()
    lines = (folder / "session.log").read_bytes()
    with (folder / "session.log").open("wb") as log:
        log.truncate(2**30)
        log.seek(0, 2)
        log.write(b"\n" + lines)
    assert cpu_s() < small + 0.05  # reading a gigabyte takes several times that
