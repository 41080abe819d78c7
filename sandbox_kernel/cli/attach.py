"""Commands that look at a session or attach to it: ``view``, ``lab``."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from sandbox_kernel.cli.options import SessionId, SessionsRoot, make_settings
from sandbox_kernel.errors import SessionHeld, SessionNotFound

if TYPE_CHECKING:
    from sandbox_kernel.settings import Settings


def view(
    context: typer.Context,
    session_id: Annotated[str, typer.Argument(metavar="ID", help="The session, or its folder.")],
    sessions_root: SessionsRoot = None,
) -> None:
    """Show the record of a session: metadata, history, variables, artifacts.

    \b
    Flags of the viewer (python -m viewer --help tells them all):
      --limit N        only the last N entries of the log
      --no-state       leave out the Python state
      --no-artifacts   leave out the artifacts
      --json           one JSON document
      --follow         go on showing entries as they are written
      --artifact ID    save an artifact (-o PATH; - is standard output)
      --verify         check the log's audit chain

    \b
    Examples:
      sandbox-kernel view conv
      sandbox-kernel view conv --limit 10 --no-state
    """
    import viewer

    settings = make_settings({"sessions_root": sessions_root})
    in_root = settings.sessions_root / session_id
    folder = in_root if in_root.is_dir() else Path(session_id)
    store = [] if any(flag.startswith("--store") for flag in context.args) else ["--store", str(settings.store_path)]
    raise typer.Exit(viewer.main([str(folder), *store, *context.args]))


def lab(
    session_id: SessionId,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
    kernelspec: Annotated[
        bool, typer.Option("--kernelspec", help="Only make the session known to the JupyterLabs of this user.")
    ] = False,
    sessions_root: SessionsRoot = None,
) -> None:
    """Open JupyterLab on a session's kernel, with its variables; the cells of both are in the record.

    In Lab, Stop interrupts the cell, and shutting the kernel down only detaches. A session that does not run is
    started. Ctrl-C ends Lab; the session lives on until `sandbox-kernel stop ID`.

    \b
    Examples:
      sandbox-kernel lab conv
      sandbox-kernel lab conv --port 8888 --no-browser
    """
    from sandbox_kernel.cli.exits import run_async

    settings = make_settings({"sessions_root": sessions_root})
    run_async(_lab(settings, session_id, port=port, browser=browser, kernelspec=kernelspec))


async def _lab(settings: Settings, session_id: str, *, port: int, browser: bool, kernelspec: bool) -> None:
    from sandbox_kernel.cli.living import notebook_dir, recorded_target, settings_of
    from sandbox_kernel.lab import LabServer, LabTarget, check_jupyterlab, how_to_attach, write_kernelspec
    from sandbox_kernel.manager import SessionManager

    if not kernelspec:
        check_jupyterlab()  # before a session is started that would be left for nothing
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(SessionManager(await settings_of(settings, session_id) or settings))
        # While Lab runs we hold the session, so that its cells are recorded; unless its holder does that.
        try:
            try:
                session = await manager.get(session_id)
            except SessionNotFound:
                typer.echo(f"session {session_id!r} did not run; it is started", err=True)
                session = await manager.start(session_id)
            # Beside the session directories, not in one: theirs is a contract, and a TMPFS session leaves nothing.
            folder = notebook_dir(settings, session_id)
            if session.directory is None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="sandbox-notebooks-")))
            target = LabTarget(session_id, session.connection_file, folder, session.container_id or "")
        except SessionHeld as exc:
            typer.echo(f"{exc}; it goes on writing the record", err=True)
            target = recorded_target(settings, session_id)
        if kernelspec:
            typer.echo(f"kernelspec: {write_kernelspec(target)}")
            return
        server = await stack.enter_async_context(LabServer(target, port=port, open_browser=browser))
        typer.echo(f"JupyterLab on session {session_id}: {server.url}\nCtrl-C ends it; the session lives on.\n")
        typer.echo(how_to_attach(target, url=server.url))
        await server.wait()
