"""The command line, as a person and a program use it: every call is a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from shell import PROGRAM, Shell

from sandbox_kernel.cli.live import terminal_text


@pytest.fixture(scope="module")
def shell(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """With a session ``conv`` that runs, and in it ``x = 41``."""
    shell = Shell(tmp_path_factory.mktemp("cli"))
    shell("run", "--session", "conv", "-c", "x = 41")
    yield shell
    shell("gc", "--all")
    assert set(shell.statuses().values()) == {"stopped"}


@pytest.fixture
def bare(tmp_path: Path) -> Shell:
    """Where no session has ever been."""
    return Shell(tmp_path)


# --- run --------------------------------------------------------------------------------------


def test_code_from_an_argument_a_file_and_standard_input(shell: Shell) -> None:
    assert shell("run", "--session", "conv", "-c", "x + 1").stdout == "42\n"
    (shell.folder / "latin.py").write_bytes("# coding: latin-1\nprint('é', x)".encode("latin-1"))
    assert shell("run", "--session", "conv", "latin.py").stdout == "é 41\n"
    assert shell("run", "-s", "conv", stdin="x + 2").stdout == "43\n"
    assert shell("run", "-s", "conv", "-", stdin="print(x, end='')\nx + 3").stdout == "41\n44\n"
    assert shell.statuses()["conv"] == "detached"


def test_output_and_errors_keep_apart(shell: Shell) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); open('artifacts/made.txt', 'w').write('1'); 1/0"
    done = shell("run", "-s", "conv", "-c", code, expect=1)
    assert done.stdout == "out\n"
    assert done.stderr.startswith("err\n")
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert re.search(r"^artifact art_\w{16}  made.txt  1 bytes$", done.stderr, re.M)


def test_output_comes_while_the_cell_runs(shell: Shell) -> None:
    code = "import time\nprint('early', flush=True)\ntime.sleep(30)"
    with shell.start("run", "-s", "conv", "-c", code) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"early\n"
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=10) == 130
    # Ctrl-C ended the cell, not the session.
    assert shell("run", "-s", "conv", "-c", "x").stdout == "41\n"
    log = [json.loads(line) for line in (shell.root / "conv" / "session.log").read_text().splitlines()]
    (entry,) = [entry for entry in log if entry.get("code") == code]
    assert entry["status"] == "interrupted"


def test_the_result_as_a_document(shell: Shell) -> None:
    document = shell.json("run", "-s", "conv", "-c", "print('a')\nx")
    assert (document["success"], document["status"], document["stdout"], document["result"]) == (
        True,
        "ok",
        "a\n",
        "41",
    )
    document = shell.json("run", "-s", "conv", "-c", "1/0", expect=1)
    assert document["error"]["name"] == "ZeroDivisionError"


def test_a_run_without_a_session_leaves_its_record_and_no_container(shell: Shell, engine: docker.DockerClient) -> None:
    before = set(shell.statuses())
    assert shell("run", "-c", "'x' in dir()").stdout == "False\n"
    (new,) = set(shell.statuses()) - before
    assert shell.statuses()[new] == "stopped"
    assert "code_execution" in (shell.root / new / "session.log").read_text()


def test_sigterm_leaves_no_container(shell: Shell) -> None:
    before = set(shell.statuses())
    with shell.start("run", "-c", "import time\nprint('on', flush=True)\ntime.sleep(60)") as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.terminate()
        assert running.wait(timeout=15) == 143
    (new,) = set(shell.statuses()) - before
    assert shell.statuses()[new] == "stopped"


def test_a_reader_that_has_enough(shell: Shell) -> None:
    with shell.start("run", "-s", "conv", "-c", "for i in range(10**9): print(i)") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait(timeout=20) == 1
        assert b"Traceback" not in running.stderr.read()
    assert shell("run", "-s", "conv", "-c", "x").stdout == "41\n"


def test_flags_reach_the_container(shell: Shell) -> None:
    (shell.folder / "data").mkdir()
    (shell.folder / "data" / "a.csv").write_text("1,2")
    code = """
