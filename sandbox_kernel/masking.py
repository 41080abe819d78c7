"""Secrets that were given to a session are masked wherever they would be written."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote, quote_plus

from sandbox_kernel.errors import SettingsError
from sandbox_kernel.events import GAP

MASK = "***"
CHUNK = 2**20
SHORTEST = 4
"""A shorter secret would mask half of every text; it is refused."""


def check_secrets(secrets: Mapping[str, str]) -> None:
    """Raises SettingsError for a name that is no environment variable, or a value that cannot be masked (not shown)."""
    for name, value in secrets.items():
        if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise SettingsError(f"secret {name!r}: not a name of an environment variable (letters, digits, '_')")
        if not isinstance(value, str) or len(value) < SHORTEST or "\0" in value:
            raise SettingsError(
                f"secret {name!r}: its value must be a text of at least {SHORTEST} characters without NUL"
            )


class Masker:
    """Masks the values of ``secrets`` in a text, also in the forms in which one is often printed: as ``repr`` and JSON
    escape it, and as it stands in a URL."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        forms: set[str] = set()
        for value in secrets.values():
            for text in (value, *(line for line in value.splitlines() if len(line) >= SHORTEST)):
                forms |= {text, repr(text)[1:-1], text.encode("unicode_escape").decode()}
                forms |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
                forms |= {quote(text, errors="replace"), quote(text, safe="", errors="replace"), quote_plus(text)}
        self._forms = sorted(forms, key=len, reverse=True)
        self._longest = len(self._forms[0])
        self._pattern = re.compile("|".join(map(re.escape, self._forms)))

    def __call__(self, text: str, *, cut: bool = False) -> str:
        """``text`` masked; where it was cut (at a gap; ``cut``: at its end) what may be a part of a value too."""
        text = self._pattern.sub(MASK, text)
        gaps = list(GAP.finditer(text))
        if not gaps and not cut:
            return text
        masked, start = [], 0
        for gap in gaps:
            masked += [self._edges(text[start : gap.start()], start > 0, True), gap.group()]
            start = gap.end()
        return "".join([*masked, self._edges(text[start:], start > 0, cut)])

    def _edges(self, text: str, begins: bool, ends: bool) -> str:
        """``text`` without a value's end at its beginning (it ``begins`` after a cut), or a beginning at its end."""
        if begins:
            size = max(_ending(text, form) for form in self._forms)
            text = MASK + text[size:] if size else text
        if ends:
            size = max(_beginning(text, form) for form in self._forms)
            text = text[: len(text) - size] + MASK if size else text
        return text

    def tree(self, value: Any) -> Any:
        """A JSON value with all of its texts masked, keys too."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return {self(str(key)): self.tree(item) for key, item in value.items()}
        return [self.tree(item) for item in value] if isinstance(value, list) else value

    def stream(self, file: BinaryIO) -> Iterator[bytes]:
        """The UTF-8 text of ``file``, masked, in pieces; a value across two of them is masked too."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        held = ""
        while data := file.read(CHUNK):
            held += decode(data)
            # What begins before this place is here as a whole.
            end = max(0, len(held) - self._longest + 1)
            for match in self._pattern.finditer(held):
                if match.start() >= end:
                    break
                end = max(end, match.end())
            yield self(held[:end]).encode("utf-8")
            held = held[end:]
        yield self(held + decode(b"", True)).encode("utf-8")


def _beginning(text: str, form: str) -> int:
    """Characters of the longest beginning of ``form``, not all of it, that ``text`` ends with."""
    at = max(0, len(text) - len(form) + 1) - 1
    while (at := text.find(form[0], at + 1)) >= 0:
        if form.startswith(text[at:]):
            return len(text) - at
    return 0


def _ending(text: str, form: str) -> int:
    """Characters of the longest end of ``form``, not all of it, that ``text`` begins with."""
    at = len(form) - 1
    while (at := text.rfind(form[-1], 0, at)) >= 0:
        if form.endswith(text[: at + 1]):
            return at + 1
    return 0


def masker(secrets: Mapping[str, str]) -> Masker | None:
    """A :class:`Masker` of these; None when there are none."""
    return Masker(secrets) if secrets else None
