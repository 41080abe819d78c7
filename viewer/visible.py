"""Text of a session made fit to be seen: nothing in it can act on the terminal, deceive the eye or flood the screen."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_LINES = 400
MAX_CHARS = 60_000

# Controls (C0 but tab and newline, DEL, C1), bidirectional and zero-width characters, separators, tags, surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_FRACTION = re.compile(r"(?<=:\d\d)\.\d+")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str) -> str:
    """``text`` with every character that a terminal would act on, or that cannot be seen, written as ``\\x1b``."""
    return _HIDDEN.sub(_escape, text.replace("\r\n", "\n")).expandtabs(4)


def one_line(value: Any, limit: int = 200) -> str:
    """Any value on one line, at most ``limit`` characters."""
    text = value if isinstance(value, str) else compact(value)
    text = visible(text[: limit * 2].replace("\r\n", "\n")).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def compact(value: Any) -> str:
    """A value that is not text, as JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return f"<{type(value).__name__}>"


def block(value: Any, *, fold: bool = False) -> str:
    """A value as lines of visible text, bounded; ``fold``: a progress bar's carriage returns leave its last state."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    text = value if isinstance(value, str) else "" if value is None else compact(value)
    text = text.replace("\r\n", "\n")
    if fold and "\r" in text:
        text = "\n".join(_overwrite(line) for line in text.split("\n"))
    if len(text) > MAX_CHARS:
        half = MAX_CHARS // 2
        text = f"{text[:half]}\n... [{len(text) - 2 * half} characters left out; --json has them] ...\n{text[-half:]}"
    lines = visible(text).rstrip("\n").split("\n")
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        lines[half:-half] = [f"... [{len(lines) - 2 * half} lines left out; --json has them] ..."]
    return "\n".join(line.rstrip() for line in lines)


def _overwrite(line: str) -> str:
    """What a terminal shows of a line with carriage returns in it."""
    shown = ""
    for part in reversed(line.split("\r")):  # each shows what the later ones leave uncovered
        if len(part) > len(shown):
            shown += part[len(shown) :]
    return shown


def when(value: Any) -> str:
    """A timestamp as it stands, without fractions of a second."""
    return _FRACTION.sub("", one_line(value, 40)) if value is not None else "-"


def size(value: Any) -> str:
    """A number of bytes for a person."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-" if value is None else one_line(value, 20)
    if abs(value) < 100_000:
        return f"{int(value)} bytes"
    unit, factor = ("kB", 1e3) if abs(value) < 1e6 else ("MB", 1e6) if abs(value) < 1e9 else ("GB", 1e9)
    return f"{value / factor:.1f} {unit}"
