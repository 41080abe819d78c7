"""MIME bundles of displays: how big they are, and how the log holds them: pictures and long values by reference."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from sandbox_kernel.bounded import clean, size_of
from sandbox_kernel.events import BLOB_MIME

Output = dict[str, Any]

MAX_INLINE = 4 * 2**20
"""Bytes of displays that one line of the log takes. A line that grew past ``logfile.MAX_LINE`` would hide its cell."""
INLINE_TEXT = 64_000
"""A MIME value longer than this (bytes) stands in the log as a reference to a blob."""


def cost(value: Any) -> int:
    """Characters that a JSON value takes."""
    return len(value) if isinstance(value, str) else len(json.dumps(value, default=str))


def bundle_size(data: dict[str, Any]) -> int:
    """Characters that a bundle takes, names included."""
    return sum(len(mime) + cost(value) for mime, value in data.items())


def mime_value(mime: Any, value: Any) -> Any:
    """JSON MIME types hold any JSON value; all others text."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(mime, str) and (mime == "application/json" or mime.endswith("+json")):
        return json.loads(clean(json.dumps(value)))
    return clean(value)


def for_log(outputs: list[Output], put_blob: Callable[[bytes, str], str]) -> list[Output]:
    """``outputs`` with pictures and long values replaced by references; still valid nbformat.

    ``put_blob(data, mime)`` stores the bytes and returns their SHA-256.
    """
    logged, left = [], MAX_INLINE
    for output in outputs:
        if isinstance(output.get("data"), dict):
            data = _refer(output["data"], put_blob, left)
            left = max(0, left - bundle_size(data))
            output = {**output, "data": data}
        logged.append(output)
    return logged


def _refer(data: dict[str, Any], put_blob: Callable[[bytes, str], str], room: int) -> dict[str, Any]:
    """``room``: bytes that may stay in the line."""
    kept: dict[str, Any] = {}
    references: list[dict[str, Any]] = []
    for mime, value in data.items():
        binary = isinstance(value, str) and mime.startswith(("image/", "audio/", "video/", "application/pdf"))
        binary = binary and mime != "image/svg+xml"
        raw: bytes | None = None
        if binary:
            try:
                raw = base64.b64decode(value, validate=False)
            except (binascii.Error, ValueError):
                raw = value.encode("utf-8", "replace")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            room -= size_of(text)
            if room < 0 or (size_of(text) > INLINE_TEXT and mime != "text/plain"):
                raw = text.encode("utf-8")
        if raw is None:
            kept[mime] = value
        else:
            references.append({"sha256": put_blob(raw, mime), "size_bytes": len(raw), "mime": mime})
    if references:
        kept[BLOB_MIME] = references[0] if len(references) == 1 else references
    return kept
