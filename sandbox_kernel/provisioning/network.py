"""How a container is networked, and how clients reach the kernel in it: its Unix sockets, or ports on loopback.

| setting | ipc | tcp |
| --- | --- | --- |
| ``none`` | no network | a bridge of ours: no route out of it, no traffic between containers, published on loopback |
| a list | a bridge of its own, with the egress proxy alone in it (:mod:`.egress`) | the same, and the host |
| ``full`` | the engine's default bridge | the same |
"""

from __future__ import annotations

import ipaddress
import random
import sys
from collections.abc import Mapping
from typing import Any

from sandbox_kernel.errors import EngineError, LimitExceeded, SettingsError
from sandbox_kernel.provisioning.engine import MANAGED, Engine
from sandbox_kernel.provisioning.runtime import PORTS, TCP_BASE
from sandbox_kernel.settings import Settings

PRIVATE = "sandbox-kernel"
"""Name of the bridge that leads nowhere; shared by all tcp kernels without network."""

EGRESS = "sandbox-kernel.egress"
"""Label of a single kernel's bridge and proxy: the id of that kernel."""

OWN_POOL = ipaddress.IPv4Network("198.18.0.0/15")
"""The bridges of single kernels are cut from it. The engine's own pool has 31 networks in all; this block (RFC 2544,
for tests of network devices) is routed nowhere and holds 16,384 of eight addresses."""

_SHARED_KERNELS = (None, "runc", "crun", "io.containerd.runc.v2")
"""OCI runtimes whose containers share the host's Linux kernel, and so its Unix sockets."""
_SOCKETS = {"--host-uds=create", "--host-uds=all"}
"""Arguments by which gVisor lets the Unix sockets of its containers appear on the host."""
_NO_NETWORK = "--network=none"

_OWN_PREFIX = 29
_TRIES = 50

_OPTIONS = {
    "com.docker.network.bridge.enable_ip_masquerade": "false",
    "com.docker.network.bridge.enable_icc": "false",
}

# The engine's resolver would ask the world's name servers for us: give it one that is not there.
NO_NAMES = {"Dns": ["127.0.0.1"], "DnsOptions": ["timeout:1", "attempts:1"]}


def choose_transport(settings: Settings, engine: Engine) -> str:
    """``ipc`` or ``tcp``: as the settings say, else ``ipc`` where the container's sockets can be reached from here.

    Raises SettingsError where the settings' runtime rules it out. Asks the engine for another runtime's arguments.
    """
    shared = settings.runtime in _SHARED_KERNELS
    arguments = [] if shared else engine.runtimes().get(str(settings.runtime), [])
    transport: str = settings.transport
    if transport == "auto":
        local = sys.platform == "linux" and engine.unix and not engine.desktop and engine.shares_files is not False
        transport = "ipc" if local and (shared or not _SOCKETS.isdisjoint(arguments)) else "tcp"
    if _NO_NETWORK in arguments and (transport == "tcp" or settings.network != "none"):
        wanted = f"network={settings.network!r}" if settings.network != "none" else f"transport={transport!r}"
        raise SettingsError(
            f"the engine gives its runtime {settings.runtime!r} no network ({_NO_NETWORK}), and {wanted} needs one"
        )
    return transport


def network_config(settings: Settings, transport: str, engine: Engine) -> dict[str, Any]:
    """Fields of ``HostConfig``; makes the private bridge where needed (blocks). Raises EngineError, SettingsError."""
    if not isinstance(settings.network, str):
        raise SettingsError(f"network={settings.network!r}: a list of hosts needs the egress proxy")
    if settings.network == "full":
        return {"NetworkMode": "bridge"}
    if transport == "ipc":
        return {"NetworkMode": "none"}
    _ensure_private(engine)
    return {"NetworkMode": PRIVATE, **NO_NAMES}


def _ensure_private(engine: Engine) -> None:
    if engine.network(PRIVATE) is not None:
        return
    # Let the engine pick a free subnet, then make the bridge with a default gateway in it that nobody has:
    # whatever is not in the subnet is unreachable, and without CAP_NET_ADMIN no kernel changes its routes.
    labels = {MANAGED: "1"}
    probe = f"{PRIVATE}-probe"
    try:
        engine.create_network(probe, ipam=None, options={}, labels=labels)
        found = engine.network(probe)
        if found is None:
            raise EngineError(f"the network {probe} vanished while {PRIVATE} was made; try again")
        subnet = ipaddress.IPv4Network(found["IPAM"]["Config"][0]["Subnet"])
        engine.remove_network(probe)
        engine.create_network(PRIVATE, ipam=_without_gateway(subnet), options=_OPTIONS, labels=labels)
    except EngineError:
        # Another process may be making it: theirs is as good.
        if engine.network(PRIVATE) is None:
            raise


def _without_gateway(subnet: ipaddress.IPv4Network) -> dict[str, Any]:
    nobody = str(subnet.broadcast_address - 1)
    return {
        "Driver": "default",
        "Config": [{"Subnet": str(subnet), "AuxiliaryAddresses": {"DefaultGatewayIPv4": nobody}}],
    }


def port_bindings(ports: tuple[int, ...]) -> dict[str, Any]:
    """What is to be published, and where on the host: at ``ports``, or where the engine likes when there are none."""
    return {
        f"{TCP_BASE + number}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port or "")}]
        for number, port in enumerate(ports or (0,) * len(PORTS))
    }


def published_ports(found: Mapping[str, Any]) -> tuple[int, ...]:
    """The host's ports out of the container's ``NetworkSettings``."""
    ports = found["Ports"] or {}
    bindings = [ports.get(f"{TCP_BASE + number}/tcp") for number in range(len(PORTS))]
    # A container that is dead already has none; the watch tells of that.
    return tuple(int(binding[0]["HostPort"]) if binding else 1 for binding in bindings)


def create_own(engine: Engine, name: str, *, published: bool, labels: Mapping[str, str]) -> ipaddress.IPv4Network:
    """Make a bridge for one kernel and its proxy, from which no route leads out; its subnet (blocks).

    The host has an address in it only when ``published``: ports of an internal network cannot be. Raises EngineError.
    """
    for _ in range(_TRIES):
        offset = random.randrange(2 ** (_OWN_PREFIX - OWN_POOL.prefixlen)) * 2 ** (32 - _OWN_PREFIX)
        subnet = ipaddress.IPv4Network((OWN_POOL.network_address + offset, _OWN_PREFIX))
        try:
            if published:
                options = {"com.docker.network.bridge.enable_ip_masquerade": "false"}
                engine.create_network(name, ipam=_without_gateway(subnet), options=options, labels=labels)
            else:
                engine.create_network(
                    name,
                    ipam={"Driver": "default", "Config": [{"Subnet": str(subnet)}]},
                    options={"com.docker.network.bridge.inhibit_ipv4": "true"},
                    labels=labels,
                    internal=True,
                )
        except EngineError as exc:
            if "overlaps" not in str(exc):
                raise
        else:
            return subnet
    raise LimitExceeded(
        f"no subnet of {OWN_POOL} is free for a session's network; stop a session or run: sandbox-kernel gc"
    )


def remove_unused(engine: Engine) -> list[str]:
    """Remove our networks that no container uses, but for those of single kernels; their names."""
    names = [str(entry["Name"]) for entry in engine.networks() if EGRESS not in (entry.get("Labels") or {})]
    return [name for name in names if engine.remove_network(name)]
