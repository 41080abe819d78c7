"""What Squid, the egress proxy, is told, and what it says. Pure functions.

Squid puts every host into one form before it compares (lower case, no trailing dot, ``0x7f.1`` as ``127.0.0.1``), and
asks a name server only for names that are listed. A name is refused when any of its addresses is one of ``_INWARD``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from sandbox_kernel.hosts import HostRule

PORT = 3128
"""Where it listens."""
LISTENING = "Accepting HTTP Socket connections"
"""Stands in its output once it does."""

_INWARD = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16"),
    *("fc00::/7", "fe80::/10", "ff00::/8"),
)
"""Addresses that are not the internet's (IANA's special-purpose registries), and prefixes that stand for IPv4 ones.

Left out are the three blocks for documentation: nobody's network has them, but some lead their way out through them.
"""

_FIRST = """\
acl web proto HTTP
acl sandbox src {subnet}
acl inward dst {inward}
deny_info ERR_NOT_LISTED all
deny_info ERR_INWARD inward
http_access deny !sandbox
http_access deny manager"""
# negative_dns_ttl is also the least time an answer is kept: what was checked is what is connected to.
# debug_options: of Squid's own remarks only those on its start and end. Others quote requests, and might forge a line.
_REST = """\
http_access deny all
http_port {address}:{port}
negative_dns_ttl 60 seconds
connect_timeout 15 seconds
forward_timeout 30 seconds
dns_timeout 10 seconds
shutdown_lifetime 0 seconds
check_hostnames on
allow_underscore on
via off
forwarded_for delete
cache deny all
cache_mem 0
digest_generation off
memory_pools off
pinger_enable off
pid_filename none
coredump_dir /tmp
cache_store_log none
cache_log stdio:/dev/stderr
debug_options ALL,0 1,1
visible_hostname egress.sandbox
logformat egress {{"method":"%#.30rm","host":"%#.280>rd","port":"%#.30>rP","status":%>Hs,"outcome":"%Ss",\
"error":"%err_code","address":"%<a","sent":%>st,"received":%<st,"ms":%tr}}
access_log stdio:/dev/stdout egress
"""


def configuration(rules: Sequence[HostRule], *, address: str, subnet: str) -> str:
    """``squid.conf``: listen at ``address`` to clients of ``subnet`` and let them reach what ``rules`` allow."""
    groups: dict[tuple[bool, tuple[int, ...]], list[HostRule]] = {}
    for rule in rules:
        groups.setdefault((rule.literal, rule.ports), []).append(rule)
    acls, allowed = [], []
    for number, ((literal, ports), members) in enumerate(groups.items()):
        # -n: an address is not looked up backwards, so that nobody's PTR record makes it a listed name.
        acls += [f"acl hosts{number} dstdom_regex -n -i {_pattern(rule)}" for rule in members]
        acls.append(f"acl ports{number} port {' '.join(map(str, ports))}")
        which = f"hosts{number} ports{number}"
        if not literal:  # asks a name server, so it comes after what needs none
            allowed.append(f"http_access deny {which} inward")
        allowed += [f"http_access allow {which} {how}" for how in ("CONNECT", "web")]
    first = _FIRST.format(subnet=subnet, inward=" ".join(_INWARD))
    return "\n".join([*acls, first, *allowed, _REST.format(address=address, port=PORT)])


def _pattern(rule: HostRule) -> str:
    name = rule.host.replace(".", "\\.")
    return f"^[a-z0-9_.-]+\\.{name}$" if rule.wildcard else f"^{name}$"


def read_line(line: str) -> tuple[str, dict[str, Any]] | None:
    """A line of its output as (event, fields) of ``session.log``; None when it is about something else.

    ``network_connection``: host, port, method, address, bytes_sent, bytes_received, duration_s, and error where the
    host was not reached. ``network_refused``: host, port, method, reason.
    """
    if not line.startswith("{"):
        return None
    try:
        said = json.loads(line)
        fields: dict[str, Any] = {"host": _text(said, "host"), "port": None, "method": _text(said, "method")}
        port = _text(said, "port")
        if port is not None and port.isdigit():
            fields["port"] = int(port)
        error, status = _text(said, "error"), int(said["status"])
        if error == "ERR_INWARD":
            return "network_refused", fields | {"reason": "it resolves to an address inside a private network"}
        if error == "ERR_NOT_LISTED":
            return "network_refused", fields | {"reason": "not in the setting network"}
        if "DENIED" in said["outcome"] or (status == 400 and fields["host"] is None):
            return "network_refused", fields | {"reason": "no request for a host" if status != 400 else "malformed"}
        fields |= {
            "address": _text(said, "address"),
            "bytes_sent": int(said["sent"]),
            "bytes_received": int(said["received"]),
            "duration_s": int(said["ms"]) / 1000,
        }
        if error is not None and (fields["address"] is None or status in (502, 503, 504)):
            fields["error"] = _ERRORS.get(error, error)
        return "network_connection", fields
    except (ValueError, KeyError, TypeError):
        return None


_ERRORS = {
    "ERR_DNS_FAIL": "the name does not resolve",
    "ERR_CONNECT_FAIL": "no connection",
    "ERR_CANNOT_FORWARD": "no connection",
    "ERR_READ_TIMEOUT": "no answer in time",
}


def _text(said: Mapping[str, Any], name: str) -> str | None:
    """A field that Squid has escaped like a URL; None where it has nothing to say."""
    value = unquote(str(said[name]), errors="replace")[:300]
    return None if value in ("", "-") else value
