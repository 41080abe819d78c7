"""A session in a terminal: highlighted code, panels, tables. Texts arrive visible and are never parsed as markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from sandbox_kernel.logfile import Problem
from viewer.entries import Block, Item, State
from viewer.visible import one_line, visible

_COLOURS = {True: "green", False: "red", None: "blue"}
_STYLES = {"stdout": "", "stderr": "yellow", "result": "bold", "output": "cyan", "error": "red", "note": "dim"}


class PrettyView:
    """The same methods as PlainView."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, markup=False, emoji=False, legacy_windows=False)

    def heading(self, text: str) -> None:
        self._console.print()
        self._console.rule(Text(text, style="bold"), align="left", style="dim")

    def note(self, text: str) -> None:
        self._console.print(Text(visible(text), style="dim"))

    def metadata(self, name: str, metadata: dict[str, Any]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for key, value in metadata.items():
            table.add_row(Text(one_line(key, 60)), Text(one_line(value)))
        title = Text(f"session {visible(name)}", style="bold")
        self._console.print(Panel(table, title=title, title_align="left", border_style="blue", box=box.ROUNDED))

    def item(self, item: Item) -> None:
        colour = _COLOURS[item.success]
        title = Text(item.title, style=f"bold {colour}")
        if item.success is None:
            line = Text.assemble((item.time, "dim"), "  ", title)
            facts = Text("  ".join(item.facts), overflow="fold")
            if line.cell_len + 2 + facts.cell_len <= self._console.width:
                self._console.print(line, facts, sep="  ")
            else:
                self._console.print(line)
                self._console.print(Padding(facts, (0, 0, 0, 4)))
            for part in item.blocks:
                self._console.print(Padding(self._block(part), (0, 0, 0, 4)))
            return
        title.append(" · " + " · ".join([*item.facts, item.time]), style="not bold dim")
        body = Group(*self._labelled(item.blocks))
        self._console.print(Panel(body, title=title, title_align="left", border_style=colour, box=box.ROUNDED))

    def _labelled(self, parts: Sequence[Block]) -> Iterator[RenderableType]:
        """The parts of a cell, each kind below its name: colours alone would not tell code from what it printed."""
        before = "code"
        for part in parts:
            if part.kind not in (before, "note"):
                yield Rule(Text(part.kind, style="dim"), align="left", style="dim", characters="─")
            before = part.kind
            yield self._block(part)

    def _block(self, part: Block) -> RenderableType:
        if part.kind == "code":
            return Syntax(part.text, "python", theme="ansi_dark", background_color="default", word_wrap=True)
        return Text(part.text, style=_STYLES[part.kind], overflow="fold")

    def state(self, state: State) -> None:
        self.heading(f"State at {state.time}")
        if state.facts:
            self._console.print(Text("  ".join(state.facts), style="dim"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name, style in (("variable", "bold"), ("type", "cyan"), ("value", "")):
            table.add_column(name, style=style, overflow="fold")
        for row in state.variables:
            table.add_row(*map(Text, row))
        if state.variables_left_out:
            table.add_row(Text("..."), Text(""), Text(f"and {state.variables_left_out} more"))
        self._console.print(table if state.variables else Text("no variables", style="dim"))
        more = state.module_count - len(state.modules)
        names = ", ".join(state.modules) + (f", … and {more} more" if more else "")
        self._console.print(Text.assemble(("imported modules ", "dim"), f"({state.module_count}): ", names))

    def artifacts(self, ingested: Sequence[tuple[str, ...]], left_out: int, source: str) -> None:
        title = Text(f"ingested ({len(ingested) + left_out}, {source})", style="dim")
        if not ingested:
            self._console.print(title)
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
        for name in ("id", "file", "size", "type", "cell"):
            # An id is there to be copied: in one piece as long as there is room.
            table.add_column(name, overflow="fold", no_wrap=name == "id", justify="right" if name == "size" else "left")
        for row in ingested:
            table.add_row(*map(Text, row))
        self._console.print(table)
        if left_out:
            self._console.print(Text(f"… and {left_out} before these", style="dim"))

    def waiting(self, rows: Sequence[tuple[str, str]], count: int) -> None:
        self._console.print(Text(f"waiting in artifacts/ ({count})", style="dim"))
        for path, size in rows:
            self._console.print(Text(f"  {path}  {size}", style="yellow", overflow="fold"))
        if count > len(rows):
            self._console.print(Text(f"  … and {count - len(rows)} more", style="dim"))

    def problems(self, problems: Sequence[Problem], left_out: int) -> None:
        self.heading(f"Problems ({len(problems) + left_out})")
        for problem in problems:
            self._console.print(Text(one_line(str(problem), 400), style="yellow", overflow="fold"))
        if left_out:
            self._console.print(Text(f"… and {left_out} more", style="dim"))
