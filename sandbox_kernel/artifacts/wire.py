"""The wire to ``kernel_side/agent.py``: lines of JSON and counted bytes, each wait and each length bounded.

What comes back is hostile: see :mod:`sandbox_kernel.artifacts.agent`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from sandbox_kernel.errors import ArtifactError, ArtifactRefused

LINE_LIMIT = 1 << 16
CHUNK = 1 << 18
PACE = 1 << 18
"""Bytes a second that an answer must come with: by ones it would hold the session for days, and never be silent."""
HUGE = 1 << 63


class ByteStream(Protocol):
    """A duplex stream to a process: its stdin and stdout."""

    async def read(self, n: int) -> bytes:
        """At most ``n`` bytes, at least one; ``b""`` at the end."""

    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None:
        """Ends the process' input; the stream is of no use afterwards."""


class AgentGone(ArtifactError):
    """Nothing sensible answers inside the container: it is gone, paused, or the session's code interfered."""


class Missing(ArtifactRefused):
    """There is no such file in the container."""


class Broken(Exception):
    """The stream ended, stalled, or broke the rules; it is dropped and may be opened once more."""


class Wire:
    """Lines and counted bytes out of a ByteStream, each wait bounded."""

    def __init__(self, raw: ByteStream, timeout_s: float) -> None:
        self.raw = raw
        self._timeout_s = timeout_s
        self._buffer = b""
        self.answer: asyncio.Future[Any] | None = None

    @property
    def answered(self) -> bool:
        """The answer to a request that is still being sent is already there."""
        return self.answer is not None and self.answer.done()

    async def write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.raw.write(data)
        except TimeoutError:
            raise Broken("it takes nothing in") from None
        except Exception as exc:
            raise Broken(f"writing to it failed: {exc}") from exc

    async def read(self, n: int, timeout: bool = True) -> bytes:
        """Between 1 and ``n`` bytes."""
        if self._buffer:
            data, self._buffer = self._buffer[:n], self._buffer[n:]
            return data
        try:
            async with asyncio.timeout(self._timeout_s if timeout else None):
                data = await self.raw.read(n)
        except TimeoutError:
            raise Broken(f"silent for {self._timeout_s} s") from None
        except Exception as exc:
            raise Broken(f"reading from it failed: {exc}") from exc
        if not data:
            raise Broken("its stream ended")
        if len(data) > n:
            self._buffer = data[n:]
        return data[:n]

    async def paced(self, n: int) -> AsyncIterator[bytes]:
        """``n`` bytes in pieces; Broken when they come too slowly."""
        loop = asyncio.get_running_loop()
        waited, left = 0.0, n
        while left:
            asked = loop.time()
            chunk = await self.read(min(left, CHUNK))
            waited += loop.time() - asked  # not what whoever takes it makes of his time
            left -= len(chunk)
            if waited > self._timeout_s + (n - left) / PACE:
                raise Broken(f"{n - left} bytes in {waited:.0f} s")
            yield chunk

    async def exactly(self, n: int) -> bytes:
        return b"".join([chunk async for chunk in self.paced(n)])

    async def line(self, timeout: bool = True) -> dict[str, Any]:
        data = b""
        try:
            async with asyncio.timeout(self._timeout_s if timeout else None):
                while b"\n" not in data:
                    if len(data) > LINE_LIMIT:
                        raise Broken("a line without end")
                    data += await self.read(LINE_LIMIT, timeout)
        except TimeoutError:
            raise Broken(f"no whole line in {self._timeout_s} s") from None
        line, _, rest = data.partition(b"\n")
        self._buffer = rest + self._buffer
        told = parse(line)
        if not isinstance(told, dict):
            raise Broken("a line that is no object")
        return told


def line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


def parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Broken("an answer that is not JSON") from None


def checked(header: dict[str, Any]) -> dict[str, Any]:
    if "error" in header:
        raise (Missing if header.get("code") == "ENOENT" else ArtifactRefused)(str(header["error"])[:500])
    return header


def count(header: dict[str, Any], name: str) -> int:
    value = header.get(name)
    if type(value) is not int or not 0 <= value < HUGE:
        raise Broken(f"{name} is not a count")
    return value


def is_plain_path(path: object) -> bool:
    """Whether ``path`` is a relative POSIX path of plain names in valid UTF-8, at most 4096 bytes."""
    if not isinstance(path, str):
        return False
    try:
        if len(path.encode()) > 4096:
            return False
    except UnicodeEncodeError:
        return False
    return "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def printable(text: str) -> str:
    """``text``, at most 4096 characters, without what no JSON writer takes."""
    return text[:4096].encode("utf-8", "backslashreplace").decode()
