"""What a running cell says, on the terminal or into a pipe, as it says it."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import TextIO

from sandbox_kernel.events import (
    DisplayData,
    ErrorData,
    ExecutionResult,
    ResultData,
    Stderr,
    Stdout,
    StreamEvent,
)
from viewer.visible import one_line, size, visible

_KEPT = re.compile("(\x1b\\[[0-9;:]*m|[\r\b\t])")
"""What a cell may do to a terminal: colours, a progress bar, tabs; not titles, the clipboard, cursor or keys."""


def terminal_text(text: str) -> str:
    """``text`` with every control sequence but colours, carriage return, backspace and tab made visible."""
    return "".join(part if at % 2 else visible(part) for at, part in enumerate(_KEPT.split(text)))


class Live:
    """Prints events: output and results to standard output, errors and what was made to standard error."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):
                # What the terminal's encoding lacks is written as an escape, never an error.
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        self._open_line = {sys.stdout: False, sys.stderr: False}

    def show(self, event: StreamEvent) -> None:
        if isinstance(event, Stdout):
            self._write(sys.stdout, event.text)
        elif isinstance(event, Stderr):
            self._write(sys.stderr, event.text)
        elif isinstance(event, (DisplayData, ResultData)):
            self._line(sys.stdout, str(event.data.get("text/plain", "")))
        elif isinstance(event, ErrorData):
            self._line(sys.stderr, event.error.traceback or f"{event.error.name}: {event.error.value}")

    def ended(self, result: ExecutionResult) -> None:
        """What was made, and what went wrong other than by an exception."""
        for artifact in (*result.artifacts, *result.output_artifacts):
            path = one_line(artifact.path)
            self._line(sys.stderr, f"artifact {artifact.id}  {path}  {size(artifact.size_bytes)}")
        if result.death is not None:
            self._line(sys.stderr, f"the kernel died: {result.death.message}")
        elif result.status not in ("ok", "error"):
            self._line(sys.stderr, f"{result.status} after {result.duration_s:.1f} s")
        if not result.state_preserved:
            lost = ", ".join(map(one_line, result.lost_names[:50])) or "none were known"
            self._line(sys.stderr, f"the kernel was restarted; variables lost: {lost}")

    def _line(self, stream: TextIO, text: str) -> None:
        start = "\n" if self._open_line[stream] else ""
        self._write(stream, f"{start}{text.rstrip(chr(10))}\n")

    def _write(self, stream: TextIO, text: str) -> None:
        if text:
            self._open_line[stream] = not text.endswith("\n")
            stream.write(terminal_text(text) if stream.isatty() else text)
            stream.flush()
