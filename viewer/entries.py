"""What a log entry, a state snapshot or an artifact says, ready to be laid out: all text here is visible and bounded.

Entries come from logs that anybody may have written: every field may be missing or of another type than ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from viewer.visible import block, one_line, size, when

BLOB_MIME = "application/vnd.sandbox-kernel.blob+json"
# events.py has the same name, but importing pydantic would cost more than showing the session does.

_CHAIN = {"seq", "prev"}
_CELL = {
    "timestamp", "event", "code", "success", "stdout", "stderr", "error", "result", "outputs", "execution_count",
    "msg_id", "status", "duration_s", "origin", "artifacts", "output_artifacts", "truncated", "state_preserved",
    "lost_names", "death", "started_at",
}  # fmt: skip
MAX_ROWS = 200
MAX_NAMED = 50
"""Artifacts of one entry that are named: of very many there are very many entries."""
MAX_FACTS = 50
"""Unknown fields of one entry that are shown."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of one kind: ``code``, ``stdout``, ``stderr``, ``result``, ``output``, ``error``, ``note``."""

    kind: str
    text: str


@dataclass(slots=True)
class Item:
    """One entry of the history."""

    time: str
    title: str
    success: bool | None = None
    """None for what is no cell."""
    facts: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def add(self, kind: str, value: Any, *, fold: bool = False) -> None:
        if value not in (None, "", [], {}) and (text := block(value, fold=fold)):
            self.blocks.append(Block(kind, text))


def describe(entry: dict[str, Any]) -> Item:
    """A log entry of any kind."""
    event = entry.get("event")
    if event == "code_execution":
        return _cell(entry)
    item = Item(when(entry.get("timestamp")), one_line(event, 60) if event is not None else "(no event)")
    left = {name: value for name, value in entry.items() if name not in _CHAIN | {"timestamp", "event"}}
    if event == "artifacts_created" and isinstance(artifacts := left.get("artifacts"), list):
        del left["artifacts"]
        for artifact in artifacts[:MAX_NAMED]:
            row = artifact if isinstance(artifact, dict) else {"id": artifact}
            name = row.get("path") or row.get("filename")
            item.add("note", f"{one_line(row.get('id'))}  {one_line(name)}  {size(row.get('size_bytes'))}")
        if len(artifacts) > MAX_NAMED:
            item.add("note", f"... and {len(artifacts) - MAX_NAMED} more")
    if len(left) > MAX_FACTS:
        item.facts.append(f"{len(left)} fields, of which the first {MAX_FACTS}:")
    for name, value in list(left.items())[:MAX_FACTS]:
        if isinstance(value, str) and (len(value) > 200 or "\n" in value):
            item.add("output", value, fold=True)
        else:
            item.facts.append(f"{one_line(name, 60)}={one_line(value)}")
    return item


def _cell(entry: dict[str, Any]) -> Item:
    status = entry.get("status")
    success = entry.get("success")
    item = Item(
        when(entry.get("timestamp")),
        f"[{one_line(entry['execution_count'], 10)}]" if entry.get("execution_count") is not None else "cell",
        success if isinstance(success, bool) else status == "ok" if status is not None else not entry.get("error"),
    )
    item.facts.append(one_line(status, 30) if status is not None else "ok" if item.success else "failed")
    if isinstance(duration := entry.get("duration_s"), (int, float)):
        item.facts.append(f"{duration:.3g} s")
    if entry.get("origin") not in (None, "sandbox-kernel"):
        item.facts.append(f"by {one_line(entry['origin'], 60)}")
    item.add("code", entry.get("code"))
    for kind, value in _streams(entry):
        item.add(kind, value, fold=True)
    item.add("result", entry.get("result"))
    for text in _displays(entry):
        item.add("output", text)
    item.add("error", _error(entry.get("error")))
    _notes(item, entry)
    item.facts += _facts(entry, [name for name in entry if name not in _CELL | _CHAIN])
    return item


def _facts(entry: dict[str, Any], names: list[str]) -> list[str]:
    facts = [f"{one_line(name, 60)}={one_line(entry[name])}" for name in names[:MAX_FACTS]]
    return [*facts, f"... and {len(names) - MAX_FACTS} more"] if len(names) > MAX_FACTS else facts


