"""How a value becomes one line of JSON and a line a value again: what the record's writers and readers agree on."""

from __future__ import annotations

import codecs
import json
import os
import re
from typing import Any

# What a terminal or an editor would act on when somebody prints the file: C1 controls, DEL, line and paragraph
# separators, bidirectional overrides; and lone surrogates, which UTF-8 does not have.
_UNSAFE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _default(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return f"<{type(value).__name__}>"


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_default)


def _clean(value: Any, depth: int = 0) -> Any:
    """``value`` with what JSON has no form for (NaN, odd keys, endless nesting) turned into text."""
    if depth > 100:
        return "..."
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return _clean(_default(value), depth + 1)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    # A lone surrogate becomes the visible text \udc80 (strict parsers refuse the escape); the others keep their value.
    return ("\\\\u%04x" if "\ud800" <= char <= "\udfff" else "\\u%04x") % ord(char)


def encode(value: Any) -> bytes:
    """``value`` as one line of strict JSON in UTF-8, without the newline. Never fails and never lets a control
    character, a bidirectional override or invalid text through as such."""
    try:
        text = _ENCODER.encode(value)
    except (ValueError, TypeError, RecursionError):
        text = _ENCODER.encode(_clean(value))
    if not text.isascii() or "\x7f" in text:
        text = _UNSAFE.sub(_escape, text)
    return text.encode()


def cleaned(value: Any) -> Any:
    """``value`` with half surrogate pairs, which no file and no database can hold, as their escapes; in keys too."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def _escape_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    # Doubled, so that inside a JSON string it is the text \xff.
    return "".join(f"\\\\x{byte:02x}" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("sandbox-kernel.json", _escape_bytes)


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in one line; bytes that are no UTF-8 become the text ``\\xff``. Raises ValueError with the reason
    when there is none."""
    try:
        value = json.loads(data.decode("utf-8", "sandbox-kernel.json").lstrip("\ufeff"))
        if b"\\ud" in data or b"\\uD" in data:
            value = cleaned(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as exc:
        raise ValueError(str(exc)) from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value
