"""What the caller of a cell waits for: that its books are closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sandbox_kernel.events import ExecutionResult


class Outcome:
    """A cell's result or the error that kept it from being recorded, once there is one.

    Not a future: a caller who is cancelled leaves it as it is, and who waits is woken in one turn of the event loop.
    """

    def __init__(self, on_closed: Callable[[], None] | None = None) -> None:
        """``on_closed()`` is called when the books are closed."""
        self._closed = asyncio.Event()
        self._on_closed = on_closed
        self._result: ExecutionResult | Exception | None = None

    @property
    def closed(self) -> bool:
        return self._result is not None

    def close(self, result: ExecutionResult | Exception) -> None:
        """Later calls change nothing."""
        if self._result is None:
            self._result = result
            self._closed.set()
            if self._on_closed is not None:
                self._on_closed()

    async def result(self) -> ExecutionResult:
        """Wait for the result. Raises the error there is instead of one."""
        await self._closed.wait()
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result
