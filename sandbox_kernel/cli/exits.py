"""How a command ends: exit codes, and signals that end it in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import typer

from sandbox_kernel.errors import EngineError, InvalidSessionId, KernelStartError, SandboxError, SettingsError

FAILED = 1
USAGE = 2
NO_ENGINE = 3

T = TypeVar("T")


def exit_code(exc: SandboxError) -> int:
    """The exit code that an error of ours becomes."""
    if isinstance(exc, (SettingsError, InvalidSessionId)):
        return USAGE
    if isinstance(exc, (EngineError, KernelStartError)):
        return NO_ENGINE
    return FAILED


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine. SIGTERM and SIGHUP cancel it as Ctrl-C does, so that nothing is left behind."""
    caught: list[int] = []

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            caught.append(number)
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            with suppress(RuntimeError, ValueError):  # not the main thread: its owner deals with signals
                loop.add_signal_handler(number, end, number)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise typer.Exit(128 + caught[0] if caught else 130) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
