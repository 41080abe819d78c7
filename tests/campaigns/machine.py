"""A machine within this one, with a container engine of its own that no other engine notices.

It has the same files, but processes, a network, ``/run``, ``/var/log`` and Docker's folders of its own (Linux
namespaces). Its first process brings the engine up as ``sandbox-kernel engine up`` does, and ends it when its standard
input ends: when its maker lets it go, or dies. With the first process Linux ends all others and takes away the mounts
and the network: nothing of it goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

import docker
import psutil

from sandbox_kernel.errors import EngineError, EngineUnavailable, SandboxError
from sandbox_kernel.provisioning.bringup import bring_up, plan
from sandbox_kernel.provisioning.engine import translated
from sandbox_kernel.provisioning.image import engine_client, recipe_of
from sandbox_kernel.provisioning.process import run, say

_UP = "up"
"""The first process's last line."""
_PLACES = {"config": "/etc/docker", "engine": "/var/lib/docker", "log": "/var/log"}
"""Folder of the machine's own -> where it lies over this one's."""
_END_S = 40.0
"""The engine gives its containers 10 s, and itself 15."""
_SILENCE_S = 600.0


class Machine:
    """``with Machine(folder):`` it runs. ``folder`` keeps what its engine stores, its configuration and its log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        """Raises EngineUnavailable; what the first process says is passed on."""
        own = ["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._first = subprocess.Popen(
            ["unshare", *own, sys.executable, "-m", "campaigns.machine", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**_environment(), "PYTHONPATH": str(Path(__file__).parents[1])},
            start_new_session=True,  # Ctrl-C is not for the engine: containers are removed first
        )
        assert self._first.stdout is not None
        try:
            for line in self._first.stdout:
                if line.rstrip() == _UP:
                    break
                say(f"  {line.rstrip()}")
            else:
                raise EngineUnavailable("the engine did not come up: see above")
            (child,) = psutil.Process(self._first.pid).children()
        except BaseException:
            self._end()
            raise
        self._pid = child.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        with self._first:  # closes its standard input first
            assert self._first.stdin is not None
            self._first.stdin.close()
            try:
                self._first.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._first.kill()

    def take(self, tag: str) -> None:
        """Copy an image of the usual engine, unless it is there already. Raises EngineError."""
        with ExitStack() as stack:
            stack.enter_context(translated(f"copy the image {tag}"))
            usual = stack.enter_context(engine_client())
            socket = f"unix:///proc/{self._pid}/root/run/docker.sock"
            own = stack.enter_context(closing(docker.APIClient(socket, timeout=_SILENCE_S)))
            if recipe_of(own, tag) == recipe_of(usual, tag):
                return
            say(f"  copying {tag} from the usual engine")
            for event in own.load_image(usual.get_image(tag)):
                if "error" in event:
                    raise EngineError(f"cannot copy the image {tag}: {event['error']}")
            own.prune_images()  # the one before

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Run a command there, with this terminal; its exit code. Ctrl-C is the command's to answer."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            enter = ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", "--"]
            set_up = ["env", "--default-signal=INT", f"--chdir={Path.cwd()}"]
            return subprocess.call([*enter, *set_up, *command], env={**_environment(), **environment})
        finally:
            signal.signal(signal.SIGINT, before)


def _environment() -> dict[str, str]:
    """Ours, without what would lead out of the machine."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}


def first_process(folder: Path) -> None:
    """What :meth:`Machine.__enter__` starts."""
    run(["mount", "-t", "tmpfs", "none", "/run"], say)
    for name, place in _PLACES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        Path(place).mkdir(parents=True, exist_ok=True)  # to lie over it; dockerd makes them too
        run(["mount", "--bind", str(folder / name), place], say)
    run(["ip", "link", "set", "lo", "up"], say)
    missing = plan().commands
    if missing:
        raise EngineUnavailable(f"there is no dockerd on this machine; install one: {' '.join(missing[-1])}")
    bring_up(assume_yes=True)
    say(_UP)
    sys.stdin.read()
    daemon = int(Path("/run/docker.pid").read_text())
    os.kill(daemon, signal.SIGTERM)
    os.waitpid(daemon, 0)


if __name__ == "__main__":
    try:
        first_process(Path(sys.argv[1]))
    except SandboxError as exc:
        sys.exit(str(exc))
