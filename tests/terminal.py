"""A program in a terminal of its own, as a person uses it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest


class Terminal:
    """What a program in a terminal says, and what is typed to it."""

    def __init__(self, program: subprocess.Popen[bytes], descriptor: int) -> None:
        self._program = program
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._program.send_signal(signal.SIGINT)

    def read_until(self, text: str, timeout: float = 60) -> None:
        """Read until ``text`` came; what was read before counts no more."""
        seen = b""
        deadline = time.monotonic() + timeout
        while text.encode() not in seen:
            ready, _, _ = select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal says {seen!r}"
            try:
                seen += os.read(self._descriptor, 65536)
            except OSError:
                pytest.fail(f"{text!r} did not come before the end; the terminal said {seen!r}")

    def exit_code(self) -> int:
        """The program's exit code, once it has ended; what it prints is dropped."""
        with suppress(OSError):
            while os.read(self._descriptor, 65536):
                pass
        return self._program.wait(timeout=20)


@contextmanager
def console(*arguments: str) -> Iterator[Terminal]:
    """``jupyter console`` with plain prompts; killed if it still runs at the end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jupyter", "console", "--simple-prompt", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as program:
        os.close(theirs)
        try:
            yield Terminal(program, ours)
        finally:
            program.kill()
            os.close(ours)
