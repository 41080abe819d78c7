"""A session under attack, and what the host must still be able to do with it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.logfile import Problem, iter_log
from sandbox_kernel.session import Session

SECRET = "the-host-keeps-this-4711"
"""Content of :attr:`Target.host_file`: wherever it turns up, the attack has succeeded."""


@asynccontextmanager
async def attacked(root: Path, **settings: Any) -> AsyncIterator[Session]:
    """A session ``victim`` below ``root``, with small limits so that attacks reach them soon."""
    small = {"interrupt_grace_s": 2, "memory_limit": "400m", "tmpfs_size": "32m", "pids_limit": 128, "timeout_s": 60}
    async with SessionManager(Settings(sessions_root=root / "sessions", **{**small, **settings})) as manager:
        yield await manager.start("victim")


def folder(session: Session) -> Path:
    assert session.directory is not None
    return session.directory


async def run(session: Session, code: str, **kwargs: Any) -> str:
    """What ``code`` prints; it must end well."""
    result = await session.execute(code, **kwargs)
    assert result.status == "ok", result
    return result.stdout


async def ask(session: Session, expression: str, setup: str = "") -> Any:
    """The JSON value of an expression inside."""
    return json.loads(await run(session, f"{setup}\nimport json\nprint(json.dumps({expression}))"))


async def usable(session: Session) -> None:
    """The session answers, its variables live, its artifacts arrive, its log grows."""
    result = await session.execute("alive = 6 * 7\nopen('artifacts/alive.txt', 'w').write('x')\nalive", timeout=30)
    assert result.result == "42", result
    assert [artifact.path for artifact in result.artifacts] == ["alive.txt"]
    line = events(session, "code_execution")[-1]
    assert (line["msg_id"], line["status"]) == (result.msg_id, "ok")


def events(session: Session, kind: str | None = None) -> list[dict[str, Any]]:
    found = [line for line in iter_log(folder(session) / "session.log") if not isinstance(line, Problem)]
    return [dict(line) for line in found if kind is None or line["event"] == kind]


async def until(condition: Callable[[], Any], timeout: float = 15) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come"
        await asyncio.sleep(0.02)
    return value
