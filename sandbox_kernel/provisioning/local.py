"""The provisioner without a container: the same supervisor on this machine (``engine="local"``, asked for by name).

There is NO isolation: a cell can do whatever this user can. A warning says so at each launch.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from jupyter_client.connect import KernelConnectionInfo

from sandbox_kernel.errors import EngineError, KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.provisioning.base import SessionProvisioner, finished
from sandbox_kernel.provisioning.death import from_exit
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.readiness import SocketFiles
from sandbox_kernel.provisioning.runtime import BOOT, SECRETS, RuntimeDirectory

PROVISIONER = "sandbox-local"
"""Name of the entry point in ``jupyter_client.kernel_provisioners``."""

_UNKNOWN = 255
"""Exit code of a process that ended as somebody else's child: the engine of processes tells it to its parent only."""

_STOP_S = 5.0
"""How long a supervisor may take to end its kernel before it is killed itself."""


class NoIsolation(UserWarning):
    """The kernel runs on this machine with all rights of this user."""


class ProcessStream:
    """stdin and stdout of a command on this machine; as :class:`~sandbox_kernel.provisioning.stream.ExecStream`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    async def read(self, size: int) -> bytes:
        """At most ``size`` bytes of its stdout, b"" at its end."""
        return await self._stdout.read(size)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """To its stdin. Raises EngineError when it no longer reads."""
        try:
            self._stdin.write(data)
            await self._stdin.drain()
        except OSError as exc:
            raise EngineError(f"the command no longer reads: {exc}") from exc

    def close_stdin(self) -> None:
        """No more input: the command reads end of file."""
        self._stdin.close()

    async def close(self) -> None:
        """End its input and the command."""
        self._stdin.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


def lives(container_id: str) -> bool:
    """Whether the kernel of that ``container_id`` runs; False for what is none of ``engine="local"``."""
    *_, boot, pid, started = ("", "", "", *container_id.split(":"))
    known = container_id.startswith("local:") and pid.isdigit()
    return known and process_identity(int(pid)) == f"{boot} {pid} {started}"


class LocalHostProvisioner(SessionProvisioner):
    """``container_id`` is ``local:<kernel id>:<pid>:<start time>``; the kernel works in ``<runtime dir>/work``."""

    _process: subprocess.Popen[bytes] | None = None
    """None after :meth:`attach`: the process is another's child, and its exit code is not told."""
    pid: int | None = None
    """The supervisor's; SIGHUP restarts its kernel."""
    _identity: str | None = None
    _exit_code: int | None = None

    async def launch(self) -> KernelConnectionInfo:
        spec = self._require_spec()
        if self.container_id is not None:  # a dead one, whose place this takes
            await self._forget(keep_identity=True)
        warnings.warn(
            "engine='local' runs the kernel on this machine WITHOUT isolation: cells can do whatever this user can",
            NoIsolation,
            stacklevel=2,
        )
        self.transport = "ipc"
        runtime = self._require_runtime()
        runtime.check_length()
        work = runtime.path / "work"
        options = spec.boot_options() | {
            "cwd": str(work),
            "artifacts_dir": str((spec.artifacts or work / "artifacts").absolute()),
            "state_dir": str((spec.state or work / "state").absolute()),
            "connection_file": str(runtime.boot / "boot" / "connection.json"),
        }
        if spec.secrets:
            options["secrets_file"] = str(runtime.boot / SECRETS)
        try:
            await finished(runtime.create, runtime.boot_files(self._inside_info(runtime.ip), options, spec.secrets))
            await finished(self._make_work, work)
            with SocketFiles(runtime.socket_paths()) as files:
                await finished(self._spawn, runtime)
                await self._wait_ready(files.fresh)
            info = self._client_info()
            if self.parent is None:
                await finished(runtime.write_connection_file, info)
        except BaseException:
            await asyncio.shield(self._forget(keep_identity=True))
            raise
        self.connection_info = info
        return info

    def _make_work(self, work: Path) -> None:
        """The working directory, with ``artifacts`` where a cell expects it: below it."""
        spec = self._require_spec()
        work.mkdir(exist_ok=True)
        for name, folder in (("artifacts", spec.artifacts), ("state", spec.state)):
            with suppress(FileExistsError):
                if folder is None:
                    (work / name).mkdir()
                else:
                    (work / name).symlink_to(folder.absolute())

    def _spawn(self, runtime: RuntimeDirectory) -> None:
        with (runtime.path / "log").open("ab") as log:
            # A session of its own: a Ctrl-C in our terminal is ours, and the kernel outlives us.
            self._process = subprocess.Popen(
                [sys.executable, str(runtime.boot / "launch.py")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=runtime.path,
                env={**os.environ, **self._require_spec().env},
                start_new_session=True,
            )
        self._exit_code = None
        self._take(self._process.pid)

    def _take(self, pid: int) -> None:
        self._identity = process_identity(pid)
        self.pid = pid
        self.container_id = (
            f"local:{self._require_runtime().kernel_id}:{(self._identity or f'? {pid} ?').replace(' ', ':')}"
        )

    async def attach(self, container_id: str) -> KernelConnectionInfo:
        try:
            _, kernel_id, _, pid, _ = container_id.split(":")
        except ValueError:
            raise EngineError(f"{container_id!r} is no kernel of engine='local'") from None
        if not lives(container_id):
            raise EngineError(f"the kernel's process {pid} has ended; start the session again")
        self.kernel_id = kernel_id
        self._runtime = RuntimeDirectory(kernel_id)
        self._keys = await asyncio.to_thread(self._runtime.keys)
        self.transport = "ipc"
        self._process, self._exit_code = None, None
        self._take(int(pid))
        self.connection_info = self._client_info()
        await asyncio.to_thread(self._runtime.write_connection_file, self.connection_info)
        return self.connection_info

    async def _until_ended(self) -> None:
        if await self.poll() is not None or self.pid is None:
            return
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def poll(self) -> int | None:
        """None while the kernel runs, else its exit code (128 + signal; 255 where it is not known)."""
        if self.pid is None:
            return 0
        if self._exit_code is None:
            code = self._process.poll() if self._process is not None else self._poll_attached(self.pid)
            self._exit_code = code if code is None or code >= 0 else 128 - code
        return self._exit_code

    def _poll_attached(self, pid: int) -> int | None:
        """As Popen.poll; :data:`_UNKNOWN` for a process that ended as somebody else's child."""
        try:
            done, status = os.waitpid(pid, os.WNOHANG)  # attached in the process that launched it
        except ChildProcessError:
            return None if process_identity(pid) == self._identity else _UNKNOWN
        return os.waitstatus_to_exitcode(status) if done else None

    async def wait_dead(self) -> KernelDeath:
        await self._until_ended()
        return await self.death()

    async def death(self) -> KernelDeath:
        if self.pid is None:
            return KernelDeath(cause="removed", message="the kernel was removed")
        code = await self.poll()
        if code is None:
            return KernelDeath(cause="unknown", message="the kernel still runs")
        if code == _UNKNOWN:
            return KernelDeath(cause="unknown", message=(await self.logs(1)) or "the kernel's process has ended")
        return from_exit(code, oom=False, memory_limit=None)

    async def _start_error(self) -> KernelStartError:
        logs = await self.logs()
        death = await self.death()
        return KernelStartError(
            f"no kernel started on this machine: {death.message}. Its last lines: {logs}", logs=logs
        )

    async def logs(self, tail: int = 50) -> str:
        def read() -> str:
            try:
                text = (self._require_runtime().path / "log").read_text("utf-8", "replace")
            except OSError:
                return ""
            return "\n".join(text.splitlines()[-tail:])

        return await asyncio.to_thread(read)

    async def exec_stream(self, argv: list[str], *, user: str | None = None) -> ProcessStream:
        """Run a command beside the kernel, with paths below ``/opt/sandbox-kernel`` and ``python3`` as they are here.

        Raises EngineError when it cannot be run. ``user`` must be None: there is only this one.
        """
        runtime = self._require_runtime()
        here = [
            argument.replace(BOOT, str(runtime.boot), 1) if argument.startswith(BOOT) else argument for argument in argv
        ]
        if here[0] == "python3":
            here[0] = sys.executable
        if user is not None:
            raise EngineError(f"engine='local' runs nothing as another user ({user})")
        try:
            process = await asyncio.create_subprocess_exec(
                *here, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=runtime.path / "work"
            )
        except OSError as exc:
            raise EngineError(f"cannot run {here[0]}: {exc}") from exc
        return ProcessStream(process)

    async def send_signal(self, signum: int) -> None:
        """To the supervisor: SIGINT interrupts the kernel, SIGHUP restarts it, SIGTERM and SIGKILL end everything."""
        if signum == 0 or self.pid is None or await self.poll() is not None:
            return
        with suppress(ProcessLookupError):
            # Were the supervisor killed, what the cells started would live on. SIGTERM it turns into SIGKILL for all.
            os.kill(self.pid, signal.SIGTERM if signum == signal.SIGKILL else signum)

    def detach(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # it lives on: no ResourceWarning, and nobody waits for it
        self._process = None
        self.pid = None
        self.container_id = None

    def _remove_now(self) -> None:
        if self.pid is not None and (process_identity(self.pid) == self._identity):
            self._end(self.pid)
        if self._process is not None:
            self._process.wait()
        self.detach()
        if self._runtime is not None:
            self._runtime.remove()

    @staticmethod
    def _end(pid: int) -> None:
        """SIGTERM, and SIGKILL where that is not heeded (blocks until the process has ended)."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(descriptor, signum)
                if select.select([descriptor], [], [], _STOP_S)[0]:
                    return
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)
