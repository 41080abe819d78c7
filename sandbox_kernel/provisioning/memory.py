"""Whether the machine has memory left for one more kernel. Limits alone do not tell: together they may exceed it."""

from __future__ import annotations

import re
from pathlib import Path

from sandbox_kernel.errors import LimitExceeded

NEEDED = 192 * 2**20
"""What a kernel holds when it has started (about 50 MB), and some for the machine: below that Linux begins to kill."""


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raises LimitExceeded when there is not enough; where the machine does not say, there is."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.M)
    except OSError:
        return
    if found is not None and int(found[1]) * 1024 < NEEDED:
        raise LimitExceeded(
            f"this machine has {int(found[1]) // 1024} MB of memory left, too little for one more kernel "
            f"({NEEDED // 2**20} MB); stop a session, or run: sandbox-kernel gc"
        )
