"""MIME bundles of displays: how big they are, and how the log holds them: pictures and long values by reference."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from sandbox_kernel.bounded import clean, size_of
from sandbox_kernel.events import BLOB_MIME, shorten

Output = dict[str, Any]

MAX_INLINE = 4 * 2**20
"""Bytes of displays that one line of the log takes. A line that grew past ``logfile.MAX_LINE`` would hide its cell."""
MAX_MIMES = 64
"""Representations of one display; each may become a file."""
ERROR_TEXT = 1_000
INLINE_TEXT = 64_000
"""A MIME value longer than this (bytes) stands in the log as a reference to a blob."""


def cost(value: Any) -> int:
    """About the bytes that a JSON value takes in memory: text is as long as it is, ``[{},{},{}]`` 25 times its size."""
    if isinstance(value, str):
        return len(value)
    if not value:
        return 2
    text = json.dumps(value, default=str)
    return len(text) + 100 * text.count("{") + 56 * text.count("[") + 30 * text.count(",")


def bundle_size(data: dict[str, Any]) -> int:
    """The same of a bundle, names included."""
    return sum(len(mime) + cost(value) for mime, value in data.items())


def mime_value(mime: Any, value: Any) -> Any:
    """JSON MIME types hold any JSON value; all others text."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(mime, str) and (mime == "application/json" or mime.endswith("+json")):
        return json.loads(clean(json.dumps(value)))
    return clean(value)


def for_log(outputs: list[Output], keep_blob: Callable[[bytes], str]) -> list[Output]:
    """``outputs`` with pictures and long values replaced by references; still valid nbformat, and bounded altogether.

    ``keep_blob(data)`` takes bytes that are to be stored and returns their SHA-256.
    """
    logged, left = [], MAX_INLINE
    for output in outputs:
        if isinstance(output.get("data"), dict):
            data = _refer(output["data"], keep_blob, left)
            size = bundle_size(data) + cost(output["metadata"])
            output = {**output, "data": data, "metadata": output["metadata"] if size <= left else {}}
            left = max(0, left - size)
        elif output["output_type"] == "error":
            size = len(output["evalue"]) + cost(output["traceback"])
            if size > left:
                output = {**output, "evalue": shorten(output["evalue"], ERROR_TEXT), "traceback": []}
            left = max(0, left - size)
        logged.append(output)
    return logged


def _refer(data: dict[str, Any], keep_blob: Callable[[bytes], str], room: int) -> dict[str, Any]:
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
            references.append({"sha256": keep_blob(raw), "size_bytes": len(raw), "mime": mime})
    if references:
        kept[BLOB_MIME] = references[0] if len(references) == 1 else references
    return kept
