"""A session as plain text: for pipes, files and terminals that know no colours. Its width depends on nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from sandbox_kernel.logfile import Problem
from viewer.entries import Item, State
from viewer.visible import one_line, visible


class PlainView:
    """Writes the parts of a session in the order in which its methods are called."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def _line(self, text: str = "", indent: int = 0) -> None:
        self._out.write(f"{' ' * indent}{text}".rstrip() + "\n")

    def _lines(self, text: str, indent: int) -> None:
        for line in text.split("\n"):
            self._line(line, indent)

    def heading(self, text: str) -> None:
        self._line()
        self._line(text)
        self._line("-" * len(text))

    def note(self, text: str) -> None:
        self._line(visible(text))

    def metadata(self, name: str, metadata: dict[str, Any]) -> None:
        self._line(f"Session {visible(name)}")
        self._line("=" * (8 + len(name)))
        for key, value in metadata.items():
            self._line(f"{one_line(key, 60):<22} {one_line(value)}", 2)

    def item(self, item: Item) -> None:
        self._line()
        facts = [item.facts[0].upper(), *item.facts[1:]] if item.success is False else item.facts
        self._line("  ".join([item.time, item.title, *facts]))
        for part in item.blocks:
            if part.kind == "code":
                first, *rest = part.text.split("\n")
                self._line(f">>> {first}", 2)
                for line in rest:
                    self._line(f"... {line}", 2)
            elif part.kind == "note":
                self._lines(part.text, 2)
            else:
                self._line(f"{part.kind}:", 2)
                self._lines(part.text, 4)

    def state(self, state: State) -> None:
        self.heading(f"State at {state.time}")
        for fact in state.facts:
            self._line(fact, 2)
        self._line(f"variables ({len(state.variables) + state.variables_left_out}):", 2)
        for name, kind, value in state.variables:
            first, *rest = value.split("\n")
            if rest:
                self._line(f"{name}: {kind} =", 4)
                self._lines(value, 8)
            else:
                self._line(f"{name}: {kind} = {first}", 4)
        if state.variables_left_out:
            self._line(f"... and {state.variables_left_out} more", 4)
        more = state.module_count - len(state.modules)
        self._line(f"imported modules ({state.module_count}):", 2)
        if state.modules:
            self._line(", ".join(state.modules) + (f", ... and {more} more" if more else ""), 4)

    def artifacts(self, ingested: Sequence[tuple[str, ...]], left_out: int, source: str) -> None:
        self._line(f"ingested ({len(ingested) + left_out}, {source}):", 2)
        for row in ingested:
            self._line("  ".join(part for part in row if part), 4)
        if left_out:
            self._line(f"... and {left_out} before these", 4)

    def waiting(self, rows: Sequence[tuple[str, str]], count: int) -> None:
        self._line(f"waiting in artifacts/ ({count}):", 2)
        for path, size in rows:
            self._line(f"{path}  {size}", 4)
        if count > len(rows):
            self._line(f"... and {count - len(rows)} more", 4)

    def problems(self, problems: Sequence[Problem], left_out: int) -> None:
        self.heading(f"Problems ({len(problems) + left_out})")
        for problem in problems:
            self._line(one_line(str(problem), 400), 2)
        if left_out:
            self._line(f"... and {left_out} more", 2)
