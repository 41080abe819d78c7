"""The line to the engine breaks, or it answers with an error: no death is missed, and no kernel is given up."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import docker
import pytest
from kernels import provisioner, spec

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.watch import Watcher

pytestmark = pytest.mark.usefixtures("image")

ENGINE = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")


class Line:
    """A Unix socket that leads to the engine, and can break."""

    def __init__(self) -> None:
        self.events: list[asyncio.StreamWriter] = []
        """To the clients that listen to events."""
        self.failing = False
        """The engine cannot tell of any container."""
        self.tasks: set[asyncio.Task[None]] = set()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(ENGINE)
        for work in (self._pass(reader, far_writer, writer), self._pass(far_reader, writer, None)):
            self.tasks.add(asyncio.create_task(work))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter | None
    ) -> None:
        with suppress(OSError, RuntimeError):
            while data := await reader.read(65536):
                if back is not None and b"/events?" in data.split(b"\r\n")[0]:
                    self.events.append(back)
                if back is not None and self.failing and re.match(rb"GET /v[\d.]+/containers/\w+/json ", data):
                    back.write(
                        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
                        b'Content-Length: 21\r\n\r\n{"message":"no luck"}'
                    )
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    def tear(self) -> None:
        """The engine is killed in the middle of an event."""
        for writer in self.events:
            writer.write(b'b\r\n{"status": \r\n0\r\n\r\n')
            writer.close()
        self.events.clear()


@asynccontextmanager
async def line_to_the_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    line = Line()
    server = await asyncio.start_unix_server(line.take, path)
    with monkeypatch.context() as patch:
        patch.setenv("DOCKER_HOST", f"unix://{path}")
        patch.setattr(Engine, "_shared", None)
        patch.setattr(Watcher, "_shared", None)
        try:
            yield line
        finally:
            Engine.shared()._api.close()
            server.close()
            for task in line.tasks:
                await asyncio.wait_for(task, 10)


async def test_a_death_is_told_after_the_events_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: docker.DockerClient
) -> None:
    async with line_to_the_engine(tmp_path / "d.sock", monkeypatch) as line:
        host = provisioner(spec(tmp_path))
        await host.launch()
        try:
            death = asyncio.ensure_future(host.wait_dead())
            await asyncio.sleep(0)
            line.tear()
            engine.api.kill(host.container_id)
            found = await asyncio.wait_for(death, 10)
            assert (found.cause, found.signal) == ("signal", "SIGKILL")
        finally:
            await host.remove()


async def test_an_engine_that_fails_costs_no_kernel_its_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(sessions_root=tmp_path / "s")
    async with SessionManager(settings) as manager:
        session = await manager.start("kept")
        await session.execute("x = 'still here'")
        await session.detach()
    async with line_to_the_engine(tmp_path / "d.sock", monkeypatch) as line, SessionManager(settings) as manager:
        await asyncio.to_thread(Engine.shared)
        line.failing = True
        with pytest.raises(EngineError, match="no luck"):
            await manager.get("kept")
        line.failing = False
        assert (await (await manager.get("kept")).execute("x")).result == "'still here'"
