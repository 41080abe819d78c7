"""Describing values: bounded and without calling foreign code, whatever the value is."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import sys
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_kernel.kernel_side.describe import LIMIT, Describer, looks_secret
from sandbox_kernel.kernel_side.fragments import Fragments
from sandbox_kernel.kernel_side.libraries import LibraryDescriber


@pytest.fixture(scope="module")
def describer() -> Describer:
    one = LibraryDescriber(secrets=["swordfish-1234"])
    one.learn()
    return one


def value_of(describer: Describer, value: Any, name: str = "x") -> str:
    found = describer.describe(name, value)
    json.dumps(found).encode("ascii")
    found["value"].encode("utf-8")
    assert len(found["value"]) <= LIMIT * 6
    return str(found["value"])


CALLS: list[str] = []
"""Foreign code that ran while it was only to be looked at."""


def called() -> NoReturn:
    CALLS.append("".join(traceback.format_stack(limit=6)))
    raise AssertionError("foreign code was called")


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    CALLS.clear()
    yield
    assert CALLS == []


class Metaclass(type):
    """Every question to a class of this kind is an accident."""

    def _no(cls, *args: Any) -> NoReturn:
        called()

    __hash__ = __eq__ = __repr__ = __getattribute__ = __instancecheck__ = __subclasscheck__ = _no


class Hostile(metaclass=Metaclass):
    """An object that must not be touched."""

    def _no(self, *args: Any) -> NoReturn:
        called()

    __class__ = property(_no)
    __repr__ = __str__ = __len__ = __iter__ = __hash__ = __eq__ = __bool__ = __format__ = __dir__ = _no
    __getattr__ = __getattribute__ = __getitem__ = __reduce_ex__ = __array__ = __index__ = __float__ = _no


class TalkativeList(list[Any]):
    def __repr__(self) -> str:
        called()

    def __len__(self) -> int:
        called()


def test_the_documents_own_examples(describer: Describer) -> None:
    frame = pd.DataFrame([[1, 2, 3], [4, 5, 6]], columns=list("ABC"))
    found = describer.describe("df", frame)
    assert found["type"] == "DataFrame"
    assert found["value"] == "   A  B  C\n0  1  2  3\n1  4  5  6"
    assert found["shape"] == [2, 3]
    assert describer.describe("x", [1, 2, 3, 4, 5]) == {"type": "list", "value": "[1, 2, 3, 4, 5]", "length": 5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (float("nan"), "nan"),
        (2j, "2j"),
        ("it's", '"it\'s"'),
        (b"ab", "b'ab'"),
        ((), "()"),
        ((1,), "(1,)"),
        ([], "[]"),
        (set(), "set()"),
        ({3}, "{3}"),
        (frozenset(), "frozenset()"),
        ({}, "{}"),
        ({"a": [1, {"b": None}]}, "{'a': [1, {'b': None}]}"),
        (collections.Counter("aab"), "Counter({'a': 2, 'b': 1})"),
        (collections.deque([1, 2]), "deque([1, 2])"),
        (range(3), "range(0, 3)"),
        (slice(1, None), "slice(1, None, None)"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), "2024-01-02T00:00:00+00:00"),
        (Path("/a/b"), "/a/b"),
        (decimal.Decimal("1.50"), "1.50"),
        ([decimal.Decimal("1e1000")], "[1E+1000]"),
        (fractions.Fraction(1, 3), "1/3"),
        (10**20_000, "<int of 66439 bits>"),
        ("\ud800", "'\\ud800'"),
        (len, "<built-in function len>"),
        (Path, "<class 'pathlib.Path'>"),
        (types.SimpleNamespace(a=1), "<types.SimpleNamespace object>"),
        (np.float64(1.5), "1.5"),
        ([np.float64(1.5), np.int8(3)], "[1.5, 3]"),
        (np.arange(6).reshape(2, 3), "[[0, 1, 2],\n [3, 4, 5]]"),
        (np.datetime64("2024-01-01"), "2024-01-01"),
        (np.array([object()]), "<array of object of shape (1,)>"),
        ([np.zeros((2, 2))], "[<numpy.ndarray object of shape (2, 2)>]"),
        (pd.Timestamp("2024-01-01"), "2024-01-01 00:00:00"),
        (pd.Series([1, 2]), "0  1\n1  2"),
        (pd.DataFrame(), ""),
        (pd.NaT, "NaT"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values(describer: Describer, value: Any, text: str) -> None:
    assert value_of(describer, value) == text


def test_functions_show_their_signature_and_no_default(describer: Describer) -> None:
    def f(a: int, b: Any = Hostile(), *rest: int, key: int, other: int = 1, **more: int) -> None: ...  # noqa: B008

    def g(a: int, *, key: int) -> None: ...

    assert value_of(describer, f).endswith("f(a, b=..., *rest, key, other=..., **more)")
    assert value_of(describer, g).endswith("g(a, *, key)")
    assert describer.describe("f", f)["type"] == "function"


def test_hostile_objects_are_not_touched(describer: Describer) -> None:
    hostile = Hostile()
    assert value_of(describer, hostile).endswith("Hostile object>")
    assert value_of(describer, Hostile).endswith("Hostile'>")
    assert "Hostile object>" in value_of(describer, [hostile, {"k": hostile}, (hostile,)])
    assert value_of(describer, slice(hostile, 1)) == "<slice object>"
    talkative = TalkativeList([1, 2])
    assert describer.describe("x", talkative)["length"] == 2
    frame = pd.DataFrame({"a": [1, 2]}).astype(object)
    frame.iat[0, 0] = types.SimpleNamespace(password="swordfish-1234")
    assert "SimpleNamespace object" in value_of(describer, frame)


def test_a_lying_class_is_not_believed(describer: Describer) -> None:
    liar = type("ndarray", (), {"__module__": "numpy", "shape": property(lambda self: 1 / 0)})()
    assert value_of(describer, liar) == "<numpy.ndarray object>"


def recursive() -> list[Any]:
    items: list[Any] = [1]
    items.append({"again": items})
    return items


@pytest.mark.parametrize(
    "value",
    [
        {i: i for i in range(1_000_000)},
        ["x" * 10_000] * 100_000,
        [[[[["deep"] * 100] * 100] * 100] * 100] * 100,
        np.broadcast_to(np.float64(1), (100_000, 13_421)),
        pd.DataFrame({"a": np.zeros(1_000_000), "b": "text" * 1000}),
        pd.DataFrame(np.zeros((3, 50_000))),
        "y" * 100_000_000,
        b"z" * 100_000_000,
        10**100_000,
        [10**5_000] * 1000,
        decimal.Decimal("1" * 1_000_000),
        fractions.Fraction(10**100_000 + 1, 10**100_000),
        range(10**30),
        recursive(),
        (i for i in range(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_large_values_take_no_time(describer: Describer, value: Any) -> None:
    value_of(describer, value)
    best = min(_seconds(describer, value) for _ in range(5))
    assert best < 0.01


def _seconds(describer: Describer, value: Any) -> float:
    started = time.perf_counter()
    describer.describe("x", value)
    return time.perf_counter() - started


def test_an_array_on_disk_is_read_at_its_beginning_only(describer: Describer, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    array = np.memmap(path, dtype=np.float64, mode="r")
    found = describer.describe("x", array)
    assert found["shape"] == [10 * 2**27]
    assert found["value"].startswith("[0.0, 0.0")
    assert path.stat().st_blocks == 0


def test_nothing_is_changed(describer: Describer) -> None:
    default: collections.defaultdict[str, list[int]] = collections.defaultdict(list, {"a": [1]})
    frame = pd.DataFrame({"a": [1, 2]})
    flags = np.get_printoptions(), pd.get_option("display.max_rows")
    iterator = iter([1, 2])
    for value in (default, frame, iterator):
        value_of(describer, value)
    assert list(default) == ["a"]
    assert list(frame.columns) == ["a"]
    assert list(iterator) == [1, 2]
    assert (np.get_printoptions(), pd.get_option("display.max_rows")) == flags


SECRET_NAMES = ["password", "DB_PASSWORD", "dbPassword", "hf_token", "API_KEY", "apiKey", "apikey", "secret", "auth"]
SECRET_NAMES += ["aws_secret_access_key", "OPENAI_API_KEY", "credentials", "private_key", "passphrase"]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(describer: Describer, name: str) -> None:
    assert looks_secret(name)
    assert value_of(describer, "hush", name) == "***"
    assert "hush" not in value_of(describer, {name: "hush"})
    assert "hush" not in value_of(describer, pd.DataFrame({name: ["hush"]}))


@pytest.mark.parametrize("name", ["author", "tokens", "tokenizer", "key", "keys", "passed", "monkey", "secretary", "x"])
def test_names_that_are_no_secret(name: str) -> None:
    assert not looks_secret(name)


def test_masking_by_name_can_be_switched_off() -> None:
    assert Describer(mask=False).describe("password", "hush")["value"] == "'hush'"


@pytest.mark.parametrize("before", [0, 180, 195, 1_980, 1_995])
def test_a_secret_is_hidden_wherever_it_is_cut(describer: Describer, before: int) -> None:
    text = "-" * before + "swordfish-1234" + "-" * 3_000
    for value in (text, [text], {"a": text}, {text: 1}, pd.DataFrame({"a": [text]})):
        assert "sword" not in value_of(describer, value)


HOSTILE, CLASS, TALKATIVE = "a hostile object", "its class", "a talkative list"
"""What hypothesis holds in their place: it would ask them questions itself."""


def plant(value: Any) -> Any:
    """``value`` with the stand-ins replaced by what they stand for."""
    if isinstance(value, dict):
        return {key: plant(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        items = [plant(item) for item in value]
        return (
            TalkativeList(items)
            if type(items[0] if items else None) is str and items[0] == TALKATIVE
            else type(value)(items)
        )
    return Hostile() if value == HOSTILE else Hostile if value == CLASS else value


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.sampled_from([HOSTILE, CLASS, TALKATIVE]),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.lists(inner).map(collections.deque),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner),
    ),
    max_leaves=50,
)


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(), VALUES), max_size=5))
def test_any_mixture_is_described(describer: Describer, variables: list[tuple[str, Any]]) -> None:
    CALLS.clear()
    for name, value in variables:
        found = describer.describe(name, plant(value))
        assert set(found) >= {"type", "value"}
        json.dumps(found).encode("ascii")
        found["value"].encode("utf-8")
    assert CALLS == []


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(max_size=20)), st.lists))
def test_small_plain_values_read_as_their_repr(describer: Describer, value: Any) -> None:
    text = repr(value)
    if len(text) < 150 and text.count("[") < 4 and "\\ud" not in text:
        assert value_of(describer, value) == text.encode("utf-8", "backslashreplace").decode()


_PLAIN = st.one_of(st.integers(-2, 2), st.booleans(), st.sampled_from([0.0, -0.0, 1.0, "", "a", "b" * 60, 1 << 80]))
_LISTED = st.lists(st.one_of(_PLAIN, st.lists(_PLAIN, max_size=2), st.tuples(_PLAIN)), max_size=25)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.one_of(_LISTED, _LISTED.map(tuple), _PLAIN), min_size=2, max_size=6))
def test_what_was_seen_before_is_described_as_if_it_were_new(describer: Describer, contents: list[Any]) -> None:
    fragments, listed = Fragments(describer), list[Any]()
    for content in contents:
        value = content
        if isinstance(content, list):
            listed[:] = content  # the same list all along
            value = listed
        fragments.begin()
        seen = fragments.of("x", value)
        fragments.done()
        assert json.loads(f"{{{seen}}}") == {"x": describer.describe("x", value)}
        if isinstance(value, list):
            for inner in value:
                if isinstance(inner, list):
                    inner.append(7)


def test_what_stayed_the_same_is_not_described_again(describer: Describer) -> None:
    described: list[str] = []

    class Counting(Describer):
        def describe(self, name: str, value: Any) -> dict[str, Any]:
            described.append(name)
            return super().describe(name, value)

    fragments = Fragments(Counting())
    namespace = {"number": 3, "text": "abc", "few": [1, "two", None], "pair": (1, 2), "nested": [[1]], "many": [0] * 99}

    def describe_all() -> list[str]:
        described.clear()
        fragments.begin()
        for name, value in namespace.items():
            fragments.of(name, value)
        fragments.done()
        return described

    assert describe_all() == list(namespace)
    assert describe_all() == ["nested", "many"]
    namespace["few"].append(4)
    namespace["number"] = 4
    assert describe_all() == ["number", "few", "nested", "many"]


@pytest.mark.parametrize("value", [[2], [[1]], {"a": 1}, np.ones(3)])
def test_what_was_described_is_not_held(describer: Describer, value: Any) -> None:
    """A list may grow, and is freed when its own cell deletes it."""
    fragments, before = Fragments(describer), sys.getrefcount(value)
    fragments.begin()
    fragments.of("x", value)
    fragments.done()
    assert sys.getrefcount(value) == before
