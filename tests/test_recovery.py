"""A host process dies at a precise moment; the next one takes over, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from hosts import killed
from kernels import client_of

from sandbox_kernel import SessionManager, SessionStorage, Settings
from sandbox_kernel.audit import verify
from sandbox_kernel.errors import SessionHeld, SessionNotFound
from sandbox_kernel.logfile import Problem, iter_log
from sandbox_kernel.provisioning.attach import read_connection_file
from sandbox_kernel.provisioning.runtime import RuntimeDirectory
from sandbox_kernel.session import Session
from sandbox_kernel.testing import just_before

pytestmark = pytest.mark.usefixtures("image")

WAIT = "import os, time\nwhile not os.path.exists('state/go'): time.sleep(0.01)\n"
"""A cell that goes on when the test says so."""


def lines(root: Path, kind: str | None = None, session_id: str = "conv") -> list[dict[str, Any]]:
    found = [dict(line) for line in iter_log(root / session_id / "session.log") if not isinstance(line, Problem)]
    return [line for line in found if kind is None or line["event"] == kind]


def the_line(root: Path, word: str) -> dict[str, Any]:
    """The one line of the cell that has ``word`` in its code."""
    (line,) = [line for line in lines(root, "code_execution") if word in line["code"]]
    return line


async def until(condition: Callable[[], Any], timeout: float = 10) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come"
        await asyncio.sleep(0.01)
    return value


def go(root: Path) -> None:
    (root / "conv" / "state" / "go").touch()


def ended(root: Path, word: str) -> bool:
    """Whether the kernel's own journal knows the end of a cell."""
    entries = map(json.loads, (root / "conv" / "state" / "cells.jsonl").read_text().splitlines())
    return any(word in entry["code"] and "ended_at" in entry for entry in entries)


async def running(session: Session, code: str, **limits: Any) -> None:
    """Send a cell and return when the kernel has begun with it."""
    call = asyncio.create_task(session.execute(code, **limits))
    KEPT.append(call)
    await until(lambda: any(cell.running for cell in session._feed.cells.values()))


def last(say: Callable[[], None]) -> None:
    """Say that the moment has come, and do nothing any more."""
    say()
    threading.Event().wait()


KEPT: list[Any] = []
"""Tasks of a process that is to be killed: asyncio itself holds them weakly."""


# --- the cell that was running ----------------------------------------------------------------


