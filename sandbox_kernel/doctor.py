"""What this machine lacks, and the command that mends it.

:func:`checks` looks and touches nothing (but for one short-lived container). A machine is fit when nothing that is
``required`` is amiss.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sandbox_kernel.errors import SandboxError
from sandbox_kernel.provisioning.bringup import engine_status, plan
from sandbox_kernel.provisioning.egress_image import IMAGE as EGRESS_IMAGE
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.image import TAG, is_current
from sandbox_kernel.provisioning.probe import Probe, probe
from sandbox_kernel.provisioning.runtime import kernel_ids
from sandbox_kernel.settings import Settings

MIN_FREE = 2 * 2**30
"""Bytes free below ``sessions_root`` under which a session soon stands still."""


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``remedy`` is a command or a sentence, "" where nothing is to be done."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str = ""


def checks(settings: Settings) -> list[Check]:
    """Look at everything that ``settings`` need of this machine. Blocking; about a second. Raises no SandboxError."""
    found = [_python(), _folder(settings.sessions_root), _disk(settings.sessions_root)]
    if settings.engine == "docker":
        found += _engine(settings)
    found.append(_jupyterlab())
    return [replace(check, remedy="") if check.ok else check for check in found]


def fit(found: list[Check]) -> bool:
    """Whether only optional things are amiss."""
    return all(check.ok for check in found if check.required)


# --- the machine ------------------------------------------------------------------------------


def _python() -> Check:
    number = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "Python", sys.version_info >= (3, 11), True, f"{number} at {sys.executable}", "install Python 3.11 or newer"
    )


def _existing(path: Path) -> Path:
    """The nearest folder on the way up from ``path`` that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _folder(root: Path) -> Check:
    there = _existing(root)
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK) and not _read_only(there)
    detail = f"{root.absolute()} can be written" if ok else f"{there} cannot be written by uid {os.geteuid()}"
    return Check(
        "sessions root", ok, True, detail, f"give your user the folder, or set SANDBOX_SESSIONS_ROOT; now {root}"
    )


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(_existing(root)).free
    detail = f"{free / 2**30:.1f} GiB free below {root.absolute()}"
    return Check("free disk", free >= MIN_FREE, True, detail, "make room: sandbox-kernel gc, docker system prune")


def _jupyterlab() -> Check:
    try:
        return Check("JupyterLab", True, False, version("jupyterlab"))
    except PackageNotFoundError:
        return Check(
            "JupyterLab",
            False,
            False,
            "not installed; only `sandbox-kernel lab` needs it",
            "pip install 'sandbox-kernel[lab]'",
        )


# --- the engine -------------------------------------------------------------------------------


def _engine(settings: Settings) -> Iterator[Check]:
    """Each check needs the one before it: without an engine there is no image to look for."""
    status = engine_status()
    remedy = plan().obstacle or "sandbox-kernel engine up"
    yield Check("engine", status.answers, True, status.detail, remedy)
    if not status.answers:
        return
    yield from _guarded("runtime", lambda: _runtimes(settings))
    image = list(_guarded("image", lambda: [_image(settings.image)]))
    yield from image
    if isinstance(settings.network, list):
        yield from _guarded("egress image", lambda: [_egress_image()])
    uid, _ = kernel_ids()
    yield Check("kernel uid", uid != 0, True, f"kernels run with uid {uid}")
    if image[0].ok:
        yield from _guarded("isolation", lambda: _isolation(settings, probe(settings.image)))


def _guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """``look()``, or one failed check saying why it could not be done."""
    try:
        return look()
    except SandboxError as exc:
        return [Check(name, False, True, str(exc))]


def _runtimes(settings: Settings) -> list[Check]:
    known = sorted(Engine.shared().runtimes())
    gvisor = "runsc" in known
    found = [
        Check(
            "gVisor",
            gvisor,
            False,
            "runsc is there: runtime='runsc'" if gvisor else f"not installed (the engine has {', '.join(known)})",
            "https://gvisor.dev/docs/user_guide/install/",
        )
    ]
    if settings.runtime is not None:
        remedy = (
            f"install {settings.runtime} and name it in /etc/docker/daemon.json, or choose one of: {', '.join(known)}"
        )
        found.append(Check("runtime", settings.runtime in known, True, f"the setting is {settings.runtime!r}", remedy))
    return found


def _image(image: str) -> Check:
    if image != TAG:
        return Check("image", _present(image), True, image, f"docker pull {image}, or build it")
    if is_current(TAG):
        return Check("image", True, True, f"{TAG} is there and current")
    there = _present(image)
    detail = f"{TAG} is there, made from another recipe than this version's" if there else f"{TAG} is not on the engine"
    return Check("image", there, True, detail, "sandbox-kernel image build")


def _egress_image() -> Check:
    there = _present(EGRESS_IMAGE)
    detail = f"{EGRESS_IMAGE} is {'there' if there else 'not on the engine; network as a list of hosts needs it'}"
    return Check("egress image", there, True, detail, "sandbox-kernel image build --egress")


def _present(image: str) -> bool:
    return Engine.shared().is_image(image)


def _isolation(settings: Settings, seen: Probe) -> list[Check]:
    missing = [name for name, in_force in seen.limits.items() if in_force is False]
    unread = [name for name, in_force in seen.limits.items() if in_force is None]
    limits = "memory, pids and cpu limits are in force"
    if missing:
        limits = f"the engine takes these limits and ignores them: {', '.join(missing)}"
    elif unread:
        limits = f"limits that cannot be read back here: {', '.join(unread)}"
    over = (
        "Unix sockets reach the host"
        if seen.ipc
        else "Unix sockets do not reach the host: kernels are reached over TCP"
    )
    return [
        Check("limits", not missing, True, limits, "use an engine run by root, or rootless with cgroup v2 and systemd"),
        Check(
            "seccomp",
            seen.seccomp,
            True,
            "on" if seen.seccomp else "off",
            "use an engine and a Linux kernel with seccomp",
        ),
        Check(
            "capabilities",
            seen.capabilities == 0,
            True,
            f"CapEff is {seen.capabilities:#x}",
            "use an engine that drops capabilities",
        ),
        Check("ipc", seen.ipc, settings.transport == "ipc", over, "set SANDBOX_TRANSPORT=tcp or leave it at auto"),
    ]
