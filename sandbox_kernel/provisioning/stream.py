"""Bytes to and from a command that runs in a container."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.engine import Engine

_HEADER = 8
_STDERR = 2
_STDERR_KEPT = 16_384
_CHUNK = 256 * 1024


class ExecStream:
    """stdin and stdout of one command. Flow-controlled: nothing is read ahead of the caller but one buffer."""

    def __init__(
        self, engine: Engine, exec_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Any
    ) -> None:
        self._engine = engine
        self._id = exec_id
        self._reader = reader
        self._writer = writer
        self._keep = keep
        self._left = 0
        self._stderr = bytearray()

    @classmethod
    async def open(cls, engine: Engine, container: str, argv: list[str], *, user: str | None = None) -> ExecStream:
        """Start ``argv`` in the container. Raises EngineError, also where the engine is reached over TLS or ssh."""
        exec_id, response = await asyncio.to_thread(engine.exec_socket, container, argv, user=user)
        found = getattr(response, "_sock", None)
        if not isinstance(found, socket.socket):
            raise EngineError(
                "a command's input and output can be had from an engine on a Unix or plain TCP socket only"
            )
        found.setblocking(False)
        connect = asyncio.open_unix_connection if found.family == socket.AF_UNIX else asyncio.open_connection
        # docker-py's response object owns the socket; asyncio gets one of its own.
        reader, writer = await connect(sock=found.dup(), limit=_CHUNK)
        return cls(engine, exec_id, reader, writer, response)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """To its stdin; returns when the buffer has room again. Raises EngineError when it no longer reads."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as exc:
            raise EngineError(f"the command in the container no longer reads: {self.stderr or exc}") from exc

    async def read(self, size: int = _CHUNK) -> bytes:
        """At most ``size`` bytes of its stdout, b"" at its end. What it writes to stderr is kept in :attr:`stderr`."""
        while self._left == 0:
            try:
                header = await self._reader.readexactly(_HEADER)
            except (asyncio.IncompleteReadError, OSError):
                return b""
            length = int.from_bytes(header[4:], "big")
            if header[0] == _STDERR:
                self._stderr += await self._reader.readexactly(length)
                del self._stderr[:-_STDERR_KEPT]
            else:
                self._left = length
        data = await self._reader.read(min(size, self._left))
        self._left -= len(data)
        return data

    async def readexactly(self, size: int) -> bytes:
        """``size`` bytes of its stdout. Raises EngineError with its stderr when it ends before."""
        data = bytearray()
        while len(data) < size:
            chunk = await self.read(size - len(data))
            if not chunk:
                raise EngineError(f"the command in the container ended early: {self.stderr or 'it said nothing'}")
            data += chunk
        return bytes(data)

    @property
    def stderr(self) -> str:
        """The tail of what it wrote to stderr so far."""
        return self._stderr.decode("utf-8", "replace").strip()

    def close_stdin(self) -> None:
        """No more input: the command reads end of file."""
        with suppress(OSError):
            self._writer.write_eof()

    async def exit_code(self) -> int | None:
        """After the end of its stdout; None when it still runs."""
        return await asyncio.to_thread(self._engine.exec_code, self._id)

    async def close(self) -> None:
        """Let go of both ends. The command sees end of file, and SIGPIPE when it writes."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
        response = getattr(self._keep, "_response", None)
        self._keep.close()
        if response is not None:
            with suppress(ValueError):  # it flushes what was closed with the socket
                response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
