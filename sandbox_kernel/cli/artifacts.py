"""``sandbox-kernel artifacts``: what sessions made."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sandbox_kernel.cli.options import AsJson, SessionName, SessionsRoot, make_settings, print_json
from sandbox_kernel.errors import ArtifactError, ArtifactNotFound, SessionNotFound

if TYPE_CHECKING:
    from sandbox_kernel.artifacts.store import ArtifactStore

app = typer.Typer(help="List and fetch the files that sessions made.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_artifacts(session: SessionName = None, sessions_root: SessionsRoot = None, as_json: AsJson = False) -> None:
    """List artifacts, of one session or of all; the oldest first.

    \b
    Examples:
      sandbox-kernel artifacts list
      sandbox-kernel artifacts list --session conv --json
    """
    store = _store(sessions_root)
    found = []
    if store is not None:
        with store:
            found = store.list(session)
    root = make_settings({"sessions_root": sessions_root}).sessions_root
    if session is not None and not found and not (root / session).is_dir():  # misspelt, most likely
        raise SessionNotFound(f"no session {session!r} in {root}, and no artifact of it; see: sandbox-kernel list")
    if as_json:
        print_json([artifact.model_dump(mode="json") for artifact in found])
        return
    from viewer.visible import one_line, size

    for artifact in found:
        version = f" (version {artifact.version})" if artifact.version > 1 else ""
        where = f"{artifact.session_id}  {one_line(artifact.path)}{version}"
        typer.echo(f"{artifact.id}  {size(artifact.size_bytes):>9}  {where}")
    if not found:
        typer.echo("no artifacts", err=True)


@app.command()
def get(
    artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Its id, art_...")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PATH", help="File or folder; - is standard output.")
    ] = None,
    sessions_root: SessionsRoot = None,
) -> None:
    """Save an artifact, by default under its own name in the current folder.

    \b
    Examples:
      sandbox-kernel artifacts get art_0123456789abcdef
      sandbox-kernel artifacts get art_0123456789abcdef -o - | sha256sum
    """
    store = _store(sessions_root)
    if store is None:
        raise ArtifactNotFound(f"no artifact {artifact_id!r}: there is no artifact store yet")
    with store:
        artifact = store.get(artifact_id)
        if output == Path("-"):
            with store.open_artifact(artifact_id) as source:
                shutil.copyfileobj(source, sys.stdout.buffer)
            return
        target = Path.cwd() if output is None else output
        if target.is_dir():
            # The name was chosen by code nobody has read.
            if not re.fullmatch(r"\w[\w .,+=@()-]*", artifact.filename):
                raise ArtifactError(f"its name is {artifact.filename!r}; name a file with -o")
            target = target / artifact.filename
            if target.exists():
                raise ArtifactError(f"{target} is there already; name another file with -o")
        store.save(artifact_id, target)
        typer.echo(str(target))


def _store(sessions_root: Path | None) -> ArtifactStore | None:
    """The store of the settings; None where there is none: looking must not make one."""
    from sandbox_kernel.artifacts.store import ArtifactStore

    path = make_settings({"sessions_root": sessions_root}).store_path
    return ArtifactStore.open(path) if path.is_dir() else None
