"""Secrets are masked in every form in which they are often printed, wherever a text is cut into pieces."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel import masking
from sandbox_kernel.events import GAP
from sandbox_kernel.late import LIMIT, LateOutput
from sandbox_kernel.masking import MASK, Masker, masker
from sandbox_kernel.outputs import OutputCollector

VALUE = 'pä"ss/w\nörd&+'


@pytest.mark.parametrize(
    "printed",
    [
        VALUE,
        repr(VALUE),
        json.dumps(VALUE),
        json.dumps(VALUE, ensure_ascii=False),
        json.dumps({"a": [VALUE]}),
        f"https://host/{quote(VALUE)}?{urlencode({'q': VALUE})}",
        VALUE.split("\n")[1],
    ],
)
def test_forms(printed: str) -> None:
    mask = masker({"KEY": VALUE})
    assert mask is not None
    assert MASK in mask(printed)
    assert not [word for word in ("ss/w", "ss%2Fw", "rd&", "rd%26") if word in mask(printed)]


def test_nothing_to_mask() -> None:
    assert masker({}) is None


@given(st.lists(st.sampled_from(["secret", "secrets", "sec", "ret", "é", "x"]), max_size=30), st.integers(1, 9))
def test_pieces_are_masked_as_the_whole(words: list[str], size: int) -> None:
    mask = Masker({"A": "secret", "B": "secrets", "C": "éxret"})
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "CHUNK", size)
        assert b"".join(mask.stream(io.BytesIO(text.encode()))).decode() == mask(text)


# --- output that was cut ----------------------------------------------------------------------

KEY = "s3cr3t-KEY"
MASK_KEY = Masker({"KEY": KEY})


def of_the_secret(texts: list[str]) -> str:
    """What is left of it in masked texts that held nothing but it and ``x``."""
    return "".join(GAP.sub("", text).translate(str.maketrans("", "", "x*")) for text in texts)


@pytest.mark.parametrize("at", range(len(KEY) + 1))
@pytest.mark.parametrize("printed", ["in small pieces", "in lines, two streams in turns", "at once"])
def test_a_value_cut_in_two_is_masked(tmp_path: Path, at: int, printed: str) -> None:
    collector = OutputCollector("m", 200, tmp_path)
    text = "x" * at + KEY * 100
    if printed == "in small pieces":
        messages = [("stdout", text[start : start + 7]) for start in range(0, len(text), 7)]
    elif printed == "at once":
        messages = [("stdout", text)]
    else:
        messages = [("stdout", "x" * at + KEY * 3), ("stderr", "x" * at + KEY * 3)] * 20
    for name, said in messages:
        collector.add("stream", {"name": name, "text": said})
    collector.add("display_data", {"data": {"text/plain": "x"}})
    collector.add("stream", {"name": "stderr", "text": KEY * 50})
    collector.add("execute_result", {"data": {"text/plain": "x" * at + KEY * 50}})
    collector.add("error", {"ename": "x", "evalue": "x" * at + KEY * 50, "traceback": [KEY * 50]})
    assert collector.truncated
    assert collector.result is not None
    assert collector.error is not None
    error = [collector.error.value, collector.error.traceback]
    shown = [output.get("text", "") for output in MASK_KEY.tree(collector.outputs())]
    plain = [collector.stdout, collector.stderr, collector.result, *error]
    assert all(GAP.search(text) for text in plain)
    assert of_the_secret([*map(MASK_KEY, plain), *shown]) == ""
    for spool in collector.take_spools():
        if (file := spool.whole()) is not None:
            file.close()


async def test_a_value_at_the_end_of_late_output_is_masked() -> None:
    lines: list[str] = []
    late = LateOutput(lambda _event, **fields: lines.append(fields["text"]), MASK_KEY)
    for size in (LIMIT - 4, LIMIT + 1):
        late.add("m", 1, "stdout", "x" * (LIMIT - 4) + KEY)
        late.add("m", 1, "stdout", "x" * size)
        late.flush()
    assert of_the_secret(lines) == ""


def test_what_was_not_cut_keeps_its_edges() -> None:
    assert MASK_KEY("Y and s") == "Y and s"
    assert MASK_KEY("s3cr3t\n... [9 bytes left out] ...\nY and s") == "***\n... [9 bytes left out] ...\n*** and s"
