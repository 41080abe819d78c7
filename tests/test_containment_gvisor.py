"""Sessions under gVisor, tried for real; skipped only where the engine has no runtime ``runsc`` (it is optional).

How to install it: SECURITY.md, "gVisor".
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from attacked import attacked, run, usable

from sandbox_kernel.provisioning.probe import engine_runtimes
from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gvisor(tmp_path_factory: pytest.TempPathFactory, engine: object) -> AsyncIterator[Session]:
    if "runsc" not in engine_runtimes():
        pytest.skip("the engine has no runtime runsc; SECURITY.md says how to install it")
    root = tmp_path_factory.mktemp("g")
    async with attacked(root, runtime="runsc", transport="ipc", memory_limit="512m") as session:
        yield session


async def test_it_is_gvisor_and_runs_pandas(gvisor: Session) -> None:
    assert "Starting gVisor" in await run(gvisor, "!dmesg")
    assert (await run(gvisor, "import pandas as pd; print(pd.DataFrame({'a': [1, 2]}).a.sum())")).strip() == "3"
    status = await run(gvisor, "print(open('/proc/self/status').read())")
    assert "CapEff:\t0000000000000000" in status
    await usable(gvisor)


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: pass"])
async def test_interrupt(gvisor: Session, code: str) -> None:
    result = await gvisor.execute(code, timeout=1)
    assert (result.status, result.state_preserved) == ("timeout", True)
    await usable(gvisor)


async def test_out_of_memory_and_restart(gvisor: Session) -> None:
    result = await gvisor.execute("b = []\nwhile True: b.append(bytearray(2**24))")
    assert result.death is not None and result.death.cause == "oom", result
    await usable(gvisor)
    await gvisor.restart()
    await usable(gvisor)
