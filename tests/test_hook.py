"""The hook in a running kernel: what it writes, when, and that a cell never notices."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from launched import Launched, child_of, launched, wait_for


@pytest.fixture(scope="module")
def shared() -> Iterator[Launched]:
    with launched() as one:
        yield one


@pytest.fixture
def kernel(shared: Launched) -> Launched:
    """The one kernel, its namespace empty."""
    shared.run("%reset -f")
    return shared


@pytest.fixture
def fresh() -> Iterator[Launched]:
    with launched() as one:
        yield one


def _of(reply: dict[str, Any]) -> str:
    return str(reply["parent_header"]["msg_id"])


# --- python_state.json -------------------------------------------------------------------------


def test_there_is_a_state_from_the_beginning_and_after_a_restart(fresh: Launched) -> None:
    empty = {"variables": {}, "imported_modules": [], "execution_count": 0, "msg_id": None}
    state = fresh.state()
    assert {key: state[key] for key in empty} == empty
    fresh.state_of("import json; x = 1")
    fresh.restart()
    state = fresh.state()
    assert {key: state[key] for key in empty} == empty
    assert datetime.fromisoformat(state["timestamp"]).utcoffset() == timedelta(0)


def test_variables_and_nothing_else_are_listed(kernel: Launched) -> None:
    state = kernel.state_of(
        "import os, sys as system\nfrom math import pi\nx = [1, 2, 3, 4, 5]\n_own = 1\nopen = 3\n"
        "def f(a, b=2): pass\nclass C: pass\n__dunder__ = 1\n1 + 1"
    )
    assert set(state["variables"]) == {"pi", "x", "_own", "open", "f", "C"}
    assert state["variables"]["x"] == {"type": "list", "value": "[1, 2, 3, 4, 5]", "length": 5}
    assert state["variables"]["f"] == {"type": "function", "value": "f(a, b=...)"}
    assert "variable_count" not in state
    state = kernel.state_of("del x, open, f\n_\n2 + 2\nIn, Out, _i, _1 = In, Out, _i, 1")
    assert list(state["variables"]) == ["pi", "_own", "C"]


def test_the_state_names_its_cell(kernel: Launched) -> None:
    reply, _ = kernel.run("y = 1")
    state = kernel.state(reply["parent_header"]["msg_id"])
    assert state["execution_count"] == reply["content"]["execution_count"]


def test_a_failed_cell_leaves_its_state_too(kernel: Launched) -> None:
    assert "before" in kernel.state_of("before = 1\n1/0\nafter = 1", "error")["variables"]


def test_names_that_look_secret_are_masked_unless_told_otherwise(kernel: Launched) -> None:
    code = "api_key = 'hush'; config = {'password': 'hush'}"
    assert "hush" not in json.dumps(kernel.state_of(code))
    with launched(mask_secrets=False) as open_one:
        assert open_one.state_of(code)["variables"]["api_key"]["value"] == "'hush'"


def test_of_very_many_variables_the_newest_are_kept(kernel: Launched) -> None:
    state = kernel.state_of("globals().update({f'v{i}': 'x' * 10_000 for i in range(5_000)})")
    assert state["variable_count"] == 5_000
    size = (kernel.state_dir / "python_state.json").stat().st_size
    assert 100_000 < size <= 2_000_000
    state = kernel.state_of("globals().update({f'v{i}': i for i in range(5_000)})")
    assert list(state["variables"]) == [f"v{i}" for i in range(3_000, 5_000)]
    assert state["variable_count"] == 5_000


def test_a_hostile_namespace_is_described_and_works(kernel: Launched) -> None:
    state = kernel.state_of(
        "import time\n"
        "class Bad:\n"
        "    def __repr__(self): print('touched'); time.sleep(100)\n"
        "    __len__ = __hash__ = __str__ = __getattr__ = __repr__\n"
        "    __class__ = property(__repr__)\n"
        "bad = Bad(); many = [bad] * 1000\n"
        "huge = dict.fromkeys(range(1_000_000))\n"
        "globals()['\\ud800'] = '\\udfff'; globals()[3] = 4; globals()['n' * 100_000] = 1\n"
        "me = globals()"
    )
    assert state["variables"]["bad"] == {"type": "Bad", "value": "<__main__.Bad object>"}
    assert state["variables"]["huge"]["length"] == 1_000_000
    json.dumps(state, ensure_ascii=False).encode("utf-8")
    assert kernel.printed("print(3)") == "3\n"


def test_names_and_exceptions_with_code_of_their_own_cost_no_cell_and_no_state(fresh: Launched) -> None:
    fresh.run(
        "class Name(str):\n"
        "    def __hash__(self): return 1 if not armed else 1 / 0\n"
        "    def __eq__(self, other): return self is other\n"
        "class Odd(Exception):\n"
        "    __traceback__ = property(lambda self: 1 / 0)\n"
        "armed = False; globals()[Name('name')] = 1; armed = True"
    )
    for number in range(3):
        assert fresh.run(f"a{number} = 1", limit=5)[0]["content"]["status"] == "ok"
    fresh.run("import json; raise Odd")
    assert "b" in fresh.state_of("b = 1")["variables"]


def test_an_empty_namespace_is_described(fresh: Launched) -> None:
    assert fresh.state_of("x = 1")["variables"]
    assert fresh.state_of("globals().clear()")["variables"] == {}


def test_changes_in_place_are_seen(kernel: Launched) -> None:
    assert kernel.state_of("items = [1]; t = (items,)")["variables"]["t"]["value"] == "([1],)"
    assert kernel.state_of("items.append(2)")["variables"]["t"]["value"] == "([1, 2],)"


def test_a_value_is_not_kept_alive(kernel: Launched) -> None:
    kernel.state_of("import gc, weakref\nclass Thing: pass\nthing = Thing(); seen = weakref.ref(thing)")
    assert kernel.printed("del thing\nprint(seen())") == "None\n"


def test_a_silent_request_leaves_no_trace(kernel: Launched) -> None:
    before = kernel.state_of("a = 1")
    lines = len(kernel.cells())
    kernel.run("b = 2", silent=True)
    reply, _ = kernel.run("c = 3")
    state = kernel.state(reply["parent_header"]["msg_id"])
    assert set(state["variables"]) == {"a", "b", "c"}
    assert state["execution_count"] == before["execution_count"] + 1
    assert len(kernel.cells()) == lines + 2


# --- imports -----------------------------------------------------------------------------------


def test_imports_are_those_the_cells_ran(fresh: Launched) -> None:
    state = fresh.state_of(
        "from __future__ import annotations\n"
        "import os.path\nimport xml.dom.minidom as dom, colorsys\nfrom textwrap import dedent\n"
        "from email import policy\n"
        "try:\n    import no_such_module\nexcept ImportError: pass\n"
        "if False:\n    import wave\n"
        "def never():\n    import sndhdr, chunk, plistlib\n"
        "def ran():\n    import mailbox\n"
        "ran()\n"
    )
    expected = ["os.path", "xml.dom.minidom", "colorsys", "textwrap", "email", "email.policy", "mailbox"]
    assert sorted(state["imported_modules"]) == sorted(expected)
    state = fresh.state_of("import difflib\n1/0\nimport stringprep", "error")
    assert sorted(state["imported_modules"]) == sorted([*expected, "difflib"])
    state = fresh.state_of("import importlib; calendar = importlib.import_module('calendar'); del dom")
    assert sorted(state["imported_modules"]) == sorted([*expected, "difflib", "importlib", "calendar"])
    state = fresh.state_of("import ast; 1 +", "error")
    assert "ast" not in state["imported_modules"]


# --- when --------------------------------------------------------------------------------------


def test_the_reply_does_not_wait_for_the_state(kernel: Launched) -> None:
    kernel.state_of("globals().update({f'v{i}': [i, str(i)] for i in range(1_000)})")
    for _ in range(20):
        reply, messages = kernel.run("pass")
        state = kernel.state(reply["parent_header"]["msg_id"])
        assert datetime.fromisoformat(state["timestamp"]) > messages[-1]["header"]["date"]  # idle was on its way


def test_requests_that_never_pause_do_not_starve_the_state(kernel: Launched) -> None:
    kernel.state_of("n = 0")
    path = kernel.state_dir / "python_state.json"
    written = path.stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while path.stat().st_mtime_ns == written and time.monotonic() < deadline:
        for _ in range(50):  # many are queued: there is no pause between two cells
            kernel.client.execute("n += 1; import time; time.sleep(0.01)")
        for _ in range(50):
            kernel.client.get_shell_msg(timeout=10)
    assert path.stat().st_mtime_ns != written


def test_a_running_async_cell_is_left_alone(kernel: Launched) -> None:
    before = kernel.state_of("import asyncio; a = 1")
    reply, _ = kernel.run("b = 1; await asyncio.sleep(0.3); c = 1")
    assert set(kernel.state(reply["parent_header"]["msg_id"])["variables"]) == {"a", "b", "c"}
    assert set(before["variables"]) == {"a"}


def test_timers_and_signals_of_the_user_are_untouched(kernel: Launched) -> None:
    kernel.state_of(
        "import signal, time\nrang = []\n"
        "signal.signal(signal.SIGALRM, lambda *a: rang.append(time.monotonic()))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3); began = time.monotonic()\n"
        "data = {i: [i] * 50 for i in range(1000)}"
    )
    assert kernel.printed("time.sleep(0.4)\nprint(len(rang), 0.29 < rang[0] - began < 0.6)") == "1 True\n"


def test_what_a_thread_prints_after_its_cell_comes_once(kernel: Launched) -> None:
    """Under which cell is ipykernel's affair: 6 names the one that started the thread, 7 the latest."""
    kernel.run(
        "import threading, time\n"
        "def late():\n    time.sleep(0.3); print('late')\n"
        "thread = threading.Thread(target=late); thread.start()"
    )
    kernel.client.execute("thread.join()")
    last = kernel.client.execute("pass")
    printed: list[str] = []
    while True:
        message = kernel.client.get_iopub_msg(timeout=10)
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
        idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if idle and message["parent_header"]["msg_id"] == last:
            break
    assert printed == ["late\n"]
    for _ in range(2):
        kernel.client.get_shell_msg(timeout=10)


