"""What a value looks like, found out in bounded time and space whatever the value is.

Only the exact types listed are looked into: builtins here, those of well-known libraries in ``libraries.py``. Of all
else the class name is given and none of its code is called: no ``__repr__``, ``__len__``, ``__class__``, ``__hash__``,
``__getattr__``. Lazy frames are of that kind, so nothing is computed.
"""

# What these would have needs Python 3.10.
# ruff: noqa: B905, RUF007

import collections
import datetime
import re
import types
import uuid
from functools import lru_cache
from itertools import islice
from pathlib import PosixPath
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

LIMIT = 2_000
"""Characters of one value."""
ITEMS = 100
"""Items of one container that are looked at."""
DEPTH = 4
CELL = 50
"""Characters of one cell of a table."""
SMALL = 200
"""Characters of a text inside a container."""
INT_BITS = 6_000
"""Longer integers are not written out: that takes quadratic time."""

Description = Dict[str, Any]

_mro = type.__dict__["__mro__"].__get__
_name = type.__dict__["__name__"].__get__
_qualname = type.__dict__["__qualname__"].__get__
_module = type.__dict__["__module__"].__get__

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET = {"password", "passwd", "passwort", "passphrase", "pwd", "secret", "secrets", "token", "credential"}
_SECRET |= {"credentials", "creds", "apikey", "auth", "authorization", "bearer"}
_KEY_OF = {"api", "access", "private", "secret", "signing", "encryption", "auth", "account", "master", "ssh"}


@lru_cache(maxsize=4096)
def looks_secret(name: str) -> bool:
    """True for names like ``API_KEY``, ``dbPassword``, ``hf_token``; not for ``author`` or ``tokens``."""
    words = [word.lower() for word in _WORDS.findall(name[:SMALL])]
    return any(word in _SECRET for word in words) or any(
        second in ("key", "keys") and first in _KEY_OF for first, second in zip(words, words[1:])
    )


def class_name(cls: type) -> str:
    """``module.Class`` without asking the class's metaclass."""
    module, name = _module(cls), _qualname(cls)
    if type(module) is not str or module == "builtins":
        return clean(str(name)[:SMALL])
    return clean(f"{module[:SMALL]}.{name[:SMALL]}")


def is_kind(cls: Any, base: type) -> bool:
    """``issubclass`` by identity: no metaclass is asked."""
    return any(entry is base for entry in _mro(cls))


