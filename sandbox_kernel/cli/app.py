"""The commands of ``sandbox-kernel``.

Only typer is imported until one runs: ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sandbox_kernel import __version__
from sandbox_kernel.cli import artifacts, attach, machine, run, sessions
from sandbox_kernel.errors import SandboxError

app = typer.Typer(
    name="sandbox-kernel",
    help="""Python sessions in containers: they keep their variables, cannot harm the host, and leave a record.

    \b
    Exit codes:
      0    done
      1    the cell failed, or the session or artifact is not to be had
      2    wrong use: a flag, a setting, a session id, a file that is not there
      3    no engine, no image, or no kernel could be started
      130  interrupted with Ctrl-C

    \b
    Examples:
      sandbox-kernel run -c "1 + 1"
      sandbox-kernel run --session conv analysis.py
      sandbox-kernel view conv
      sandbox-kernel stop conv

    Every setting can be given in the environment as SANDBOX_<NAME>, or in a file .env.
    """,
    no_args_is_help=True,
    # Plain help: it needs no import of rich, and can be read by programs, and compared with docs/cli.md.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sandbox-kernel {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("list")(sessions.list_sessions)
app.command("state")(sessions.state)
app.command("interrupt")(sessions.interrupt)
app.command("restart")(sessions.restart)
app.command("stop")(sessions.stop)
app.command("view", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(attach.view)
app.command("lab")(attach.lab)
app.add_typer(artifacts.app, name="artifacts")
app.command("install")(machine.install)
app.add_typer(machine.image, name="image")
app.add_typer(machine.engine, name="engine")
app.command("doctor")(machine.doctor)
app.command("gc")(sessions.gc)


def _warn(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(f"sandbox-kernel: warning: {message}", file=sys.stderr)


def run_command(argv: Sequence[str] | None) -> None:
    """Run one, and leave with its exit code. A :class:`SandboxError` becomes its message on stderr."""
    warnings.showwarning = _warn
    try:
        app(args=None if argv is None else list(argv), prog_name="sandbox-kernel")
    except SandboxError as exc:
        from sandbox_kernel.cli.exits import exit_code
        from viewer.visible import visible

        print(f"sandbox-kernel: {visible(str(exc))}", file=sys.stderr)
        sys.exit(exit_code(exc))
