"""Host processes that hold sessions until they are killed."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
from collections.abc import Awaitable, Callable
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from sandbox_kernel import SessionManager, Settings

Work = Callable[[SessionManager, Callable[[], None]], Awaitable[None]]
"""What the process does with its manager; it is killed when it has called the function."""


@functools.cache
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hosts"])
    return context


def _live(work: Work, root: Path, settings: dict[str, Any], line: Connection) -> None:
    async def main() -> None:
        async with SessionManager(Settings(sessions_root=root, **settings)) as manager:
            await work(manager, lambda: line.send("now"))
            await asyncio.Event().wait()

    asyncio.run(main())


async def killed(work: Work, root: Path, **settings: Any) -> None:
    """Run ``work`` in a process of its own; return when it has been ended by SIGKILL at the moment it asked for."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=_live, args=(work, root, settings, theirs))
    process.start()
    theirs.close()
    with closing(ours):
        try:
            assert await asyncio.to_thread(ours.poll, 30), "the moment did not come"
            assert ours.recv() == "now"
        finally:
            process.kill()
            await asyncio.to_thread(process.join)
    process.close()
