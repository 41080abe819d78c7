"""Processes of the host: programs run while somebody watches, and which process is meant by a number."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox_kernel.errors import EngineError

Progress = Callable[[str], None]
"""Called with one line of text at a time."""


def say(line: str) -> None:
    """The usual :data:`Progress`: to standard output, at once also where that is a pipe."""
    print(line, flush=True)


def run(command: list[str], progress: Progress, *, environment: Mapping[str, str] | None = None) -> None:
    """Run ``command`` to its end without a terminal, stdout and stderr to ``progress``. Blocking.

    ``environment`` is added to ours. Raises EngineError with the exit code and the last lines.
    """
    tail: deque[str] = deque(maxlen=10)
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as exc:
        raise EngineError(f"cannot run {command[0]}: {exc}") from exc
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            progress(f"  {line.rstrip()[:160]}")
    if process.returncode:
        raise EngineError(f"{' '.join(command[:3])} ... failed with {process.returncode}:\n" + "\n".join(tail))


def process_identity(pid: int) -> str | None:
    """Boot id, pid and start time (clock ticks): together never used twice. None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] == b"Z":
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {pid} {fields[19].decode()}"
    except (OSError, IndexError):
        return None
