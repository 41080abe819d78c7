"""What the command line says of itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.main import get_command

from sandbox_kernel import __version__
from sandbox_kernel.cli.app import app

if TYPE_CHECKING:
    from shell import Shell

pytest_plugins = ["shell"]


def commands() -> list[list[str]]:
    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, sub] for sub in inner] if inner else [[name]]
    return found


def test_there_are_the_commands_that_were_promised() -> None:
    promised = ["run", "list", "stop", "view", "lab", "install", "doctor", "gc", "restart", "interrupt", "state"]
    promised += ["artifacts list", "artifacts get", "image build", "engine up"]
    assert {" ".join(command) for command in commands()} == set(promised)


@pytest.mark.parametrize("command", [[], *commands()], ids=" ".join)
def test_every_command_explains_itself(bare: Shell, command: list[str]) -> None:
    text = bare(*command, "--help").stdout
    assert text.startswith("Usage: sandbox-kernel")
    assert "Examples:" in text or len(command) == 1 or command[0] == "engine"
    assert bare(*command, "-h").stdout == text
    assert list(bare.folder.iterdir()) == []


def test_help_answers_at_once(bare: Shell) -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        bare("--help")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, sandbox_kernel.cli.app; print(*sys.modules)"],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert not {"pydantic", "docker", "zmq", "rich", "asyncio"} & set(loaded)


@pytest.mark.parametrize("module", ["typer", "sandbox_kernel.cli.run", "pydantic", "docker", "sandbox_kernel.manager"])
@pytest.mark.parametrize("program", ["script", "module"])
def test_ctrl_c_while_it_is_imported(bare: Shell, module: str, program: str) -> None:
    how = (
        [str(Path(sys.executable).with_name("sandbox-kernel"))] if program == "script" else ["-m", "sandbox_kernel.cli"]
    )
    command = [sys.executable, "-X", "importtime", *how, "state", "conv"]
    with subprocess.Popen(
        command, cwd=bare.folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while process.stderr.readline().rpartition("|")[2].strip() != module:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        told = [line for line in process.stderr if not line.startswith("import time:")]
        assert (process.wait(), told, process.stdout.read()) == (130, [], "")


def test_version_and_exit_codes_are_told(bare: Shell) -> None:
    assert bare("--version").stdout == f"sandbox-kernel {__version__}\n"
    text = bare("--help").stdout
    assert all(re.search(rf"^ +{code} +\w", text, re.M) for code in (0, 1, 2, 3, 130))
