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
from typing import Any, Protocol, TypeVar

from sandbox_kernel.errors import ArtifactError, ArtifactRefused

AGENT_PATH = "/opt/sandbox-kernel/agent.py"
LINE_LIMIT = 1 << 16
BODY_LIMIT = 1 << 24
CHUNK = 1 << 18
FRAME_END = b"\0\0\0\0"
FRAME_GIVE_UP = b"\xff\xff\xff\xff"
MAX_FILES = 100_000
"""Files of one listing; what is past them waits until some are gone."""
_HUGE = 1 << 63
_T = TypeVar("_T")


class ByteStream(Protocol):
    """A duplex stream to a process: its stdin and stdout."""

    async def read(self, n: int) -> bytes:
        """At most ``n`` bytes, at least one; ``b""`` at the end."""

    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None:
        """Ends the process' input; the stream is of no use afterwards."""


OpenStream = Callable[[list[str]], Awaitable[ByteStream]]
"""Starts a command beside the kernel: ``docker exec -i`` here, an exec of a pod elsewhere."""


class AgentGone(ArtifactError):
    """Nothing sensible answers inside the container: it is gone, paused, or the session's code interfered."""


class Missing(ArtifactRefused):
    """There is no such file in the container."""


class _Broken(Exception):
    """The stream ended, stalled, or broke the rules; it is dropped and may be opened once more."""


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
    _stream: _Stream
    changed: bool = False
    _ended: bool = field(default=False)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Exactly ``size`` bytes. Raises AgentGone when the stream breaks."""
        left = self.size
        try:
            while left:
                chunk = await self._stream.read(min(left, CHUNK))
                left -= len(chunk)
                yield chunk
            self.changed = bool((await self._stream.line()).get("changed", True))
        except _Broken as exc:
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
        self._stream: _Stream | None = None

    async def listing(self, tag: str | None = None) -> tuple[Listing | None, str | None]:
        """What lies below ``artifacts/`` and a tag of it; None for the listing when ``tag`` still holds."""
        files: list[RemoteFileInfo] = []
        first: str | None = None
        while True:
            header, told = await self._ask(_listing, op="list", skip=len(files), tag=None if files else tag)
            if told is None:
                return None, tag
            page, refused, more = told
            known = {file.path for file in files}
            fresh = [file for file in page if file.path not in known]
            files += fresh
            if not known:
                first = header["tag"] if isinstance(header.get("tag"), str) and not more else None
            if not more or not fresh or len(files) >= MAX_FILES:  # an agent may say "more" for ever
                return Listing(files, refused, not more), first

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

        async def send(stream: _Stream) -> None:
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

        async def send(stream: _Stream) -> None:
            for start in range(0, len(payload), CHUNK):
                part = payload[start : start + CHUNK]
                await stream.write(len(part).to_bytes(4, "big") + part)
            await stream.write(FRAME_END)

        async with self._lock, self._guard():
            await self._twice(lambda: self._send(send, op="link"))

    async def selected(self) -> list[tuple[str, int]]:
        """The data sets that were published: ``(id, bytes)``."""
        _, told = await self._ask(_parse, op="selected")
        return [(str(path), int(size)) for path, size in told]

    async def close(self) -> None:
        """Ends the agent process; without effect when there is none."""
        async with self._lock:
            await self._drop()

    # --- the exchange -------------------------------------------------------------------------

    @asynccontextmanager
    async def _file(self, limit: int, request: dict[str, Any]) -> AsyncIterator[RemoteFile]:
        async with self._lock, self._guard():
            header, stream = await self._twice(lambda: self._begin(request))
            size = _count(header, "size")
            if size > limit:
                await self._drop()
                raise ArtifactRefused(f"{size} bytes; at most {limit} are taken")
            file = RemoteFile(size, _count(header, "ino"), _count(header, "mtime_ns"), stream)
            yield file
            if not file._ended:
                await self._drop()

    async def _ask(self, parse: Callable[[bytes], _T] | None, **request: Any) -> tuple[dict[str, Any], _T | None]:
        """The answer's header and parsed body; None for a body that is not there."""

        async def exchange() -> tuple[dict[str, Any], _T | None]:
            header, stream = await self._begin(request)
            if parse is None or "size" not in header:
                return header, None
            size = _count(header, "size")
            if size > BODY_LIMIT:
                raise _Broken(f"an answer of {size} bytes")
            return header, parse(await stream.exactly(size))

        async with self._lock, self._guard():
            return await self._twice(exchange)

    async def _send(self, send: Callable[[_Stream], Awaitable[None]], **request: Any) -> dict[str, Any]:
        """A request with a payload; an answer that comes before its end is a refusal. Under the lock and the guard."""
        stream = await self._connected()
        await stream.write(_line(request))
        answer = asyncio.ensure_future(stream.line(timeout=False))
        stream.answer = answer
        try:
            await send(stream)
            async with asyncio.timeout(self._timeout_s):
                return _checked(await asyncio.shield(answer))
        except ArtifactRefused:
            raise
        except BaseException as exc:
            with suppress(Exception):
                await stream.write(FRAME_GIVE_UP)
            if isinstance(exc, TimeoutError):
                raise _Broken("no answer") from None
            raise
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _begin(self, request: dict[str, Any]) -> tuple[dict[str, Any], _Stream]:
        """Sends ``request`` and reads the answer's first line."""
        stream = await self._connected()
        await stream.write(_line(request))
        return _checked(await stream.line()), stream

    async def _twice(self, exchange: Callable[[], Awaitable[_T]]) -> _T:
        """An agent that was killed since the last request is started again, once."""
        try:
            return await exchange()
        except _Broken:
            await self._drop()
            return await exchange()

    @asynccontextmanager
    async def _guard(self) -> AsyncIterator[None]:
        """Whatever goes wrong inside leaves no half-read answer behind: the stream is dropped."""
        try:
            yield
        except ArtifactRefused:
            raise  # a whole answer, or already dropped
        except _Broken as exc:
            await self._drop()
            raise AgentGone(f"the agent in the container does not answer as it should: {exc}") from None
        except BaseException:
            await self._drop()
            raise

    async def _connected(self) -> _Stream:
        if self._stream is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._stream = _Stream(await self._open_stream(self._command), self._timeout_s)
            except TimeoutError:
                raise _Broken("it cannot be started: no answer from the engine") from None
            except Exception as exc:  # whatever the engine's client raises
                raise _Broken(f"it cannot be started: {exc}") from exc
        return self._stream

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):
                async with asyncio.timeout(self._timeout_s):
                    await stream.raw.close()


