"""The host's end of ``kernel_side/agent.py``: requests over one byte stream to a process beside the kernel.

The process runs as the kernel's user, so that whatever it says is hostile: every line, count, size and name is bounded
and checked here, every wait has an end, and a stream that breaks the rules is dropped. The next request opens another.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sandbox_kernel.artifacts.wire import (
    CHUNK,
    HUGE,
    AgentGone,
    Broken,
    ByteStream,
    Missing,
    Wire,
    checked,
    count,
    is_plain_path,
    line,
    parse,
    printable,
)
from sandbox_kernel.errors import ArtifactRefused

__all__ = ["Agent", "AgentGone", "ByteStream", "Missing", "OpenStream", "is_plain_path"]

AGENT_PATH = "/opt/sandbox-kernel/agent.py"
BODY_LIMIT = 1 << 23
FRAME_END = b"\0\0\0\0"
FRAME_GIVE_UP = b"\xff\xff\xff\xff"
MAX_PAGES = 200
MAX_FILES = 100_000
"""Files of one listing; what is past them waits until some are gone."""
_T = TypeVar("_T")


OpenStream = Callable[[list[str]], Awaitable[ByteStream]]
"""Starts a command beside the kernel: ``docker exec -i`` here, an exec of a pod elsewhere."""


@dataclass(frozen=True, slots=True)
class RemoteFileInfo:
    """A regular file below ``artifacts/`` as the agent tells it. ``path`` was checked, the rest may be a lie."""

    path: str
    ino: int
    size: int
    mtime_ns: int
    open: bool
    """Some process has it open for writing."""

    @property
    def identity(self) -> tuple[int, int, int]:
        """Another value: another content."""
        return (self.ino, self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Listing:
    files: list[RemoteFileInfo]
    refused: list[tuple[str, str]]
    """What is no regular file: ``(path, reason)``; the path is printable text."""
    complete: bool


@dataclass(slots=True)
class RemoteFile:
    """One file on its way. Iterate :meth:`chunks` to the end; then ``changed`` says whether it held still."""

    size: int
    ino: int
    mtime_ns: int
    _stream: Wire
    changed: bool = False
    _ended: bool = field(default=False)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Exactly ``size`` bytes. Raises AgentGone when the stream breaks."""
        left = self.size
        try:
            async for chunk in self._stream.paced(left):
                left -= len(chunk)
                yield chunk
            self.changed = bool((await self._stream.line()).get("changed", True))
        except Broken as exc:
            raise AgentGone(f"a file broke off after {self.size - left} of {self.size} bytes: {exc}") from None
        self._ended = True


