"""A message out of a kernel's hands: its frames, checked and read, or refused.

The kernel holds the key, so a good signature only says that it came from there. What passes here has the shape that
the Feed relies on and costs the host a bounded amount of memory, whatever it was made to be.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from typing import Any, cast

from jupyter_client.session import Session as WireSession

from sandbox_kernel.jsonline import cleaned

Message = dict[str, Any]

MAX_STRUCTURE = 16 * 2**20
"""Bytes of one frame outside its strings. Text is as long as it is; ``[{},{},{}...]`` takes 25 times its size."""
MAX_VALUES = 1_000_000
"""Values in one frame: to read and write more of them would keep the event loop, and so every session, for seconds."""
MAX_DEPTH = 100
"""What is nested more deeply cannot be written down again without exhausting Python's stack."""
MAX_NUMBER = 2**53


def read_message(wire: WireSession, frames: list[bytes]) -> Message:
    """The message in ``frames``. Raises ValueError for one that is not to be believed, and whatever parsing it does."""
    parts = cast(list[bytes], wire.feed_identities(frames)[1])
    # signature, header, parent header, metadata, content, buffers
    for part in parts[1:5]:
        if len(part) > MAX_VALUES and _bloated(part):
            raise ValueError("a message that would take many times its size in memory, or long to read")
    message = _unpack(wire, parts)
    header, parent, content = (message.get(name) for name in ("header", "parent_header", "content"))
    if not isinstance(header, dict) or not isinstance(parent, dict) or not isinstance(content, dict):
        raise ValueError("header, parent header and content must be objects")
    if not isinstance(message.get("msg_type"), str):
        raise ValueError("msg_type must be text")
    for name in ("msg_id", "session", "username"):
        if not isinstance(parent.get(name, ""), str) or len(parent.get(name, "")) > 1000:
            raise ValueError(f"{name} must be short text")
    if _nested(parts[1:5]):
        _check_depth((header, parent, content), MAX_DEPTH)
    if any(b"\\ud" in part or b"\\uD" in part for part in parts[1:5]):
        for name in ("header", "parent_header", "content", "msg_type"):
            message[name] = cleaned(message[name])
    return message


def _unpack(wire: WireSession, parts: list[bytes]) -> Message:
    """As ``wire.deserialize`` in a third of its time: the dates stay text, and no digests are kept.

    (It remembers 65,536 of them, 8 MB a session, against replayed messages; the kernel could sign new ones as well.)
    """
    if len(parts) < 5 or not hmac.compare_digest(wire.sign(parts[1:5]), bytes(parts[0])):
        raise ValueError("the signature is not the kernel's")
    # Not as bytes: json would look for UTF-16 in them.
    header, parent, metadata, content = (json.loads(part.decode("utf-8", "replace")) for part in parts[1:5])
    if not isinstance(header, dict):
        raise ValueError("the header must be an object")
    return {
        "header": header,
        "msg_id": header.get("msg_id"),
        "msg_type": header.get("msg_type"),
        "parent_header": parent,
        "metadata": metadata,
        "content": content,
    }


def count_of(value: Any) -> int | None:
    """``value`` as an execution count, None for anything that is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER else None


def _bloated(part: bytes) -> bool:
    if len(part) <= MAX_STRUCTURE and _separators(part) <= MAX_VALUES:
        return False
    plain = part.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * MAX_VALUES:
        return True
    outside = plain.split(b'"')[::2]
    return sum(map(len, outside)) > MAX_STRUCTURE or sum(map(_separators, outside)) > MAX_VALUES


def _separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _nested(parts: Iterable[bytes]) -> bool:
    return any(part.count(b"[") + part.count(b"{") > MAX_DEPTH for part in parts)


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, (dict, list, tuple)):
        if left <= 0:
            raise ValueError("nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (dict, list)):
                _check_depth(item, left - 1)
