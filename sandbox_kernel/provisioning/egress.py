"""The egress proxy of one kernel: where its session may reach a list of hosts, this is its only way out.

    kernel ── bridge of its own, leads nowhere ── proxy (Squid) ── the engine's default bridge ── the hosts listed

The kernel has no route, no name server and no neighbour but the proxy, which resolves names itself, compares them with
the list, and prints a line for every connection and every refusal. Proxy and bridge live and die with the kernel's
container; they are found again by label, not by memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sandbox_kernel.errors import EngineError, ImageNotFound
from sandbox_kernel.hosts import HostRule
from sandbox_kernel.provisioning.container import seccomp_profile
from sandbox_kernel.provisioning.egress_image import IMAGE
from sandbox_kernel.provisioning.egress_log import EgressLine, EgressLog
from sandbox_kernel.provisioning.engine import MANAGED, Engine, NotThere
from sandbox_kernel.provisioning.network import EGRESS, NO_NAMES, create_own
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.squid import PORT, configuration

MAKER = "sandbox-kernel.maker"
"""Label with the process that made them: until it has made the kernel's container too, nobody else takes them away."""

_UPSTREAM = "bridge"
_UID = 65532
_MEMORY = 256 * 2**20
_YOUNG_S = 120.0
_STOP_S = 10.0
_COMMAND = 'printf %s "$SQUID_CONF" > /tmp/squid.conf && exec squid -N -f /tmp/squid.conf'


class Egress:
    """Proxy and bridge of the kernel ``kernel_id``. All methods block. Making the object touches nothing."""

    def __init__(self, engine: Engine, kernel_id: str) -> None:
        self._engine = engine
        self._kernel_id = kernel_id
        self.network = f"sandbox-kernel-{kernel_id}"
        self.container: str | None = None
        self._address = ""
        self._log: EgressLog | None = None

    def create(self, rules: Sequence[HostRule], *, published: bool, labels: dict[str, str]) -> None:
        """Make bridge and proxy; :meth:`follow` starts it. ``published``: the kernel is reached over tcp.

        Raises EngineError.
        """
        ours = {**labels, MANAGED: "1", EGRESS: self._kernel_id, MAKER: process_identity(os.getpid()) or ""}
        if self._engine.network(self.network) is not None:  # of a launch that was cut off
            self.remove()
        # The engine gives out addresses in their order: the kernel, whichever of the two starts first, gets the second.
        subnet = create_own(self._engine, self.network, published=published, labels=ours)
        self._address = str(subnet.network_address + 3)
        conf = configuration(rules, address=self._address, subnet=str(subnet))
        try:
            self.container = self._engine.create(f"{self.network}-egress", self._body(conf, ours))
        except ImageNotFound as exc:
            raise ImageNotFound(
                f"network as a list of hosts needs the image {IMAGE!r}, which is not on the engine; "
                "build it: sandbox-kernel image build --egress"
            ) from exc
        self._engine.connect(self.container, _UPSTREAM)

    def _body(self, conf: str, labels: dict[str, str]) -> dict[str, Any]:
        tmpfs = f"rw,noexec,nosuid,nodev,mode=1777,size={32 * 2**20}"
        host: dict[str, Any] = {
            "NetworkMode": self.network,
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": tmpfs, "/run": tmpfs, "/dev/shm": tmpfs},
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true", f"seccomp={seccomp_profile()}"],
            "Sysctls": {"net.ipv4.ip_forward": "0"},
            "Init": True,
            "PidsLimit": 32,
            "Memory": _MEMORY,
            "MemorySwap": _MEMORY,
            "NanoCpus": 10**9,
            # Squid sizes its tables by the number of descriptors it may have.
            "Ulimits": [
                {"Name": name, "Soft": limit, "Hard": limit} for name, limit in (("nofile", 4096), ("core", 0))
            ],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "16m", "max-file": "4"}},
            "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 20},
        }
        return {
            "Image": IMAGE,
            "Entrypoint": ["/bin/sh", "-c", _COMMAND],
            "Cmd": [],
            "User": f"{_UID}:{_UID}",
            "WorkingDir": "/tmp",
            "Hostname": "egress",
            "Env": [f"SQUID_CONF={conf}"],
            "Labels": labels,
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": host,
            "NetworkingConfig": {
                "EndpointsConfig": {self.network: {"IPAMConfig": {"IPv4Address": self._address}}},
            },
        }

    # -- the kernel's side -----------------------------------------------------------------

    def host_config(self) -> dict[str, Any]:
        """Fields of ``HostConfig`` of the kernel's container."""
        return {"NetworkMode": self.network, **NO_NAMES}

    def environment(self) -> dict[str, str]:
        """What makes HTTP clients in the kernel use the proxy."""
        url = f"http://{self._address}:{PORT}"
        here = "localhost,127.0.0.1,::1"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)
        return {**proxies, "NO_PROXY": here, "no_proxy": here}

    # -- what it says ----------------------------------------------------------------------

    def attach(self) -> bool:
        """Find the proxy of a kernel that lives; False when it is gone. Raises EngineError."""
        found = self._engine.containers(egress=self._kernel_id)
        self.container = str(found[0]["Id"]) if found else None
        return bool(found)

    def follow(self, deliver: Callable[[list[EgressLine]], None], *, since: str) -> None:
        """Call ``deliver`` from another thread with every line after ``since`` (engine time, "" for all)."""
        assert self.container is not None
        fresh = bool(self._address)
        self._log = EgressLog(self._engine, self.container, deliver, since=since, fresh=fresh)
        self._log.start()

    def wait_ready(self, timeout: float) -> None:
        """Return when the proxy listens; after :meth:`follow`. Raises EngineError with its last lines."""
        assert self._log is not None
        assert self.container is not None
        if not self._log.ready(timeout):
            if self._log.failure is not None:
                raise self._log.failure
            lines = self._engine.logs(self.container, tail=20)
            raise EngineError(f"the egress proxy of the kernel {self._kernel_id} did not start: {lines or 'no output'}")

    def detach(self) -> None:
        """Stop reading; the proxy goes on."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def stop(self) -> None:
        """Let the proxy end, within about a second; a step of :meth:`remove` that may come before the kernel's end."""
        if self.container is not None:
            with suppress(EngineError):
                self._engine.signal(self.container, "TERM")

    def remove(self) -> None:
        """Remove the proxy and its bridge; done already is done. After :meth:`stop` its last lines are delivered first.

        The kernel's container is gone by then.
        """
        for entry in self._engine.containers(egress=self._kernel_id):
            container = str(entry["Id"])
            if self._log is not None and container == self.container:
                self._log.join(_STOP_S)
            self._engine.remove(container)
        self.detach()
        self.container = None
        deadline = time.monotonic() + _STOP_S
        while not self._engine.remove_network(self.network) and time.monotonic() < deadline:
            time.sleep(0.05)  # the engine takes the kernel's container out of it


