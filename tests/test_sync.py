"""The blocking face: the same names as the async one, in scripts, threads and below a running event loop."""

from __future__ import annotations

import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import nbformat
import pytest
from nbclient import NotebookClient

from sandbox_kernel import manager, session, sync
from sandbox_kernel.errors import ArtifactNotFound, InvalidSessionId, SessionClosed, SessionNotFound
from sandbox_kernel.events import Finished, Stdout
from sandbox_kernel.settings import Settings

WIRING = {"wire", "owns", "opened", "spare_kernel", "end_kernel", "last_lines", "store", "last_used"}
"""Of the async session: for those who put it together."""


# --- parity -----------------------------------------------------------------------------------


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_") and name not in WIRING}


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [(sync.Session, session.Session), (sync.SessionManager, manager.SessionManager)],
    ids=["Session", "SessionManager"],
)
def test_both_faces_have_the_same_names_and_parameters(blocking: type, asynchronous: type) -> None:
    ours, theirs = public(blocking), public(asynchronous)
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        if isinstance(value, property):
            assert isinstance(ours[name], property), name
            continue
        assert parameters(ours[name]) == parameters(value), name
        assert not inspect.iscoroutinefunction(ours[name]), name
        assert inspect.isgeneratorfunction(ours[name]) == inspect.isasyncgenfunction(value), name
        assert ours[name].__doc__, name
    if blocking is sync.SessionManager:
        assert parameters(blocking.__init__) == parameters(asynchronous.__init__)  # type: ignore[misc]


def test_both_sessions_have_the_same_attributes(conv: sync.Session) -> None:
    ours, theirs = ({n for n in vars(s) if not n.startswith("_")} for s in (conv, conv._session))
    assert ours == theirs - WIRING


# --- at work ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sync") / "sessions"


@pytest.fixture(scope="module")
def held(image: str, root: Path) -> Iterator[sync.SessionManager]:
    with sync.SessionManager(Settings(sessions_root=root)) as held:
        yield held


@pytest.fixture(scope="module")
def conv(held: sync.SessionManager) -> sync.Session:
    return held.start("conv")


def test_a_session_from_start_to_end(held: sync.SessionManager, root: Path, tmp_path: Path) -> None:
    one = held.start("one")
    assert held.start("one") is one
    assert held.get("one") is one
    assert held.sessions["one"] is one
    assert (one.status, one.directory, one.host_port) == ("running", root.absolute() / "one", None)
    assert one.connection_file.is_file()
    result = one.execute("x = 41\nopen('artifacts/a.txt', 'w').write('hello')\nx + 1", timeout=30)
    assert (result.success, result.result, one.execution_count) == (True, "42", 1)
    assert one.state().variables["x"].value == "41"
    (artifact,) = one.artifacts()
    assert one.read_artifact(artifact.id) == b"hello"
    assert one.save_artifact(artifact.id, tmp_path).read_bytes() == b"hello"
    with one.open_artifact(artifact.id) as file:
        assert file.read() == b"hello"
    assert one.export("/etc/hostname").kind == "export"
    assert one.datasets() == []
    assert one.restart() == ["x"]
    assert not one.interrupt()
    assert "one" in [info.session_id for info in held.list() if info.status == "running"]
    held.stop("one")
    assert one.status == "stopped"
    assert "one" not in held.sessions
    with pytest.raises(SessionClosed, match="'one' is stopped"):
        one.execute("x")