# --- failures ----------------------------------------------------------------------------------


def test_a_folder_that_is_gone_or_full_costs_one_line_in_the_log(fresh: Launched) -> None:
    fresh.state_of("x = 1")
    fresh.run("import os, shutil; os.rename('state', 'elsewhere')")
    for _ in range(3):
        assert fresh.printed("print(x)") == "x\n".replace("x", "1")
    fresh.run("os.rename('elsewhere', 'state')")
    state = fresh.state_of("y = 2")
    assert set(state["variables"]) == {"x", "y"}
    fresh.run("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))")
    for _ in range(3):
        reply, _ = fresh.run("z = 3")
        assert reply["content"]["status"] == "ok"
    fresh.run("resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)")
    assert "z" in fresh.state_of("pass")["variables"]
    lines = [line for line in fresh.log.splitlines() if "cannot write" in line]
    assert 1 <= len(lines) <= 4
    assert "Traceback" not in fresh.log
    assert not (fresh.state_dir / ".python_state.json.tmp").exists()


def test_a_link_in_place_of_a_file_is_not_followed(fresh: Launched) -> None:
    victim = fresh.folder / "victim"
    victim.write_text("precious")
    fresh.run(
        "import os\n"
        "for name in ('cells.jsonl', '.python_state.json.tmp'):\n"
        "    if os.path.exists(f'state/{name}'): os.unlink(f'state/{name}')\n"
        "    os.symlink('../victim', f'state/{name}')"
    )
    assert fresh.printed("print(1)") == "1\n"
    wait_for(lambda: "cannot write" in fresh.log, "the warning")
    assert victim.read_text() == "precious"


