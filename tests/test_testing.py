"""``sandbox_kernel.testing``: every step is one that is taken, and nothing stays behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.testing import STEPS, Step, just_before

DOC = Path(__file__).parents[1] / "docs" / "python.md"


async def test_a_session_comes_to_every_step_and_goes_on(image: str, tmp_path: Path) -> None:
    seen: list[Step] = []

    async def waits() -> None:
        seen.append("kernel_wanted")

    async with SessionManager(Settings(sessions_root=tmp_path, pool_size=1)) as manager:
        with just_before("kernel_wanted", waits):
            with just_before("cell_sent", lambda: seen.append("cell_sent")):
                with just_before("kernel_launched", lambda: seen.append("kernel_launched")):
                    with just_before("spare_warmed", lambda: seen.append("spare_warmed")):
                        await manager.pool.full()
                        session = await manager.start("conv")
                    with just_before("blobs_placed", lambda: seen.append("blobs_placed")):
                        with just_before("artifacts_marked", lambda: seen.append("artifacts_marked")):
                            result = await session.execute("open('artifacts/a', 'w').write('a')")
        assert [artifact.path for artifact in result.artifacts] == ["a"]
        assert sorted(set(seen)) == sorted(STEPS)
        assert seen.index("kernel_wanted") < seen.index("cell_sent") < seen.index("blobs_placed")
        seen.clear()
        assert (await session.execute("1 + 1")).result == "2"
        assert seen == []


async def test_what_is_raised_there_is_raised_and_the_step_is_not_taken(image: str, tmp_path: Path) -> None:
    def full() -> None:
        raise RuntimeError("just so")

    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.start("conv")
        with just_before("kernel_wanted", full), pytest.raises(RuntimeError, match="just so"):
            await session.execute("x = 1")
        assert (await session.execute("'x' in globals()")).result == "False"


def test_the_steps_are_documented() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", DOC.read_text().partition("## Testing")[2], re.M)) == STEPS
