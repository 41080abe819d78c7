"""Events wait for a slow reader: complete, in order, in bounded memory; what finds no room is told of."""

from __future__ import annotations

import asyncio
import math
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel import SessionManager, Settings, backlog
from sandbox_kernel.backlog import Backlog
from sandbox_kernel.events import (
    GAP,
    Artifact,
    ArtifactCreated,
    CellEvent,
    DisplayData,
    Finished,
    Stderr,
    Stdout,
    utc_now,
)

LIMIT = 5_000
JSON = {"a": [2**70, math.inf, None, "é"]}
ARTIFACT = Artifact(
    id="art_0",
    filename="é",
    path="é",
    size_bytes=1,
    sha256="0",
    content_type="a/b",
    session_id="s",
    created_at=utc_now(),
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(Stdout, msg_id=st.just("m"), text=st.text(st.characters(exclude_categories=["Cs"]), max_size=500)),
        st.builds(Stderr, msg_id=st.just("m"), text=st.sampled_from(["\r\n", "\x85\u2028", "x" * 10_000])),
        st.builds(
            DisplayData,
            msg_id=st.just("m"),
            data=st.sampled_from(
                [{"application/json": {"a": [2**70, math.inf, None, "é"]}}, {"image/png": "AA" * 9_000}]
            ),
        ),
        st.just(ArtifactCreated(msg_id="m", artifact=ARTIFACT)),
        st.integers(1, 20),
    ),
    max_size=60,
)


def read(events: Backlog, count: int) -> list[CellEvent]:
    """The next ones, as far as they are there."""
    found = []
    while len(found) < count and (event := events._next()) is not None:
        found.append(event)
    return found


@given(MESSAGES)
def test_whatever_waits_where_it_is_read_in_order(messages: list[CellEvent | int]) -> None:
    """A number: so many are read."""
    with tempfile.TemporaryDirectory() as folder, Backlog(LIMIT, Path(folder)) as events:
        put: list[CellEvent] = []
        found: list[CellEvent] = []
        for message in messages:
            if isinstance(message, int):
                found += read(events, message)
            else:
                put.append(message)
                events.put(message)
        assert found + read(events, 1_000) == put
        assert list(Path(folder).iterdir()) == []


def test_memory_is_bounded_and_room_on_the_disk_is_given_back(tmp_path: Path) -> None:
    with Backlog(1_000_000, tmp_path) as events:
        for _ in range(2):
            tracemalloc.start()
            for number in range(30_000):
                events.put(Stdout(msg_id="m", text=f"{number:99}\n"))
            assert tracemalloc.get_traced_memory()[1] < 4e6
            for number in range(30_000):
                (event,) = read(events, 1)
                assert isinstance(event, Stdout)
                assert int(event.text) == number
            assert tracemalloc.get_traced_memory()[1] < 4e6
            tracemalloc.stop()
            assert read(events, 1) == []
            assert events._file is not None
            assert events._file.seek(0, 2) == 0


@pytest.mark.parametrize("why", ["too much", "no folder"])
def test_what_finds_no_room_is_told_of_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    folder = tmp_path / "folder"
    if why == "too much":
        monkeypatch.setattr(backlog, "MAX_SPOOL", 50_000)
    else:
        folder.touch()
    with Backlog(LIMIT, folder) as events:
        for _ in range(2):
            for number in range(200):
                events.put(Stdout(msg_id="m", text=f"{number:999}\n"))
            *kept, last = [event.text for event in read(events, 1_000) if isinstance(event, Stdout)]
            assert [int(text) for text in kept] == list(range(len(kept)))
            assert 2 <= len(kept) < 100
            assert GAP.fullmatch(last)
            assert str((200 - len(kept)) * 1000) in last


async def test_a_slow_reader_holds_nobody_up_and_misses_nothing(image: str, tmp_path: Path) -> None:
    lines = 30_000
    async with SessionManager(Settings(sessions_root=tmp_path, max_output_bytes=100_000)) as manager:
        session = await manager.start("conv")
        stream = session.stream(f"for n in range({lines}): print(f'{{n:99}}', flush=n % 10 == 0)")
        first = await anext(stream)
        assert isinstance(first, Stdout)
        async with asyncio.timeout(60):
            while session._feed.cells:
                await asyncio.sleep(0.01)
        texts = [first.text]
        async for event in stream:
            if isinstance(event, Stdout):
                texts.append(event.text)
        assert "".join(texts) == "".join(f"{n:99}\n" for n in range(lines))
        assert isinstance(event, Finished)
        assert event.result.success
        (whole,) = event.result.output_artifacts
        assert (await session.read_artifact(whole.id)).decode() == "".join(texts)
