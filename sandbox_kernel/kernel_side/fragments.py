"""The variables' entries in ``python_state.json``; those that stayed what they were are not described again."""

import json
from typing import Any, Callable, Dict, List, Tuple

from .describe import SMALL, Describer, all_plain, clean

FEW = 20
"""Items of a list or tuple that is compared with what it was: with more, describing it anew costs less."""
_IMMUTABLE = frozenset(map(id, (type(None), bool, int, float, complex, str, bytes)))
_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii

_Known = Tuple[List[int], Tuple[Any, ...], str]
"""Ids of the class and of what a value consists of; the latter itself, so that its ids stay its own; and the entry.

A list itself is not held: one that has grown large meanwhile would not be freed when its cell deletes it.
"""


class Fragments:
    """Made one by one by :meth:`of` for all variables, then :meth:`done`."""

    def __init__(self, describer: Describer) -> None:
        self._describer = describer
        self._known: Dict[str, _Known] = {}
        self._next: Dict[str, _Known] = {}

    def begin(self) -> None:
        """Again from the first variable on."""
        self._next = {}

    def of(self, name: str, value: Any) -> str:
        """``"name": {...}``, without looking into what is the same as the last time."""
        cls, known = type(value), self._known.get(name)
        immutable = id(cls) in _IMMUTABLE
        parts: Tuple[Any, ...] = ()
        if immutable:
            parts = (value,)
        elif (cls is list or cls is tuple) and len(value) <= FEW:
            parts = tuple(value)
        else:
            return self._made(name, value)
        ids = [id(cls), *map(id, parts)]
        if known is None or known[0] != ids:
            fragment = self._made(name, value)
            if len(fragment) > 2 * SMALL or not (immutable or all_plain(parts)):
                return fragment
            known = ids, parts, fragment
        self._next[name] = known
        return known[2]

    def done(self) -> None:
        """All were asked for; of what was not, nothing is remembered."""
        self._known, self._next = self._next, {}

    def _made(self, name: str, value: Any) -> str:
        return _fragment(self._describer.hide(name), self._describer.describe(name, value))


def _fragment(name: str, found: Dict[str, Any]) -> str:
    """By hand where it is but texts and a length, as ``json.dumps`` takes longer than describing."""
    length = f', "length": {found["length"]}' if "length" in found else ""
    if len(found) == 2 + bool(length):
        inner = f'{{"type": {_quote(found["type"])}, "value": {_quote(found["value"])}{length}}}'
    else:
        inner = json.dumps(found)
    return f"{_quote(clean(name[:SMALL]))}: {inner}"
