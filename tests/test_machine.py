"""The machine within this one that ``make gvisor`` runs in: nothing of it is seen from outside, and nothing stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from campaigns.machine import Machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces and start a daemon")

DAEMONS = ["containerd", "dockerd", "unshare"]


def within(maker: int) -> list[psutil.Process]:
    """The machine's own daemons, seen from outside."""
    found = [process for process in psutil.Process(maker).children(recursive=True) if process.name() in DAEMONS]
    return sorted(found, key=psutil.Process.name)


INSIDE = """
import os, sys, docker
client = docker.from_env()
print(client.info()["DockerRootDir"], client.containers.list(all=True), sorted(os.listdir("/var/log")))
sys.exit(7)
"""


def test_it_is_apart_and_leaves_nothing(engine: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Machine(tmp_path) as machine:
        processes = within(os.getpid())
        assert [process.name() for process in processes] == DAEMONS
        assert machine.run([sys.executable, "-c", INSIDE], {}) == 7
        assert capfd.readouterr().out.splitlines()[-1] == "/var/lib/docker [] ['sandbox-kernel-dockerd.log']"
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert psutil.wait_procs(processes, timeout=1)[1] == []
    assert (tmp_path / "log" / "sandbox-kernel-dockerd.log").stat().st_size > 0
    shutil.rmtree(tmp_path)  # nothing is mounted below it


MAKER = """
import sys
from pathlib import Path
from campaigns.machine import Machine
with Machine(Path(sys.argv[1])) as machine:
    machine.run([sys.executable, "-c", "import time; print('there', flush=True); time.sleep(60)"], {})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_its_maker_is_stopped_or_killed(engine: object, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches all processes of the terminal; the other signals the maker alone."""
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        start_new_session=True,
    )
    with maker:
        assert maker.stdout is not None
        assert "there\n" in iter(maker.stdout.readline, "")
        processes = within(maker.pid)
        assert [process.name() for process in processes] == DAEMONS
        if number == signal.SIGINT:
            os.killpg(maker.pid, number)
        else:
            maker.send_signal(number)
        assert psutil.wait_procs(processes, timeout=20)[1] == []
