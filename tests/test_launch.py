"""The supervisor in the container: restart, deaths, keys, leftovers. Driven for real, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from launched import LAUNCH, Launched, alive, child_of, environ_of, launched, wait_for

KERNEL_PYTHON = os.environ.get("KERNEL_PYTHON", sys.executable)
HAS_CURVE = not subprocess.run(
    [KERNEL_PYTHON, "-c", "from ipykernel.kernelapp import IPKernelApp as A; A.curve_secretkey"], capture_output=True
).returncode
needs_curve = pytest.mark.skipif(not HAS_CURVE, reason="the ipykernel under test is older than its CurveZMQ support")


@pytest.fixture
def kernel() -> Iterator[Launched]:
    with launched() as one:
        yield one


def test_a_restart_gives_a_fresh_kernel_and_kills_everything_the_old_one_started(kernel: Launched) -> None:
    pids = kernel.printed(
        "import os, subprocess, sys\n"
        "x = 1\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "daemon = subprocess.run([sys.executable, '-c', 'import os, time\\n"
        "if os.fork(): os._exit(0)\\nos.setsid()\\nif os.fork(): os._exit(0)\\nprint(os.getpid(), flush=True)\\n"
        "os.closerange(1, 3)\\ntime.sleep(1000)'], capture_output=True, text=True).stdout\n"
        "print(os.getpid(), child.pid, daemon)"
    ).split()
    old = [int(pid) for pid in pids]
    assert len(old) == 3
    assert all(alive(pid) for pid in old)
    kernel.restart()
    assert not any(alive(pid) for pid in old)
    assert kernel.printed("print('x' in globals())") == "False\n"
    assert kernel.process.poll() is None


@needs_curve
def test_a_restart_reads_keys_and_options_again(kernel: Launched) -> None:
    public, secret = zmq.curve_keypair()
    kernel.info |= {"key": "another", "curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
    kernel.connection_file.unlink()
    kernel.connection_file.write_text(json.dumps(kernel.info))
    kernel.options["env"] = {"COLOUR": "green"}
    kernel.write_options()
    kernel.restart()
    assert kernel.printed("import os; print(os.environ['COLOUR'])") == "green\n"


@needs_curve
def test_the_connection_file_is_only_read() -> None:
    with launched(curve=True) as kernel:
        before = kernel.connection_file.read_bytes()
        own = kernel.printed("from ipykernel.connect import get_connection_file as f; print(f())").strip()
        assert Path(own) != kernel.connection_file
        assert Path(own).stat().st_mode & 0o777 == 0o600
        assert Path(own).parent.stat().st_mode & 0o077 == 0
        assert kernel.connection_file.read_bytes() == before
        assert "Traceback" not in kernel.log
    assert not Path(own).exists()


@needs_curve
def test_without_the_curve_key_nobody_is_answered() -> None:
    with launched(curve=True) as kernel, zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.linger = 0
        stranger.connect(f"ipc://{kernel.info['ip']}-{kernel.info['hb_port']}")
        stranger.send(b"ping")
        assert not stranger.poll(500)
        assert kernel.printed("print(1)") == "1\n"


@pytest.mark.parametrize(
    ("code", "exit_code", "line"),
    [
        ("import os; os._exit(7)", 7, "exited with code 7"),
        ("import os; os._exit(0)", 0, "exited with code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "signal 9"),
        ("import ctypes; ctypes.string_at(0)", 139, "signal 11"),
    ],
)
def test_a_kernel_that_ends_by_itself_ends_the_supervisor(
    kernel: Launched, code: str, exit_code: int, line: str
) -> None:
    child = int(kernel.printed("import subprocess; print(subprocess.Popen(['sleep', '1000']).pid)"))
    kernel.client.execute(code)
    assert kernel.process.wait(20) == exit_code
    assert line in kernel.log
    assert not alive(child)


LATE_INTERRUPT = """
import os, signal
kernel = get_ipython().kernel
def hook(restore=kernel.post_handler_hook):
    del kernel.post_handler_hook
    os.kill(os.getpid(), signal.SIGINT)
    restore()
kernel.post_handler_hook = hook
"""
EXITING_TASK = """
import asyncio, sys
async def leave():
    sys.exit(3)
