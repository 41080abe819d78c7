"""Foreign errors leave the engine's room as ours; the engine's client survives what the engine does."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path

import docker
import docker.errors
import pytest
import requests
from kernels import evaluate, kernel, spec

from sandbox_kernel.errors import EngineError, EngineUnavailable, ImageNotFound, LimitExceeded
from sandbox_kernel.provisioning.engine import Engine, translated

KINDS = [kind for _, kind in inspect.getmembers(docker.errors, inspect.isclass) if issubclass(kind, Exception)]


def an_error(kind: type[Exception]) -> Exception:
    """An instance, whatever its constructor wants."""
    if issubclass(kind, docker.errors.APIError):
        return kind("no", response=None, explanation="no such thing")
    wanted = {
        docker.errors.ContainerError: ("c", 1, "true", "image", b"stderr"),
        docker.errors.BuildError: ("reason", []),
        docker.errors.StreamParseError: ("reason",),
        docker.errors.MissingContextParameter: ("name",),
        docker.errors.ContextAlreadyExists: ("name",),
        docker.errors.ContextException: ("name",),
        docker.errors.ContextNotFound: ("name",),
    }
    return kind(*wanted.get(kind, ("what happened",)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_docker_pys_errors_is_translated(kind: type[Exception]) -> None:
    with pytest.raises(EngineError) as caught, translated("start the thing"):
        raise an_error(kind)
    assert "start the thing" in str(caught.value) or "build it" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "error",
    [requests.ConnectionError("refused"), requests.ReadTimeout("slow"), ConnectionResetError(), FileNotFoundError()],
)
def test_a_silent_engine_is_unavailable_with_the_remedy(error: Exception) -> None:
    with pytest.raises(EngineUnavailable, match="sandbox-kernel engine up"), translated("do it"):
        raise error


def api_error(status: int, text: str) -> docker.errors.APIError:
    response = requests.Response()
    response.status_code = status
    response.raw = io.BytesIO()
    return docker.errors.APIError("x", response=response, explanation=text)


@pytest.mark.parametrize(
    ("status", "text", "kind", "says"),
    [
        (404, "No such image: nope:latest", ImageNotFound, "sandbox-kernel image build"),
        (500, "fork/exec: cannot allocate memory", LimitExceeded, "sandbox-kernel gc"),
        (400, "Unknown runtime specified runsc", EngineError, "daemon.json"),
        (400, "setting up network: cannot run with network enabled in root network namespace", EngineError, "=none"),
        (500, "something new", EngineError, "something new"),
    ],
)
def test_an_answer_is_told_with_its_remedy(status: int, text: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says), translated("start it", runtime="runsc"):
        raise api_error(status, text)


def test_no_engine_is_said_with_what_to_run(tmp_path: Path) -> None:
    code = "from sandbox_kernel.provisioning.engine import Engine\nEngine.shared()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "EngineUnavailable" in done.stderr
    assert "sandbox-kernel engine up" in done.stderr
    assert "nobody.sock" in done.stderr


class Relay:
    """A socket before the engine's, which can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
        self._writers |= {writer, behind_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, behind_writer))
                group.create_task(self._pump(behind_reader, writer))
        finally:
            for end in (writer, behind_writer):
                end.close()
                self._writers.discard(end)

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()
        self.path.unlink(missing_ok=True)


async def test_a_death_while_the_engine_was_away_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: docker.DockerClient, image: str
) -> None:
    relay = Relay(tmp_path / "relay.sock")
    await relay.open()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{relay.path}")
    monkeypatch.setattr(Engine, "_shared", None)
    async with kernel(spec(tmp_path)) as (host, client):
        waiting = asyncio.ensure_future(host.wait_dead())
        await relay.cut()
        with pytest.raises(EngineUnavailable):
            await host.exec_stream(["true"])
        assert await evaluate(client, "print(1)") == "1\n"  # the kernel does not need the engine
        assert not waiting.done()
        engine.api.kill(host.container_id)
        await relay.open()
        death = await asyncio.wait_for(waiting, 20)
        assert (death.cause, death.signal) == ("signal", "SIGKILL")
    await relay.cut()


async def test_the_client_takes_many_calls_at_once(engine: docker.DockerClient) -> None:
    shared = Engine.shared()
    answers = await asyncio.gather(*(asyncio.to_thread(shared.is_image, "nobody/has:this") for _ in range(64)))
    assert answers == [False] * 64