def clean(text: str) -> str:
    """``text`` as it can stand in UTF-8: lone surrogates are escaped."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Describer:
    """Describes values. ``secrets`` never appear in a description; ``mask`` hides values of secret-looking names."""

    def __init__(self, secrets: Sequence[str] = (), mask: bool = True) -> None:
        plain = [text for text in secrets if len(text) >= 4]
        self.secrets = sorted({form for text in plain for form in (text, repr(text)[1:-1])}, key=len, reverse=True)
        self.margin = max([len(text) for text in self.secrets], default=0)
        self.mask = mask
        # By id, as looking up a class in a dictionary by itself would call its metaclass's __hash__.
        self.known: Dict[int, Tuple[type, Callable[[Any], Description]]] = {}
        self.inline: Set[int] = set()  # shown inside containers as they are shown alone
        self.shaped: Set[int] = set()  # shown inside containers by their shape
        self._register_builtins()

    # --- faces ---------------------------------------------------------------------------------

    def describe(self, name: str, value: Any) -> Description:
        """``{"type", "value", ...}`` of the variable ``name``; never raises."""
        cls = type(value)
        try:
            known = self.known.get(id(cls))
            found = known[1](value) if known is not None else self._unknown(value)
        except Exception:
            found = {"value": f"<{class_name(cls)} object>"}
        text = "***" if self.mask and looks_secret(name) else self.hide(found["value"])[:LIMIT]
        return {"type": clean(str(_name(cls))[:SMALL]), **found, "value": clean(text)}

    def hide(self, text: str) -> str:
        """``text`` with every secret replaced."""
        for secret in self.secrets:
            if secret in text:
                text = text.replace(secret, "***")
        return text

    # --- texts ---------------------------------------------------------------------------------

    def cut(self, text: str, limit: int) -> str:
        """The start of a text; a secret across the cut is hidden first."""
        if len(text) <= limit:
            return text
        return self.hide(text[: limit + self.margin])[:limit]

    def brief(self, value: Any, limit: int = LIMIT, depth: int = DEPTH) -> str:
        """``repr`` for small builtin values, of bounded length; the class name for all else."""
        cls = type(value)
        if value is None or cls is bool or cls is float or cls is complex:
            return repr(value)
        if cls is int:
            return repr(value) if value.bit_length() <= INT_BITS else f"<int of {value.bit_length()} bits>"
        if cls is str:
            return repr(self.cut(value, limit)) + ("..." if len(value) > limit else "")
        if cls is bytes or cls is bytearray:
            return repr(value[:limit]) + ("..." if len(value) > limit else "")
        if id(cls) in _CONTAINERS:
            return self._container(value, limit, depth)
        known = self.known.get(id(cls))
        if known is not None and id(cls) in self.inline:
            return str(known[1](value)["value"])
        of_shape = f" of shape {tuple(value.shape)}" if known is not None and id(cls) in self.shaped else ""
        return f"<{class_name(cls)} object{of_shape}>"

    def _container(self, value: Any, limit: int, depth: int) -> str:
        cls = type(value)
        _, left, right = _CONTAINERS[id(cls)]
        if depth <= 0:
            return f"{left}...{right}"
        if (cls is list or cls is tuple) and len(value) <= ITEMS and all_plain(value):
            return repr(value)
        parts: List[str] = []
        room = limit
        mapping = left.endswith("{") and issubclass(cls, dict)
        for item in islice(value.items() if mapping else value, ITEMS):
            if mapping:
                key, item = item
                shown = "'***'" if self.mask and type(key) is str and looks_secret(key) else None
                part = f"{self.brief(key, SMALL, depth - 1)}: {shown or self.brief(item, SMALL, depth - 1)}"
            else:
                part = self.brief(item, SMALL, depth - 1)
            parts.append(part)
            room -= len(part) + 2
            if room <= 0:
                break
        if len(parts) < len(value):
            parts.append("...")
        elif cls is tuple and len(parts) == 1:
            parts[0] += ","
        if not parts and (cls is set or cls is frozenset):
            return f"{cls.__name__}()"
        return left + ", ".join(parts) + right

    def table(self, rows: Sequence[Sequence[Any]], header: Sequence[Any], index: Sequence[Any]) -> str:
        """Right-aligned columns, as pandas prints them. Columns with secret-looking names are masked."""
        hidden = [self.mask and type(name) is str and looks_secret(name) for name in header]
        lines = [["", *[self.cell(name) for name in header]]] if header else []
        for label, row in zip(index, rows):
            cells = ["***" if hide else self.cell(item) for item, hide in zip(row, hidden or [False] * len(row))]
            lines.append([self.cell(label), *cells])
        if not lines:
            return ""
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]])
            for line in lines
        )

    def cell(self, value: Any) -> str:
        if type(value) is str:
            text = self.cut(value, CELL).replace("\n", "\\n")
        elif type(value) is float:
            text = f"{value:.6g}" if value == value else "NaN"
        else:
            text = self.brief(value, CELL, 2)
        return text[:CELL]

    # --- kinds of values -----------------------------------------------------------------------

    def know(
        self, describe: Callable[[Any], Description], classes: Iterable[Any], kind: Optional[Set[int]] = None
    ) -> None:
        for cls in classes:
            self.known[id(cls)] = (cls, describe)  # holding the class, its id stays its own
            if kind is not None:
                kind.add(id(cls))

    def _register_builtins(self) -> None:
        self.know(self._plain, [type(None), bool, int, float, complex])
        self.know(self._sized, [str, bytes, bytearray, *[entry[0] for entry in _CONTAINERS.values()]])
        scalars = [range, slice, datetime.date, datetime.timedelta, PosixPath, uuid.UUID, type(...)]
        self.know(self.scalar, scalars, self.inline)
        self.know(self._moment, [datetime.datetime, datetime.time], self.inline)
        self.know(_function, [types.FunctionType], self.inline)
        self.know(_builtin, [types.BuiltinFunctionType], self.inline)

    def _plain(self, value: Any) -> Description:
        return {"value": self.brief(value)}

    def _sized(self, value: Any) -> Description:
        return {"value": self.brief(value), "length": len(value)}

    def scalar(self, value: Any) -> Description:
        """A value whose own ``str`` is short and runs no foreign code."""
        parts = (value.start, value.stop, value.step) if type(value) in (range, slice) else ()
        if any(part is not None and (type(part) is not int or part.bit_length() > INT_BITS) for part in parts):
            return {"value": f"<{type(value).__name__} object>"}
        return {"value": self.cut(str(value), SMALL)}

    def _moment(self, value: Any) -> Description:
        zone = value.tzinfo
        if zone is None or type(zone) is datetime.timezone:
            return {"value": value.isoformat()}
        return {"value": f"{value.replace(tzinfo=None).isoformat()} <{class_name(type(zone))}>"}

    def _unknown(self, value: Any) -> Description:
        cls = type(value)
        if is_kind(cls, type):
            return {"value": f"<class '{class_name(value)}'>"}
        found: Description = {"value": f"<{class_name(cls)} object>"}
        for base in _SIZED:
            if is_kind(cls, base):
                found["length"] = base.__len__(value)
        return found


_CONTAINERS: Dict[int, Tuple[type, str, str]] = {
    id(cls): (cls, left, right)
    for cls, left, right in [
        (list, "[", "]"),
        (tuple, "(", ")"),
        (set, "{", "}"),
        (frozenset, "frozenset({", "})"),
        (collections.deque, "deque([", "])"),
        (dict, "{", "}"),
        (collections.OrderedDict, "OrderedDict({", "})"),
        (collections.defaultdict, "defaultdict({", "})"),
        (collections.Counter, "Counter({", "})"),
    ]
}
_SIZED = (list, tuple, dict, set, frozenset, str, bytes, bytearray)
_CONSTANTS = frozenset(map(id, (float, bool, type(None))))
_LONG = 1 << 64


def all_plain(items: Iterable[Any]) -> bool:
    """True when ``repr`` of the whole is quick and short: no foreign types, no giant integers, no long texts."""
    for item in items:
        cls = type(item)
        if cls is int:
            if not -_LONG < item < _LONG:
                return False
        elif cls is str:
            if len(item) > 50:
                return False
        elif id(cls) not in _CONSTANTS:
            return False
    return True


def _function(value: types.FunctionType) -> Description:
    """``qualname(a, b=..., *rest, key=...)`` from the code object; the repr of a default is anybody's code."""
    code = value.__code__
    names = list(code.co_varnames)
    count, keywords = code.co_argcount, code.co_kwonlyargcount
    plain = names[:count]
    defaults = len(value.__defaults__ or ())
    parts = [f"{name}=..." if i >= count - defaults else name for i, name in enumerate(plain)]
    position = count + keywords
    if code.co_flags & 0x04:
        parts.append(f"*{names[position]}")
        position += 1
    elif keywords:
        parts.append("*")
    given = value.__kwdefaults__ or {}
    parts += [f"{name}=..." if name in given else name for name in names[count : count + keywords]]
    if code.co_flags & 0x08:
        parts.append(f"**{names[position]}")
    return {"value": f"{value.__qualname__[:SMALL]}({', '.join(parts[:ITEMS])})"}


def _builtin(value: Any) -> Description:
    return {"value": f"<built-in function {str(value.__name__)[:SMALL]}>"}
