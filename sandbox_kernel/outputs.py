"""The messages of one cell become nbformat outputs, bounded in memory whatever the cell prints.

Two views are kept of what a cell says:

- ``stdout`` and ``stderr``: all text of each stream, in order; a ``clear_output`` does not take back what was printed;
- ``outputs``: what a notebook would show (https://nbformat.readthedocs.io/en/latest/format_description.html#code-cell-outputs):
  consecutive stream messages merged, ``display()`` updates applied in place, ``clear_output`` obeyed.

Past ``limit`` bytes both keep a head and a tail. Nothing is thrown away: everything that was said then goes to
spool files too, which the session puts into the artifact store.
"""

from __future__ import annotations

import json
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

from sandbox_kernel.bounded import BoundedText, Spool, clean, end_of, size_of
from sandbox_kernel.bundles import MAX_MIMES, Output, bundle_size, cost, for_log, mime_value
from sandbox_kernel.events import (
    CellError,
    CellEvent,
    ClearOutput,
    DisplayData,
    ErrorData,
    ResultData,
    Stderr,
    Stdout,
    gap,
    shorten,
    strip_ansi,
)

__all__ = ["BoundedText", "Output", "OutputCollector", "clean", "for_log"]

MAX_OBJECTS = 2_000
"""Output objects kept per cell (half at the head, half at the tail); a loop of ``display()`` is bounded."""
BUNDLE_FACTOR = 32
"""Rich displays (pictures) may take this many times ``limit``."""
NAME_LIMIT = 1_000
METADATA_LIMIT = 64_000


