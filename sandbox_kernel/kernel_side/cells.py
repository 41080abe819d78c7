"""``cells.jsonl``: what the kernel itself knows of its cells, for a host process that was not there to see.

One line when a cell starts (``msg_id, session, username, execution_count, started_at, code``, and ``names``, those of
variables that ``python_state.json`` does not have yet) and one when it has ended (``names`` no more, but ``status``,
``ename``, ``evalue``, ``ended_at``). Lines are written whole, by one process. A line with ``status`` is an end; a
cell with none was running when the kernel or the machine died, or ended within the last milliseconds before.
"""

import contextlib
import json
import os
from collections import deque
from datetime import datetime, timezone
from typing import Any, Callable, Deque, Dict, Optional

from .describe import clean

CODE_LIMIT = 20_000
TEXT_LIMIT = 2_000
ROTATE_BYTES = 1 << 20
# O_NONBLOCK: a FIFO that the session's code put there is an error, not a wait for ever.
SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | SAFELY


def now() -> str:
    """ISO 8601 in UTC, with the offset."""
    return datetime.now(timezone.utc).isoformat()


class Cell:
    """One execute request while it runs."""

    __slots__ = ("entry", "status")

    def __init__(self, parent: Dict[str, Any], execution_count: Optional[int], hide: Callable[[str], str]) -> None:
        header = parent["header"]
        self.status: Optional[str] = None
        self.entry: Dict[str, Any] = {
            "msg_id": clean(str(header.get("msg_id"))[:TEXT_LIMIT]),
            "session": clean(str(header.get("session"))[:TEXT_LIMIT]),
            "username": clean(str(header.get("username"))[:TEXT_LIMIT]),
            "execution_count": execution_count,
            "started_at": now(),
            "code": clean(hide(str(parent["content"].get("code", "")))[:CODE_LIMIT]),
        }

    def end(self, reply: Dict[str, Any], hide: Callable[[str], str]) -> None:
        """Take the cell's outcome from its reply."""
        status = str(reply.get("status"))
        if status == "error":
            self.entry["ename"] = clean(str(reply.get("ename"))[:TEXT_LIMIT])
            self.entry["evalue"] = clean(hide(str(reply.get("evalue")))[:TEXT_LIMIT])
            if self.entry["ename"] == "KeyboardInterrupt":
                status = "interrupted"
        self.status = status

    def ended(self) -> Dict[str, Any]:
        """The line for its end. A cell without a reply was interrupted just before it could give one."""
        return {**self.entry, "status": self.status or "interrupted", "ended_at": now()}


class Journal:
    """Appends lines to a file; opens it anew each time, as a cell may close descriptors or delete the file."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "cells.jsonl")
        self.waiting: Deque[Dict[str, Any]] = deque()
        """Entries that have no line yet: some can wait until nobody waits for a reply."""
        self.too_long = False

    def write(self) -> None:
        """Write what waits, at once. Raises OSError, ValueError; then it is lost."""
        line = b""
        with contextlib.suppress(IndexError):  # another thread's cell may have taken the last one
            while self.waiting:
                line += json.dumps(self.waiting.popleft()).encode("ascii") + b"\n"
        if not line:
            return
        descriptor = os.open(self.path, APPEND, 0o644)
        try:
            os.write(descriptor, line)
            self.too_long = os.lseek(descriptor, 0, os.SEEK_CUR) > ROTATE_BYTES
        finally:
            os.close(descriptor)

    def rotate(self) -> None:
        """Keep the newest half. Raises OSError."""
        self.too_long = False
        descriptor = os.open(self.path, os.O_RDONLY | SAFELY)
        with open(descriptor, "rb") as file:
            file.seek(-ROTATE_BYTES // 2, os.SEEK_END)
            file.readline()
            kept = file.read()
        replace(self.path, kept)


def replace(path: str, data: bytes) -> None:
    """Put ``data`` at ``path`` at once: readers see the old file or the new one. Raises OSError."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | SAFELY, 0o644)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)  # on a full disk a half-written file would keep it full
        raise
