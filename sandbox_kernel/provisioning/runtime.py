"""The runtime directory of one kernel: what its container boots from, its sockets, the client's connection file.

    <base>/<kernel id>/            0700, the host user's
    ├── boot/                      mounted read-only at /opt/sandbox-kernel
    │   ├── launch.py, hook.py ... copies: an upgrade of this package does not change a running container
    │   └── boot/{connection,options}.json
    ├── s/                         owned by the kernel's uid, mounted at /run/kernel
    └── session                    the session that claimed this kernel out of the pool

``<base>`` is ``$XDG_RUNTIME_DIR/sandbox-kernel``; for root ``/run/sandbox-kernel``; else ``/tmp/sandbox-kernel-<uid>``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_core.paths import jupyter_runtime_dir, secure_write

from sandbox_kernel.directory import replace_file, session_id_rule
from sandbox_kernel.errors import ConnectionFileError, EngineError, SettingsError
from sandbox_kernel.tree import remove_tree

BOOT = "/opt/sandbox-kernel"
SOCKETS = "/run/kernel"
SECRETS = "boot/secrets.json"
"""Below :data:`BOOT`: the session's secrets."""
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
"""In the container, port n of ``PORTS`` is ``TCP_BASE + n``, its socket ``/run/kernel/k-<n + 1>``."""
TCP_BASE = 9001

_SESSION = "session"
"""File with the id of the session that claimed a spare."""
_PATH_LIMIT = 107
"""Bytes of a Unix socket's path (sockaddr_un)."""


def kernel_ids() -> tuple[int, int]:
    """uid and gid a kernel runs with: the host user's, 1000 where that is root; never 0."""
    return (1000, 1000) if os.geteuid() == 0 else (os.geteuid(), os.getegid() or 1000)


@dataclass(frozen=True)
class Keys:
    """What makes two ends of a connection believe each other."""

    key: bytes
    """Signs messages (HMAC-SHA256)."""
    curve_public: str
    curve_secret: str
    """CurveZMQ pair (Z85), the kernel's; Jupyter clients hold both halves and authenticate the kernel by them."""

    @classmethod
    def new(cls, key: bytes = b"") -> Keys:
        """Fresh ones; ``key`` is kept when it is not empty."""
        public, secret = zmq.curve_keypair()
        return cls(key or os.urandom(32).hex().encode(), public.decode(), secret.decode())


def connection_info(keys: Keys, transport: str, ip: str, ports: tuple[int, ...]) -> KernelConnectionInfo:
    """Connection info as jupyter_client's managers compare it (``key`` is bytes)."""
    info: dict[str, Any] = dict(zip(PORTS, ports, strict=True))
    info |= {"transport": transport, "ip": ip, "key": keys.key, "signature_scheme": "hmac-sha256"}
    info |= {"curve_publickey": keys.curve_public, "curve_secretkey": keys.curve_secret}
    return info  # type: ignore[return-value]


def as_json(info: Mapping[str, Any]) -> bytes:
    """Connection info as a connection file."""
    return json.dumps({**info, "key": info["key"].decode(), "kernel_name": "sandbox"}, indent=1).encode()


@functools.cache
def kernel_side() -> dict[str, bytes]:
    """The files that run in the container: name -> content."""
    folder = Path(__file__).parent.parent / "kernel_side"
    return {entry.name: entry.read_bytes() for entry in sorted(folder.glob("*.py"))}


def runtime_base() -> Path:
    """The folder of all runtime directories of this user; made, and its owner checked. Raises SettingsError."""
    uid = os.geteuid()
    if uid == 0:
        base = Path("/run/sandbox-kernel")
    elif os.environ.get("XDG_RUNTIME_DIR") and os.access(os.environ["XDG_RUNTIME_DIR"], os.W_OK):
        base = Path(os.environ["XDG_RUNTIME_DIR"], "sandbox-kernel")
    else:
        base = Path(f"/tmp/sandbox-kernel-{uid}")
    with suppress(FileExistsError):
        base.mkdir(mode=0o700)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise SettingsError(f"{base} must be a folder that only uid {uid} can write; remove it or set XDG_RUNTIME_DIR")
    return base


def session_of(labels: Mapping[str, str]) -> str | None:
    """The session whose kernel a container of ours runs: its label, or, where it was a spare, what `assign` noted."""
    if labels.get("sandbox-kernel.session"):
        return labels["sandbox-kernel.session"]
    path = Path(labels.get("sandbox-kernel.runtime", ""))
    if path.parent != runtime_base():  # a label is no licence to read any file
        return None
    try:
        found = (path / _SESSION).read_text()
    except OSError:
        return None
    return found if re.fullmatch(session_id_rule, found) else None


