"""Containers of ours that were left: a dead one of the session that starts again, those of killed Jupyter programs.

A session's container outlives its host process on purpose; a notebook's does not, just as a local kernel ends with the
program that started it, and neither does a spare of the pool that no session has claimed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sandbox_kernel.errors import ContainerConflict, SandboxError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.provisioning import egress
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.death import explain
from sandbox_kernel.provisioning.engine import MANAGED, Engine, NotThere
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, runtime_base, session_of
from sandbox_kernel.provisioning.watch import Watch

T = TypeVar("T")

OWNER = "sandbox-kernel.owner"
"""Label with the process a container must not outlive: ``<boot id> <pid> <start time>``."""


def sweep(engine: Engine) -> list[str]:
    """Remove containers whose owner is dead, with their runtime directories; their ids (blocks)."""
    removed = []
    for found in engine.containers():
        labels = found["Labels"]
        owner = labels.get(OWNER, "").split()
        if len(owner) != 3 or process_identity(int(owner[1])) == " ".join(owner) or session_of(labels):
            continue
        engine.remove(found["Id"])
        remove_runtime(labels)
        removed.append(str(found["Id"]))
    if removed:
        egress.sweep(engine)
    return removed


def sweep_in_background(engine: Engine) -> None:
    """As :func:`sweep`, beside a launch that must not wait for it."""

    def run() -> None:
        with suppress(SandboxError):
            sweep(engine)

    threading.Thread(target=run, name="sandbox-kernel sweep", daemon=True).start()


def in_its_place(engine: Engine, spec: ContainerSpec, take: Callable[[], T]) -> T:
    """``take()``, which gives a container the name of ``spec``; a dead one of the session that has it is removed."""
    try:
        return take()
    except ContainerConflict:
        _make_room(engine, spec)
        return take()


def _make_room(engine: Engine, spec: ContainerSpec) -> None:
    """Remove a dead container of the same session; raises ContainerConflict for any other of that name (blocks)."""
    try:
        found = engine.inspect(spec.name)
    except NotThere:
        return
    labels = found["Config"].get("Labels") or {}
    who = f"{spec.name} ({found['Id'][:12]}, image {found['Config']['Image']})"
    if labels.get(MANAGED) != "1":
        raise ContainerConflict(
            f"the container name {who} is taken by a container that is not ours; "
            "rename or remove it, or choose another session id"
        )
    if found["State"]["Running"]:
        raise ContainerConflict(f"the container {who} still runs; get() its session instead of starting it, or stop it")
    if labels.get("sandbox-kernel.kernel") != spec.kernel_id and session_of(labels) != spec.session_id:
        raise ContainerConflict(f"the container {who} belongs to another session of ours; run: sandbox-kernel gc")
    engine.remove(found["Id"])


def last_words(spec: ContainerSpec, container: str, otherwise: str) -> KernelDeath:
    """Why a session's container cannot be taken over; ``otherwise``: what was seen while it runs (blocks)."""
    if spec.settings.engine == "local":
        return KernelDeath(cause="removed", message=otherwise)
    death = explain(Engine.shared(), Watch(container), spec.settings)
    return death if death.cause != "unknown" else KernelDeath(cause="unresponsive", message=otherwise)


def clear(spec: ContainerSpec) -> None:
    """Remove what is left of a session whose holder died: its containers, running too, and its runtime directory.

    For the holder of the session's lock only (blocks). Raises ContainerConflict when the container of its name is not
    ours.
    """
    if spec.settings.engine != "local":
        engine = Engine.shared()
        found = {entry["Id"]: entry["Labels"] for entry in engine.containers(kernel=spec.kernel_id)}
        try:
            named = engine.inspect(spec.name)
            found[named["Id"]] = named["Config"].get("Labels") or {}
        except NotThere:
            pass
        for container, labels in found.items():
            if labels.get(MANAGED) != "1":
                raise ContainerConflict(
                    f"the container name {spec.name} is taken by a container that is not ours; "
                    "rename or remove it, or choose another session id"
                )
            engine.remove(container)
            remove_runtime(labels)
        egress.Egress(engine, spec.kernel_id).remove()
    RuntimeDirectory(spec.kernel_id).remove()


def remove_runtime(labels: Mapping[str, str]) -> None:
    """Remove the runtime directory that a container of ours names."""
    path = Path(labels.get("sandbox-kernel.runtime", ""))
    if path.parent == runtime_base():  # a label is no licence to remove any folder
        RuntimeDirectory(labels.get("sandbox-kernel.kernel", path.name), path).remove()


def remove(engine: Engine, container: str) -> None:
    """Remove a container of ours with its runtime directory; one that is gone or not ours is left (blocks)."""
    try:
        labels = engine.inspect(container)["Config"].get("Labels") or {}
    except NotThere:
        return
    if labels.get(MANAGED) == "1":
        engine.remove(container)
        remove_runtime(labels)
