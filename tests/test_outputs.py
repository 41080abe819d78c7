"""Messages → outputs: nbformat-valid, bounded, and nothing lost, whatever the messages are."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.events import BLOB_MIME, GAP
from sandbox_kernel.outputs import BoundedText, OutputCollector, for_log

LIMIT = 2_000


@pytest.fixture
def collector(tmp_path: Path) -> OutputCollector:
    return OutputCollector("m1", LIMIT, tmp_path)


def close(collector: OutputCollector) -> dict[str, bytes]:
    """The spools by name, read and closed."""
    whole = {}
    for spool in collector.take_spools():
        file = spool.whole()
        assert file is not None
        with file:
            whole[spool.filename] = file.read()
    return whole


def check_nbformat(outputs: list[dict[str, Any]]) -> None:
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.from_dict(output) for output in outputs])
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
anything = st.text(st.characters(codec=None)) | json_values  # lone surrogates too
bundle = st.dictionaries(
    st.sampled_from(["text/plain", "text/html", "image/png", "application/json", "application/x+json", "weird"]),
    anything,
)
message = st.one_of(
    st.tuples(st.just("stream"), st.fixed_dictionaries({"name": anything, "text": anything})),
    st.tuples(
        st.sampled_from(["display_data", "update_display_data", "execute_result"]),
        st.fixed_dictionaries(
            {"data": bundle | anything, "metadata": st.just({}) | anything},
            optional={"transient": st.just({"display_id": "d"}) | anything, "execution_count": anything},
        ),
    ),
    st.tuples(
        st.just("error"),
        st.fixed_dictionaries({"ename": anything, "evalue": anything, "traceback": st.lists(anything) | anything}),
    ),
    st.tuples(st.just("clear_output"), st.fixed_dictionaries({"wait": anything})),
    st.tuples(st.text(), st.fixed_dictionaries({})),
)


@given(st.lists(message, max_size=30))
@settings(deadline=None, max_examples=80)
def test_any_messages_give_valid_outputs(tmp_path_factory: pytest.TempPathFactory, messages: list[Any]) -> None:
    collector = OutputCollector("m1", LIMIT, tmp_path_factory.getbasetemp())
    for msg_type, content in messages:
        collector.add(msg_type, content)
    outputs = collector.outputs()
    check_nbformat(outputs)
    check_nbformat(for_log(outputs, lambda data: "0" * 64))
    for text in (collector.stdout, collector.stderr):
        assert len(text.encode()) <= LIMIT + 100
    close(collector)


@given(st.lists(st.text(max_size=400), max_size=60))
@settings(deadline=None)
def test_every_byte_is_in_the_result_or_in_the_spool(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    collector = OutputCollector("m1", LIMIT, tmp_path_factory.getbasetemp())
    for text in texts:
        collector.add("stream", {"name": "stdout", "text": text})
    printed = "".join(texts).encode("utf-8", "backslashreplace")
    spools = close(collector)
    if len(printed) <= LIMIT:
        assert collector.stdout.encode() == printed or "stdout.txt" in spools
    if "stdout.txt" in spools:
        assert spools["stdout.txt"] == printed
    else:
        assert collector.stdout.encode() == printed


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), max_size=20), st.integers(10, 200))
@settings(deadline=None)
def test_head_and_tail_are_as_long_as_they_may_be(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], limit: int
) -> None:
    """In whatever pieces it was printed; at a cut some bytes of a character may be missing."""
    bounded = BoundedText(limit)
    collector = OutputCollector("m1", limit, tmp_path_factory.getbasetemp())
    for text in texts:
        bounded.add(text)
        collector.add("stream", {"name": "stdout", "text": text})
    close(collector)
    whole = "".join(texts)
    assert bounded.size == len(whole.encode())
    for shown in (bounded.text(), "".join(output["text"] for output in collector.outputs())):
        cut = GAP.search(shown)
        if cut is None:
            assert shown == whole
            continue
        head, tail = shown[: cut.start()], shown[cut.end() :]
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert len((head + tail).encode()) + int(re.findall(r"\d+", cut.group())[0]) == len(whole.encode())
        assert limit // 2 - 6 <= len(tail.encode()) <= limit // 2
        assert len(head.encode()) <= limit // 2
    assert len(whole.encode()) > limit // 2 * 2 - 4 or bounded.text() == whole, "cut without need"


def test_a_newline_does_not_cost_the_tail(collector: OutputCollector) -> None:
    """`print` of one long text: its end is a message of its own."""
    for text in ("x" * 10_000 + "end", "\n"):
        collector.add("stream", {"name": "stdout", "text": text})
    assert collector.stdout.endswith("end\n")
    assert collector.outputs()[-1]["text"].endswith("end\n")
    assert collector.truncated
    close(collector)


def test_consecutive_streams_merge_and_others_keep_their_order(collector: OutputCollector) -> None:
    for name, text in [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]:
        collector.add("stream", {"name": name, "text": text})
    assert [(o["name"], o["text"]) for o in collector.outputs()] == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]


def test_a_display_update_replaces_in_place(collector: OutputCollector) -> None:
    collector.add("display_data", {"data": {"text/plain": "10 %"}, "metadata": {}, "transient": {"display_id": "p"}})
    collector.add("stream", {"name": "stdout", "text": "between"})
    collector.add(
        "update_display_data", {"data": {"text/plain": "99 %"}, "metadata": {}, "transient": {"display_id": "p"}}
    )
    assert [o.get("data", {}).get("text/plain") for o in collector.outputs()] == ["99 %", None]


def test_clear_output_empties_the_outputs_but_not_what_was_printed(collector: OutputCollector) -> None:
    collector.add("stream", {"name": "stdout", "text": "step 1\n"})
    collector.add("clear_output", {"wait": True})
    assert collector.outputs(), "wait: cleared only when the next output comes"
    collector.add("stream", {"name": "stdout", "text": "step 2\n"})
    assert [o["text"] for o in collector.outputs()] == ["step 2\n"]
    assert collector.stdout == "step 1\nstep 2\n"


def test_pictures_stand_in_the_log_as_references(collector: OutputCollector) -> None:
    png = b"\x89PNG\r\n\x1a\n" + bytes(300)
    collector.add("display_data", {"data": {"image/png": base64.b64encode(png).decode(), "text/plain": "<Figure>"}})
    kept: list[bytes] = []

    def keep(data: bytes) -> str:
        kept.append(data)
        return "ab" * 32

    (logged,) = for_log(collector.outputs(), keep)
    assert kept == [png]
    assert logged["data"] == {
        "text/plain": "<Figure>",
        BLOB_MIME: {"sha256": "ab" * 32, "size_bytes": len(png), "mime": "image/png"},
    }
    assert "image/png" in collector.outputs()[0]["data"], "the result itself keeps the picture"


def test_a_huge_repr_is_cut_and_kept_whole_in_the_spool(collector: OutputCollector) -> None:
    collector.add("execute_result", {"data": {"text/plain": "x" * 50_000}, "metadata": {}, "execution_count": 1})
    assert collector.result is not None
    assert len(collector.result) <= LIMIT
    assert collector.truncated
    assert b"x" * 50_000 in close(collector)["displays.jsonl"]


def test_a_loop_of_displays_is_bounded(collector: OutputCollector) -> None:
    for number in range(10_000):
        collector.add("display_data", {"data": {"text/plain": f"number {number}"}, "metadata": {}})
    outputs = collector.outputs()
    assert len(outputs) <= 2_001
    assert outputs[-1]["data"]["text/plain"] == "number 9999"
    lines = close(collector)["displays.jsonl"].decode().splitlines()
    assert len(lines) + sum(1 for o in outputs if "data" in o) == 10_000


def test_a_traceback_has_no_ansi_codes_in_the_error(collector: OutputCollector) -> None:
    collector.add("error", {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[39m: v", "\x1b]0;title\x07end"]})
    assert collector.error is not None
    assert collector.error.traceback == "E: v\nend"