class OutputCollector:
    """What one cell has said so far.

    ``limit``: bytes of text kept per stream and in ``outputs``; ``spool_dir``: where the whole goes past it.
    """

    def __init__(self, msg_id: str, limit: int, spool_dir: Path) -> None:
        self.msg_id = msg_id
        self.error: CellError | None = None
        self.result: str | None = None
        self.limit = limit
        self._spool_dir = spool_dir
        self._texts = {"stdout": BoundedText(limit), "stderr": BoundedText(limit)}
        self._whole: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._spools: dict[str, Spool] = {}
        self._head: list[Output] = []
        self._tail: deque[Output] = deque()
        self._sizes: dict[int, int] = {}
        self._text_budget = limit // 2
        self._bundle_budget = limit * BUNDLE_FACTOR
        self._tail_text = 0
        self._dropped = 0
        self._clear_next = False
        self._displays: dict[str, dict[int, Output]] = {}
        """The kept outputs of each ``display_id``, by :func:`id`."""
        self._display_ids: dict[int, str] = {}
        self._updated: dict[str, int] = {}
        """What the last update of each display took of the budget."""

    # -- adding ----------------------------------------------------------------------------

    def add(self, msg_type: str, content: dict[str, Any]) -> CellEvent | None:
        """Take one iopub message; returns the event a stream should yield, None for messages that are no output."""
        if msg_type == "stream":
            return self._stream(content)
        if msg_type in ("display_data", "update_display_data", "execute_result"):
            return self._bundle(msg_type, content)
        if msg_type == "error":
            return self._error(content)
        if msg_type == "clear_output":
            return self._clear(bool(content.get("wait")))
        return None

    def _stream(self, content: dict[str, Any]) -> CellEvent | None:
        name = "stderr" if content.get("name") == "stderr" else "stdout"
        text = clean(content.get("text", ""))
        if not text:
            return None
        bounded = self._texts[name]
        spool = self._spools.get(name)
        if spool is not None:
            spool.write(text.encode("utf-8"))
        else:
            self._whole[name].append(text)
            if bounded.size + size_of(text) > self.limit:
                spool = self._spools[name] = Spool(self._spool_dir, f"{name}.txt", "text/plain; charset=utf-8")
                spool.write("".join(self._whole.pop(name)).encode("utf-8"))
        bounded.add(text)
        self._show({"output_type": "stream", "name": name, "text": text}, size_of(text))
        return Stdout(msg_id=self.msg_id, text=text) if name == "stdout" else Stderr(msg_id=self.msg_id, text=text)

    def _bundle(self, msg_type: str, content: dict[str, Any]) -> CellEvent:
        raw_data, raw_meta = content.get("data"), content.get("metadata")
        data = (
            {str(mime)[:NAME_LIMIT]: mime_value(mime, value) for mime, value in islice(raw_data.items(), MAX_MIMES)}
            if isinstance(raw_data, dict)
            else {}
        )
        metadata = dict(raw_meta) if isinstance(raw_meta, dict) and cost(raw_meta) <= METADATA_LIMIT else {}
        size = bundle_size(data) + cost(metadata)
        count = content.get("execution_count")
        if msg_type == "execute_result":
            if size > self.limit and size_of(clean(data.get("text/plain", ""))) > self.limit:
                self._spool_bundle(data)
                data = {**data, "text/plain": shorten(clean(data["text/plain"]), self.limit)}
                size = bundle_size(data) + cost(metadata)
            self.result = clean(data.get("text/plain", ""))
            output: Output = {
                "output_type": "execute_result",
                "execution_count": count if isinstance(count, int) else None,
                "data": data,
                "metadata": metadata,
            }
            self._show(output, size)
            return ResultData(
                msg_id=self.msg_id, data=data, metadata=metadata, execution_count=output["execution_count"]
            )
        transient = content.get("transient")
        given = transient.get("display_id") if isinstance(transient, dict) else None
        display_id = None if given is None else clean(given)[:NAME_LIMIT]
        update = msg_type == "update_display_data"
        if update:
            if display_id in self._displays:
                self._update(display_id, data, metadata, size)
        else:
            output = {"output_type": "display_data", "data": data, "metadata": metadata}
            self._show(output, size)
            if display_id is not None and len(self._displays) < MAX_OBJECTS:
                self._displays.setdefault(display_id, {})[id(output)] = output
                self._display_ids[id(output)] = display_id
        return DisplayData(msg_id=self.msg_id, data=data, metadata=metadata, display_id=display_id, update=update)

    def _update(self, display_id: str, data: dict[str, Any], metadata: dict[str, Any], size: int) -> None:
        shown = self._displays[display_id]
        kept = self._afford(display_id, data, size * len(shown))
        for output in shown.values():
            output["data"], output["metadata"] = kept, metadata

    def _afford(self, display_id: str, data: dict[str, Any], size: int) -> dict[str, Any]:
        """What of an update is kept: it takes the place of the last one in the budget."""
        self._bundle_budget += self._updated.pop(display_id, 0)
        if size > self._bundle_budget:
            self._spool_bundle(data)
            return {"text/plain": f"[{size} bytes of display data left out]"}
        self._bundle_budget -= size
        self._updated[display_id] = size
        return data

    def _error(self, content: dict[str, Any]) -> CellEvent:
        lines = content.get("traceback")
        traceback = [clean(line) for line in lines] if isinstance(lines, list) else []
        name, value = clean(content.get("ename", ""))[:NAME_LIMIT], clean(content.get("evalue", ""))
        whole = "\n".join(traceback)
        if size_of(whole) + size_of(value) > self.limit:
            self._spool_text("error", f"{name}: {value}\n{whole}")
            value, traceback = shorten(value, self.limit // 4), [shorten(whole, self.limit // 2)]
        self.error = CellError(name=name, value=value, traceback=strip_ansi("\n".join(traceback)))
        size = size_of(value) + size_of(whole) + 8 * len(traceback)
        self._show({"output_type": "error", "ename": name, "evalue": value, "traceback": traceback}, size)
        return ErrorData(msg_id=self.msg_id, error=self.error)

    def _clear(self, wait: bool) -> CellEvent:
        if wait:
            self._clear_next = True
        else:
            self._reset()
        return ClearOutput(msg_id=self.msg_id, wait=wait)

    def _reset(self) -> None:
        self._head.clear()
        self._tail.clear()
        self._sizes.clear()
        self._displays.clear()
        self._display_ids.clear()
        self._updated.clear()
        self._text_budget, self._bundle_budget, self._tail_text = self.limit // 2, self.limit * BUNDLE_FACTOR, 0
        self._dropped = 0
        self._clear_next = False

    # -- keeping ---------------------------------------------------------------------------

    def _show(self, output: Output, size: int) -> None:
        """Append to ``outputs``, within the budgets."""
        if self._clear_next:
            self._reset()
        if output["output_type"] == "stream":
            last = self._tail[-1] if self._tail else (self._head[-1] if self._head else None)
            merges = last is not None and last["output_type"] == "stream" and last["name"] == output["name"]
            if not self._tail and size <= self._text_budget and (merges or len(self._head) < MAX_OBJECTS // 2):
                self._text_budget -= size
                if merges and last is not None:
                    last.setdefault("parts", [last["text"]]).append(output["text"])
                else:
                    self._head.append(output)
                return
            half = self.limit // 2
            if size > half:
                output["text"] = end_of(output["text"], half)
                output["left_out"] = size - size_of(output["text"])
                size -= output["left_out"]
            self._tail_text += size
        else:
            if size > self._bundle_budget:
                if "data" in output:
                    self._spool_bundle(output["data"])
                    output["data"] = {"text/plain": f"[{size} bytes of display data left out]"}
                else:
                    self._spool_text("error", "\n".join([output["ename"], output["evalue"], *output["traceback"], ""]))
                    output |= {"evalue": shorten(output["evalue"], NAME_LIMIT), "traceback": []}
                size = 0
            self._bundle_budget -= size
            if not self._tail and len(self._head) < MAX_OBJECTS // 2:
                self._head.append(output)
                return
        self._sizes[id(output)] = size
        self._tail.append(output)
        while len(self._tail) > MAX_OBJECTS // 2 or (len(self._tail) > 1 and self._first_is_spare()):
            self._drop(self._tail.popleft())

    def _first_is_spare(self) -> bool:
        """The texts after the tail's first output fill its budget; where they do not, it is cut when it is read."""
        first = self._tail[0]
        text = self._sizes[id(first)] if first["output_type"] == "stream" else 0
        return self._tail_text - text > self.limit // 2 - 4  # a text that was cut to fill it may lack three bytes

    def _drop(self, output: Output) -> None:
        size = self._sizes.pop(id(output), 0)
        self._dropped += size + output.get("left_out", 0)
        if output["output_type"] == "stream":
            self._tail_text -= size
        else:
            self._bundle_budget += size
            display_id = self._display_ids.pop(id(output), None)
            if display_id is not None:
                del self._displays[display_id][id(output)]
                if not self._displays[display_id]:
                    del self._displays[display_id]
                    self._bundle_budget += self._updated.pop(display_id, 0)
            if "data" in output:
                self._spool_bundle(output["data"])

    def _spool_bundle(self, data: dict[str, Any]) -> None:
        self._spool_text("displays", json.dumps(data, default=str) + "\n")

    def _spool_text(self, kind: str, text: str) -> None:
        spool = self._spools.get(kind)
        if spool is None:
            mime = "application/jsonl" if kind == "displays" else "text/plain; charset=utf-8"
            suffix = "jsonl" if kind == "displays" else "txt"
            spool = self._spools[kind] = Spool(self._spool_dir, f"{kind}.{suffix}", mime)
        spool.write(text.encode("utf-8", "backslashreplace"))

    # -- reading ---------------------------------------------------------------------------

    @property
    def stdout(self) -> str:
        return self._texts["stdout"].text()

    @property
    def stderr(self) -> str:
        return self._texts["stderr"].text()

    @property
    def truncated(self) -> bool:
        """True when something is not in ``outputs``, ``stdout`` or ``stderr`` but only in the spools."""
        cut = self._tail_text > self.limit // 2 or any("left_out" in output for output in self._tail)
        return bool(self._spools) or self._dropped > 0 or cut

    def take_spools(self) -> list[Spool]:
        """The files that hold the whole of each cut output; the caller stores and closes them."""
        spools, self._spools = list(self._spools.values()), {}
        return spools

    def outputs(self) -> list[Output]:
        """nbformat output objects. A gap says where text was cut, in each stream that was."""
        shown: list[Output] = [*self._head]
        left_out = self._dropped
        for number, output in enumerate(self._tail):
            left_out += output.get("left_out", 0)
            excess = self._tail_text - self.limit // 2
            if number == 0 and excess > 0:
                size = self._sizes[id(output)]
                output = {**output, "text": end_of(output["text"], size - excess)}
                left_out += size - size_of(output["text"])
            if left_out:
                before = shown[-1:] if number == 0 else []
                names = [side["name"] for side in (*before, output) if side["output_type"] == "stream"] or ["stdout"]
                shown += (
                    {"output_type": "stream", "name": name, "text": gap(left_out)} for name in dict.fromkeys(names)
                )
                left_out = 0
            shown.append(output)
        return _merged(shown)


def _merged(shown: list[Output]) -> list[Output]:
    """Consecutive texts of one stream made one."""
    merged: list[Output] = []
    for output in shown:
        text = "".join(output["parts"]) if "parts" in output else output.get("text")
        output = {key: value for key, value in output.items() if key not in ("parts", "left_out")}
        if output["output_type"] == "stream":
            output["text"] = text
            last = merged[-1] if merged else None
            if last is not None and last["output_type"] == "stream" and last["name"] == output["name"]:
                last["text"] += text
                continue
        merged.append(output)
    return merged
