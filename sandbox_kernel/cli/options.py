"""Options that several commands have, and the settings they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sandbox_kernel.settings import Settings

SessionsRoot = Annotated[
    Path | None,
    typer.Option("--sessions-root", metavar="DIR", help="Folder of the sessions [default: sessions]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def _session_ids(incomplete: str) -> list[str]:
    """Shell completion: the sessions that have a folder; asks no engine."""
    from viewer.folder import sessions_root

    root = sessions_root()
    names = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    return sorted(name for name in names if name.startswith(incomplete) and not name.startswith("."))


SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session.", autocompletion=_session_ids)]
SomeSessionIds = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="The sessions.", autocompletion=_session_ids)
]
SessionName = Annotated[
    str | None, typer.Option("--session", "-s", metavar="ID", help="The session.", autocompletion=_session_ids)
]


def make_settings(given: Mapping[str, Any], *, keep: bool = True) -> Settings:
    """Settings from the options that were given (those that are None come from environment, ``.env``, default).

    ``keep``: what a command leaves running lives on for the next one. Raises SettingsError.
    """
    from sandbox_kernel.settings import Settings

    return Settings(stop_on_exit=not keep, **{name: value for name, value in given.items() if value is not None})


def print_json(document: Any) -> None:
    """One document on standard output; what JSON lacks is written as text."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))
