"""Attacks on the processes of a session: whatever its code kills, stops or closes, the caller is back in time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from attacked import attacked, events, until, usable

from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    async with attacked(tmp_path_factory.mktemp("k"), interrupt_grace_s=1) as session:
        yield session


KILLS = {
    "everything": "import os\nos.kill(-1, 9)",
    "the supervisor": "import os\nos.kill(os.getppid(), 9)",
    "init": "import os, time\nos.kill(1, 9)\nos.kill(1, 15)\ntime.sleep(3)",
    "its group": "import os\nos.killpg(0, 9)",
    "stopped": "import os\nos.kill(os.getpid(), 19)",
    "supervisor stopped": "import os\nos.kill(os.getppid(), 19)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "all stopped": "import os\nos.kill(-1, 19)",
    "sockets closed": "import gc, zmq\n[o.close(linger=0) for o in gc.get_objects() if type(o).__module__.startswith('zmq') and isinstance(o, zmq.Socket)]\nimport time; time.sleep(30)",
    "descriptors closed": "import os\nos.closerange(0, 8192)",
    "context ended": "import zmq\nget_ipython().kernel.iopub_socket.context.destroy(linger=0)\nimport time; time.sleep(30)",
    "socket files removed": "import os\n[os.unlink('/run/kernel/' + n) for n in os.listdir('/run/kernel')]\nimport time; time.sleep(30)",
    "many threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "exit in a thread": "import threading, os, time\nthreading.Thread(target=os._exit, args=(9,)).start()\ntime.sleep(30)",
}

DEADLY = ("everything", "the supervisor")
"""The kernel itself dies of its parent's death, perhaps after it has answered."""


@pytest.mark.parametrize("what", KILLS)
async def test_whatever_it_kills_the_caller_is_back(victim: Session, what: str) -> None:
    deaths = len(events(victim, "kernel_died"))
    began = time.monotonic()
    result = await victim.execute(KILLS[what], timeout=2)
    took = time.monotonic() - began
    assert result.status in ("timeout", "kernel_died", "error", "ok", "interrupted"), result
    # The timeout, the grace, 1 s as promised, and half of that again for a machine on which other tests run.
    assert took < 2 + 1 + 1 + 0.5, took
    began = time.monotonic()
    if result.status == "ok" and what in DEADLY:
        # It said so before its parent's death reached it: a cell until then may be the one that dies of it.
        await until(lambda: len(events(victim, "kernel_died")) > deaths)
    await usable(victim)
    assert time.monotonic() - began < 15
    assert [line for line in events(victim, "code_execution") if line["msg_id"] == result.msg_id]
