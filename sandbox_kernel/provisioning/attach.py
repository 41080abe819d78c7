"""A provisioner that attaches Jupyter programs to a session that already runs.

A kernelspec naming ``sandbox-attach`` starts nothing: "launching" it returns the session's connection
info, "shutting it down" lets go of it, and "restarting" it restarts the session's kernel in its container.

jupyter_client's managers send the kernel a ``shutdown_request`` of their own and delete ipc socket files
when they clean up, both past the provisioner. So the provisioner replaces these methods on its manager.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from queue import Empty
from typing import Any, cast

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from jupyter_core.utils import ensure_async, run_sync
from traitlets import Unicode

from sandbox_kernel.errors import ConnectionFileError, EngineError, KernelStartError, SessionClosed
from sandbox_kernel.provisioning.engine import Engine, NotThere
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, runtime_base

PROVISIONER = "sandbox-attach"
"""Name of the entry point in ``jupyter_client.kernel_provisioners``."""

_PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
_RESTART_GAP_S = 5.0
"""How long the shell socket may be missing before the kernel counts as dead: the session relaunches it."""
_RESTART_TIMEOUT_S = 60.0


class AttachProvisioner(KernelProvisionerBase):
    """Configured by the kernelspec's ``kernel_provisioner.config``; see :func:`sandbox_kernel.lab.write_kernelspec`.

    On SIGHUP the container's ``kernel_side/launch.py`` replaces its kernel by a fresh one on the same sockets.
    """

    connection_file = Unicode(help="The session's connection file.").tag(config=True)
    container = Unicode(help="Id or name of the session's container, or the id of a local kernel.").tag(config=True)

    _attached = False

    @property
    def has_process(self) -> bool:
        """Whether the manager may use the kernel: from launch until it lets go."""
        return self._attached

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called by the manager before :meth:`launch_kernel`. Raises ConnectionFileError or SessionClosed."""
        self.connection_info = read_connection_file(Path(self.connection_file))
        if not await _listens(self.connection_info):
            raise SessionClosed(
                f"no kernel answers at the sockets in {self.connection_file}: the session has ended; start it again"
            )
        self._keep_session()
        return await super().pre_launch(cmd=[], **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Called by the manager to start the kernel; gives it the running one."""
        self._attached = True
        return self.connection_info

    async def post_launch(self, **kwargs: Any) -> None:
        """Called once the manager's restarter runs. It may report a death, but mending it is the session's business."""
        restarter = getattr(self.parent, "_restarter", None)
        if restarter is not None:
            restarter.restart_limit = 0

    async def poll(self) -> int | None:
        """None while something listens at the shell socket, else 1; called every 3 s and before interrupts."""
        if not self._attached:
            return 0
        try:
            async with asyncio.timeout(_RESTART_GAP_S):
                while not await _listens(self.connection_info):  # noqa: ASYNC110 - nothing tells of a kernel's socket
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return 1
        return None

    async def wait(self) -> int | None:
        """There is nothing to wait for: the kernel outlives its managers."""
        return 0

    async def send_signal(self, signum: int) -> None:
        """Interrupts go by message (``interrupt_mode``); no other signal of a manager may reach the session."""

    async def kill(self, restart: bool = False) -> None:
        """Lets go of the kernel."""
        self._attached = False

    async def terminate(self, restart: bool = False) -> None:
        """Lets go of the kernel."""
        self._attached = False

    async def cleanup(self, restart: bool = False) -> None:
        """Nothing of the session's is ours to remove."""

    def _keep_session(self) -> None:
        """Puts our shutdown (which detaches), restart and interrupt in the place of the manager's and its clients'."""
        manager: Any = self.parent

        async def detach(now: bool = False, restart: bool = False) -> None:
            manager.shutting_down = True
            manager.stop_restarter()
            self._attached = False
            await ensure_async(manager.cleanup_resources())

        async def request_detach(restart: bool = False) -> None:
            self._attached = False

        async def restart(now: bool = False, newports: bool = False, **kwargs: Any) -> None:
            await self.restart_session()

        async def interrupt() -> None:
            await self.interrupt_session()

        for name, function in (
            ("shutdown_kernel", detach),
            ("request_shutdown", request_detach),
            ("restart_kernel", restart),
            ("interrupt_kernel", interrupt),
        ):
            setattr(manager, name, function if isinstance(manager, AsyncKernelManager) else run_sync(function))
        manager.cleanup_ipc_files = lambda: None
        make_client = manager.client

        def client(**options: Any) -> Any:
            made = make_client(**options)
            # `jupyter console` asks the kernel itself to shut down, at `exit` and at Ctrl-D.
            made.shutdown = lambda restart=False: ""
            return made

        manager.client = client

    async def restart_session(self) -> None:
        """Restarts the session's kernel and returns when the new one answers.

        Raises EngineError when the container cannot be signalled, KernelStartError when no kernel answers in 60 s.
        """
        async with self._client() as client:
            # On control, because shell waits for the cell that is to be cut short.
            before = await _ask(client, "control", wait_s=1.0)
            self._seal(False)
            await asyncio.to_thread(self._hang_up)
            try:
                async with asyncio.timeout(_RESTART_TIMEOUT_S):
                    while await _ask(client, "shell", wait_s=0.2) in (None, before):
                        pass
            except TimeoutError:
                raise KernelStartError(
                    f"the session's kernel did not answer within {_RESTART_TIMEOUT_S:g} s of its restart"
                ) from None
            self._seal(True)

    def _seal(self, sealed: bool) -> None:
        """See :meth:`RuntimeDirectory.seal`."""
        folder = Path(self.connection_info["ip"]).parent.parent
        if self.connection_info["transport"] == "ipc" and folder.parent == runtime_base():
            RuntimeDirectory(folder.name, folder).seal(sealed)

    async def interrupt_session(self) -> None:
        """Interrupts the running cell; returns when the kernel has taken it, at the latest after 2 s."""
        async with self._client() as client:
            await _ask(client, "control", "interrupt_request", wait_s=1.0)
            # Wakes a loop that waits in `await asyncio.sleep(...)`: the signal alone does not (ipykernel #881).
            await _ask(client, "shell", wait_s=1.0)

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[AsyncKernelClient]:
        client = AsyncKernelClient()
        client.load_connection_info(self.connection_info)
        client.start_channels(iopub=False, stdin=False, hb=False)
        try:
            yield client
        finally:
            client.stop_channels()
            client.context.destroy(linger=0)

    def _hang_up(self) -> None:
        """Sends SIGHUP to the kernel's supervisor (blocks)."""
        if self.container.startswith("local:"):
            _, _, identity = self.container.split(":", 2)
            pid = int(identity.split(":")[1])
            if process_identity(pid) != identity.replace(":", " "):
                raise EngineError(f"the kernel's process {pid} has ended; attach to the session anew")
            os.kill(pid, signal.SIGHUP)
            return
        engine = Engine.shared()
        try:
            engine.signal(self.container, "SIGHUP")
        except NotThere:
            # A kernel that died and was launched again has the same connection file, in a container of another id.
            kernel_id = Path(self.connection_file).stem.removeprefix("kernel-")
            found = engine.containers(kernel=kernel_id)
            if not found:
                raise
            engine.signal(str(found[0]["Id"]), "SIGHUP")


class AttachedKernelSpecs(KernelSpecManager):
    """Finds nothing but ``allowed_kernelspecs``.

    The base class only hides the others: a script in a cell's HTML output, which runs in Lab's page with Lab's
    token, could still ask for ``python3`` by name and so run code on the host.
    """

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        if kernel_name not in self.allowed_kernelspecs:
            raise NoSuchKernel(kernel_name)
        return super().get_kernel_spec(kernel_name)


def read_connection_file(path: Path) -> KernelConnectionInfo:
    """The connection info as jupyter_client's managers want it (the key as bytes). Raises ConnectionFileError."""
    try:
        raw = json.loads(path.read_bytes())
        names = [*_PORTS, "transport", "ip", "signature_scheme"]
        if "curve_publickey" in raw:
            names += ["curve_publickey", "curve_secretkey"]
        # jupyter_client's own type says `str` for the key, its code compares bytes.
        return cast(KernelConnectionInfo, {name: raw[name] for name in names} | {"key": raw["key"].encode()})
    except FileNotFoundError:
        raise ConnectionFileError(f"no connection file {path}: the session has ended; start it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConnectionFileError(f"{path} is not a kernel's connection file: {exc!r}") from exc


async def _listens(info: KernelConnectionInfo) -> bool:
    """Whether something accepts connections where the kernel's shell socket should be."""
    try:
        if info["transport"] == "ipc":
            path = f"{info['ip']}-{info['shell_port']}"
            # The kernel can write its socket folder: a link there would lead us to a socket of the host.
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                return False
            _, writer = await asyncio.open_unix_connection(path)
        else:
            _, writer = await asyncio.open_connection(info["ip"], info["shell_port"])
    except OSError:
        return False
    writer.close()
    return True


async def _ask(
    client: AsyncKernelClient, channel: str, request: str = "kernel_info_request", *, wait_s: float
) -> str | None:
    """The ``header.session`` of the kernel that replies, another one in every kernel; None when no reply comes."""
    receive = client.get_control_msg if channel == "control" else client.get_shell_msg
    getattr(client, f"{channel}_channel").send(client.session.msg(request))
    try:
        reply = await receive(timeout=wait_s)
    except Empty:
        return None
    return str(reply["header"]["session"])
