"""What all provisioners of ours share: keys, runtime directory, and the two sides they are called from.

A session gives a ``spec`` and no manager, and calls ``launch``, ``attach``, ``wait_dead``, ``restart_in_place``,
``remove``. A Jupyter program calls the methods of :class:`KernelProvisionerBase` through its KernelManager; the
settings are then those of the kernelspec.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Dict as DictTrait
from traitlets import Instance

from sandbox_kernel.errors import EngineError, KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.provisioning.container import COMMAND, ContainerSpec
from sandbox_kernel.provisioning.egress_log import Traffic
from sandbox_kernel.provisioning.readiness import SocketFiles, first
from sandbox_kernel.provisioning.runtime import PORTS, TCP_BASE, Keys, RuntimeDirectory, connection_info
from sandbox_kernel.settings import Settings

T = TypeVar("T")


async def finished(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run in a thread; a cancellation is raised only after the call has ended, so that its result is never lost."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.gather(call, return_exceptions=True)
        raise


class SessionProvisioner(KernelProvisionerBase):
    """See the module. ``settings``: values of :class:`Settings` out of the kernelspec, used when ``spec`` is None."""

    spec: ContainerSpec | None = Instance(ContainerSpec, allow_none=True)  # type: ignore[assignment]
    settings: dict[str, Any] = DictTrait().tag(config=True)  # type: ignore[assignment]

    container_id: str | None = None
    host_port: int | None = None
    """The published shell port; None over ipc."""
    transport: str | None = None
    """``ipc`` or ``tcp`` once launched."""
    traffic: Traffic | None = None
    """Who keeps what the egress proxy says; to be set before launch or attachment."""

    _env: Mapping[str, str] = {}
    """The kernelspec's ``env``, with its references to the host's variables replaced."""
    _runtime: RuntimeDirectory | None = None
    _keys: Keys | None = None
    _ports: tuple[int, ...] = ()
    """Published ports; kept over a relaunch, so that clients that are connected need not learn new ones."""

    # -- for each kind of provisioner to say -----------------------------------------------

    @abstractmethod
    async def launch(self) -> KernelConnectionInfo:
        """Start a kernel; return when its sockets are there, with the client's connection info.

        Raises EngineError (ImageNotFound, ContainerConflict, ...) or KernelStartError with the last log lines.
        Nothing is left behind then, nor after a cancellation.
        """

    @abstractmethod
    async def attach(self, container_id: str) -> KernelConnectionInfo:
        """Take over a running kernel of ours whose host process died; the client's connection info.

        Raises EngineError when it is gone, dead or not ours, ConnectionFileError when its keys are lost.
        """

    @abstractmethod
    async def wait_dead(self) -> KernelDeath:
        """Return when the kernel has died, or was paused from outside, with the cause."""

    @abstractmethod
    async def death(self) -> KernelDeath:
        """Why the kernel is gone; ``unknown`` while it lives."""

    @abstractmethod
    async def logs(self, tail: int = 50) -> str:
        """The last lines of the supervisor's and the kernel's own output, "" when they are gone."""

    @abstractmethod
    def detach(self) -> None:
        """Let go of a kernel that lives on for the next :meth:`attach`."""

    @abstractmethod
    async def _until_ended(self) -> None:
        """Return when the kernel has ended."""

    @abstractmethod
    async def _start_error(self) -> KernelStartError:
        """Why a kernel ended before it could be reached."""

    @abstractmethod
    def _remove_now(self) -> None:
        """Remove everything (blocks); done already is done."""

    # -- what is known ---------------------------------------------------------------------

    def _require_spec(self) -> ContainerSpec:
        if self.spec is None:
            self.spec = ContainerSpec(settings=Settings(**self.settings), kernel_id=self.kernel_id, env=self._env)
        return self.spec

    def _require_runtime(self) -> RuntimeDirectory:
        if self._runtime is None:
            self._runtime = RuntimeDirectory(self._require_spec().kernel_id)
        return self._runtime

    @property
    def runtime_dir(self) -> Path | None:
        """The kernel's runtime directory (see :mod:`.runtime`)."""
        return self._runtime.path if self._runtime is not None else None

    @property
    def connection_file(self) -> Path | None:
        """The client's connection file; a KernelManager writes one itself."""
        return self._runtime.connection_file if self._runtime is not None else None

    def _require_keys(self) -> Keys:
        if self._keys is None:
            manager = self.parent
            key = bytes(manager.session.key) if manager is not None else b""
            if manager is not None and getattr(manager, "curve_publickey", None) and manager.curve_secretkey:
                key = key or os.urandom(32).hex().encode()
                self._keys = Keys(key, manager.curve_publickey.decode(), manager.curve_secretkey.decode())
            else:
                self._keys = Keys.new(key)
        return self._keys

    def _inside_info(self, ip: str) -> KernelConnectionInfo:
        """Connection info as the kernel binds it."""
        base = 1 if self.transport == "ipc" else TCP_BASE
        ports = tuple(range(base, base + len(PORTS)))
        return connection_info(self._require_keys(), self.transport or "ipc", ip, ports)

    def _client_info(self) -> KernelConnectionInfo:
        """Connection info as clients on this machine need it."""
        if self.transport == "ipc":
            return self._inside_info(self._require_runtime().ip)
        return connection_info(self._require_keys(), "tcp", "127.0.0.1", self._ports)

    # -- a session's side ------------------------------------------------------------------

    async def _wait_ready(self, ready: Callable[[], Any]) -> None:
        """Wait for ``ready`` beside the kernel's death and the clock. Raises KernelStartError."""
        timeout = self._require_spec().settings.start_timeout_s
        try:
            winner = await first(ready, self._until_ended, timeout=timeout)
        except TimeoutError:
            logs = await self.logs()
            raise KernelStartError(
                f"no kernel answered within {timeout:g} s (start_timeout_s); its last lines: {logs or 'none'}",
                logs=logs,
            ) from None
        if winner != 0:
            raise await self._start_error()

    async def restart_in_place(self) -> KernelConnectionInfo:
        """Have the supervisor kill its kernel and fork a fresh one on the same sockets; the same connection info.

        Raises EngineError when the container is gone, KernelStartError when no fresh kernel comes.
        """
        await self._require_alive()
        with SocketFiles(self._require_runtime().socket_paths()) as files:
            await self._restart_signals()
            await self._wait_ready(files.fresh)
        return self.connection_info

    async def _restart_signals(self) -> None:
        # The kernel's code may have stopped the supervisor.
        await self.send_signal(signal.SIGCONT)
        await self.send_signal(signal.SIGHUP)

    async def _require_alive(self) -> None:
        if not self.has_process or await self.poll() is not None:
            raise EngineError("the kernel has ended, or was never launched; launch it")

    async def remove(self) -> None:
        """End the kernel and remove container, sockets, keys and connection file; done already is done."""
        await self.cleanup()

    async def _forget(self, *, keep_identity: bool) -> None:
        """Remove what there is; ``keep_identity``: keys and ports stay for the next launch."""
        atexit.unregister(self._remove_now)
        await finished(self._remove_now)
        if not keep_identity:
            self._keys, self._ports = None, ()

    # -- a KernelManager's side ------------------------------------------------------------

    @property
    def has_process(self) -> bool:
        """Whether there is a container or process, running or not yet removed."""
        return self.container_id is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Before :meth:`launch_kernel`. Of the environment only what the kernelspec names reaches the kernel."""
        kwargs = await super().pre_launch(cmd=list(COMMAND), **kwargs)
        if self.kernel_spec is not None:
            self._env = {name: kwargs["env"][name] for name in self.kernel_spec.env}
        return kwargs

    def _finalize_env(self, env: dict[str, str]) -> None:
        if self.kernel_spec is not None:
            super()._finalize_env(env)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel; see :meth:`launch`."""
        if self.parent is not None:
            # jupyter console and jupyter run end without cleaning up.
            atexit.register(self._remove_now)
        return await self.launch()

    async def wait(self) -> int | None:
        """Return the exit code once the kernel has ended."""
        await self._until_ended()
        return await self.poll()

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL to everything of the kernel's."""
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        """SIGTERM to the kernel; its supervisor follows within a second."""
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove everything; before a restart keys and ports are kept, so that clients stay connected."""
        await self._forget(keep_identity=restart)

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What :meth:`load_provisioner_info` needs, in another process too."""
        info = await super().get_provisioner_info()
        return {**info, "container_id": self.container_id}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Attach to the kernel of :meth:`get_provisioner_info`. Raises EngineError when it is gone."""
        await super().load_provisioner_info(provisioner_info)
        if provisioner_info.get("container_id"):
            await self.attach(provisioner_info["container_id"])
