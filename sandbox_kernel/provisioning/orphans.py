"""Containers of Jupyter programs that were killed: removed by the next kernel that such a program starts.

A session's container outlives its host process on purpose; a notebook's does not, just as a local kernel ends with the
program that started it.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from sandbox_kernel.errors import SandboxError
from sandbox_kernel.provisioning.engine import Engine
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, runtime_base

OWNER = "sandbox-kernel.owner"
"""Label with the process a container must not outlive: ``<boot id> <pid> <start time>``."""


def this_process() -> str:
    """The label's value for this process."""
    return _identity(os.getpid()) or ""


def _identity(pid: int) -> str | None:
    """Boot id, pid and start time (clock ticks): together never used twice. None where there is no such process."""
    try:
        started = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {pid} {started}"
    except (OSError, IndexError):
        return None


def sweep(engine: Engine) -> list[str]:
    """Remove containers whose owner is dead, with their runtime directories; their ids (blocks)."""
    removed = []
    for found in engine.containers():
        labels = found["Labels"]
        owner = labels.get(OWNER, "").split()
        if len(owner) != 3 or _identity(int(owner[1])) == " ".join(owner):
            continue
        engine.remove(found["Id"])
        path = Path(labels.get("sandbox-kernel.runtime", ""))
        if path.parent == runtime_base():  # a label is no licence to remove any folder
            RuntimeDirectory(labels["sandbox-kernel.kernel"], path).remove()
        removed.append(str(found["Id"]))
    return removed


def sweep_in_background(engine: Engine) -> None:
    """As :func:`sweep`, beside a launch that must not wait for it."""

    def run() -> None:
        with suppress(SandboxError):
            sweep(engine)

    threading.Thread(target=run, name="sandbox-kernel sweep", daemon=True).start()
