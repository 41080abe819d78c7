"""Commands about the machine: ``install``, ``image build``, ``engine up``, ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sandbox_kernel.cli.options import AsJson, SessionsRoot, make_settings, print_json

image = typer.Typer(help="The image that sessions run in.", no_args_is_help=True, rich_markup_mode=None)
engine = typer.Typer(help="The container engine.", no_args_is_help=True, rich_markup_mode=None)


def install(
    user: Annotated[bool, typer.Option("--user", help="Into this user's Jupyter folder.")] = False,
    sys_prefix: Annotated[bool, typer.Option("--sys-prefix", help="Into this Python environment.")] = False,
    prefix: Annotated[Path | None, typer.Option(metavar="DIR", help="Below this folder.")] = None,
    name: Annotated[str, typer.Option(help="Name of the kernelspec.")] = "sandbox",
    display_name: Annotated[str | None, typer.Option(help="What launchers show.")] = None,
) -> None:
    """Write the kernelspec by which any Jupyter program starts a kernel in a container.

    \b
    Examples:
      sandbox-kernel install --sys-prefix
      jupyter execute --kernel_name=sandbox notebook.ipynb
    """
    from sandbox_kernel.provisioning import kernelspec

    shown = {} if display_name is None else {"display_name": display_name}
    typer.echo(str(kernelspec.install(user=user, sys_prefix=sys_prefix, prefix=prefix, name=name, **shown)))


@image.command("build")
def build(
    tag: Annotated[str | None, typer.Option(help="Name of the image [default: sandbox:latest].")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="An image with Python 3.13 [default: python:3.13-slim].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build a current image again.")] = False,
    egress: Annotated[
        bool, typer.Option("--egress", help="The proxy of sessions that may reach a list of hosts, instead.")
    ] = False,
) -> None:
    """Build the image with numpy, pandas, matplotlib and their kin; nothing to do when it is current.

    \b
    Examples:
      sandbox-kernel image build
      sandbox-kernel image build --base my-registry/python:3.13
      sandbox-kernel image build --egress
    """
    if egress:
        from sandbox_kernel.provisioning.egress_image import build_egress_image

        if tag is not None:
            raise typer.BadParameter("--egress has a name of its own; leave --tag out")
        build_egress_image(base=base, force=force)
        return
    from sandbox_kernel.provisioning.image import TAG, build_image

    build_image(tag or TAG, base=base, force=force)


@engine.command("up")
def up(yes: Annotated[bool, typer.Option("--yes", help="Do it without asking.")] = False) -> None:
    """Make a container engine answer: start it, or (as root on Debian) install it first."""
    from sandbox_kernel.provisioning.bringup import bring_up

    bring_up(assume_yes=yes)


def doctor(
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Check the session folders and the artifact store instead.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="With --sessions: mend what can be mended.")] = False,
    sessions_root: SessionsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine lacks, and the command that mends it.

    Exit code 0 where only optional things lack.

    \b
    Examples:
      sandbox-kernel doctor
      sandbox-kernel doctor --sessions --repair
    """
    if repair and not sessions:
        raise typer.BadParameter("--repair needs --sessions")
    settings = make_settings({"sessions_root": sessions_root})
    if sessions:
        from sandbox_kernel.cli.inspection import inspect

        findings = list(inspect(settings, repair=repair))
        rows, fine = [finding._asdict() for finding in findings], all(finding.mended for finding in findings)
        lines = [f"{'mended' if found.mended else 'AMISS '}  {found.where}: {found.problem}" for found in findings]
        lines = lines or [f"{settings.sessions_root}: nothing amiss"]
    else:
        from sandbox_kernel.doctor import checks, fit

        found = checks(settings)
        rows, fine, lines = [vars(check) for check in found], fit(found), []
        for check in found:
            mark = "ok     " if check.ok else "MISSING" if check.required else "lacks  "
            lines.append(f"{mark}  {check.name}: {check.detail}")
            lines += [f"         {check.remedy}"] if check.remedy else []
    if as_json:
        print_json({"ok": fine, "checks": rows})
    else:
        typer.echo("\n".join(lines))
    if not fine:
        raise typer.Exit(1)