async def sleeper(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    await session.execute("x = 41")
    await running(session, WAIT + "print('after')\nopen('artifacts/made.txt', 'w').write('m')\nx += 1  # marked")
    say()


async def test_a_running_cell_is_adopted_and_finished(tmp_path: Path) -> None:
    await killed(sleeper, tmp_path)
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        assert session.busy
        go(tmp_path)
        await until(lambda: not session.busy)
        assert (await session.execute("x")).result == "42"
        assert [artifact.path for artifact in await session.artifacts()] == ["made.txt"]
    line = the_line(tmp_path, "marked")
    assert (line["status"], line["success"], line["origin"]) == ("ok", True, "sandbox-kernel")
    assert line["stdout"] == "after\n"
    assert "not known" in line["note"]
    assert len(line["artifacts"]) == 1
    assert len(lines(tmp_path, "artifacts_created")) == 1
    assert [e["event"] for e in lines(tmp_path)][2] == "session_reattached"
    assert verify(tmp_path / "conv").intact
    assert json.loads((tmp_path / "conv" / "session_metadata.json").read_bytes())["execution_count"] == 3


async def failing(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    await running(session, WAIT + "open('artifacts/made.txt', 'w').write('m')\nraise ValueError('boom')  # marked")
    say()


@pytest.mark.parametrize(("work", "status"), [(sleeper, "ok"), (failing, "error")])
async def test_a_cell_that_ended_while_nobody_was_there(tmp_path: Path, work: Any, status: str) -> None:
    await killed(work, tmp_path)
    go(tmp_path)
    await until(lambda: ended(tmp_path, "marked"))
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        line = the_line(tmp_path, "marked")  # there before anything else can run
        assert (await session.execute("'next'")).artifacts == []
        (artifact,) = await session.artifacts()
        assert await session.read_artifact(artifact.id) == b"m"
    assert line["artifacts"] == [artifact.id]
    assert line["status"] == status
    assert "not known" in line["note"]
    assert line["execution_count"] >= 1
    assert (line["error"] or {}).get("value") == (None if status == "ok" else "boom")
    assert 0 < line["duration_s"] < 10
    assert len(lines(tmp_path, "artifacts_created")) == 1


async def unsent(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    with just_before("cell_sent", lambda: last(say)):
        await session.execute("never = 'began'")


async def test_a_cell_that_was_accepted_and_never_began(tmp_path: Path) -> None:
    await killed(unsent, tmp_path)
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        await until(lambda: not session.busy)
        assert (await session.execute("'never' in globals()")).result == "False"
    assert the_line(tmp_path, "began")["status"] == "unknown"


async def endless(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    await session.execute("precious = 1")
    await session.state()
    await running(session, "while True: pass  # marked", timeout=1.5)
    say()


async def test_its_time_limit_goes_on(tmp_path: Path) -> None:
    await killed(endless, tmp_path)
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        await until(lambda: not session.busy, 4)
        assert (await session.execute("precious", timeout=5)).result == "1"
    assert the_line(tmp_path, "marked")["status"] == "timeout"


async def test_a_clock_that_jumped_backwards(tmp_path: Path) -> None:
    await killed(endless, tmp_path)
    pending = tmp_path / "conv" / ".pending"
    (cell,) = map(json.loads, pending.read_text().splitlines())
    pending.write_text(json.dumps({**cell, "timestamp": "2999-01-01T00:00:00+00:00"}) + "\n")
    journal = tmp_path / "conv" / "state" / "cells.jsonl"
    journal.write_text(journal.read_text().replace('"started_at": "20', '"started_at": "29'))
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        await until(lambda: not session.busy, 4)
        assert (await session.execute("precious", timeout=5)).result == "1"
    line = the_line(tmp_path, "marked")
    assert line["status"] == "timeout"
    assert 0 <= line["duration_s"] < 10


@pytest.mark.parametrize("strangers", [False, True])
async def test_a_forged_journal_costs_no_line(tmp_path: Path, strangers: bool) -> None:
    """The kernel writes it: numbers that no database takes, half a character, ids without end."""
    await killed(sleeper, tmp_path)
    journal = tmp_path / "conv" / "state" / "cells.jsonl"
    entries = [{**json.loads(line), "execution_count": 10**30} for line in journal.read_text().splitlines()]
    other = {"session": "lab", "username": "", "execution_count": -1, "started_at": "never", "code": "\ud800"}
    if strangers:
        entries += [{**other, "msg_id": msg_id} for msg_id in ("\ud800", "x" * 100_000, 7, "", None)]
        entries += [{**other, "msg_id": "ended\ud800", "ended_at": "\ud800", "status": [], "ename": {}, "evalue": [1]}]
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.get("conv")
        go(tmp_path)
        await until(lambda: not session.busy)
        result = await session.execute("open('artifacts/next.txt', 'w').write('n')\nx")
        assert result.result == "42"
        await until(lambda: not any((tmp_path / "conv" / "artifacts").iterdir()))
        assert {artifact.path for artifact in await session.artifacts()} == {"made.txt", "next.txt"}
    assert the_line(tmp_path, "marked")["status"] == "ok"
    assert verify(tmp_path / "conv").intact


# --- the container is gone as well --------------------------------------------------------------


@pytest.mark.parametrize(("end", "cause"), [("kill", "signal"), ("remove_container", "removed")])
async def test_the_container_is_gone_as_well(tmp_path: Path, engine: docker.DockerClient, end: str, cause: str) -> None:
    await killed(endless, tmp_path)
    container = json.loads((tmp_path / "conv" / "session_metadata.json").read_bytes())["container_id"]
    getattr(engine.api, end)(container, **({"force": True} if end == "remove_container" else {}))
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        with pytest.raises(SessionNotFound):
            await manager.get("conv")
        with pytest.raises(SessionNotFound):
            await manager.get("conv")
        assert [info.status for info in await manager.list()] == ["stopped"]
        assert engine.api.containers(all=True, filters={"label": "sandbox-kernel.session=conv", "id": container}) == []
        (death,) = lines(tmp_path, "kernel_died")
        assert death["cause"] == cause
        assert "precious" in death["lost_names"]
        line = the_line(tmp_path, "marked")
        assert line["status"] == "kernel_died"
        assert line["state_preserved"] is False
        assert lines(tmp_path)[-1]["event"] == "session_stopped"
        assert (await (await manager.start("conv")).execute("'precious' in globals()")).result == "False"
    assert verify(tmp_path / "conv").intact


async def test_a_kernel_that_replaced_its_sockets(tmp_path: Path) -> None:
    """As it can where the host is not root's."""
    await killed(idle, tmp_path)
    metadata = json.loads((tmp_path / "conv" / "session_metadata.json").read_bytes())
    control = RuntimeDirectory(metadata["kernel_id"]).sockets / "k-4"
    control.unlink()
    control.symlink_to("k-1")
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        async with asyncio.timeout(10):
            session = await manager.start("conv")
        assert (await session.execute("1 + 1")).result == "2"
    (death,) = lines(tmp_path, "kernel_died")
    assert death["cause"] == "unresponsive"
    assert "replaced" in death["message"]


# --- what others did meanwhile ------------------------------------------------------------------


async def test_what_another_client_ran_meanwhile(tmp_path: Path) -> None:
    await killed(idle, tmp_path)
    metadata = json.loads((tmp_path / "conv" / "session_metadata.json").read_bytes())
    info = read_connection_file(connection_of(metadata["kernel_id"]))
    async with client_of(info) as client:
        await client.execute_interactive("theirs = 1  # first", allow_stdin=False, output_hook=lambda _: None)
        client.execute(WAIT + "print('from them')  # second")
        await until(lambda: "second" in (tmp_path / "conv" / "state" / "cells.jsonl").read_text())
        async with SessionManager(Settings(sessions_root=tmp_path, stop_on_exit=False)) as manager:
            session = await manager.get("conv")
            go(tmp_path)
            await until(lambda: not session.busy)
            assert (await session.execute("theirs")).result == "1"
    first, second = the_line(tmp_path, "first"), the_line(tmp_path, "second")
    assert first["origin"].startswith("jupyter-client:")
    assert first["status"] == "ok"
    assert first["stdout"] == ""
    assert second["origin"] == first["origin"]
    assert second["stdout"] == "from them\n"
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        await manager.get("conv")
    assert the_line(tmp_path, "first") == first
    assert the_line(tmp_path, "second") == second


def connection_of(kernel_id: str) -> Path:
    from sandbox_kernel.provisioning.runtime import RuntimeDirectory

    return RuntimeDirectory(kernel_id).connection_file


# --- other sessions -----------------------------------------------------------------------------


async def idle(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv", secrets={"TOKEN": "s3cret-value"})
    await session.execute("import os\nx = 'kept'\nwith open('artifacts/a.txt', 'w') as f: f.write('a')")
    say()


async def test_a_session_in_memory(tmp_path: Path) -> None:
    await killed(idle, tmp_path, session_storage=SessionStorage.TMPFS)
    settings = Settings(sessions_root=tmp_path, session_storage=SessionStorage.TMPFS)
    async with SessionManager(settings) as manager:
        session = await manager.get("conv")
        result = await session.execute("open('artifacts/b.txt', 'w').write('b')\nx")
        assert result.result == "'kept'"
        assert [artifact.path for artifact in result.artifacts] == ["b.txt"]
        assert [artifact.path for artifact in await session.artifacts()] == ["a.txt", "b.txt"]


async def test_secrets_stay_masked(tmp_path: Path) -> None:
    await killed(idle, tmp_path)
    async with SessionManager(Settings(sessions_root=tmp_path, restart_on_death=True)) as manager:
        session = await manager.get("conv")
        assert "s3cret-value" in (await session.execute("print(os.environ['TOKEN'])")).stdout
        await session.execute("'s3cret-value'")
        assert (await session.execute("os._exit(1)")).status == "kernel_died"
        assert "s3cret-value" in (await session.execute("import os; print(os.environ['TOKEN'])")).stdout
    written = b"".join(path.read_bytes() for path in (tmp_path / "conv").rglob("*") if path.is_file())
    assert b"s3cret-value" not in written
    assert b"***" in written


async def test_one_that_is_idle_for_too_long(tmp_path: Path, engine: docker.DockerClient) -> None:
    await killed(idle, tmp_path)
    async with SessionManager(Settings(sessions_root=tmp_path, idle_timeout_s=0.5)) as manager:
        session = await manager.get("conv")
        container = session.container_id
        await until(lambda: lines(tmp_path)[-1]["event"] == "session_stopped", 5)
        assert lines(tmp_path)[-1]["reason"] == "idle"
        assert engine.api.containers(all=True, filters={"id": container}) == []


async def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    moment = asyncio.Event()

    async def second() -> None:
        await until(lambda: (tmp_path / "conv" / "state" / "cells.jsonl").exists())
        async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
            with pytest.raises(SessionHeld, match="process"):
                await manager.start("conv")
        moment.set()

    await asyncio.gather(killed(slow_to_die, tmp_path), second())
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        assert (await (await manager.start("conv")).execute("x")).result == "'kept'"
    assert moment.is_set()


async def slow_to_die(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    await session.execute("x = 'kept'")
    await session.execute("import time; time.sleep(1)")
    say()


# --- killed between two steps -------------------------------------------------------------------


async def half_started(manager: SessionManager, say: Callable[[], None]) -> None:
    with just_before("kernel_launched", lambda: last(say)):
        await manager.start("conv")


@pytest.mark.parametrize("by", ["start", "get"])
async def test_killed_while_it_started(tmp_path: Path, engine: docker.DockerClient, by: str) -> None:
    await killed(half_started, tmp_path)
    (left,) = engine.api.containers(filters={"label": f"sandbox-kernel.path={tmp_path}"})
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        if by == "get":
            with pytest.raises(SessionNotFound):
                await manager.get("conv")
            assert not Path(left["Labels"]["sandbox-kernel.runtime"]).exists()
        else:
            assert (await (await manager.start("conv")).execute("1 + 1")).result == "2"
        remaining = engine.api.containers(all=True, filters={"label": f"sandbox-kernel.path={tmp_path}"})
        assert left["Id"] not in {entry["Id"] for entry in remaining}
        assert len(remaining) == (by == "start")
        assert [info.status for info in await manager.list()] == ["running" if by == "start" else "stopped"]


async def unmarked(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    with just_before("artifacts_marked", lambda: last(say)):
        await session.execute("open('artifacts/a.txt', 'w').write('a')")


async def test_killed_between_an_artifact_s_line_and_its_mark(tmp_path: Path) -> None:
    await killed(unmarked, tmp_path)
    for _ in range(2):
        async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
            session = await manager.start("conv")
            assert len(await session.artifacts()) == 1
    assert len(lines(tmp_path, "artifacts_created")) == 1


async def taking(manager: SessionManager, say: Callable[[], None]) -> None:
    session = await manager.start("conv")
    with just_before("blobs_placed", lambda: last(say)):
        await session.execute("with open('artifacts/big.bin', 'wb') as f: f.write(bytes(8 * 2**20))")


async def test_killed_while_a_file_was_being_taken(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:  # its store is open before and after
        await killed(taking, tmp_path)
        session = await manager.get("conv")
        await until(lambda: not session.busy and not any((tmp_path / "conv" / "artifacts").iterdir()), 5)
        (artifact,) = await session.artifacts()
        assert await session.read_artifact(artifact.id) == bytes(8 * 2**20)
    assert len(lines(tmp_path, "artifacts_created")) == 1
