"""The session's network traffic in its log: what the egress proxy printed, each line once, whoever held the session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import RecordError
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.logfile import iter_log_backwards
from sandbox_kernel.provisioning.egress_log import EgressLine

BURST = 500
"""Lines that are written as they come; the code in a kernel may make thousands a second, and the log is the host's."""
PER_SECOND = 20
"""Further lines a second. What is more is gathered: one ``network_gathered`` line a second, with numbers and sums."""

_SUMS = ("bytes_sent", "bytes_received")


class TrafficLog:
    """Takes the proxy's lines for the ledger (see :class:`.provisioning.egress_log.Traffic`)."""

    def __init__(self, ledger: Ledger, log: Path | None, mask: Callable[[str], str] | None) -> None:
        self._ledger = ledger
        self._log = log
        self._mask = mask
        self._budget = float(BURST)
        self._refilled = asyncio.get_running_loop().time()
        self._gathered: dict[str, Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def since(self, proxy: str) -> str:
        """The last line of that proxy that stands in the log: what comes after it is new (blocks)."""
        try:
            for entry in iter_log_backwards(self._log) if self._log is not None else ():
                if entry.get("proxy") == proxy and isinstance(entry.get("at"), str):
                    return str(entry["at"])
        except RecordError:
            pass  # opening the record says what is wrong with it
        return ""

    def take(self, lines: list[EgressLine]) -> None:
        """Write them, in their order."""
        now = asyncio.get_running_loop().time()
        self._budget = min(float(BURST), self._budget + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        for line in lines:
            if self._gathered is None and self._budget >= 1:
                self._budget -= 1
                self._append(line.event, line.fields, line)
            else:
                self._gather(line)
        if self._gathered is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(1.0, self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self._ledger.append("network_gathered", **gathered)

    def _gather(self, line: EgressLine) -> None:
        if self._gathered is not None and self._gathered["proxy"] != line.proxy:
            self.flush()
        if self._gathered is None:
            self._gathered = {"connections": 0, "refusals": 0, **dict.fromkeys(_SUMS, 0)}
        gathered = self._gathered
        gathered["connections" if line.event == "network_connection" else "refusals"] += 1
        for name in _SUMS:
            gathered[name] += line.fields.get(name, 0)
        gathered |= {"proxy": line.proxy, "at": line.at}

    def _append(self, event: str, fields: dict[str, Any], line: EgressLine) -> None:
        host = fields.get("host")
        if self._mask is not None and isinstance(host, str):
            fields = {**fields, "host": self._mask(host)}
        self._ledger.append(event, **fields, proxy=line.proxy, at=line.at)