leaving = asyncio.get_running_loop().create_task(leave())
"""


@pytest.mark.parametrize("code", [LATE_INTERRUPT, EXITING_TASK])
def test_what_ends_the_loop_does_not_end_the_kernel(kernel: Launched, code: str) -> None:
    if code is LATE_INTERRUPT and kernel.printed("print(hasattr(get_ipython().kernel, 'dispatch_queue'))") == "True\n":
        pytest.skip("ipykernel 6 could not read a request any more")
    kernel.run("x = 5")
    kernel.client.execute(code)
    pid = int(kernel.printed("import os; print(os.getpid())"))
    os.kill(pid, signal.SIGINT)  # between cells: of no effect
    assert kernel.printed("print(x)") == "5\n"


def test_a_shutdown_does_not_wait_for_a_thread_that_never_ends(kernel: Launched) -> None:
    kernel.run("import threading; threading.Thread(target=threading.Event().wait).start()")
    kernel.client.shutdown()
    assert kernel.process.wait(10) == 0


def test_sigterm_ends_a_kernel_that_ignores_it(kernel: Launched) -> None:
    pid = int(kernel.printed("import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid())"))
    kernel.process.send_signal(signal.SIGTERM)
    assert kernel.process.wait(5) == 143
    assert not alive(pid)


def test_sigint_interrupts_the_kernel_and_its_children(kernel: Launched) -> None:
    msg_id = kernel.client.execute("import subprocess; open('running', 'w'); subprocess.run(['sleep', '1000'])")
    wait_for((kernel.folder / "running").exists, "the cell to run")
    kernel.process.send_signal(signal.SIGINT)
    reply = kernel.client.get_shell_msg(timeout=10)
    assert reply["parent_header"]["msg_id"] == msg_id
    assert reply["content"]["ename"] == "KeyboardInterrupt"


def test_a_fork_bomb_is_gone_after_a_restart(kernel: Launched) -> None:
    kernel.run(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    deadline = time.monotonic() + 30\n"
        "    while time.monotonic() < deadline:\n"
        "        if len(os.listdir('/proc')) < 400 and os.fork() == 0:\n"
        "            time.sleep(0.02)\n"
        "            if os.fork(): os._exit(0)\n"
        "        time.sleep(0.002)\n"
        "    os._exit(0)\n"
    )
    kernel.restart()
    assert child_of(kernel.process.pid)


def test_secrets_reach_the_kernel_alone() -> None:
    with launched(secrets_file="/tmp/none-yet") as kernel:
        secrets = kernel.folder / "secrets.json"
        secrets.write_text(json.dumps({"API_TOKEN": "swordfish-1234"}))
        kernel.options["secrets_file"] = str(secrets)
        kernel.write_options()
        kernel.restart()
        assert kernel.printed("import os; print(os.environ['API_TOKEN'])") == "swordfish-1234\n"
        for pid in (kernel.process.pid, child_of(kernel.process.pid)):
            assert b"swordfish" not in environ_of(pid)
        state = kernel.state_of(
            "harmless = 'it is ' + os.environ['API_TOKEN']; parts = [{'a': os.environ['API_TOKEN']}]"
        )
        assert state["variables"]["harmless"]["value"] == "'it is ***'"
        kernel.run("raise ValueError('swordfish-1234')")
        for name in ("python_state.json", "cells.jsonl"):
            assert "swordfish" not in (kernel.state_dir / name).read_text()
        assert "secrets are missing" in kernel.log  # of the first start, without the file


def test_a_restart_works_with_sockets_replaced_by_other_things(kernel: Launched) -> None:
    kernel.run(
        "import os\n"
        "for port in range(1, 6):\n"
        "    os.unlink(f'k-{port}')\n"
        "os.mkdir('k-1'); os.mkdir('k-1/deep'); os.symlink('/etc/passwd', 'k-2'); open('k-3', 'w'); os.mkfifo('k-4')\n"
        "os.mkdir('k-5')"
    )
    kernel.restart()
    assert kernel.printed("print(1)") == "1\n"


def test_kernels_do_not_draw_the_same_random_numbers() -> None:
    draw = "import numpy, random; print(numpy.random.random(), random.random())"
    with launched(imports=["numpy", "no_such_module"]) as kernel:
        first = kernel.printed(draw).split()
        kernel.restart()
        assert not set(first) & set(kernel.printed(draw).split())
        assert "cannot import 'no_such_module'" in kernel.log


def test_the_launcher_is_not_importable_by_cells(kernel: Launched) -> None:
    for name in ("hook", "launch", "describe"):
        reply, _ = kernel.run(f"import {name}")
        assert reply["content"]["ename"] == "ModuleNotFoundError"


def test_an_image_without_ipykernel_is_named(tmp_path: Path) -> None:
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"connection_file": str(tmp_path / "connection.json")}))
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(LAUNCH), str(options)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 78
    assert "this image has no ipykernel" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_CURVE, reason="the ipykernel under test supports CurveZMQ")
def test_an_ipykernel_too_old_for_the_keys_is_named() -> None:
    with pytest.raises(AssertionError, match="cannot encrypt with CurveZMQ"), launched(curve=True):
        pass


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"connection_file": "/does/not/exist"}'])
def test_options_that_cannot_be_read_are_named(tmp_path: Path, content: str | None) -> None:
    options = tmp_path / "options.json"
    if content is not None:
        options.write_text(content)
    done = subprocess.run([sys.executable, str(LAUNCH), str(options)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 66
    assert "cannot start a kernel" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_lost_of_a_flood_of_messages(kernel: Launched) -> None:
    kernel.client.execute("import sys\nfor i in range(20_000):\n    print(i); sys.stdout.flush()")
    msg_id = kernel.client.execute("print('after')")  # read only now: by then the flood has been sent
    lines: list[str] = []
    while True:
        message = kernel.client.get_iopub_msg(timeout=20)
        if message["msg_type"] == "stream":
            lines += message["content"]["text"].split()
        idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if idle and message["parent_header"]["msg_id"] == msg_id:
            break
    assert lines == [*map(str, range(20_000)), "after"]


def test_the_supervisor_has_one_thread_and_no_variable_of_the_kernels(kernel: Launched) -> None:
    assert len(os.listdir(f"/proc/{kernel.process.pid}/task")) == 1
