"""Secrets are masked in every form in which they are often printed, wherever a text is cut into pieces."""

from __future__ import annotations

import io
import json
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel import masking
from sandbox_kernel.masking import MASK, Masker, masker

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
