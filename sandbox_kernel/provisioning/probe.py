"""What the engine really does with our limits: one small container tells what it sees of itself.

An engine may take a limit and ignore it (a rootless one on cgroup v1 does), so the container reads them back.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.container import seccomp_profile
from sandbox_kernel.provisioning.engine import MANAGED, Engine, SourceMissing
from sandbox_kernel.provisioning.runtime import kernel_ids, runtime_base

_MEMORY = 96 * 2**20
_PIDS = 32
_CPUS = 0.5
_WAIT_S = 15.0

_PROGRAM = """
import json, os, socket
def first(*paths):
    for path in paths:
        try:
            with open(path) as file:
                return file.read().split()[0]
        except OSError:
            pass
root = "/sys/fs/cgroup/"
with open("/proc/self/status") as file:
    status = dict(line.rstrip().split(":\\t", 1) for line in file)
print(json.dumps({
    "memory": first(root + "memory.max", root + "memory/memory.limit_in_bytes"),
    "pids": first(root + "pids.max", root + "pids/pids.max"),
    "cpu": first(root + "cpu.max", root + "cpu/cpu.cfs_quota_us"),
    "seccomp": status.get("Seccomp", "?"), "capabilities": status.get("CapEff", "?"), "uid": os.getuid(),
}), flush=True)
try:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/probe/s")
    listener.listen()
    listener.settimeout(10)
    listener.accept()
except OSError:
    pass
"""


@dataclass(frozen=True)
class Probe:
    """What the container found. ``limits`` says of each limit whether it is in force; None: it cannot be read there."""

    limits: dict[str, bool | None]
    seccomp: bool
    capabilities: int
    """Effective capabilities, as the bit mask of ``/proc/self/status``; 0 is what we ask for."""
    uid: int
    ipc: bool
    """Whether a Unix socket made in the container can be connected to from here."""


def probe(image: str) -> Probe:
    """Run the probe in ``image`` (it needs only ``python3``); about half a second. Blocking.

    Raises ImageNotFound, or EngineError with the container's output when the probe does not run.
    """
    engine = Engine.shared()
    with _folder() as folder:
        try:
            return _run(engine, image, folder)
        except SourceMissing:
            return _run(engine, image, None)


def _run(engine: Engine, image: str, folder: Path | None) -> Probe:
    """``folder``: the host's, for the socket; None where the engine cannot see our files."""
    uid, gid = kernel_ids()
    host: dict[str, Any] = {
        "Memory": _MEMORY,
        "MemorySwap": _MEMORY,
        "PidsLimit": _PIDS,
        "NanoCpus": int(_CPUS * 1e9),
        "NetworkMode": "none",
        "CapDrop": ["ALL"],
        "ReadonlyRootfs": True,
        "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp_profile()}"],
    }
    if folder is not None:
        host["Mounts"] = [{"Type": "bind", "Source": str(folder), "Target": "/probe"}]
    body = {
        "Image": image,
        "Cmd": ["python3", "-c", _PROGRAM],
        "Entrypoint": [],
        "User": f"{uid}:{gid}",
        "Labels": {MANAGED: "1"},
        "HostConfig": host,
    }
    container = engine.create(f"sandbox-kernel-probe-{secrets.token_hex(4)}", body)
    try:
        engine.start(container)
        connected = folder is not None and _connects(engine, container, folder / "s")
        report = _report(engine, container)
    finally:
        engine.remove(container)
    return Probe(
        limits={
            "memory": _equals(report["memory"], _MEMORY),
            "pids": _equals(report["pids"], _PIDS),
            # The quota's period is the engine's choice; without a quota it reads "-1" or "max".
            "cpu": None if report["cpu"] is None else report["cpu"] not in ("-1", "max"),
        },
        seccomp=report["seccomp"] == "2",
        capabilities=int(report["capabilities"], 16),
        uid=int(report["uid"]),
        ipc=connected,
    )


def _connects(engine: Engine, container: str, path: Path) -> bool:
    """Whether the container's socket takes a connection before it gives up or ends."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            try:
                client.connect(str(path))
            except OSError:
                if not engine.inspect(container)["State"]["Running"]:
                    return False
                time.sleep(0.02)  # the socket announces itself by appearing; an engine elsewhere never shows it
                continue
            return True
    return False


def _report(engine: Engine, container: str) -> dict[str, Any]:
    """The container's line of JSON, as soon as it has written it."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        running = engine.inspect(container)["State"]["Running"]
        output = engine.logs(container)
        for line in output.splitlines():
            if line.startswith("{"):
                report: dict[str, Any] = json.loads(line)
                return report
        if not running or time.monotonic() > deadline:
            raise EngineError(f"the probe's container said nothing of itself: {output or 'no output'}")
        time.sleep(0.05)  # a container's log has no event for "one line more"


def _equals(read: str | None, limit: int) -> bool | None:
    return None if read is None else read == str(limit)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder only the kernel's uid can write, with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=runtime_base()))
    try:
        if os.geteuid() == 0:
            os.chown(folder, *kernel_ids())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
