"""The cells that campaigns run: each has a tag of its own, so that the books can be compared with what it did."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

SHARED = "shared.txt"
"""Written by many cells: each time a new version."""


@dataclass(frozen=True)
class CellPlan:
    """One cell. ``files``: path -> SHA-256 of what it leaves in ``artifacts/`` when it runs to its end."""

    tag: str
    kind: str
    code: str
    files: dict[str, str] = field(default_factory=dict)
    timeout: float = 20.0


def _content(name: str, size: int) -> bytes:
    unit = f"{name}\n".encode()
    return unit * (size // len(unit) + 1)


def _writing(names: dict[str, int]) -> tuple[str, dict[str, str]]:
    lines = ["import os, time"]
    hashes = {}
    for name, size in names.items():
        data = _content(name, size)
        unit = f"{name}\n"
        lines.append(f"with open('artifacts/{name}', 'wb') as f: f.write({unit!r}.encode() * {len(data) // len(unit)})")
        hashes[name] = hashlib.sha256(data).hexdigest()
    return "\n".join(lines), hashes


def cell(tag: str, kind: str, chance: random.Random) -> CellPlan:
    """A cell of ``kind``: quick, files, slow, big, shared, error, loop, flood, picture or death."""
    files: dict[str, str] = {}
    timeout = 20.0
    if kind == "quick":
        body = f"last = {tag!r}\nprint(last)"
    elif kind == "files":
        body, files = _writing({f"{tag}-{n}.bin": chance.randrange(1, 60_000) for n in range(chance.randrange(1, 25))})
    elif kind == "slow":
        before, files = _writing({f"{tag}-early.txt": 2000})
        after, late = _writing({f"{tag}-late.txt": 3000})
        files |= late
        pause = chance.uniform(0.05, 0.5)
        body = f"{before}\nprint('early', flush=True)\ntime.sleep({pause:.3f})\n{after}\nprint('late')"
    elif kind == "big":
        body, files = _writing({f"{tag}.bin": chance.randrange(4, 24) * 2**20})
    elif kind == "shared":
        body = f"with open('artifacts/{SHARED}', 'w') as f: f.write({tag!r})"
    elif kind == "error":
        body, _ = _writing({f"{tag}.txt": 100})
        body += "\n1 / 0"
    elif kind == "loop":
        body, timeout = "while True: pass", 1.0
    elif kind == "flood":
        body = "for n in range(20_000): print(n, 'x' * 50)"
    elif kind == "picture":
        body = f"import base64\ndisplay({{'image/png': base64.b64encode({tag!r}.encode() * 500).decode()}}, raw=True)"
    elif kind == "death":
        body = "import os; os._exit(3)"
    else:
        raise ValueError(kind)
    return CellPlan(tag, kind, f"# {tag}\n{body}", files, timeout)


def tag_of(code: str) -> str:
    """The tag in a cell's first line, "" without one."""
    first = code.partition("\n")[0]
    return first[2:] if first.startswith("# ") else ""