class Agent:
    """Requests to an agent process, one at a time; it is started with the first and again when its stream broke.

    Every method raises AgentGone when two streams in a row failed, ArtifactRefused when the agent says no.
    """

    def __init__(self, open_stream: OpenStream, *, timeout_s: float = 15.0, arguments: Sequence[str] = ()) -> None:
        """``timeout_s``: longest silence while an answer is due. ``arguments``: further ones of the agent's."""
        self._open_stream = open_stream
        self._timeout_s = timeout_s
        self._command = ["python3", "-I", "-S", AGENT_PATH, *arguments]
        self._lock = asyncio.Lock()
        self._stream: Wire | None = None

    async def listing(self, tag: str | None = None) -> tuple[Listing | None, str | None]:
        """What lies below ``artifacts/`` and a tag of it; None for the listing when ``tag`` still holds."""
        files: list[RemoteFileInfo] = []
        known: set[str] = set()
        first: str | None = None
        for number in range(MAX_PAGES):
            header, told = await self._ask(_listing, op="list", skip=len(files), tag=None if files else tag)
            if told is None:
                return None, tag
            page, refused, more = told
            fresh = [file for file in page if file.path not in known][: MAX_FILES - len(files)]
            files += fresh
            known.update(file.path for file in fresh)
            if number == 0:
                first = header["tag"] if isinstance(header.get("tag"), str) and not more else None
            if not more or not fresh or len(files) >= MAX_FILES:  # an agent may say "more" for ever
                return Listing(files, refused, not more), first
        return Listing(files, refused, False), None

    @asynccontextmanager
    async def get(self, path: str, *, limit: int) -> AsyncIterator[RemoteFile]:
        """A file below ``artifacts/``. Raises ArtifactRefused also for more than ``limit`` bytes."""
        async with self._file(limit, {"op": "get", "path": path}) as file:
            yield file

    @asynccontextmanager
    async def export(self, path: str, *, limit: int) -> AsyncIterator[RemoteFile]:
        """Any regular file that the kernel's user can read, links followed, inside the container."""
        async with self._file(limit, {"op": "export", "path": path}) as file:
            yield file

    async def state(self, name: str, *, limit: int) -> bytes:
        """The content of a file in the state folder. Raises ArtifactRefused also when there is none."""
        async with self._file(limit, {"op": "state", "name": name, "limit": limit}) as file:
            return b"".join([chunk async for chunk in file.chunks()])

    async def stat(self, path: str) -> dict[str, Any]:
        """``kind``, ``size_now`` and ``mtime_ns`` of a path of the container."""
        header, _ = await self._ask(None, op="stat", path=path)
        return header

    async def remove(self, files: Sequence[RemoteFileInfo]) -> set[str]:
        """Removes those that are unchanged and not open for writing; their paths."""
        removed: set[str] = set()
        for start in range(0, len(files), 100):
            batch = files[start : start + 100]
            wanted = [[f.path, f.ino, f.size, f.mtime_ns] for f in batch]
            _, told = await self._ask(_texts, op="remove", files=wanted)
            removed |= {f.path for f in batch} & (told or set())
        return removed

    async def put(self, token: str, name: str, source: AsyncIterable[bytes]) -> int:
        """Sends a file of a data set into the staging folder; the bytes written. Tried once: so is a source read."""

        async def send(stream: Wire) -> None:
            async for chunk in source:
                for start in range(0, len(chunk), CHUNK):
                    part = chunk[start : start + CHUNK]
                    await stream.write(len(part).to_bytes(4, "big") + part)
                if stream.answered:
                    break  # it can only be a refusal: the rest need not travel
            await stream.write(FRAME_END)

        async with self._lock, self._guard():
            header = await self._send(send, op="put", token=token, name=name)
        return int(header.get("put", 0))

    async def publish(self, token: str, path: str) -> int:
        """What was put under ``token`` stands at ``path`` below ``/data``, at once; its bytes."""
        header, _ = await self._ask(None, op="publish", token=token, path=path)
        return int(header.get("published", 0))

    async def discard(self, token: str) -> None:
        """Removes what was put under ``token``."""
        await self._ask(None, op="discard", token=token)

    async def link(self, links: Sequence[tuple[str, str]]) -> None:
        """Symbolic links ``(path below /data, target)``, except where something stands."""
        payload = json.dumps(links).encode()

        async def send(stream: Wire) -> None:
            for start in range(0, len(payload), CHUNK):
                part = payload[start : start + CHUNK]
                await stream.write(len(part).to_bytes(4, "big") + part)
            await stream.write(FRAME_END)

        async with self._lock, self._guard():
            await self._twice(lambda: self._send(send, op="link"))

    async def selected(self) -> list[tuple[str, int]]:
        """The data sets that were published: ``(id, bytes)``."""
        _, told = await self._ask(parse, op="selected")
        return [(str(path), int(size)) for path, size in told or ()]

    async def close(self) -> None:
        """Ends the agent process; without effect when there is none."""
        async with self._lock:
            await self._drop()

    # --- the exchange -------------------------------------------------------------------------

    @asynccontextmanager
    async def _file(self, limit: int, request: dict[str, Any]) -> AsyncIterator[RemoteFile]:
        async with self._lock, self._guard():
            header, stream = await self._twice(lambda: self._begin(request))
            size = count(header, "size")
            if size > limit:
                await self._drop()
                raise ArtifactRefused(f"{size} bytes; at most {limit} are taken")
            file = RemoteFile(size, count(header, "ino"), count(header, "mtime_ns"), stream)
            yield file
            if not file._ended:
                await self._drop()

    async def _ask(self, parse: Callable[[bytes], _T] | None, **request: Any) -> tuple[dict[str, Any], _T | None]:
        """The answer's header and parsed body; None for a body that is not there."""

        async def exchange() -> tuple[dict[str, Any], _T | None]:
            header, stream = await self._begin(request)
            if parse is None or "size" not in header:
                return header, None
            size = count(header, "size")
            if size > BODY_LIMIT:
                raise Broken(f"an answer of {size} bytes")
            return header, parse(await stream.exactly(size))

        async with self._lock, self._guard():
            return await self._twice(exchange)

    async def _send(self, send: Callable[[Wire], Awaitable[None]], **request: Any) -> dict[str, Any]:
        """A request with a payload; an answer that comes before its end is a refusal. Under the lock and the guard."""
        stream = await self._connected()
        await stream.write(line(request))
        answer = asyncio.ensure_future(stream.line(timeout=False))
        stream.answer = answer
        try:
            await send(stream)
            async with asyncio.timeout(self._timeout_s):
                return checked(await asyncio.shield(answer))
        except ArtifactRefused:
            raise
        except BaseException as exc:
            with suppress(Exception):
                await stream.write(FRAME_GIVE_UP)
            if isinstance(exc, TimeoutError):
                raise Broken("no answer") from None
            raise
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _begin(self, request: dict[str, Any]) -> tuple[dict[str, Any], Wire]:
        """Sends ``request`` and reads the answer's first line."""
        stream = await self._connected()
        await stream.write(line(request))
        return checked(await stream.line()), stream

    async def _twice(self, exchange: Callable[[], Awaitable[_T]]) -> _T:
        """An agent that was killed since the last request is started again, once."""
        try:
            return await exchange()
        except Broken:
            await self._drop()
            return await exchange()

    @asynccontextmanager
    async def _guard(self) -> AsyncIterator[None]:
        """Whatever goes wrong inside leaves no half-read answer behind: the stream is dropped."""
        try:
            yield
        except ArtifactRefused:
            raise  # a whole answer, or already dropped
        except Broken as exc:
            await self._drop()
            raise AgentGone(f"the agent in the container does not answer as it should: {exc}") from None
        except BaseException:
            await self._drop()
            raise

    async def _connected(self) -> Wire:
        if self._stream is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._stream = Wire(await self._open_stream(self._command), self._timeout_s)
            except TimeoutError:
                raise Broken("it cannot be started: no answer from the engine") from None
            except Exception as exc:  # whatever the engine's client raises
                raise Broken(f"it cannot be started: {exc}") from exc
        return self._stream

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):
                async with asyncio.timeout(self._timeout_s):
                    await stream.raw.close()


def _listing(body: bytes) -> tuple[list[RemoteFileInfo], list[tuple[str, str]], bool]:
    told = parse(body)
    try:
        files, refused = [], [(printable(str(path)), printable(str(why))[:200]) for path, why in told["refused"][:1000]]
        for path, ino, size, mtime_ns, is_open in told["files"]:
            if not all(type(n) is int and -HUGE <= n < HUGE for n in (ino, size, mtime_ns)) or size < 0:
                raise ValueError
            if is_plain_path(path):
                files.append(RemoteFileInfo(path, ino, size, mtime_ns, bool(is_open)))
            else:
                refused.append((printable(str(path)), "not a plain path below artifacts"))
        return files, refused, bool(told["more"])
    except (TypeError, KeyError, ValueError):
        raise Broken("a listing that makes no sense") from None


def _texts(body: bytes) -> set[str]:
    told = parse(body)
    return {item for item in told if isinstance(item, str)} if isinstance(told, list) else set()
