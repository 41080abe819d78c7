"""Commands about sessions that are there: found, looked at, interrupted, stopped, attached to."""

from __future__ import annotations

import hashlib
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from shell import Shell

pytest_plugins = ["shell"]


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


def test_names_that_act_on_a_terminal_are_shown_as_text(shell: Shell) -> None:
    shell("run", "-s", "names", "-c", "globals()['\\x1b]0;owned\\x07'] = 1")
    assert "\\x1b]0;owned\\x07" in shell("restart", "names").stderr
    shell("stop", "names")


def test_stopping(shell: Shell) -> None:
    for name in ("s1", "s2"):
        shell("run", "-s", name, "-c", "1")
    shell("stop", "s1", "s2")
    shell("stop", "s1")
    assert [shell.statuses()[name] for name in ("s1", "s2")] == ["stopped", "stopped"]
    assert "no session 'never'" in shell("stop", "never", "s1", expect=1).stderr


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_looking_makes_nothing(bare: Shell, there: bool) -> None:
    if there:
        bare.root.mkdir()
    before = sorted(bare.folder.rglob("*"))
    for command in ("state", "stop", "interrupt", "restart"):
        assert "session 'never'" in bare(command, "never", expect=1).stderr
    bare("view", "never", expect=1)
    bare("view", "never", "--artifact", "art_0123456789abcdef", expect=1)
    bare("artifacts", "get", "art_0123456789abcdef", expect=1)
    assert "no session 'never'" in bare("artifacts", "list", "--session", "never", expect=1).stderr
    assert sorted(bare.folder.rglob("*")) == before


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
        assert b"jupyter console --kernel sandbox-conv" in lab.stdout.read()
    assert shell("run", "-s", "conv", "-c", "x").stdout == "41\n"
