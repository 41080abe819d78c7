"""Byte streams to agent processes, for tests: a process of this machine, or one in a container."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sandbox_kernel.artifacts.agent import AGENT_PATH, ByteStream

AGENT = Path(__file__).parents[1] / "sandbox_kernel" / "kernel_side" / "agent.py"


class ProcessStream:
    """stdin and stdout of a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self._in, self._out = process, process.stdin, process.stdout

    async def read(self, n: int) -> bytes:
        return await self._out.read(n)

    async def write(self, data: bytes) -> None:
        self._in.write(data)
        await self._in.drain()

    async def close(self) -> None:
        self._in.close()
        try:
            async with asyncio.timeout(0.5):
                while await self._out.read(1 << 20):
                    pass
        except TimeoutError:
            pass
        finally:
            if self.process.returncode is None:
                self.process.kill()
            await asyncio.shield(self.process.wait())
            self.process._transport.close()  # type: ignore[attr-defined]  # the loop offers no other way


class Opener:
    """An OpenStream; remembers the streams it opened."""

    def __init__(
        self, *, script: Path = AGENT, prefix: list[str] | None = None, arguments: list[str] | None = None
    ) -> None:
        self.opened: list[ProcessStream] = []
        self._script, self._prefix, self._arguments = script, prefix, arguments or []

    async def __call__(self, argv: list[str]) -> ByteStream:
        if self._prefix is None:
            swap = {"python3": sys.executable, AGENT_PATH: str(self._script)}
            argv = [swap.get(word, word) for word in argv] + self._arguments
        process = await asyncio.create_subprocess_exec(
            *(self._prefix or []), *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.opened.append(ProcessStream(process))
        return self.opened[-1]


def in_container(container: str, user: str | None = None) -> Opener:
    """An OpenStream into a running container."""
    flags = ["--user", user] if user is not None else []
    return Opener(prefix=["docker", "exec", "-i", *flags, container])
