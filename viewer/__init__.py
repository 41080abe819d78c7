"""Looking at a session folder, ours or another program's: metadata, history, state, artifacts.

    python -m viewer sessions/conv --limit 10

Reads files only: no engine, no running session is needed or touched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from sandbox_kernel.errors import SandboxError
from viewer.folder import NoSession, locate

__all__ = ["main", "show"]


def show(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    state: bool = True,
    artifacts: bool = True,
    as_json: bool = False,
    follow: bool = False,
    artifact: str | None = None,
    output: str | os.PathLike[str] | None = None,
    verify: bool = False,
    store: str | os.PathLike[str] | None = None,
    out: TextIO | None = None,
) -> int:
    """Show the session in a folder (or of an id), and return the exit code.

    0: something was shown; 1: no session there, the artifact cannot be had, or ``verify`` found the log not intact.
    ``limit``: only the last entries of the log. ``artifact``: save this one, to ``output`` (``"-"``: standard output)
    or under its own name. ``store``: the artifact store, default ``.store`` beside the session's folder.
    """
    out = out or sys.stdout
    try:
        folder = locate(path)
        # Imported here: --help and a wrong path need none of it.
        from viewer import session as parts

        store_path = Path(store) if store is not None else _default_store(folder)
        if verify:
            return parts.show_verdict(folder, out, as_json=as_json)
        if artifact is not None:
            return parts.save_artifact(store_path, folder, artifact, output, out)
        reading = parts.Reading(folder, store_path)
        if follow:
            with contextlib.suppress(KeyboardInterrupt):
                parts.show_follow(reading, None if as_json else parts.choose_view(out), out, limit=limit)
        elif as_json:
            parts.show_json(reading, out, limit=limit, state=state, artifacts=artifacts)
        else:
            parts.show_text(reading, parts.choose_view(out), limit=limit, state=state, artifacts=artifacts)
        out.flush()
    except (NoSession, SandboxError) as exc:
        from viewer.visible import visible

        print(visible(str(exc)), file=sys.stderr)
        return 1
    return 0


def _default_store(folder: Path) -> Path:
    root = os.environ.get("SANDBOX_STORE_ROOT")
    return Path(root).expanduser() if root else folder.resolve().parent / ".store"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of entries")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m viewer",
        description="Show a session: metadata, history, Python state, artifacts.",
        epilog="examples: python -m viewer sessions/conv --limit 10 | python -m viewer conv --json | "
        "python -m viewer conv --artifact art_0123456789abcdef -o plot.png",
    )
    parser.add_argument("session", help="the session's folder, or its id (below $SANDBOX_SESSIONS_ROOT or sessions/)")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the last N entries of the log")
    parser.add_argument("--no-state", action="store_true", help="leave out the Python state")
    parser.add_argument("--no-artifacts", action="store_true", help="leave out the artifacts")
    parser.add_argument("--json", action="store_true", help="one JSON document instead (with --follow: JSON lines)")
    parser.add_argument("--follow", action="store_true", help="go on showing entries as they are written")
    parser.add_argument("--artifact", metavar="ID", help="save this artifact")
    parser.add_argument("-o", "--output", metavar="PATH", help="where to save it; - is standard output")
    parser.add_argument("--verify", action="store_true", help="check the log's audit chain; exit code 1 if not intact")
    parser.add_argument("--store", metavar="PATH", help="the artifact store (default: .store beside the folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes as :func:`show`; 2 for wrong flags."""
    parser = _parser()
    try:
        given = parser.parse_args(argv)
        if given.output is not None and given.artifact is None:
            parser.error("-o needs --artifact")
        if sum(map(bool, (given.follow, given.artifact is not None, given.verify))) > 1:
            parser.error("--follow, --artifact and --verify exclude each other")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 2
    with contextlib.suppress(AttributeError, ValueError):
        # What the terminal's encoding lacks is written as an escape, never an error.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return show(
            given.session,
            limit=given.limit,
            state=not given.no_state,
            artifacts=not given.no_artifacts,
            as_json=given.json,
            follow=given.follow,
            artifact=given.artifact,
            output=given.output,
            verify=given.verify,
            store=given.store,
        )
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has enough (`| head`); keep the interpreter's own flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
