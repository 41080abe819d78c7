"""Commands about sessions that are there: ``list``, ``state``, ``interrupt``, ``restart``, ``stop``, ``gc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sandbox_kernel.cli.options import AsJson, SessionId, SessionsRoot, SomeSessionIds, make_settings, print_json
from sandbox_kernel.errors import SandboxError, SessionHeld, SessionNotFound

if TYPE_CHECKING:
    from sandbox_kernel.events import PythonState, SessionInfo
    from sandbox_kernel.settings import Settings


def list_sessions(sessions_root: SessionsRoot = None, as_json: AsJson = False) -> None:
    """List the sessions, alive or recorded.

    \b
    running   a living process holds it
    detached  its kernel lives, and the next command takes it up
    stopped   its record is there; starting it again appends to it
    dead      its kernel ended without being asked
    """
    from sandbox_kernel.cli.exits import run_async

    found = run_async(_list(make_settings({"sessions_root": sessions_root})))
    if as_json:
        print_json([info.model_dump(mode="json") for info in found])
    elif found:
        from viewer.visible import one_line

        width = max(len(info.session_id) for info in found)
        for info in found:
            used = "-" if info.last_used is None else f"{info.last_used:%Y-%m-%d %H:%M:%S}"
            cells = f"{info.execution_count:4} cells"
            typer.echo(f"{info.session_id:{width}}  {info.status:8}  {used:19}  {cells}  {one_line(info.image)}")
    else:
        typer.echo("no sessions", err=True)


async def _list(settings: Settings) -> list[SessionInfo]:
    from sandbox_kernel.manager import SessionManager

    return await SessionManager(settings).list()  # not entered: looking must not make a store


def state(session_id: SessionId, sessions_root: SessionsRoot = None, as_json: AsJson = False) -> None:
    """Show the variables and imports of a session, as they were after its last cell."""
    from sandbox_kernel.cli.exits import run_async

    found = run_async(_state(make_settings({"sessions_root": sessions_root}), session_id))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from viewer.visible import one_line

    for name, variable in found.variables.items():
        typer.echo(f"{one_line(name)}: {one_line(variable.type)} = {one_line(variable.value)}")
    more = (found.variable_count or 0) - len(found.variables)
    if more > 0:
        typer.echo(f"... and {more} more variables")
    typer.echo(f"imported: {one_line(', '.join(found.imported_modules), 2000) or '-'}")


async def _state(settings: Settings, session_id: str) -> PythonState:
    from sandbox_kernel.cli.living import living
    from sandbox_kernel.directory import check_session_id
    from sandbox_kernel.snapshot import read_state
    from sandbox_kernel.workspace import parse_state

    folder = settings.sessions_root / check_session_id(session_id)
    if (folder / "session_metadata.json").exists():
        # From the file: that works whoever holds the session, and after its end.
        raw, problem = read_state(folder)
        if problem is not None:
            raise SandboxError(f"{folder / problem.where}: {problem.message}")
        return parse_state(raw)
    async with living(settings, session_id) as session:
        return await session.state()


def interrupt(session_id: SessionId, sessions_root: SessionsRoot = None) -> None:
    """End the cell that a session runs, whoever sent it. Its variables stay."""
    from sandbox_kernel.cli.exits import run_async

    run_async(_interrupt(make_settings({"sessions_root": sessions_root}), session_id))


async def _interrupt(settings: Settings, session_id: str) -> None:
    from sandbox_kernel.cli.living import attachment, living

    try:
        async with living(settings, session_id) as session:
            if not await session.interrupt():
                typer.echo(f"session {session_id!r} runs no cell", err=True)
    except SessionHeld:
        # Its holder writes the record; we are one more client of its kernel.
        await attachment(settings, session_id).interrupt_session()


def restart(session_id: SessionId, sessions_root: SessionsRoot = None) -> None:
    """Start a session's kernel anew. Its variables are gone, its record and artifacts stay."""
    from sandbox_kernel.cli.exits import run_async

    run_async(_restart(make_settings({"sessions_root": sessions_root}), session_id))


async def _restart(settings: Settings, session_id: str) -> None:
    from sandbox_kernel.cli.living import attachment, living
    from viewer.visible import one_line

    try:
        async with living(settings, session_id) as session:
            lost = await session.restart()
            # The names come from the kernel.
            typer.echo(f"variables gone: {one_line(', '.join(lost), 2000) or 'none'}", err=True)
    except SessionHeld:
        await attachment(settings, session_id).restart_session()


def stop(
    session_ids: SomeSessionIds = None,
    everything: Annotated[bool, typer.Option("--all", help="All sessions that no living process holds.")] = False,
    sessions_root: SessionsRoot = None,
) -> None:
    """Stop sessions: their kernels end, their records are closed and stay.

    \b
    Examples:
      sandbox-kernel stop conv
      sandbox-kernel stop --all
    """
    if everything == bool(session_ids):
        raise typer.BadParameter("name sessions, or give --all")

    from sandbox_kernel.cli.exits import exit_code, run_async

    failed = run_async(_stop(make_settings({"sessions_root": sessions_root}), session_ids))
    for exc in failed:
        from viewer.visible import visible

        typer.echo(f"sandbox-kernel: {visible(str(exc))}", err=True)
    if failed:
        raise typer.Exit(exit_code(failed[0]))


async def _stop(settings: Settings, session_ids: list[str] | None) -> list[SandboxError]:
    """Stop those, or all that nobody holds; what went wrong."""
    from sandbox_kernel.cli.living import settings_of
    from sandbox_kernel.manager import SessionManager

    failed: list[SandboxError] = []
    for session_id in session_ids or [i.session_id for i in await _list(settings) if i.status in ("detached", "dead")]:
        try:
            as_started = await settings_of(settings, session_id)
            if as_started is not None:
                async with SessionManager(as_started) as manager:
                    await manager.stop(session_id)
            elif not (settings.sessions_root / session_id / "session_metadata.json").exists():
                failed.append(
                    SessionNotFound(f"no session {session_id!r} in {settings.sessions_root}; see: sandbox-kernel list")
                )
        except SandboxError as exc:
            failed.append(exc)
    return failed


def gc(
    everything: Annotated[
        bool, typer.Option("--all", help="Stop also the sessions that were left alive on purpose.")
    ] = False,
    sessions_root: SessionsRoot = None,
) -> None:
    """Remove what crashed programs left: containers, networks, folders of ours that nobody holds."""
    from sandbox_kernel.cli.exits import run_async

    for line in run_async(_gc(make_settings({"sessions_root": sessions_root}), everything)):
        typer.echo(line)


async def _gc(settings: Settings, everything: bool) -> list[str]:
    from sandbox_kernel.manager import SessionManager

    return await SessionManager(settings).gc(all=everything)  # not entered: cleaning must not make a store
