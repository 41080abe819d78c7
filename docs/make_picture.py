"""Writes docs/terminal.svg: real commands, run in a terminal of their own, and what they printed.

python docs/make_picture.py
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from rich import console as rich_console
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).parent / "terminal.svg"
COLUMNS = 104
COMMANDS = [
    """sandbox-kernel run -s conv -c "import pandas as pd; sales = pd.DataFrame({'eur': [120, 90, 150]})\"""",
    """sandbox-kernel run -s conv -c "sales.plot().figure.savefig('artifacts/sales.png')\"""",
    """sandbox-kernel run -s conv -c "int('12 EUR')\"""",
    """sandbox-kernel run -s conv -c "sales['eur'].mean()\"""",
    "sandbox-kernel view conv --limit 6",
]
LAST = "sandbox-kernel stop conv"


def printed(command: str, folder: str) -> str:
    """What ``command`` writes to a terminal of ``COLUMNS`` columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    words = [sys.executable, "-m", "sandbox_kernel.cli", *shlex.split(command)[1:]]
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with subprocess.Popen(words, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        data = b""
        while chunk := _read(ours):
            data += chunk
    os.close(ours)
    return data.decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: nobody writes to this terminal any more
        return b""


def main() -> None:
    picture = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            picture.print(Text.assemble(("$ ", "bold green"), command))
            if text := printed(command, folder).rstrip("\n"):
                picture.print(Text.from_ansi(text))
        printed(LAST, folder)
    # The picture must not fetch fonts when somebody looks at it.
    code_format = re.sub(r"@font-face \{\{.*?\}\}\s*", "", rich_console.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    PICTURE.write_text(picture.export_svg(title="sandbox-kernel", theme=MONOKAI, code_format=code_format))


if __name__ == "__main__":
    main()
