"""The viewer on text that wants to act on the terminal, and on entries of any shape."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from viewing import ACTIVE, document_session, shown

from viewer.entries import describe, describe_state
from viewer.pretty import PrettyView
from viewer.visible import block, visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\x00\x08\ud800\U000e0041"


@pytest.mark.parametrize("colour", [False, True])
def test_nothing_hostile_reaches_the_terminal(tmp_path: Path, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = document_session(tmp_path)
    cell = dict.fromkeys(("code", "stdout", "stderr", "result", "error", "origin", "status", HOSTILE), HOSTILE)
    state = {
        "timestamp": HOSTILE,
        "variables": {HOSTILE: {"type": HOSTILE, "value": HOSTILE}},
        "imported_modules": [HOSTILE],
    }
    with (folder / "session.log").open("a") as log:
        log.write(json.dumps(cell | {"event": "code_execution", "timestamp": HOSTILE}) + "\n")
        log.write(
            json.dumps({"event": HOSTILE, HOSTILE: [HOSTILE]}) + "\n" + HOSTILE.encode("utf-8", "replace").decode()
        )
    (folder / "python_state.json").write_text(json.dumps(state))
    (folder / "session_metadata.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "artifacts" / "\x1b[2J\n.csv").write_text("")
    os.symlink("/etc/passwd", os.fsencode(folder / "artifacts") + b"/\xff\x1b")
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(folder)) if colour else shown(folder)
    assert ACTIVE.findall(text) == []
    assert "\\x1b" in text
    assert ACTIVE.findall(shown(folder, as_json=True)) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from((
    "timestamp", "event", "code", "success", "stdout", "stderr", "error", "result", "outputs", "execution_count",
    "status", "duration_s", "origin", "artifacts", "output_artifacts", "truncated", "state_preserved", "lost_names",
    "death", "other",
))  # fmt: skip
KINDS = st.sampled_from(["stream", "execute_result", 1])
OUTPUT = {"output_type": KINDS, "data": VALUES, "name": VALUES, "text": VALUES}
OUTPUTS = st.lists(st.fixed_dictionaries({}, optional=OUTPUT), max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    entry=st.dictionaries(FIELDS, VALUES), outputs=OUTPUTS | VALUES,
    event=st.sampled_from(["code_execution", "artifacts_created", "session_started"]),
)  # fmt: skip
def test_any_entry_and_any_state_can_be_laid_out(entry: dict[str, Any], outputs: Any, event: str) -> None:
    item = describe(entry | {"event": event, "outputs": outputs})
    PrettyView(io.StringIO()).item(item)
    assert ACTIVE.findall("".join([item.time, item.title, *item.facts, *(part.text for part in item.blocks)])) == []
    PrettyView(io.StringIO()).state(describe_state({"variables": entry, "imported_modules": outputs}))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_visible_text_has_nothing_active(text: str) -> None:
    assert ACTIVE.findall(visible(text)) == []


def test_long_text_is_cut_in_the_middle_and_progress_bars_are_folded() -> None:
    assert block("0%\r100%\ndone\r\n", fold=True) == "100%\ndone"
    assert block("abcdef\rXY", fold=True) == "XYcdef"
    lines = block("\n".join(map(str, range(10_000)))).split("\n")
    assert (lines[0], lines[-1], len(lines)) == ("0", "9999", 401)
    assert len(block("x" * 10**6)) < 61_000


def test_nothing_hostile_takes_long_or_floods_the_screen() -> None:
    began = time.monotonic()
    assert len(block("x" * 300_000 + "\r" * 300_000 + "y", fold=True)) < 61_000
    state = describe_state({str(n): n for n in range(50_000)} | {"imported_modules": [1] * 1_000_000})
    assert (len(state.modules), state.module_count, len(state.facts)) == (40, 1_000_000, 51)
    for event in ("code_execution", "other"):
        assert len(describe({"event": event} | {str(n): n for n in range(50_000)}).facts) < 60
    assert time.monotonic() - began < 2
