"""Commands about the machine, and what mistakes get."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from shell import Shell

pytest_plugins = ["shell"]


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
        (2, "cannot write /proc/nowhere", ["install", "--prefix", "/proc/nowhere"]),
        (2, "Invalid kernel name 'a/b'", ["install", "--prefix", ".", "--name", "a/b"]),
        (2, "'none' stands alone", ["run", "--network", "none", "--network", "pypi.org", "-c", "1"]),
        (1, "sandbox-kernel run --session nobody", ["state", "nobody"]),
        (1, "no session 'nobody' in sessions; see: sandbox-kernel list", ["stop", "nobody"]),
        (1, "no living session 'nobody'", ["interrupt", "nobody"]),
        (1, "TMPFS leaves none", ["view", "nobody"]),
        (1, "no artifact", ["artifacts", "get", "art_0"]),
        (3, "sandbox-kernel image build", ["run", "--image", "no-such-image:1", "-c", "1"]),
        (3, "image='bad!'", ["run", "--image", "bad!", "-c", "1"]),
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
    done = bare("image", "build", expect=3, DOCKER_HOST="unix:///nonexistent.sock")
    assert "sandbox-kernel engine up" in done.stderr


def test_looking_and_cleaning_make_nothing(bare: Shell, image: str) -> None:
    for command in (["list"], ["gc"], ["artifacts", "list"], ["doctor"], ["doctor", "--sessions"]):
        bare(*command)
    assert list(bare.folder.iterdir()) == []


def test_without_isolation_only_by_name_and_with_a_warning(bare: Shell) -> None:
    done = bare("run", "-c", "1 + 1", SANDBOX_ENGINE="local")
    assert done.stdout == "2\n"
    assert "WITHOUT isolation" in done.stderr
