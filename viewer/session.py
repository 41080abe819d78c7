"""Showing one session: laid out for a person, or as one JSON document for a program."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from sandbox_kernel.audit import verify
from sandbox_kernel.jsonline import encode
from sandbox_kernel.logfile import Problem, follow, iter_log, read_log
from sandbox_kernel.snapshot import read_metadata, read_state
from viewer.entries import Item, State, artifact_row, describe, describe_state
from viewer.folder import MAX_INGESTED, ingested, waiting
from viewer.stored import save_artifact, stored_artifacts
from viewer.visible import one_line, size, visible

_MAX_PROBLEMS = 1000
_SHOWN = 50
"""Artifacts and problems of each kind that are laid out; ``--json`` has more."""
FOLLOW_FROM = 10
"""Entries shown before following begins."""


class View(Protocol):
    """What PlainView and PrettyView have in common."""

    def heading(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def metadata(self, name: str, metadata: dict[str, Any]) -> None: ...
    def item(self, item: Item) -> None: ...
    def state(self, state: State) -> None: ...
    def artifacts(self, ingested: list[tuple[str, ...]], left_out: int, source: str) -> None: ...
    def waiting(self, rows: list[tuple[str, str]], count: int) -> None: ...
    def problems(self, problems: list[Problem], left_out: int) -> None: ...


class Reading:
    """One session being read: what went wrong and which artifacts were told of, collected on the way. Bounded."""

    def __init__(self, folder: Path, store: Path | None) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.problem_count = 0
        self.entry_count = 0
        self.log_end = 0
        self._store = store
        self._told: deque[dict[str, Any]] = deque(maxlen=MAX_INGESTED)

    def note(self, *problems: Problem | None) -> None:
        for problem in problems:
            if problem is not None:
                self.problem_count += 1
                if len(self.problems) < _MAX_PROBLEMS:
                    self.problems.append(problem)

    def metadata(self) -> dict[str, Any] | None:
        metadata, problem = read_metadata(self.folder)
        self.note(problem)
        return metadata

    def entries(self, limit: int | None) -> Iterator[dict[str, Any]]:
        """The log's entries, or its last ``limit``; one at a time where all are asked for."""
        path = self.folder / "session.log"
        if limit is not None:
            log = read_log(path, limit=limit)
            self.note(*log.problems)
            self.log_end = log.end
            yield from map(self._count, log.entries)
            return
        for found in iter_log(path):
            if isinstance(found, Problem):
                self.note(found)
            else:
                yield self._count(found)

    def _count(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.entry_count += 1
        self._told.extend(ingested(entry))
        return entry

    def state(self) -> dict[str, Any] | None:
        state, problem = read_state(self.folder)
        self.note(problem)
        return state

    def waiting(self) -> tuple[list[dict[str, Any]], int]:
        rows, count, problems = waiting(self.folder)
        self.note(*problems)
        return rows, count

    def ingested(self) -> tuple[list[dict[str, Any]], str]:
        """The artifacts in the store or, where there is none, those that the entries read tell of; oldest first."""
        stored, problem = stored_artifacts(self._store, self.folder.resolve().name)
        self.note(problem)
        if stored:
            return stored, "from the store"
        return list(self._told), "from the log"


def show_text(reading: Reading, view: View, *, limit: int | None, state: bool, artifacts: bool) -> None:
    """Everything, in the document's order: metadata, history, state, artifacts; then what went wrong."""
    view.metadata(reading.folder.resolve().name, reading.metadata() or {})
    view.heading("History" if limit is None else f"History (last {limit})")
    for entry in reading.entries(limit):
        view.item(describe(entry))
    if not reading.entry_count:
        view.note("no entries")
    if state:
        found = reading.state()
        if found is not None:
            view.state(describe_state(found))
        else:
            view.heading("State")
            view.note("no python_state.json")
    if artifacts:
        view.heading("Artifacts")
        rows, source = reading.ingested()
        last = rows[-_SHOWN:]
        view.artifacts([artifact_row(row) for row in last], len(rows) - len(last), source)
        files, count = reading.waiting()
        view.waiting([(one_line(row["path"]), size(row["size_bytes"])) for row in files[:_SHOWN]], count)
    if reading.problems:
        first = reading.problems[:_SHOWN]
        view.problems(first, reading.problem_count - len(first))


def show_json(reading: Reading, out: TextIO, *, limit: int | None, state: bool, artifacts: bool) -> None:
    """``{"metadata", "log", "state", "artifacts", "problems"}``, written as it is read. See docs/formats.md."""
    out.write('{"metadata": ' + _json(reading.metadata()) + ',\n "log": [')
    for entry in reading.entries(limit):
        out.write((",\n  " if reading.entry_count > 1 else "\n  ") + _json(entry))
    out.write('],\n "state": ' + _json(reading.state() if state else None))
    document = None
    if artifacts:
        rows, _ = reading.ingested()
        files, count = reading.waiting()
        document = {"waiting": files, "waiting_count": count, "ingested": rows}
    problems = [{"where": problem.where, "message": problem.message} for problem in reading.problems]
    out.write(',\n "artifacts": ' + _json(document) + ',\n "problems": ' + _json(problems) + "}\n")


def show_follow(reading: Reading, view: View | None, out: TextIO, *, limit: int | None) -> None:
    """The last entries, then each as it is written, until Ctrl-C. Without ``view``: JSON lines."""

    def put(entry: dict[str, Any]) -> None:
        if view is not None:
            view.item(describe(entry))
        else:
            out.write(_json(entry) + "\n")
        out.flush()

    if view is not None:
        view.metadata(reading.folder.resolve().name, reading.metadata() or {})
    for entry in reading.entries(FOLLOW_FROM if limit is None else limit):
        put(entry)
    for found in follow(reading.folder / "session.log", start=reading.log_end):
        if isinstance(found, Problem):
            print(visible(str(found)), file=sys.stderr)
        else:
            put(found)


def show_verdict(folder: Path, out: TextIO, *, as_json: bool) -> int:
    """What the audit chain says; 1 when the log is not intact."""
    verdict = verify(folder)
    if as_json:
        fields = ("intact", "lines", "first_bad_line", "reason", "after_head")
        out.write(_json({name: getattr(verdict, name) for name in fields}) + "\n")
    else:
        out.write(visible(verdict.reason if verdict.intact is not False else f"NOT INTACT: {verdict.reason}") + "\n")
    return 1 if verdict.intact is False else 0


def choose_view(out: TextIO) -> View:
    """Rich in a terminal (or with FORCE_COLOR), plain otherwise."""
    terminal = out.isatty() and os.environ.get("TERM") != "dumb"
    if terminal or os.environ.get("FORCE_COLOR"):
        # Imported here: a pipe should not wait for it.
        from viewer.pretty import PrettyView

        return PrettyView(out)
    from viewer.plain import PlainView

    return PlainView(out)


def _json(value: Any) -> str:
    return encode(value).decode()


__all__ = ["Reading", "choose_view", "save_artifact", "show_follow", "show_json", "show_text", "show_verdict"]