import glob
limit = glob.glob("/sys/fs/cgroup/memory.max") or glob.glob("/sys/fs/cgroup/memory/memory.limit_in_bytes")
print(open(limit[0]).read().strip(), open("/data/a.csv").read())
"""
    flags = ["--storage", "tmpfs", "--memory", "256m", "--cpus", "0.5", "--datasets", "data", "--timeout", "20"]
    assert shell("run", *flags, "-c", code).stdout == f"{2**28} 1,2\n"


def test_a_timeout_is_told(shell: Shell) -> None:
    done = shell("run", "-s", "conv", "--timeout", "1", "-c", "import time; time.sleep(60)", expect=1)
    assert re.search(r"timeout after 1\.\d s", done.stderr)
    done = shell("run", "-s", "conv", "-c", "import os; os._exit(3)", expect=1)
    assert "the kernel died: " in done.stderr
    assert "variables lost: " in done.stderr
    shell("run", "-s", "conv", "-c", "x = 41")


def test_settings_of_a_session_that_runs_are_not_pretended(shell: Shell) -> None:
    done = shell("run", "-s", "conv", "--memory", "1g", "--storage", "TMPFS", "-c", "x")
    assert done.stdout == "41\n"
    assert "without effect until it is stopped: session_storage, memory_limit" in done.stderr


def test_a_session_in_memory_is_found_again(shell: Shell) -> None:
    shell("run", "-s", "mem", "--storage", "TMPFS", "-c", "y = 5")
    assert shell("run", "-s", "mem", "-c", "y").stdout == "5\n"
    assert shell.json("state", "mem")["variables"]["y"]["value"] == "5"
    assert not (shell.root / "mem").exists()
    shell("stop", "mem")
    assert "mem" not in shell.statuses()


def test_what_a_cell_may_do_to_a_terminal(shell: Shell) -> None:
    assert terminal_text("\x1b[31mred\x1b[0m 1\r2\b3\t4\n") == "\x1b[31mred\x1b[0m 1\r2\b3\t4\n"
    assert "\x1b" not in terminal_text("\x1b]52;c;ZXZpbA==\x07 \x1b[2J \x1b[6n \x1bc")
    ours, theirs = pty.openpty()
    code = r"print('\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b6n')"
    with shell.start("run", "-s", "conv", "-c", code) as plain:
        assert plain.stdout is not None
        assert plain.stdout.read() == "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b6n\n".encode()
    subprocess.run([*PROGRAM, "run", "-s", "conv", "-c", code], cwd=shell.folder, stdout=theirs, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert shown == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x9b6n\r\n"


# --- sessions ---------------------------------------------------------------------------------


def test_the_shell_completes_commands_and_sessions(shell: Shell) -> None:
    def completed(words: str) -> list[str]:
        env = {"_SANDBOX_KERNEL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return shell(**env).stdout.split()

    assert completed("sandbox-kernel in") == ["interrupt", "install"]
    assert completed("sandbox-kernel stop c") == ["conv"]


def test_state_of_a_session_alive_held_and_stopped(shell: Shell) -> None:
    shell("run", "-s", "st", "-c", "import math\nn = 3")
    assert shell("state", "st").stdout == "n: int = 3\nimported: math\n"
    shell("stop", "st")
    assert shell.json("state", "st")["imported_modules"] == ["math"]


def test_interrupt_and_restart_reach_a_session_that_another_process_holds(shell: Shell) -> None:
    with shell.start("run", "-s", "conv", "-c", "import time\nprint('on', flush=True)\ntime.sleep(60)") as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert "held by process" in shell("run", "-s", "conv", "-c", "1", expect=1).stderr
        shell("interrupt", "conv")
        assert running.wait(timeout=10) == 1
    assert "runs no cell" in shell("interrupt", "conv").stderr
    assert "variables gone: x" in shell("restart", "conv").stderr
    assert shell("run", "-s", "conv", "-c", "'x' in dir()").stdout == "False\n"
    shell("run", "-s", "conv", "-c", "x = 41")


def test_stopping(shell: Shell) -> None:
    for name in ("s1", "s2"):
        shell("run", "-s", name, "-c", "1")
    shell("stop", "s1", "s2")
    shell("stop", "s1")
    assert [shell.statuses()[name] for name in ("s1", "s2")] == ["stopped", "stopped"]
    assert "no living session 'never'" in shell("stop", "never", "s1", expect=1).stderr


def test_list_is_for_people_and_programs(shell: Shell, bare: Shell) -> None:
    assert re.search(r"^conv +detached +\d{4}-\d\d-\d\d .* cells  sandbox:latest$", shell("list").stdout, re.M)
    done = bare("list")
    assert (done.stdout, done.stderr) == ("", "no sessions\n")
    assert bare.json("list") == []


def test_artifacts_are_listed_and_fetched(shell: Shell, tmp_path: Path) -> None:
    shell("run", "-s", "conv", "-c", "import os; open('artifacts/b.bin', 'wb').write(os.urandom(100_000))")
    *_, artifact = shell.json("artifacts", "list", "--session", "conv")
    assert artifact["path"] == "b.bin"
    assert artifact["id"] in shell("artifacts", "list").stdout
    shell("artifacts", "get", artifact["id"])
    assert hashlib.sha256((shell.folder / "b.bin").read_bytes()).hexdigest() == artifact["sha256"]
    assert "is there already" in shell("artifacts", "get", artifact["id"], expect=1).stderr
    shell("artifacts", "get", artifact["id"], "-o", str(tmp_path / "other"))
    with shell.start("artifacts", "get", artifact["id"], "-o", "-") as getting:
        assert getting.stdout is not None
        assert hashlib.sha256(getting.stdout.read()).hexdigest() == artifact["sha256"]


def test_an_artifacts_name_decides_nothing(shell: Shell) -> None:
    shell(
        "run", "-s", "conv", "-c", r"open('artifacts/.bashrc', 'w').write('1'); open('artifacts/a\nb', 'w').write('2')"
    )
    for artifact in shell.json("artifacts", "list", "-s", "conv")[-2:]:
        assert "name a file with -o" in shell("artifacts", "get", artifact["id"], expect=1).stderr
    assert "\n" not in shell("artifacts", "list", "-s", "conv").stdout.splitlines()[-1].partition("b")[0]


def test_view_passes_the_viewers_flags(shell: Shell) -> None:
    document = shell.json("view", "conv", "--limit", "1", "--no-state")
    assert document["metadata"]["session_id"] == "conv"
    assert len(document["log"]) == 1
    assert shell("view", "sessions/conv", "--verify").returncode == 0
    shell("view", "nobody", expect=1)
    shell("view", "conv", "--no-such-flag", expect=2)


def test_lab_serves_a_running_session(shell: Shell) -> None:
    with shell.start("lab", "conv", "--no-browser") as lab:
        assert lab.stdout is not None
        assert re.match(rb"JupyterLab on session conv: http://127.0.0.1:\d+/lab/tree/conv.ipynb", lab.stdout.readline())
        lab.send_signal(signal.SIGINT)
        assert lab.wait(timeout=20) == 130
        assert b"jupyter console --existing kernel-" in lab.stdout.read()
    assert shell("run", "-s", "conv", "-c", "x").stdout == "41\n"


# --- the machine ------------------------------------------------------------------------------


def test_doctor(shell: Shell, bare: Shell) -> None:
    assert "engine" in [check["name"] for check in shell.json("doctor")["checks"]]
    assert "ok       image: sandbox:latest" in bare("doctor").stdout
    sick = bare("doctor", expect=1, DOCKER_HOST="unix:///nonexistent.sock")
    assert "MISSING  engine" in sick.stdout


def test_doctor_finds_and_mends_what_is_wrong_with_sessions(shell: Shell) -> None:
    shell("run", "-s", "sick", "-c", "open('artifacts/a.txt', 'w').write('1')")
    shell("stop", "sick")
    assert "nothing amiss" in shell("doctor", "--sessions").stdout
    metadata = shell.root / "sick" / "session_metadata.json"
    metadata.write_text('{"session_id": ')
    found = shell.json("doctor", "--sessions", expect=1)
    assert [Path(row["where"]) for row in found["checks"]] == [metadata]
    assert "mended" in shell("doctor", "--sessions", "--repair").stdout
    assert json.loads(metadata.read_text())["session_id"] == "sick"
    log = shell.root / "sick" / "session.log"
    log.write_text(log.read_text().replace("a.txt", "b.txt", 1))
    assert "audit chain is broken" in shell("doctor", "--sessions", expect=1).stdout
    log.unlink()


def test_install_writes_the_kernelspec(bare: Shell) -> None:
    done = bare("install", "--prefix", str(bare.folder), "--name", "other", "--display-name", "Another")
    spec = json.loads((Path(done.stdout.strip()) / "kernel.json").read_text())
    assert Path(done.stdout.strip()) == bare.folder / "share" / "jupyter" / "kernels" / "other"
    assert spec["display_name"] == "Another"
    assert spec["metadata"]["kernel_provisioner"]["provisioner_name"] == "sandbox-docker"


def test_an_image_that_is_current_costs_nothing(bare: Shell, image: str) -> None:
    assert bare("image", "build").stdout == "sandbox:latest is current.\n"
    assert bare("engine", "up").stdout.startswith("Docker Engine ")


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "No such command", ["rum"]),
        (2, "No such option", ["run", "--colour"]),
        (2, "not both", ["run", "x.py", "-c", "1"]),
        (2, "cannot read nowhere.py: No such file", ["run", "nowhere.py"]),
        (2, "Is a directory", ["run", "."]),
        (2, "is not Python source text", ["run", "binary.py"]),
        (2, "session id 'a/b' is not allowed", ["run", "-s", "a/b", "-c", "1"]),
        (2, "session id '..' is not allowed", ["state", ".."]),
        (2, "setting 'memory_limit'", ["run", "--memory", "lots", "-c", "1"]),
        (2, "setting 'session_storage'", ["run", "--storage", "TAPE", "-c", "1"]),
        (2, "--timeout", ["run", "--timeout", "-1", "-c", "1"]),
        (2, "name sessions, or give --all", ["stop"]),
        (2, "--repair needs --sessions", ["doctor", "--repair"]),
        (2, "at most one of --user", ["install", "--user", "--sys-prefix"]),
        (1, "sandbox-kernel run --session nobody", ["state", "nobody"]),
        (1, "no living session 'nobody'", ["stop", "nobody"]),
        (1, "no artifact", ["artifacts", "get", "art_0"]),
        (3, "sandbox-kernel image build", ["run", "--image", "no-such-image:1", "-c", "1"]),
        (3, "runtime", ["run", "--runtime", "no-such-runtime", "-c", "1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(bare: Shell, image: str, code: int, message: str, args: list[str]) -> None:
    (bare.folder / "x.py").write_text("1")
    (bare.folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    done = bare(*args, expect=code)
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert done.stdout == ""


def test_settings_of_the_environment_are_named_too(bare: Shell) -> None:
    assert "SANDBOX_MEMORY" in bare("list", expect=2, SANDBOX_MEMORY="1g").stderr
    assert "'cpus'" in bare("run", "-c", "1", expect=2, SANDBOX_CPUS="many").stderr
    (bare.folder / ".env").write_text("SANDBOX_PIDS_LIMIT=1\n")
    assert "'pids_limit'" in bare("list", expect=2).stderr


def test_no_engine(bare: Shell) -> None:
    done = bare("run", "-c", "1", expect=3, DOCKER_HOST="unix:///nonexistent.sock")
    assert "nonexistent.sock" in done.stderr
    assert bare.json("list") == []


def test_without_isolation_only_by_name_and_with_a_warning(bare: Shell) -> None:
    done = bare("run", "-c", "1 + 1", SANDBOX_ENGINE="local")
    assert done.stdout == "2\n"
    assert "WITHOUT isolation" in done.stderr