def sweep(engine: Engine) -> list[str]:
    """Remove proxies and bridges whose kernel's container is gone; a line for each (blocks)."""
    entries = engine.containers()
    kernels = {(entry.get("Labels") or {}).get("sandbox-kernel.kernel") for entry in entries}
    removed = []
    for entry in entries:
        labels = entry.get("Labels") or {}
        if labels.get(EGRESS) and labels[EGRESS] not in kernels and not _being_made(labels, entry.get("Created")):
            engine.remove(entry["Id"])
            removed.append(f"container {entry['Id'][:12]}: the egress proxy of a kernel that is gone")
    for entry in engine.networks():
        labels, name = entry.get("Labels") or {}, str(entry["Name"])
        if labels.get(EGRESS) and labels[EGRESS] not in kernels and not _being_made(labels, None):
            with suppress(NotThere):
                if engine.remove_network(name):
                    removed.append(f"network {name}: the kernel it was for is gone")
    return removed


def _being_made(labels: dict[str, str], created: Any) -> bool:
    """Whether the process that made it may still be about to make the kernel's container."""
    maker = labels.get(MAKER, "").split()
    ours = (process_identity(os.getpid()) or "").split()
    if len(maker) == 3 and ours and maker[0] == ours[0]:
        return process_identity(int(maker[1])) == " ".join(maker)
    # Made from another machine: nobody here can tell whether that process lives.
    return isinstance(created, int) and time.time() - created < _YOUNG_S
