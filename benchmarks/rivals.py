"""Others' executors on the same image: ``pip install 'sandbox-kernel[rivals]'``. One that is not installed is left out.

Each is driven as its documentation says, first result and ``pass``, in turns with ours. Where one wants to install
packages into its container at every start (there is no pip in our image, and no network), it finds them installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.cells import checked, session
from benchmarks.measure import Bench, Measurement, in_turns, timed
from benchmarks.raw import UID

Run = Callable[[str], Awaitable[None]]
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
    """Its Docker executor, where ``bench.image`` has jupyter_kernel_gateway."""
    from smolagents.monitoring import AgentLogger, LogLevel
    from smolagents.remote_executors import DockerExecutor

    # Without it the container ends at once, and the executor waits for it for minutes.
    look = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", bench.image]
    await asyncio.to_thread(subprocess.run, [*look, "-c", "import kernel_gateway"], check=True, capture_output=True)
    command = ["python3", "-m", "kernel_gateway", "--KernelGatewayApp.ip=0.0.0.0", "--KernelGatewayApp.port=8888"]
    one: Any = await asyncio.to_thread(
        DockerExecutor,
        [],
        AgentLogger(level=LogLevel.OFF),
        image_name=bench.image,
        build_new_image=False,
        container_run_kwargs={"command": command},
    )
    try:

        async def run(code: str) -> None:
            await asyncio.to_thread(one.run_code_raise_errors, code)

        yield run
    finally:
        await asyncio.to_thread(one.cleanup)


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
            print(f"  {name} left out: {type(exc).__name__}: {str(exc)[:200]}", file=sys.stderr)
    return found


async def _beside(name: str, rival: Rival, bench: Bench) -> list[Measurement]:
    async def first(make: Rival) -> float:
        async def start() -> None:
            run = await stack.enter_async_context(make(bench))
            await run("print(1 + 1)")

        async with contextlib.AsyncExitStack() as stack:
            return await timed(start)

    starts = await in_turns(
        {"ours": lambda: first(_ours), "theirs": lambda: first(rival)}, max(3, bench.few // 3), warm_up=0
    )
    async with rival(bench) as theirs, _ours(bench) as ours:
        cells = await in_turns(
            {"ours": lambda: timed(lambda: ours("pass")), "theirs": lambda: timed(lambda: theirs("pass"))}, bench.few
        )
    return [
        Measurement("first result, cold", "ms", starts["ours"], starts["theirs"], name),
        Measurement("pass", "ms", cells["ours"], cells["theirs"], name),
    ]


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
