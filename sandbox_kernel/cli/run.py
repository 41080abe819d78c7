"""``sandbox-kernel run``: code from a file, an argument or standard input, in a session."""

from __future__ import annotations

import sys
import tokenize
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_kernel.cli.options import AsJson, SessionName, SessionsRoot, make_settings, print_json

if TYPE_CHECKING:
    from sandbox_kernel.events import ExecutionResult
    from sandbox_kernel.manager import SessionManager
    from sandbox_kernel.session import Session
    from sandbox_kernel.settings import Settings

_NO_LIMIT = 0.0


def run(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Python file; - or none: standard input.")] = None,
    code: Annotated[str | None, typer.Option("-c", "--code", metavar="CODE", help="Run this code.")] = None,
    session: SessionName = None,
    timeout: Annotated[
        float | None, typer.Option(min=_NO_LIMIT, metavar="SECONDS", help="Longest run; 0: no limit [default: 300].")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Image to start [default: sandbox:latest].")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="BIND|TMPFS", help="BIND: with a record, TMPFS: without [default: BIND]."),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(metavar="none|full|HOST", help="A host that may be reached; may be repeated [default: none]."),
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory limit, e.g. 512m [default: 2g].")] = None,
    cpus: Annotated[float | None, typer.Option(metavar="N", help="CPU limit [default: 1].")] = None,
    runtime: Annotated[str | None, typer.Option(help="OCI runtime of the engine, e.g. runsc.")] = None,
    datasets: Annotated[Path | None, typer.Option(metavar="DIR", help="Host folder to see read-only at /data.")] = None,
    sessions_root: SessionsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run Python code in a session and print what it prints.

    With --session the session is started if need be and lives on, with its variables, until `sandbox-kernel stop ID`.
    Without, a session is made for this run alone; its record stays.

    Output goes to standard output as it comes, with the value of the last expression; tracebacks and the artifacts that
    were made go to standard error. The exit code is 0 if the cell ended well, 1 if it failed, timed out or lost its
    kernel, 130 after Ctrl-C (which ends the cell, not the session).

    \b
    Examples:
      sandbox-kernel run analysis.py
      sandbox-kernel run --session conv -c "x = 41"
      echo "x + 1" | sandbox-kernel run --session conv
      sandbox-kernel run --json --timeout 30 --memory 512m analysis.py
    """
    if code is not None and file is not None:
        raise typer.BadParameter("give a file or -c, not both")
    container = {
        "session_storage": None if storage is None else storage.upper(),
        "image": image,
        "network": _network(network),
        "memory_limit": memory,
        "cpus": cpus,
        "runtime": runtime,
        "datasets_path": datasets,
        "dataset_access": None if datasets is None else "LOCAL_RO",
    }
    others = {"sessions_root": sessions_root, "timeout_s": timeout or None}
    settings = make_settings(container | others, keep=session is not None)
    source = code if code is not None else _read(file)
    limit = None if timeout == _NO_LIMIT else settings.timeout_s

    from sandbox_kernel.cli.exits import FAILED, run_async

    given = [name for name, value in container.items() if value is not None]
    result = run_async(_run(settings, session, source, limit, given, as_json))
    if not result.success:
        raise typer.Exit(FAILED)


def _network(given: list[str] | None) -> str | list[str] | None:
    if not given:
        return None
    return given[0] if given in (["none"], ["full"]) else given


def _read(file: Path | None) -> str:
    if file is not None and str(file) != "-":
        try:
            with tokenize.open(file) as source:
                return source.read()
        except OSError as exc:
            raise typer.BadParameter(f"cannot read {file}: {exc.strerror}") from None
        except (SyntaxError, UnicodeDecodeError) as exc:
            raise typer.BadParameter(f"{file} is not Python source text: {exc}") from None
    if sys.stdin.isatty():
        typer.echo("Reading code from the terminal; Ctrl-D ends it.", err=True)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise typer.BadParameter(f"standard input is not UTF-8: {exc}") from None


async def _run(
    settings: Settings, session_id: str | None, code: str, limit: float | None, given: list[str], as_json: bool
) -> ExecutionResult:
    from sandbox_kernel.cli.live import Live
    from sandbox_kernel.events import Finished
    from sandbox_kernel.manager import SessionManager

    if session_id is not None:
        from sandbox_kernel.cli.living import settings_of

        settings = await settings_of(settings, session_id) or settings
    async with SessionManager(settings) as manager:
        session = await _open(manager, session_id, given)
        if as_json:
            result = await session.execute(code, timeout=limit)
            print_json(_document(result))
            return result
        live = Live()
        async with aclosing(session.stream(code, timeout=limit)) as events:
            async for event in events:
                live.show(event)
                if isinstance(event, Finished):
                    live.ended(event.result)
                    return event.result
    raise AssertionError("a stream ends with its result")


async def _open(manager: SessionManager, session_id: str | None, given: list[str]) -> Session:
    from sandbox_kernel.errors import SessionNotFound

    if session_id is None:
        return await manager.start()
    try:
        session = await manager.get(session_id)
    except SessionNotFound:
        return await manager.start(session_id)
    if given:
        names = ", ".join(given)
        typer.echo(f"session {session_id!r} runs already; without effect until it is stopped: {names}", err=True)
    return session


def _document(result: ExecutionResult) -> Mapping[str, Any]:
    return {"success": result.success} | result.model_dump(mode="json")
