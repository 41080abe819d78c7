"""The session's own stdout and stderr, where signals, children and pipes get in between."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from launched import Launched, launched


@pytest.fixture(scope="module")
def kernel() -> Iterator[Launched]:
    with launched() as one:
        yield one


def test_a_signals_handler_may_flush_while_its_thread_does(kernel: Launched) -> None:
    text = kernel.printed(
        "import os, signal, sys\n"
        "took = type(sys.stdout)._take\n"
        "def take(self, fid):\n"
        "    type(self)._take = took\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    took(self, fid)\n"
        "usual = signal.signal(signal.SIGUSR1, lambda *a: print('handled', flush=True))\n"
        "type(sys.stdout)._take = take\n"
        "print('flushed', flush=True)\n"
        "_ = signal.signal(signal.SIGUSR1, usual)"
    )
    assert sorted(text.split()) == ["flushed", "handled"]


def test_a_flush_returns_while_somebody_writes_without_a_pause(kernel: Launched) -> None:
    """As a child does that is quicker than we are: where the pipe was emptied there is something in it again."""
    text = kernel.printed(
        "import os, sys\n"
        "read, refills = os.read, 0\n"
        "def refilled(*args):\n"
        "    global refills\n"
        "    data = read(*args)\n"
        "    if refills < 2_000:\n"
        "        refills += 1; os.write(1, b'y' * 60_000)\n"
        "    return data\n"
        "os.read = refilled\n"
        "os.write(1, b'y')\n"
        "sys.stdout.flush()\n"
        "seen, refills, os.read = refills, 2_000, read\n"
        "print(seen < 1_000)"
    )
    assert "True" in text


def test_what_a_child_writes_is_paced_as_prints_are(kernel: Launched) -> None:
    began = time.monotonic()
    _, messages = kernel.run("import os\nos.system('head -c 40000000 /dev/zero | tr \"\\\\0\" a')\nNone")
    texts = [one["content"]["text"] for one in messages if one["msg_type"] == "stream"]
    assert sum(map(len, texts)) == 40_000_000
    assert max(map(len, texts)) < 4 * 2**20
    assert time.monotonic() - began > 0.5  # 24 MB more than may come at once, at 32 MB/s


def test_a_log_that_is_full_costs_a_cell_nothing() -> None:
    with launched() as kernel:
        kernel.run("import os, sys\nos.dup2(os.open('/dev/full', os.O_WRONLY), sys.stdout.fileno())")
        for _ in range(2):
            text = kernel.printed("os.system('head -c 300000 /dev/zero | tr \"\\\\0\" a')\nprint('b', flush=True)")
            assert (text.count("a"), text.count("b")) == (300_000, 1)


def test_a_child_forked_while_threads_print_has_their_lock_and_its_own_output(kernel: Launched) -> None:
    text = kernel.printed(
        "import os, signal, sys, time, warnings\n"
        "warnings.simplefilter('ignore')\n"  # from Python 3.12 on: a fork with threads
        "class Held:\n"  # as a thread holds it that is not there any more in the child
        "    def __enter__(self): time.sleep(100)\n"
        "    def __exit__(self, *exc): pass\n"
        "print('parent', end=' ')\n"
        "lock, sys.stdout._buffer_lock = sys.stdout._buffer_lock, Held()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(5); print('child', end=' ', flush=True); os._exit(0)\n"
        "sys.stdout._buffer_lock = lock\n"
        "print(os.waitpid(child, 0)[1])"
    )
    assert sorted(text.split()) == ["0", "child", "parent"]


def test_what_a_tee_writes_is_the_cells_that_printed_it(kernel: Launched) -> None:
    kernel.run(
        "import sys\n"
        "class Tee:\n"
        "    def __init__(self, stream): self.stream = stream\n"
        "    def write(self, text): self.stream.write(text)\n"
        "    def flush(self): pass\n"
        "sys.stdout = Tee(sys.stdout)"
    )
    assert kernel.printed("print('one')") == "one\n"
    assert kernel.printed("print('two'); sys.stdout = sys.stdout.stream") == "two\n"


def test_an_interrupt_does_not_have_the_thread_that_sends_taken_for_dead(kernel: Launched) -> None:
    text = kernel.printed(
        "import signal, time\n"
        "thread, until = get_ipython().kernel.iopub_thread.thread, time.monotonic() + 1\n"
        "class Interrupt(Exception): pass\n"
        "def interrupt(*args): raise Interrupt\n"
        "usual = signal.signal(signal.SIGALRM, interrupt)\n"
        "while time.monotonic() < until and thread.is_alive():\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0.0005)\n"
        "        while True: thread.is_alive()\n"
        "    except Interrupt: pass\n"
        "_ = signal.signal(signal.SIGALRM, usual)\n"
        "print(thread.is_alive())"
    )
    assert text == "True\n"
