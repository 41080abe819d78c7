"""What a session does beside its callers; it ends with the session, and the session's end waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from sandbox_kernel.errors import SessionClosed

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Tasks:
    """The tasks of one session."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._running: set[asyncio.Task[Any]] = set()
        self.closed = False
        """Nothing is to be begun any more."""

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run ``work`` beside everything else."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.warning("session %s: %s", self._session_id, problem)  # perhaps nobody waits to be told

    async def to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` to its end also when the caller goes away. Raises SessionClosed when the session ends first."""
        left = SessionClosed(f"session {self._session_id!r} was left; SessionManager.start() takes it up again")
        if self.closed:
            work.close()
            raise left
        task = self.spawn(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if task.cancelled() and caller is not None and not caller.cancelling():
                raise left from None
            raise

    async def end(self) -> None:
        """Cancel them all, and return when they have ended: a container that was being made is none by then."""
        self.closed = True
        under_way = list(self._running)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
