"""Bring a Docker Engine up where none answers.

Only as root on Debian or Ubuntu is anything done (install Debian's ``docker.io``, start ``dockerd``), and only
what :func:`plan` announced. Elsewhere the caller gets the sentence that says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import docker
import requests

from sandbox_kernel.errors import EngineUnavailable
from sandbox_kernel.provisioning.process import Progress, run, say

DEFAULT_ENDPOINT = "unix:///var/run/docker.sock"
LOG = Path("/var/log/sandbox-kernel-dockerd.log")
PACKAGES = ("docker.io", "iptables")
START_TIMEOUT_S = 60.0
_PID_FILES = {
    "dockerd": Path("/var/run/docker.pid"),
    "containerd": Path("/var/run/docker/containerd/containerd.pid"),
}
_APT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine answers at ``endpoint``; ``detail`` is its version or why it does not."""

    answers: bool
    endpoint: str
    detail: str
    version: str = ""


@dataclass(frozen=True)
class BringUpPlan:
    """What :func:`bring_up` would run, in order; ``obstacle`` says why it may not, and what to do instead."""

    commands: list[list[str]] = field(default_factory=list)
    start_daemon: bool = False
    obstacle: str = ""

    def __str__(self) -> str:
        if self.obstacle:
            return self.obstacle
        steps = [" ".join(command) for command in self.commands]
        if self.start_daemon:
            steps.append(f"dockerd >{LOG} 2>&1 &   (in a session of its own; it goes on when this command ends)")
        return "\n".join(steps)


def engine_status(timeout_s: float = 5.0) -> EngineStatus:
    """Ask the engine that ``DOCKER_HOST`` (or the default socket) names for its version. Never raises."""
    endpoint = os.environ.get("DOCKER_HOST") or DEFAULT_ENDPOINT
    try:
        client = docker.from_env(timeout=timeout_s)
        try:
            version = client.version()
        finally:
            client.close()
    except (docker.errors.DockerException, requests.RequestException, OSError, ValueError) as exc:
        return EngineStatus(False, endpoint, f"no engine answers at {endpoint}: {_innermost(exc)}")
    number = str(version.get("Version", "?"))
    return EngineStatus(True, endpoint, f"Docker Engine {number} at {endpoint}", number)


def plan() -> BringUpPlan:
    """What is missing on this machine between now and an engine that answers."""
    endpoint = os.environ.get("DOCKER_HOST")
    if endpoint:
        return BringUpPlan(obstacle=f"start the engine that DOCKER_HOST={endpoint} names, or unset DOCKER_HOST")
    if sys.platform != "linux":
        return BringUpPlan(obstacle="install and start Docker Desktop: https://docs.docker.com/get-docker/")
    systemd = Path("/run/systemd/system").is_dir()
    installed = _find("dockerd") is not None
    if os.geteuid() != 0:
        start = "sudo systemctl start docker" if systemd else "sudo dockerd"
        remedy = start if installed else f"sudo apt-get install {' '.join(PACKAGES)} && {start}"
        return BringUpPlan(
            obstacle=f"run as root: {remedy}; then let your user in: sudo usermod -aG docker $USER (and log in anew)"
        )
    commands: list[list[str]] = []
    if not installed:
        if _find("apt-get") is None:
            return BringUpPlan(
                obstacle="install Docker Engine as your distribution does: https://docs.docker.com/engine/install/"
            )
        commands.append(["apt-get", "update", "-qq"])
        commands.append(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES])
    if systemd:
        commands.append(["systemctl", "start", "docker"])
    return BringUpPlan(commands=commands, start_daemon=not systemd)


def bring_up(assume_yes: bool = False, progress: Progress = say) -> EngineStatus:
    """Make an engine answer, or say what a person must do. Blocking; seconds to a minute.

    Without ``assume_yes`` a person at a terminal is asked first, and anybody else is refused.
    Raises EngineUnavailable with the remedy or the daemon's last log lines; EngineError when a command failed.
    """
    status = engine_status()
    if status.answers:
        progress(status.detail)
        return status
    progress(status.detail)
    todo = plan()
    if todo.obstacle:
        raise EngineUnavailable(f"{status.detail}\nTo mend it: {todo}")
    progress(f"To bring one up:\n{todo}")
    if not assume_yes and not _agreed():
        raise EngineUnavailable(f"{status.detail}\nTo mend it: sandbox-kernel engine up --yes (or the commands above)")
    for command in todo.commands:
        run(command, progress, environment=_APT)
    daemon = _start_daemon() if todo.start_daemon and not engine_status().answers else None
    try:
        status = _await_engine(daemon)
    finally:
        if daemon is not None:
            daemon.returncode = 0  # not ours to reap: it lives on, and Popen must not warn of it
    progress(status.detail)
    return status


def _start_daemon() -> subprocess.Popen[bytes] | None:
    """Start ``dockerd`` so that it outlives us and holds none of our descriptors."""
    if _daemon_alive():
        return None  # the package's own init script was quicker
    dockerd = _find("dockerd")
    if dockerd is None:
        raise EngineUnavailable(f"{' '.join(PACKAGES)} are installed, but there is no dockerd on this machine")
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}"}
    with LOG.open("ab") as log:
        return subprocess.Popen(
            [dockerd], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _daemon_alive() -> bool:
    """Whether the pid files name living daemons; those that name nobody, or somebody else, are removed.

    A daemon that was killed leaves them, and where the pid is in use again dockerd takes that process for a daemon.
    """
    alive = {name: _owner_lives(pid_file, name) for name, pid_file in _PID_FILES.items()}
    return alive["dockerd"]


def _owner_lives(pid_file: Path, name: str) -> bool:
    try:
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == name:
            return True
    except (OSError, ValueError):
        pass
    pid_file.unlink(missing_ok=True)
    return False


def _await_engine(daemon: subprocess.Popen[bytes] | None) -> EngineStatus:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        status = engine_status()
        if status.answers:
            return status
        if daemon is not None and daemon.poll() is not None:
            raise EngineUnavailable(f"dockerd ended at once ({daemon.returncode}). {_log_tail()}")
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"{status.detail} after {START_TIMEOUT_S:.0f} s. {_log_tail()}")
        time.sleep(0.2)  # the daemon has no event for "ready": its socket is asked again


def _log_tail() -> str:
    try:
        lines = LOG.read_text(errors="replace").splitlines()[-8:]
    except OSError:
        return ""
    return f"The last lines of {LOG}:\n" + "\n".join(lines)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        return False
    return input("Do that? [y/N] ").strip().lower() in ("y", "yes")


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def _innermost(exc: BaseException) -> str:
    """The cause at the bottom: docker-py wraps what happened three times."""
    while (inner := exc.__cause__ or exc.__context__) is not None:
        exc = inner
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
