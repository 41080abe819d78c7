"""Secrets that were given to a session are masked wherever they would be written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from sandbox_kernel.errors import SettingsError

MASK = "***"
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


def masker(secrets: Mapping[str, str]) -> Callable[[str], str] | None:
    """A function that masks the values of ``secrets`` in a text; None when there are none.

    Also in the forms in which a value is often printed: as ``repr`` and as JSON escape it.
    """
    forms: set[str] = set()
    for value in secrets.values():
        forms |= {value, repr(value)[1:-1], value.encode("unicode_escape").decode()}
        forms |= {line for line in value.splitlines() if len(line) >= SHORTEST}
    if not forms:
        return None
    pattern = re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
    return lambda text: pattern.sub(MASK, text)