# --- cells.jsonl -------------------------------------------------------------------------------


def test_the_journal_has_a_line_before_and_after_each_cell(kernel: Launched) -> None:
    reply, _ = kernel.run("print('hello')")
    msg_id = reply["parent_header"]["msg_id"]
    wait_for(lambda: len([c for c in kernel.cells() if c["msg_id"] == msg_id]) == 2, "both lines")
    started, ended = (cell for cell in kernel.cells() if cell["msg_id"] == msg_id)
    assert "status" not in started
    assert ended["status"] == "ok"
    for line in (started, ended):
        assert line["code"] == "print('hello')"
        assert line["session"] == kernel.client.session.session
        assert line["execution_count"] == reply["content"]["execution_count"]
    assert datetime.fromisoformat(started["started_at"]) <= datetime.fromisoformat(ended["ended_at"])


def test_the_journal_names_what_the_state_has_not_yet(kernel: Launched) -> None:
    kernel.state_of("known = 1")
    kernel.client.execute("import os; new = 1; _own = 2")
    reply, _ = kernel.run("later = 1")  # it was there before the first had ended
    started, _ = (cell for cell in kernel.state_of("pass") and kernel.cells() if cell["msg_id"] == _of(reply))
    assert started["names"] == ["_own", "new"]
    quiet = kernel.run("pass")[0]
    assert "names" not in next(cell for cell in kernel.cells() if cell["msg_id"] == _of(quiet))


