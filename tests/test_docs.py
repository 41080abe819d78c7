"""The documentation is executed, and what it lists is compared with what is there."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, get_args

import pytest

from sandbox_kernel import SandboxError, SessionManager, errors, sync
from sandbox_kernel.cli.options import make_settings
from sandbox_kernel.events import ExecutionResult, StreamEvent
from sandbox_kernel.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<before><!-- not run: .+? -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code on a page that is to be executed."""

    page: Path
    line: int
    language: str
    code: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match["before"] is None and match["language"] in ("python", "console"):
            line = text.count("\n", 0, match.start("code")) + 1
            yield Block(page, line, match["language"], match["code"])


def run_python(block: Block) -> None:
    """As a notebook cell: ``await`` is allowed at the top."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    # The newlines make a traceback name the page's own line.
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", flags=flags)
    names: dict[str, Any] = {}
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(_awaited(code, names))
    else:
        exec(code, names)


async def _awaited(code: CodeType, names: dict[str, Any]) -> None:
    await eval(code, names)


def run_console(block: Block) -> None:
    """Each ``$ command``: its exit code is 0 (or that of ``# exits with N``), its output what stands below, if any."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.code, re.M):
        command, _, exits = command.partition("  # exits with ")
        words = shlex.split(command)
        assert words[0] == "sandbox-kernel", f"{block.page.name}:{block.line}: only our own commands are run here"
        words[:1] = [sys.executable, "-m", "sandbox_kernel.cli"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == int(exits or 0), f"{command}\n{done.stderr}"
        assert not expected or done.stdout == expected, command


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.name)
def test_what_a_page_tells_to_run_works(
    page: Path, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "python":
            run_python(block)
        else:
            run_console(block)


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        languages = {match["language"] for match in FENCE.finditer(page.read_text())}
        assert languages <= {"python", "console", "text", "json", "bash", "toml", ""}, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


# --- what is listed ---------------------------------------------------------------------------


def documented_settings() -> dict[str, str]:
    """Name -> default, from the tables of docs/settings.md."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (ROOT / "docs" / "settings.md").read_text(), re.M)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def test_every_setting_is_documented_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SANDBOX_")]:
        monkeypatch.delenv(name)
    documented = documented_settings()
    assert sorted(documented) == sorted(Settings.model_fields)
    defaults = Settings()
    for name, text in documented.items():
        value = None if text == "None" else [] if text == "[]" else text
        assert getattr(Settings(**{name: value}), name) == getattr(defaults, name), name


def test_defaults_that_the_help_tells_are_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "cli.md").read_text().partition("## sandbox-kernel run")[2])
    text = text.partition("Options:")[2]
    names = {"timeout": "timeout_s", "image": "image", "storage": "session_storage", "network": "network"}
    names |= {"memory": "memory_limit", "cpus": "cpus", "sessions-root": "sessions_root"}
    defaults = Settings()
    for option, name in names.items():
        told = re.search(rf" --{option} .*?\[default: ([^\]]+)\]", text)
        assert told is not None, option
        assert getattr(make_settings({name: told[1]}), name) == getattr(defaults, name), option


def test_the_commands_help_stands_in_the_docs() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert make_cli.PAGE.read_text() == make_cli.render(), "run: python docs/make_cli.py"


def names_in_table(page: str, heading: str) -> set[str]:
    """What stands in backticks in the first column of the table below a heading; of a call its name."""
    section = (ROOT / "docs" / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    first = " ".join(re.findall(r"^\| (.*?) \|", section, re.M)[1:])
    return set(re.findall(r"`(\w+)", first))


def test_every_public_name_is_on_the_page_about_python() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names_in_table("python.md", "SessionManager") == public(SessionManager) | {"pool"}
    assert names_in_table("python.md", "Session") == public(sync.Session) | {"id", "settings"}
    kinds = [kind.model_fields["type"].default for kind in get_args(get_args(StreamEvent)[0])]
    assert names_in_table("python.md", "Events") == set(kinds)
    assert names_in_table("python.md", "Result") == {*ExecutionResult.model_fields, "success"}
    tree = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SandboxError)}
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "python.md").read_text().partition("## Errors\n")[2]))
    assert tree <= told


def test_the_picture_stands_alone() -> None:
    picture = (ROOT / "docs" / "terminal.svg").read_text()
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
    assert "sandbox-kernel&#160;view&#160;conv" in picture


def test_the_version_is_in_the_changelog() -> None:
    from sandbox_kernel import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