class _Stream:
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
            raise _Broken("it takes nothing in") from None
        except Exception as exc:
            raise _Broken(f"writing to it failed: {exc}") from exc

    async def read(self, n: int, timeout: bool = True) -> bytes:
        """Between 1 and ``n`` bytes."""
        if self._buffer:
            data, self._buffer = self._buffer[:n], self._buffer[n:]
            return data
        try:
            async with asyncio.timeout(self._timeout_s if timeout else None):
                data = await self.raw.read(n)
        except TimeoutError:
            raise _Broken(f"silent for {self._timeout_s} s") from None
        except Exception as exc:
            raise _Broken(f"reading from it failed: {exc}") from exc
        if not data:
            raise _Broken("its stream ended")
        if len(data) > n:
            self._buffer = data[n:]
        return data[:n]

    async def exactly(self, n: int) -> bytes:
        parts = []
        while n:
            parts.append(await self.read(min(n, CHUNK)))
            n -= len(parts[-1])
        return b"".join(parts)

    async def line(self, timeout: bool = True) -> dict[str, Any]:
        data = b""
        while b"\n" not in data:
            if len(data) > LINE_LIMIT:
                raise _Broken("a line without end")
            data += await self.read(LINE_LIMIT, timeout)
        line, _, rest = data.partition(b"\n")
        self._buffer = rest + self._buffer
        told = _parse(line)
        if not isinstance(told, dict):
            raise _Broken("a line that is no object")
        return told


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise _Broken("an answer that is not JSON") from None


def _checked(header: dict[str, Any]) -> dict[str, Any]:
    if "error" in header:
        raise (Missing if header.get("code") == "ENOENT" else ArtifactRefused)(str(header["error"])[:500])
    return header


def _count(header: dict[str, Any], name: str) -> int:
    value = header.get(name)
    if type(value) is not int or not 0 <= value < _HUGE:
        raise _Broken(f"{name} is not a count")
    return value


def _listing(body: bytes) -> tuple[list[RemoteFileInfo], list[tuple[str, str]], bool]:
    told = _parse(body)
    try:
        files, refused = [], [(printable(str(path)), printable(str(why))[:200]) for path, why in told["refused"][:1000]]
        for path, ino, size, mtime_ns, is_open in told["files"]:
            if not all(type(n) is int and -_HUGE <= n < _HUGE for n in (ino, size, mtime_ns)) or size < 0:
                raise ValueError
            if is_plain_path(path):
                files.append(RemoteFileInfo(path, ino, size, mtime_ns, bool(is_open)))
            else:
                refused.append((printable(str(path)), "not a plain path below artifacts"))
        return files, refused, bool(told["more"])
    except (TypeError, KeyError, ValueError):
        raise _Broken("a listing that makes no sense") from None


def _texts(body: bytes) -> set[str]:
    told = _parse(body)
    return {item for item in told if isinstance(item, str)} if isinstance(told, list) else set()


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