def test_the_journal_tells_how_cells_ended(kernel: Launched) -> None:
    kernel.client.execute("import time; time.sleep(0.5)\nraise ValueError('wrong')")
    kernel.client.execute("print('aborted')")
    kernel.client.execute("print('aborted')")
    replies = [kernel.client.get_shell_msg(timeout=10)["content"]["status"] for _ in range(3)]
    assert replies == ["error", "aborted", "aborted"]
    msg_id = kernel.client.execute("import time\nopen('sleeping', 'w')\ntime.sleep(100)")
    wait_for((kernel.folder / "sleeping").exists, "the cell to run")
    assert [c for c in kernel.cells() if c["msg_id"] == msg_id][-1].get("status") is None
    os.kill(child_of(kernel.process.pid), signal.SIGINT)
    kernel.client.get_shell_msg(timeout=10)
    wait_for(lambda: kernel.cells()[-1].get("status"), "the last end")
    ends = [c for c in kernel.cells() if "status" in c][-4:]
    assert [c["status"] for c in ends] == ["error", "aborted", "aborted", "interrupted"]
    assert (ends[0]["ename"], ends[0]["evalue"]) == ("ValueError", "wrong")
    assert ends[1]["code"] == "print('aborted')"


def test_a_cell_that_killed_its_kernel_has_no_end(fresh: Launched) -> None:
    fresh.run("x = 1")
    fresh.client.execute("import os; os._exit(1)")
    fresh.process.wait(10)
    assert [c.get("status") for c in fresh.cells()] == [None, "ok", None]


def test_the_journal_keeps_its_newest_half(kernel: Launched) -> None:
    path = kernel.state_dir / "cells.jsonl"
    for _ in range(70):
        reply, _ = kernel.run("'" + "x" * 30_000 + "';")
        kernel.state(reply["parent_header"]["msg_id"])
    assert path.stat().st_size < 1.2 * 2**20
    cells = kernel.cells()
    assert 20 < len(cells) < 70
    assert len(cells[-1]["code"]) == 20_000


def test_a_deleted_journal_begins_anew(kernel: Launched) -> None:
    kernel.run("import os; os.unlink('state/cells.jsonl')")
    kernel.run("pass")
    wait_for(lambda: [c.get("status") for c in kernel.cells()] == ["ok", None, "ok"], "the new journal")


def test_a_cell_whose_reply_an_interrupt_ate_still_has_an_end(kernel: Launched) -> None:
    msg_id = kernel.client.execute("get_ipython().kernel.finish_metadata = None")  # ipykernel can make no reply now
    wait_for(lambda: kernel.cells()[-1]["msg_id"] == msg_id and kernel.cells()[-1].get("status"), "its end")
    assert kernel.cells()[-1]["status"] == "interrupted"
    kernel.restart()
