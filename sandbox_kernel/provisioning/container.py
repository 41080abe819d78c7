"""What one container is made of: from settings to the engine's document, without an engine.

:func:`body` is a pure function; the document is the Docker Engine API's ``POST /containers/create``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sandbox_kernel.provisioning.engine import MANAGED
from sandbox_kernel.provisioning.runtime import BOOT, SECRETS, SOCKETS, kernel_ids
from sandbox_kernel.settings import Settings

WORKDIR = "/session"
COMMAND = ("python3", f"{BOOT}/launch.py")
_OOM_SCORE = 500
"""Under memory pressure the machine's kernel ends sandboxes before the host's programs."""
_LABEL = "sandbox-kernel."


@dataclass(frozen=True)
class Mount:
    """A bind mount of a host folder or file."""

    source: Path
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class ContainerSpec:
    """Everything that one kernel's container is made from."""

    settings: Settings
    kernel_id: str
    session_id: str | None = None
    """None: a spare of the pool, or a kernel of a Jupyter program."""
    artifacts: Path | None = None
    """Host folder at ``/session/artifacts``; None: it is part of the tmpfs."""
    state: Path | None = None
    """Host folder at ``/session/state``; None: it is part of the tmpfs."""
    mounts: tuple[Mount, ...] = ()
    tmpfs: Mapping[str, str] = field(default_factory=dict)
    """Further tmpfs: target -> mount options (``{"/data": "size=1g,mode=0755"}`` belongs to the container's root)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables; visible in the engine's ``inspect``, so nothing secret."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables of the kernel alone, by way of a file in ``boot/``: ``inspect`` does not show them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of ``boot/options.json`` (see ``kernel_side/launch.py``)."""
    root: Path | None = None
    """``sessions_root``: part of the container's name and labels, so that equal ids of two roots do not meet."""

    @property
    def name(self) -> str:
        """``sandbox-kernel-<session>-<6 hex of the root>``."""
        if self.session_id is None:
            return f"sandbox-kernel-{self.kernel_id[:13]}-{root_hash(self.root)}"
        return f"sandbox-kernel-{self.session_id}-{root_hash(self.root)}"

    def sources(self) -> tuple[Path, ...]:
        """Host paths that are mounted."""
        folders = (self.artifacts, self.state)
        return (*(mount.source for mount in self.mounts), *(folder for folder in folders if folder is not None))

    def all_labels(self) -> dict[str, str]:
        """``sandbox-kernel.*``: managed, kernel, version, session, root (6 hex), path (of the root), and ``labels``."""
        labels = {MANAGED: "1", _LABEL + "kernel": self.kernel_id, **self.root_labels()}
        if self.session_id is not None:
            labels[_LABEL + "session"] = self.session_id
        if not self.settings.stop_on_exit:
            labels[_LABEL + "keep"] = "1"
        return labels | dict(self.labels)

    def root_labels(self) -> dict[str, str]:
        """Those that say whose it is, but not which kernel: version, root, path."""
        labels = {_LABEL + "version": _version()}
        if self.root is not None:
            labels |= {_LABEL + "root": root_hash(self.root), _LABEL + "path": str(self.root.resolve())}
        return labels

    def boot_options(self) -> dict[str, Any]:
        """``boot/options.json`` but for the connection file."""
        return {
            "imports": list(self.settings.pool_imports),
            "mask_secrets": self.settings.mask_secrets,
            "state_dir": f"{WORKDIR}/state",
            "artifacts_dir": f"{WORKDIR}/artifacts",
            "trims": True,
            "secrets_file": f"{BOOT}/{SECRETS}" if self.secrets else None,
            **self.options,
        }


def root_hash(root: Path | None) -> str:
    """Six hex digits that stand for a sessions root in names and labels."""
    return hashlib.sha256(os.fsencode(root.resolve()) if root is not None else b"").hexdigest()[:6]


@functools.cache
def _version() -> str:
    try:
        return version("sandbox-kernel")
    except PackageNotFoundError:  # run from a checkout
        return "0"


@functools.cache
def seccomp_profile() -> str:
    """Our seccomp profile (an allow list without ``io_uring``) as the engine takes it."""
    return json.dumps(json.loads(Path(__file__).with_name("seccomp.json").read_bytes()))


def body(
    spec: ContainerSpec,
    *,
    runtime_dir: Path | None,
    network: Mapping[str, Any],
    published: Mapping[str, Any] | None,
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """The engine's document for ``spec``.

    ``runtime_dir``: the kernel's runtime directory as the engine sees it, mounted; None when the engine does not see
    our files (a volume takes the boot files then). ``network``: fields of ``HostConfig`` from :mod:`.network`.
    ``published``: port bindings of tcp, None over ipc.
    """
    settings = spec.settings
    uid, gid = kernel_ids()
    owned = f"uid={uid},gid={gid}"
    mounts = [_bind(mount.source, mount.target, mount.read_only) for mount in spec.mounts]
    for folder, target in ((spec.artifacts, "artifacts"), (spec.state, "state")):
        if folder is not None:
            mounts.append(_bind(folder, f"{WORKDIR}/{target}", False))
    if runtime_dir is None:
        mounts.append({"Type": "volume", "Target": BOOT})
    else:
        mounts.append(_bind(runtime_dir / "boot", BOOT, True))
        if published is None:
            mounts.append(_bind(runtime_dir / "s", SOCKETS, False))
    # Larger than any artifact may be, so that one the store refuses is written whole and can be looked at.
    largest = max(2 * settings.max_artifact_bytes, settings.max_session_artifacts_bytes)
    threads = str(max(1, math.ceil(settings.cpus)))
    environment = {
        "HOME": WORKDIR,
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "IPYTHONDIR": "/tmp/.ipython",
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        **spec.env,
    }
    host: dict[str, Any] = {
        "Mounts": mounts,
        "Tmpfs": {
            WORKDIR: f"rw,exec,nosuid,nodev,mode=0700,size={settings.tmpfs_size},{owned}",
            "/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={settings.tmpfs_size}",
            **{target: f"rw,nosuid,nodev,{options}" for target, options in spec.tmpfs.items()},
        },
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true", f"seccomp={seccomp_profile()}"],
        "Init": True,
        "PidsLimit": settings.pids_limit,
        "Memory": settings.memory_limit,
        "MemorySwap": settings.memory_limit,
        "NanoCpus": int(settings.cpus * 1e9),
        "OomScoreAdj": _OOM_SCORE,
        "Ulimits": [
            {"Name": name, "Soft": limit, "Hard": limit}
            for name, limit in (("fsize", largest), ("nofile", 8192), ("core", 0))
        ],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "2"}},
        "RestartPolicy": {"Name": "no"},
        **network,
    }
    if settings.runtime is not None:
        host["Runtime"] = settings.runtime
    document: dict[str, Any] = {
        "Image": settings.image,
        "Entrypoint": list(COMMAND),
        "Cmd": [],
        "User": f"{uid}:{gid}",
        "WorkingDir": WORKDIR,
        "Hostname": "sandbox",
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "Labels": {**spec.all_labels(), **labels},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }
    if published is not None:
        host["PortBindings"] = dict(published)
        document["ExposedPorts"] = {port: {} for port in published}
    return document


def _bind(source: Path, target: str, read_only: bool) -> dict[str, Any]:
    # As a mount, not as a "bind": the engine refuses a source it does not see instead of making an empty folder.
    return {
        "Type": "bind",
        "Source": str(source.absolute()),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
