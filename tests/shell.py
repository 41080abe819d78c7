"""``sandbox-kernel`` as a person and a program use it: every call is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Shell:
    """Runs ``sandbox-kernel`` in one folder."""

    program = (sys.executable, "-m", "sandbox_kernel.cli")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "sessions"

    def __call__(self, *args: str, expect: int = 0, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.program, *args],
            cwd=self.folder,
            env=os.environ | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == expect, f"{args}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback (most recent call last):\n  File" not in done.stderr
        return done

    def json(self, *args: str, expect: int = 0) -> Any:
        return json.loads(self(*args, "--json", expect=expect).stdout)

    @contextmanager
    def start(self, *args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A program under way; one that the test has not seen end is killed."""
        command, pipe = [*self.program, *args], subprocess.PIPE
        with subprocess.Popen(command, cwd=self.folder, **{"stdout": pipe, "stderr": pipe, **options}) as process:
            try:
                yield process
            finally:
                process.kill()

    def statuses(self) -> dict[str, str]:
        return {info["session_id"]: info["status"] for info in self.json("list")}


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