def test_errors_are_those_of_the_async_face(held: sync.SessionManager, conv: sync.Session) -> None:
    with pytest.raises(InvalidSessionId):
        held.start("a/b")
    with pytest.raises(SessionNotFound):
        held.get("nobody")
    with pytest.raises(ArtifactNotFound):
        conv.read_artifact("art_0000000000000000")
    with pytest.raises(TypeError):
        conv.execute(b"1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        next(conv.stream(b"1"))  # type: ignore[arg-type]


def test_a_stream_is_a_generator(conv: sync.Session) -> None:
    events = list(conv.stream("for i in range(3): print(i, flush=True)"))
    assert "".join(event.text for event in events if isinstance(event, Stdout)) == "0\n1\n2\n"
    assert isinstance(events[-1], Finished)
    assert events[-1].result.success


SLEEP = "import time\nprint('on', flush=True)\ntime.sleep(60)"


def last_status(conv: sync.Session) -> str:
    assert conv.directory is not None
    lines = (conv.directory / "session.log").read_text().splitlines()
    return str([entry for line in lines if (entry := json.loads(line))["event"] == "code_execution"][-1]["status"])


@pytest.mark.parametrize("leave", ["close", "drop", "throw"])
def test_leaving_a_stream_interrupts_its_cell(conv: sync.Session, leave: str) -> None:
    began = time.monotonic()
    events = conv.stream(SLEEP)
    assert isinstance(next(events), Stdout)
    if leave == "close":
        events.close()
    elif leave == "throw":
        with pytest.raises(ZeroDivisionError):
            events.throw(ZeroDivisionError)
    else:
        del events
        gc.collect()
    assert conv.execute("1").success
    assert time.monotonic() - began < 10
    conv.execute("after = True")
    assert last_status(conv) == "ok"


def test_a_stream_is_never_closed_into_a_deadlock_by_the_loops_own_thread(conv: sync.Session) -> None:
    events = conv.stream(SLEEP)
    next(events)
    loop = conv._loop
    assert loop._portal is not None
    loop._portal.call(events.close)  # as a garbage collector would that runs over there
    assert conv.execute("2").result == "2"


def signal_when_on(conv: sync.Session) -> threading.Thread:
    """Ctrl-C once the cell that prints ``on`` has begun."""

    def wait() -> None:
        while not any(cell.running for cell in list(conv._session._feed.cells.values())):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_interrupts_the_cell_and_the_session_stays(conv: sync.Session) -> None:
    conv.execute("kept = 7")
    thread = signal_when_on(conv)
    with pytest.raises(KeyboardInterrupt):
        conv.execute(SLEEP)
    thread.join()
    assert last_status(conv) == "interrupted"
    assert conv.execute("kept").result == "7"


def test_ctrl_c_while_a_stream_waits(conv: sync.Session) -> None:
    thread = signal_when_on(conv)
    with pytest.raises(KeyboardInterrupt):
        list(conv.stream(SLEEP))
    thread.join()
    assert conv.execute("1").success


def test_threads_share_a_session(conv: sync.Session) -> None:
    conv.execute("total = 0")
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: conv.execute(f"total += {n}\ntotal"), range(20)))
    assert all(result.success for result in results)
    assert conv.execute("total").result == str(sum(range(20)))


def test_another_thread_interrupts(conv: sync.Session) -> None:
    with ThreadPoolExecutor(1) as threads:
        events = conv.stream(SLEEP)
        next(events)
        interrupted = threads.submit(conv.interrupt)
        (*_, finished) = events
        assert interrupted.result(timeout=10)
    assert isinstance(finished, Finished)
    assert finished.result.status == "interrupted"


async def test_below_a_running_event_loop(conv: sync.Session) -> None:
    assert conv.execute("6 * 7").result == "42"
    assert [type(event) for event in conv.stream("pass")] == [Finished]


def test_in_a_notebook(image: str, tmp_path: Path) -> None:
    cell = f"""
from sandbox_kernel import Settings
from sandbox_kernel.sync import SessionManager
with SessionManager(Settings(sessions_root={str(tmp_path)!r})) as manager:
    print(manager.start("nb").execute("6 * 7").result)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    done = NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    assert done.cells[0].outputs[0]["text"] == "42\n"


def test_managers_side_by_side_and_without_with(conv: sync.Session, root: Path) -> None:
    other = sync.SessionManager(Settings(sessions_root=root.parent / "other"))
    try:
        assert other.sessions == {}
        with ThreadPoolExecutor(2) as threads:
            slow = threads.submit(conv.execute, "import time; time.sleep(0.5); 'slow'")
            assert other.start("conv").execute("'quick'").result == "'quick'"
            assert slow.result().result == "'slow'"
    finally:
        other.close()
        other.close()
    with pytest.raises(SessionClosed, match="the SessionManager is closed"):
        other.start("conv")


# --- the end of a program ---------------------------------------------------------------------


def program(code: str, root: Path, *, expect: int = 0) -> str:
    """Run a script of a user; what it printed."""
    start = f"""
        import sys, threading
        from sandbox_kernel import Settings
        from sandbox_kernel.sync import SessionManager
        def manage(**settings):
            return SessionManager(Settings(sessions_root={str(root)!r}, **settings))
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True, timeout=40
    )
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def stopped(root: Path, session_id: str) -> bool:
    return bool(json.loads((root / session_id / "session_metadata.json").read_text())["stopped_at"])


def test_a_program_that_closes_nothing_ends_and_leaves_nothing(
    engine: docker.DockerClient, image: str, tmp_path: Path
) -> None:
    program(
        """
        session = manage().start("end")
        events = session.stream("import time; print(1, flush=True); time.sleep(60)")
        next(events)
        threading.Thread(target=session.execute, args=("2",), daemon=True).start()
        """,
        tmp_path,
    )
    assert stopped(tmp_path, "end")


def test_a_program_that_fails_shows_its_own_error(image: str, tmp_path: Path) -> None:
    text = program("session = manage().start('end')\nsession.execute('1')\nraise SystemExit(5)", tmp_path, expect=5)
    assert text == ""
    assert stopped(tmp_path, "end")


def test_a_session_lives_on_for_the_next_program(image: str, tmp_path: Path) -> None:
    program("manage(stop_on_exit=False).start('on').execute('x = 5')", tmp_path)
    assert not stopped(tmp_path, "on")
    assert program("with manage() as m: print(m.get('on').execute('x').result)", tmp_path) == "5\n"
    assert stopped(tmp_path, "on")