class RuntimeDirectory:
    """See the module. Making the object touches nothing."""

    def __init__(self, kernel_id: str, path: Path | None = None) -> None:
        self.kernel_id = kernel_id
        self.path = path if path is not None else runtime_base() / kernel_id
        self.boot = self.path / "boot"
        self.sockets = self.path / "s"
        self.ip = str(self.sockets / "k")
        """``ip`` of the client's ipc connection info."""

    def check_length(self) -> None:
        """Raises SettingsError when the sockets' paths are longer than Linux takes."""
        if len(os.fsencode(self.ip)) + 2 > _PATH_LIMIT:
            raise SettingsError(
                f"the socket path {self.ip}-1 is longer than {_PATH_LIMIT} bytes; "
                "set XDG_RUNTIME_DIR to a shorter folder"
            )

    def boot_files(
        self, connection: Mapping[str, Any], options: Mapping[str, Any], secrets: Mapping[str, str]
    ) -> dict[str, bytes]:
        """What the container boots from: path below :data:`BOOT` -> content."""
        return {
            **kernel_side(),
            "boot/connection.json": as_json(connection),
            "boot/options.json": json.dumps({"connection_file": f"{BOOT}/boot/connection.json", **options}).encode(),
            **({SECRETS: json.dumps(dict(secrets)).encode()} if secrets else {}),
        }

    def create(self, files: Mapping[str, bytes]) -> None:
        """Make the folders and the boot files (replaced when they are there). Raises EngineError naming the place."""
        uid, gid = kernel_ids()
        try:
            # Only the topmost folder is closed: below it the kernel's uid must be able to read.
            self.path.mkdir(mode=0o700, exist_ok=True)
            for folder, mode in ((self.boot, 0o755), (self.boot / "boot", 0o755), (self.sockets, 0o700)):
                folder.mkdir(exist_ok=True)
                folder.chmod(mode)
            if os.geteuid() == 0:
                os.chown(self.sockets, uid, gid)
            for name, data in files.items():
                target = self.boot / name
                target.write_bytes(data)
                target.chmod(0o644)
        except OSError as exc:
            raise EngineError(f"cannot make the kernel's runtime folder {self.path}: {exc.strerror}") from exc

    def seal(self, sealed: bool) -> None:
        """Whether the folder of the sockets is the host's, once they are in it, or the kernel's, which is to make them.

        Sealed, its code can neither put anything else in their place nor fill the file system, which often is the
        machine's own ``/run``. Without effect where this user cannot give files away.
        """
        if os.geteuid() == 0:
            with suppress(FileNotFoundError):  # it has just been removed
                os.chown(self.sockets, *((0, 0) if sealed else kernel_ids()))
                self.sockets.chmod(0o755 if sealed else 0o700)

    def assign(self, session_id: str) -> None:
        """Note whose kernel this has become: the labels of a spare's container cannot change."""
        replace_file(self.path / _SESSION, session_id.encode())

    def keys(self) -> Keys:
        """The running kernel's keys, out of ``boot/`` (which the kernel cannot write). Raises ConnectionFileError."""
        path = self.boot / "boot" / "connection.json"
        try:
            found = json.loads(path.read_bytes())
            return Keys(found["key"].encode(), found["curve_publickey"], found["curve_secretkey"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConnectionFileError(
                f"{path} is missing or not ours ({exc!r}); the kernel cannot be reached again"
            ) from exc

    def secrets(self) -> dict[str, str]:
        """The session's secrets out of ``boot/``, so that a process that takes it over masks them too; else {}."""
        try:
            found = json.loads((self.boot / SECRETS).read_bytes())
        except (OSError, ValueError):
            return {}
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}

    def socket_paths(self) -> list[Path]:
        """Where the five sockets are, in the order of :data:`PORTS`."""
        return [self.sockets / f"k-{number}" for number in range(1, len(PORTS) + 1)]

    def remove(self) -> None:
        """Remove everything; gone already is done."""
        remove_tree(self.path)
        with suppress(OSError):
            self.connection_file.unlink()

    @property
    def connection_file(self) -> Path:
        """The client's connection file: ``kernel-<id>.json`` in Jupyter's runtime folder."""
        return Path(jupyter_runtime_dir()) / f"kernel-{self.kernel_id}.json"

    def write_connection_file(self, info: Mapping[str, Any]) -> Path:
        """Write the client's connection file (0600), where the kernel cannot reach it."""
        self.connection_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with secure_write(str(self.connection_file), binary=True) as file:
            file.write(as_json(info))
        return self.connection_file
