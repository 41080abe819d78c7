"""Writes docs/cli.md from the command line's own help.

python docs/make_cli.py
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from typer.main import get_command

from sandbox_kernel.cli.app import app

PAGE = Path(__file__).parent / "cli.md"
START = """# Command line

Made from the commands' own help by `docs/make_cli.py`. Each is a process of its own: a session that one command
leaves alive is taken up by the next. `sandbox-kernel --install-completion` teaches your shell commands and session ids.
"""


def commands() -> list[list[str]]:
    """Every command as words, in the order of the help; [] is the program itself."""
    found: list[list[str]] = [[]]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, sub] for sub in inner] if inner else [[name]]
    return found


def help_of(words: list[str]) -> str:
    """What ``sandbox-kernel WORDS --help`` prints in 100 columns."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        app([*words, "--help"], prog_name="sandbox-kernel", terminal_width=100, max_content_width=100)
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def render() -> str:
    """The page."""
    parts = [START]
    for words in commands():
        title = " ".join(["sandbox-kernel", *words])
        parts.append(f"## {title}\n\n```text\n{help_of(words)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