def _streams(entry: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for kind in ("stdout", "stderr"):
        value = entry.get(kind)
        if not value:
            value = [
                part
                for output in _dicts(entry.get("outputs"))
                if output.get("output_type") == "stream" and output.get("name") == kind
                for part in _texts(output.get("text"))
            ]
        yield kind, value


def _displays(entry: dict[str, Any]) -> Iterable[str]:
    for output in _dicts(entry.get("outputs")):
        data = output.get("data")
        kind = output.get("output_type")
        if not isinstance(data, dict) or (kind == "execute_result" and entry.get("result")):
            continue
        blobs = _dicts(data.get(BLOB_MIME))
        for blob in blobs:
            digest = one_line(blob.get("sha256"), 64)
            yield f"[{one_line(blob.get('mime'), 60)}, {size(blob.get('size_bytes'))}, sha256 {digest}]"
        pictures = [name for name in data if not name.startswith("text/") and name != BLOB_MIME]
        if pictures:
            yield f"[{', '.join(one_line(name, 60) for name in pictures[:10])}]"
        if "text/plain" in data:
            yield "".join(_texts(data["text/plain"]))
        elif not blobs and not pictures:
            yield f"[{', '.join(one_line(name, 60) for name in list(data)[:10])}]"


def _error(error: Any) -> Any:
    if not isinstance(error, dict):
        return error
    traceback = error.get("traceback")
    if traceback:
        return "\n".join(map(str, traceback)) if isinstance(traceback, list) else traceback
    name, value = error.get("name", error.get("ename")), error.get("value", error.get("evalue"))
    return f"{name}: {value}" if name is not None else error


def _notes(item: Item, entry: dict[str, Any]) -> None:
    if isinstance(death := entry.get("death"), dict):
        item.add("note", f"kernel died: {one_line(death.get('message') or death.get('cause'))}")
    if entry.get("state_preserved") is False:
        lost = entry.get("lost_names")
        names = ", ".join(map(str, lost[:50])) if isinstance(lost, list) and lost else "none were known"
        item.add("note", f"the kernel was restarted; variables lost: {one_line(names, 2000)}")
    if entry.get("truncated"):
        item.add("note", f"output cut here; the whole: {_ids(entry.get('output_artifacts')) or 'not kept'}")
    if ids := _ids(entry.get("artifacts")):
        item.add("note", f"artifacts: {ids}")


def _ids(artifacts: Any) -> str:
    ids = [row.get("id") if isinstance(row, dict) else row for row in _list(artifacts)[:MAX_NAMED]]
    return one_line(", ".join(map(str, ids)), 2000)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]


def _texts(value: Any) -> list[str]:
    return [part if isinstance(part, str) else str(part) for part in _list(value)]


@dataclass(slots=True)
class State:
    """``python_state.json``, ready to be laid out."""

    time: str
    facts: list[str]
    variables: list[tuple[str, str, str]]
    """Name, type, value (possibly several lines)."""
    variables_left_out: int
    modules: list[str]
    module_count: int


def describe_state(state: dict[str, Any], *, modules: int = 40, value_lines: int = 8) -> State:
    """A state of any origin; at most ``modules`` module names and ``value_lines`` lines of a value are kept."""
    variables = state.get("variables")
    rows = list(variables.items()) if isinstance(variables, dict) else [(str(row), {}) for row in _list(variables)]
    shown = []
    for name, what in rows[:MAX_ROWS]:
        known = what if isinstance(what, dict) else {"value": what}
        lines = block(known.get("value"))[:2000].split("\n")
        if len(lines) > value_lines:
            lines[value_lines:] = [f"... [{len(lines) - value_lines} more lines]"]
        more = [f"{one_line(k, 40)}={one_line(v, 80)}" for k, v in known.items() if k not in ("type", "value")]
        kind = one_line(known.get("type", "?"), 60)
        shown.append((one_line(name, 60), " ".join([kind, *more]), "\n".join(lines)))
    imported = _list(state.get("imported_modules"))
    names = [one_line(name, 80) for name in imported[:modules]]
    laid_out = ("timestamp", "variables", "imported_modules", "msg_id")
    facts = _facts(state, [name for name in state if name not in laid_out])
    return State(when(state.get("timestamp")), facts, shown, len(rows) - len(shown), names, len(imported))


def artifact_row(artifact: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Id, path, size, type and the cell that wrote it, of an ingested artifact."""
    path = artifact.get("path") or artifact.get("filename")
    version = artifact.get("version")
    shown = one_line(path, 120) + (f" (version {one_line(version, 8)})" if version not in (None, 1) else "")
    cell = artifact.get("execution_count")
    return (
        one_line(artifact.get("id"), 60), shown, size(artifact.get("size_bytes")),
        one_line(artifact.get("content_type") or "", 60), f"[{one_line(cell, 10)}]" if cell is not None else "",
    )  # fmt: skip
