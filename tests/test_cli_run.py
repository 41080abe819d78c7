"""``sandbox-kernel run``: code in, output out, and the session that stays."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import docker

from sandbox_kernel.cli.live import terminal_text

if TYPE_CHECKING:
    from shell import Shell

pytest_plugins = ["shell"]


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
    subprocess.run([*shell.program, "run", "-s", "conv", "-c", code], cwd=shell.folder, stdout=theirs, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert shown == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x9b6n\r\n"
