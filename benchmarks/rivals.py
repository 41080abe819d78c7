"""Others' executors on the same image: ``pip install 'sandbox-kernel[rivals]'``. One that cannot be driven has a row
that says why.

Each is driven as its documentation says, first result and ``pass``, in turns with ours. Where one wants to install
packages into its container at every start (there is no pip in our image, and no network), it finds them installed;
what one needs in its image besides is added to a copy (gateway.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.cells import checked, session
from benchmarks.gateway import gateway_image
from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import UID

Run = Callable[[str], Awaitable[None]]
ROWS = ("first result, cold", "pass")
Rival = Callable[[Bench], contextlib.AbstractAsyncContextManager[Run]]


@contextlib.asynccontextmanager
async def _llm_sandbox(bench: Bench) -> AsyncIterator[Run]:
    from llm_sandbox import InteractiveSandboxSession

    folder = _shared(bench.folder / "llm-sandbox")
    programs = folder / ".sandbox-venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, does in (
        ("pip", "exit 0"),
        ("python", 'exec python3 "$@"'),
        ("python3", 'exec /opt/venv/bin/python3 "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    one = InteractiveSandboxSession(
        image=bench.image,
        keep_template=True,
        skip_environment_setup=True,
        runtime_configs={"volumes": {str(folder): {"bind": "/sandbox", "mode": "rw"}}},
    )
    await asyncio.to_thread(one.open)
    try:

        async def run(code: str) -> None:
            result = await asyncio.to_thread(one.run, code)
            assert result.exit_code == 0, result

        yield run
    finally:
        await asyncio.to_thread(one.close)


@contextlib.asynccontextmanager
async def _autogen(bench: Bench) -> AsyncIterator[Run]:
    """Its Docker executor. (The Jupyter one needs a Jupyter server in the image.) It keeps no variables."""
    from autogen_core import CancellationToken
    from autogen_core.code_executor import CodeBlock
    from autogen_ext.code_executors.docker import DockerCommandLineCodeExecutor

    async with DockerCommandLineCodeExecutor(image=bench.image, work_dir=_shared(bench.folder / "autogen")) as one:

        async def run(code: str) -> None:
            result = await one.execute_code_blocks([CodeBlock(code=code, language="python")], CancellationToken())
            assert result.exit_code == 0, result

        yield run


@contextlib.asynccontextmanager
async def _smolagents(bench: Bench) -> AsyncIterator[Run]:
    """Its Docker executor, which talks to a Jupyter kernel gateway in the container."""
    from smolagents.monitoring import AgentLogger, LogLevel
    from smolagents.remote_executors import DockerExecutor

    name = f"benchmark-smolagents-{secrets.token_hex(4)}"
    try:
        one: Any = await asyncio.to_thread(
            DockerExecutor,
            [],
            AgentLogger(level=LogLevel.OFF),
            port=_free_port(),
            image_name=await asyncio.to_thread(gateway_image, bench.image),
            build_new_image=False,
            container_run_kwargs={"name": name},
        )

        async def run(code: str) -> None:
            await asyncio.to_thread(one.run_code_raise_errors, code)

        yield run
        await asyncio.to_thread(one.cleanup)
    finally:  # also where it gave up half-way, or its own clean-up failed (which it only logs)
        await asyncio.to_thread(subprocess.run, ["docker", "rm", "--force", "--volumes", name], capture_output=True)


RIVALS: dict[str, Rival] = {
    "llm-sandbox, interactive": _llm_sandbox,
    "AutoGen, Docker": _autogen,
    "smolagents, Docker": _smolagents,
}


async def rivals(bench: Bench) -> list[Measurement]:
    """First result and ``pass`` of ours, beside each that is installed and works here."""
    found: list[Measurement] = []
    for name, rival in RIVALS.items():
        try:
            found += await _beside(name, rival, bench)
        except Exception as exc:  # theirs: whatever it raises, the table goes on without it
            found += [Measurement(row, "ms", [], [], name, note=f"{name}: {_reason(exc)}") for row in ROWS]
    return found


async def _beside(name: str, rival: Rival, bench: Bench) -> list[Measurement]:
    async def first(make: Rival) -> float:
        async def start() -> None:
            run = await stack.enter_async_context(make(bench))
            await run("print(1 + 1)")

        async with contextlib.AsyncExitStack() as stack:
            return await timed(start)

    # One of each unmeasured: theirs is imported then, and its image made.
    starts = await in_turns({"ours": lambda: first(_ours), "theirs": lambda: first(rival)}, max(3, bench.few // 3))
    async with rival(bench) as theirs, _ours(bench) as ours:
        cells = await in_turns(
            {"ours": lambda: timed(lambda: ours("pass")), "theirs": lambda: timed(lambda: theirs("pass"))}, bench.few
        )
    return [
        Measurement(row, "ms", samples["ours"], samples["theirs"], name)
        for row, samples in zip(ROWS, (starts, cells), strict=True)
    ]


def _reason(exc: Exception) -> str:
    """Why a rival is left out."""
    if isinstance(exc, ImportError):
        return f"{exc}; pip install 'sandbox-kernel[rivals]'"
    return f"{type(exc).__name__}: {str(exc)[:500]}"


@contextlib.asynccontextmanager
async def _ours(bench: Bench) -> AsyncIterator[Run]:
    async with session(bench) as one:

        async def run(code: str) -> None:
            await checked(one, code)

        yield run


def _shared(folder: Path) -> Path:
    """A folder that the image's user can write."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, UID, UID)
    folder.chmod(0o777)
    return folder


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
