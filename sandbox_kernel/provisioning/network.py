"""How a container is networked. A list of hosts to reach will attach here.

| setting | ipc | tcp |
| --- | --- | --- |
| ``none`` | no network | a bridge of ours: no route out of it, no traffic between containers, published on loopback |
| ``full`` | the engine's default bridge | the same |
"""

from __future__ import annotations

import ipaddress
from typing import Any

from sandbox_kernel.errors import EngineError, SettingsError
from sandbox_kernel.provisioning.engine import MANAGED, Engine
from sandbox_kernel.settings import Settings

PRIVATE = "sandbox-kernel"
"""Name of the bridge that leads nowhere; shared by all tcp kernels without network."""

_OPTIONS = {
    "com.docker.network.bridge.enable_ip_masquerade": "false",
    "com.docker.network.bridge.enable_icc": "false",
}


def network_config(settings: Settings, transport: str, engine: Engine) -> dict[str, Any]:
    """Fields of ``HostConfig``; makes the private bridge where needed (blocks). Raises EngineError, SettingsError."""
    if not isinstance(settings.network, str):
        raise SettingsError(
            f"network={settings.network!r}: a list of hosts is not supported by this version; use 'none' or 'full'"
        )
    if settings.network == "full":
        return {"NetworkMode": "bridge"}
    if transport == "ipc":
        return {"NetworkMode": "none"}
    _ensure_private(engine)
    # The engine's resolver would ask the world's name servers for us: give it one that is not there.
    return {"NetworkMode": PRIVATE, "Dns": ["127.0.0.1"], "DnsOptions": ["timeout:1", "attempts:1"]}


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
        subnet = ipaddress.ip_network(found["IPAM"]["Config"][0]["Subnet"])
        engine.remove_network(probe)
        nobody = subnet.broadcast_address - 1
        ipam = {
            "Driver": "default",
            "Config": [{"Subnet": str(subnet), "AuxiliaryAddresses": {"DefaultGatewayIPv4": str(nobody)}}],
        }
        engine.create_network(PRIVATE, ipam=ipam, options=_OPTIONS, labels=labels)
    except EngineError:
        # Another process may be making it: theirs is as good.
        if engine.network(PRIVATE) is None:
            raise


def remove_unused(engine: Engine) -> list[str]:
    """Remove our networks that no container uses; their names."""
    return [name for name in engine.networks() if engine.remove_network(name)]
