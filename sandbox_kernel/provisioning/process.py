"""Programs run on the host while somebody watches: their output line by line, and their last lines in the error."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping

from sandbox_kernel.errors import EngineError

Progress = Callable[[str], None]
"""Called with one line of text at a time."""


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
