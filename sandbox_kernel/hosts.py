"""Which hosts a session may reach: the entries of ``Settings.network`` when it is a list.

| entry | allows |
| --- | --- |
| ``pypi.org`` | that name, ports 80 and 443 |
| ``pypi.org:8443`` | that name, that port |
| ``*.example.org`` | every name below ``example.org``, not ``example.org`` itself |
| ``10.0.0.5:8080`` | that address, named as an address; the only way to a private one |

Names are compared in ASCII (IDNA 2008 with UTS 46), in lower case, without a trailing dot.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

import idna

DEFAULT_PORTS = (80, 443)
MAX_HOSTS = 300
"""Entries of one list; together they are the proxy's configuration, which is one environment variable."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


@dataclass(frozen=True)
class HostRule:
    """One entry, checked. ``str(rule)`` is the entry as it is kept: ASCII, lower case."""

    host: str
    """A name or an IPv4 address; of a wildcard what follows ``*.``."""
    wildcard: bool = False
    port: int | None = None
    """None: :data:`DEFAULT_PORTS`."""

    @classmethod
    def parse(cls, entry: str) -> HostRule:
        """Raises ValueError that names the entry and says what is wrong with it."""
        try:
            return cls._parse(entry.strip())
        except ValueError as exc:
            raise ValueError(f"{entry!r} is no host to allow: {exc}") from None

    @classmethod
    def _parse(cls, entry: str) -> HostRule:
        if "/" in entry or "@" in entry:
            raise ValueError("write the name alone, without scheme, user or path, like 'pypi.org'")
        if entry.startswith("[") or entry.count(":") > 1:
            raise ValueError("IPv6 addresses cannot be listed; list a name, or an IPv4 address")
        name, colon, digits = entry.partition(":")
        port = None
        if colon:
            if not re.fullmatch(r"[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
                raise ValueError("after the colon stands a port from 1 to 65535")
            port = int(digits)
        wildcard = name.startswith("*.")
        name = name[2:] if wildcard else name
        if name == "*":
            raise ValueError("to allow every host write network='full'")
        if "*" in name:
            raise ValueError("a '*' can only stand first, for whole labels, like '*.example.org'")
        host = _ascii(name)
        numeric = re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]) is not None
        if numeric:
            if wildcard:
                raise ValueError("an address has no names below it")
            try:
                ipaddress.IPv4Address(host)
            except ValueError:
                raise ValueError("it looks like an IPv4 address, but is none of the form 1.2.3.4") from None
        elif wildcard and "." not in host:
            raise ValueError("it would allow a whole top-level domain; to allow every host write network='full'")
        return cls(host, wildcard, port)

    @property
    def literal(self) -> bool:
        """Whether it is an address."""
        return self.host.rpartition(".")[2].isdigit()

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports it allows."""
        return DEFAULT_PORTS if self.port is None else (self.port,)

    def __str__(self) -> str:
        return ("*." if self.wildcard else "") + self.host + ("" if self.port is None else f":{self.port}")


def parse_hosts(entries: list[str]) -> list[HostRule]:
    """The rules of a list, each once. Raises ValueError naming the bad entry."""
    if not entries:
        raise ValueError("an empty list allows nothing; write network='none'")
    if alone := {"none", "full"}.intersection(entries):
        raise ValueError(f"{min(alone)!r} stands alone, not in a list of hosts")
    if len(entries) > MAX_HOSTS:
        raise ValueError(f"{len(entries)} hosts are more than {MAX_HOSTS}; use wildcards, or network='full'")
    return list(dict.fromkeys(HostRule.parse(entry) for entry in entries))


def _ascii(name: str) -> str:
    """The name as DNS knows it: lower case, IDNA, no trailing dot. Raises ValueError."""
    name = name.removesuffix(".")
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as exc:
            raise ValueError(f"it is no internationalised name ({exc})") from None
    name = name.lower()
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("a host name has labels of letters, digits and hyphens, separated by dots")
    return name
