"""The provisioner that runs a kernel in a container of its own (entry point ``sandbox-docker``).

Two callers: a session (``spec`` given, no manager: :meth:`DockerProvisioner.launch`, ``wait_dead``,
``restart_in_place``, ``remove``), and any Jupyter program through jupyter_client's KernelManager, which calls the
methods of :class:`KernelProvisionerBase` with the settings of the kernelspec.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Dict as DictTrait
from traitlets import Instance

from sandbox_kernel.errors import ContainerConflict, EngineError, KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.provisioning import orphans
from sandbox_kernel.provisioning.container import COMMAND, ContainerSpec, body
from sandbox_kernel.provisioning.death import explain, start_failure
from sandbox_kernel.provisioning.engine import MANAGED, Engine, NotThere, SourceMissing, tar
from sandbox_kernel.provisioning.network import network_config
from sandbox_kernel.provisioning.readiness import SocketFiles, first, handshake
from sandbox_kernel.provisioning.runtime import BOOT, PORTS, SOCKETS, TCP_BASE, Keys, RuntimeDirectory, connection_info
from sandbox_kernel.provisioning.stream import ExecStream
from sandbox_kernel.provisioning.watch import Watch, Watcher
from sandbox_kernel.settings import Settings

PROVISIONER = "sandbox-docker"
"""Name of the entry point in ``jupyter_client.kernel_provisioners``."""

_SHARED_KERNELS = (None, "runc", "crun", "io.containerd.runc.v2")
"""OCI runtimes whose containers share the host's Linux kernel, and so its Unix sockets."""

T = TypeVar("T")


async def _finished(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run in a thread; a cancellation is raised only after the call has ended, so that its result is never lost."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.gather(call, return_exceptions=True)
        raise


class DockerProvisioner(KernelProvisionerBase):
    """See the module. ``settings``: values of :class:`Settings` out of the kernelspec, used when ``spec`` is None."""

    spec: ContainerSpec | None = Instance(ContainerSpec, allow_none=True)  # type: ignore[assignment]
    settings: dict[str, Any] = DictTrait().tag(config=True)  # type: ignore[assignment]

    container_id: str | None = None
    host_port: int | None = None
    """The published shell port; None over ipc."""
    transport: str | None = None
    """``ipc`` or ``tcp`` once launched."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._runtime: RuntimeDirectory | None = None
        self._keys: Keys | None = None
        self._watch: Watch | None = None
        self._engine: Engine | None = None
        self._ports: tuple[int, ...] = ()
        self._death: KernelDeath | None = None
        self._paused_by_us = False

    # -- what is known ---------------------------------------------------------------------

    def _require_spec(self) -> ContainerSpec:
        if self.spec is None:
            spec_env = self.kernel_spec.env if self.kernel_spec is not None else {}
            self.spec = ContainerSpec(settings=Settings(**self.settings), kernel_id=self.kernel_id, env=spec_env)
        return self.spec

    @property
    def container_name(self) -> str:
        """The container's name while it belongs to its session."""
        return self._require_spec().name

    @property
    def runtime_dir(self) -> Path | None:
        """The kernel's runtime directory (see :mod:`.runtime`)."""
        return self._runtime.path if self._runtime is not None else None

    @property
    def connection_file(self) -> Path | None:
        """The client's connection file; a KernelManager has written it itself."""
        return self._runtime.connection_file if self._runtime is not None else None

    @property
    def has_process(self) -> bool:
        """Whether there is a container, running or not yet removed."""
        return self.container_id is not None

    def _running(self) -> tuple[Engine, str]:
        if self._engine is None or self.container_id is None:
            raise EngineError("the kernel was not launched, or is removed; launch it first")
        return self._engine, self.container_id

    # -- launch ----------------------------------------------------------------------------

    async def launch(self) -> KernelConnectionInfo:
        """Make and start the container; return when its kernel's sockets are there, with the client's connection info.

        Raises EngineError (ImageNotFound, ContainerConflict, ...) or KernelStartError with the last log lines.
        Nothing is left behind then, nor after a cancellation.
        """
        spec = self._require_spec()
        # No cell may find itself in a half-made container after a fork of the host, nor two listeners: see Watcher.
        watcher = Watcher.shared()
        watcher.open()
        try:
            self._engine = engine = await _finished(Engine.shared)
            if self.parent is not None:
                orphans.sweep_in_background(engine)
                atexit.register(self._remove_now)
            transport = self._transport(spec.settings, engine)
            try:
                return await self._launch_over(engine, spec, transport)
            except SourceMissing:
                engine.shares_files = False
                if spec.settings.transport == "ipc" or spec.artifacts is not None or spec.mounts:
                    raise
                return await self._launch_over(engine, spec, "tcp")
        finally:
            watcher.close()

    @staticmethod
    def _transport(settings: Settings, engine: Engine) -> str:
        if settings.transport != "auto":
            return settings.transport
        same_machine = (
            sys.platform == "linux" and engine.unix and not engine.desktop and engine.shares_files is not False
        )
        return "ipc" if same_machine and settings.runtime in _SHARED_KERNELS else "tcp"

    async def _launch_over(self, engine: Engine, spec: ContainerSpec, transport: str) -> KernelConnectionInfo:
        self.transport = transport
        self._death = None
        self._runtime = runtime = RuntimeDirectory(spec.kernel_id)
        if transport == "ipc":
            runtime.check_length()
        if self._keys is None:
            self._keys = self._new_keys()
        inside = connection_info(
            self._keys, transport, f"{SOCKETS}/k" if transport == "ipc" else "0.0.0.0", self._inside_ports(transport)
        )
        files = runtime.boot_files(inside, spec.boot_options())
        try:
            await _finished(runtime.create, files)
            document = await _finished(self._document, engine, spec, transport)
            remote = files if engine.shares_files is False else None
            await self._create(engine, spec, document, None if remote is None else tar(remote))
            info = await self._start(engine, spec)
            if self.parent is None:
                await asyncio.to_thread(runtime.write_connection_file, info)
        except BaseException:
            await asyncio.shield(self._forget(keep_identity=True))
            raise
        engine.shares_files = engine.shares_files is not False
        self.connection_info = info
        return info

    def _new_keys(self) -> Keys:
        manager = self.parent
        key = bytes(manager.session.key) if manager is not None else b""
        if manager is not None and getattr(manager, "curve_publickey", None) and manager.curve_secretkey:
            return Keys(
                key or os.urandom(32).hex().encode(), manager.curve_publickey.decode(), manager.curve_secretkey.decode()
            )
        return Keys.new(key)

    @staticmethod
    def _inside_ports(transport: str) -> tuple[int, ...]:
        base = 1 if transport == "ipc" else TCP_BASE
        return tuple(range(base, base + len(PORTS)))

    def _document(self, engine: Engine, spec: ContainerSpec, transport: str) -> dict[str, Any]:
        """The engine's document; makes the network where one is needed (blocks)."""
        assert self._runtime is not None
        published = None
        if transport == "tcp":
            # A relaunch keeps its ports: clients that are connected need not learn new ones.
            ports = self._ports or (0,) * len(PORTS)
            published = {
                f"{TCP_BASE + number}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port or "")}]
                for number, port in enumerate(ports)
            }
        labels = {"sandbox-kernel.runtime": str(self._runtime.path), "sandbox-kernel.transport": transport}
        if self.parent is not None:
            labels[orphans.OWNER] = orphans.this_process()
        return body(
            spec,
            runtime_dir=None if engine.shares_files is False else self._runtime.path,
            network=network_config(spec.settings, transport, engine),
            published=published,
            labels=labels,
        )

    async def _create(self, engine: Engine, spec: ContainerSpec, document: dict[str, Any], files: bytes | None) -> None:
        def create() -> None:
            # Set in the thread: after a cancellation `_forget` must find it.
            try:
                self.container_id = engine.create(spec.name, document, files=files, files_at=BOOT)
            except ContainerConflict:
                self._make_room(engine, spec)
                self.container_id = engine.create(spec.name, document, files=files, files_at=BOOT)

        await _finished(create)

    @staticmethod
    def _make_room(engine: Engine, spec: ContainerSpec) -> None:
        """Remove a dead container of the same session; raises ContainerConflict for any other of that name."""
        try:
            found = engine.inspect(spec.name)
        except NotThere:
            return
        labels = found["Config"].get("Labels") or {}
        who = f"{spec.name} ({found['Id'][:12]}, image {found['Config']['Image']})"
        if labels.get(MANAGED) != "1":
            raise ContainerConflict(
                f"the container name {who} is taken by a container that is not ours; rename or remove it, or choose another session id"
            )
        if found["State"]["Running"]:
            raise ContainerConflict(
                f"the container {who} of this session still runs; get() the session instead of starting it, or stop it"
            )
        if labels.get("sandbox-kernel.session") != spec.session_id:
            raise ContainerConflict(
                f"the container name {who} belongs to another session of ours; run: sandbox-kernel gc"
            )
        engine.remove(found["Id"])

    async def _start(self, engine: Engine, spec: ContainerSpec) -> KernelConnectionInfo:
        """Start, wait for the kernel, and return the client's connection info."""
        assert self.container_id is not None and self._runtime is not None
        watch = self._watch = Watcher.shared().watch(self.container_id)
        timeout = spec.settings.start_timeout_s

        async def died() -> None:
            await watch.until(lambda found: found.dead)

        try:
            with ExitStack() as stack:
                if self.transport == "ipc":
                    files = stack.enter_context(SocketFiles(self._runtime.socket_paths()))
                    await _finished(engine.start, self.container_id, runtime=spec.settings.runtime)
                    info = self._client_info()
                    winner = await first(files.fresh, died, timeout=timeout)
                else:
                    await _finished(engine.start, self.container_id, runtime=spec.settings.runtime)
                    await self._read_ports(engine)
                    info = self._client_info()
                    async with handshake(info) as connection:
                        winner = await first(connection.up, died, timeout=timeout)
        except TimeoutError:
            logs = await asyncio.to_thread(engine.logs, self.container_id)
            raise KernelStartError(
                f"no kernel answered within {timeout:g} s (start_timeout_s) in {spec.settings.image!r}; its last lines: {logs or 'none'}",
                logs=logs,
            ) from None
        if winner != 0:
            raise await asyncio.to_thread(start_failure, engine, self.container_id, watch, spec.settings)
        return info

    async def _read_ports(self, engine: Engine) -> None:
        assert self.container_id is not None
        found = (await asyncio.to_thread(engine.inspect, self.container_id))["NetworkSettings"]["Ports"] or {}
        self._take_ports(found)

    def _take_ports(self, found: dict[str, Any]) -> None:
        bindings = [found.get(f"{TCP_BASE + number}/tcp") for number in range(len(PORTS))]
        # A container that is dead already has none; the watch tells of that.
        self._ports = tuple(int(binding[0]["HostPort"]) if binding else 1 for binding in bindings)
        self.host_port = self._ports[0]

    def _client_info(self) -> KernelConnectionInfo:
        assert self._keys is not None and self._runtime is not None
        if self.transport == "ipc":
            return connection_info(self._keys, "ipc", self._runtime.ip, self._inside_ports("ipc"))
        return connection_info(self._keys, "tcp", "127.0.0.1", self._ports)

    async def attach(self, container_id: str) -> KernelConnectionInfo:
        """Take over a running container of ours whose host process died; the client's connection info.

        Raises EngineError when it is gone, dead or not ours, ConnectionFileError when its keys are lost.
        """
        self._engine = engine = await asyncio.to_thread(Engine.shared)
        watch = Watcher.shared().watch(container_id)
        try:
            found = await asyncio.to_thread(engine.inspect, container_id)
            labels = found["Config"].get("Labels") or {}
            if labels.get(MANAGED) != "1":
                raise EngineError(
                    f"the container {container_id[:12]} is not ours (no label {MANAGED}); it is left alone"
                )
            if not found["State"]["Running"]:
                raise EngineError(
                    f"the container {container_id[:12]} has ended ({found['State'].get('Status')}); start the session again"
                )
            self.kernel_id = labels["sandbox-kernel.kernel"]
            self._runtime = RuntimeDirectory(self.kernel_id, Path(labels["sandbox-kernel.runtime"]))
            self._keys = await asyncio.to_thread(self._runtime.keys)
        except BaseException:
            Watcher.shared().unwatch(watch)
            raise
        self.transport = labels["sandbox-kernel.transport"]
        self.container_id = found["Id"]
        watch.take_state(found["State"])
        self._watch = watch
        if self.transport == "tcp":
            self._take_ports(found["NetworkSettings"]["Ports"] or {})
        self.connection_info = self._client_info()
        await asyncio.to_thread(self._runtime.write_connection_file, self.connection_info)
        return self.connection_info

    # -- while it runs ---------------------------------------------------------------------

    async def restart_in_place(self) -> KernelConnectionInfo:
        """Have the container's supervisor kill its kernel and fork a fresh one on the same sockets; same connection info.

        Raises EngineError when the container is gone, KernelStartError when no fresh kernel comes.
        """
        engine, container = self._running()
        assert self._watch is not None and self._runtime is not None
        watch = self._watch
        timeout = self._require_spec().settings.start_timeout_s

        async def died() -> None:
            await watch.until(lambda found: found.dead)

        try:
            if self.transport == "ipc":
                with SocketFiles(self._runtime.socket_paths()) as files:
                    await asyncio.to_thread(engine.signal, container, signal.SIGHUP.name)
                    winner = await first(files.fresh, died, timeout=timeout)
            else:
                async with handshake(self.connection_info) as connection:
                    await first(connection.up, died, timeout=timeout)
                    await asyncio.to_thread(engine.signal, container, signal.SIGHUP.name)

                    async def replaced() -> None:
                        await connection.down()
                        await connection.up()

                    winner = await first(replaced, died, timeout=timeout)
        except TimeoutError:
            logs = await self.logs()
            raise KernelStartError(
                f"no fresh kernel came within {timeout:g} s of the restart; its last lines: {logs}", logs=logs
            ) from None
        if winner != 0:
            raise await asyncio.to_thread(start_failure, engine, container, watch, self._require_spec().settings)
        return self.connection_info

    async def wait_dead(self) -> KernelDeath:
        """Return when the container has died, or was paused from outside, with the cause."""
        watch = self._watch
        if watch is None:
            return await self.death()
        await watch.until(lambda found: found.dead or (found.paused and not self._paused_by_us))
        if not watch.dead:
            return KernelDeath(cause="unresponsive", message="its container was paused from outside")
        return await self.death()

    async def death(self) -> KernelDeath:
        """Why the kernel is gone; ``unknown`` while it lives."""
        if self._death is None:
            if self._engine is None or self._watch is None:
                return KernelDeath(cause="removed", message="the kernel was removed")
            death = await asyncio.to_thread(explain, self._engine, self._watch, self._require_spec().settings)
            if not self._watch.dead:
                return death
            self._death = death
        return self._death

    async def logs(self, tail: int = 50) -> str:
        """The last lines of the container's output, "" when it is gone."""
        if self._engine is None or self.container_id is None:
            return ""
        return await asyncio.to_thread(self._engine.logs, self.container_id, tail)

    async def exec_stream(self, argv: list[str], *, user: str | None = None) -> ExecStream:
        """Run a command in the container with its stdin and stdout in hand. Raises EngineError."""
        engine, container = self._running()
        return await ExecStream.open(engine, container, argv, user=user)

    async def pause(self) -> None:
        """Freeze the kernel and everything in its container; :meth:`wait_dead` does not mind."""
        engine, container = self._running()
        self._paused_by_us = True
        await asyncio.to_thread(engine.pause, container)

    async def unpause(self) -> None:
        """Let a paused kernel go on."""
        engine, container = self._running()
        await asyncio.to_thread(engine.unpause, container)
        assert self._watch is not None
        await self._watch.until(lambda found: not found.paused)
        self._paused_by_us = False

    async def rename(self, spec: ContainerSpec) -> None:
        """Give a spare's container the name of the session that takes it. Labels stay as they were made."""
        engine, container = self._running()
        await asyncio.to_thread(engine.rename, container, spec.name)
        self.spec = spec

    async def remove(self) -> None:
        """End the kernel and remove container, sockets, keys and connection file; done already is done."""
        await self._forget(keep_identity=False)

    def detach(self) -> None:
        """Let go of a container that lives on for the next :meth:`attach`."""
        if self._watch is not None:
            Watcher.shared().unwatch(self._watch)
        self._watch = None
        self.container_id = None
        atexit.unregister(self._remove_now)

    async def _forget(self, *, keep_identity: bool) -> None:
        """Remove what there is; ``keep_identity``: keys and ports stay for the next launch."""
        await _finished(self._remove_now)
        if not keep_identity:
            self._keys, self._ports = None, ()

    def _remove_now(self) -> None:
        """Blocks; also run at exit for kernels of a program that ends without cleaning up, as jupyter console does."""
        atexit.unregister(self._remove_now)
        if self._watch is not None:
            Watcher.shared().unwatch(self._watch)
            self._watch = None
        container, self.container_id = self.container_id, None
        try:
            if container is not None and self._engine is not None:
                self._engine.remove(container)
        finally:
            if self._runtime is not None:
                self._runtime.remove()

    # -- what jupyter_client's KernelManager calls -----------------------------------------

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Before :meth:`launch_kernel`. Of the environment only what the kernelspec names reaches the container."""
        return await super().pre_launch(cmd=list(COMMAND), **kwargs)

    def _finalize_env(self, env: dict[str, str]) -> None:
        if self.kernel_spec is not None:
            super()._finalize_env(env)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel; see :meth:`launch`."""
        return await self.launch()

    async def poll(self) -> int | None:
        """None while the kernel runs, else its exit code (128 + signal)."""
        if self._watch is None:
            return 0
        if self._watch.exit_code is not None:
            return self._watch.exit_code
        return 137 if self._watch.removed else None

    async def wait(self) -> int | None:
        """Return the exit code once the container has ended."""
        watch = self._watch
        if watch is not None:
            await watch.until(lambda found: found.dead)
        return await self.poll()

    async def send_signal(self, signum: int) -> None:
        """SIGINT interrupts the kernel, SIGHUP restarts it, SIGTERM and SIGKILL end it."""
        if signum == 0 or self.container_id is None or self._engine is None:
            return
        # A container that has ended, or is about to, has nobody left to signal.
        with suppress(NotThere):
            try:
                await asyncio.to_thread(self._engine.signal, self.container_id, signal.Signals(signum).name)
            except EngineError:
                if self._watch is None or not self._watch.dead:
                    state = (await asyncio.to_thread(self._engine.inspect, self.container_id))["State"]
                    if state["Running"]:
                        raise

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL to everything in the container."""
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        """SIGTERM to the kernel; its supervisor follows within a second."""
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the container; before a restart keys and ports are kept, so that clients stay connected."""
        await self._forget(keep_identity=restart)

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What :meth:`load_provisioner_info` needs, in another process too."""
        info = await super().get_provisioner_info()
        return {**info, "container_id": self.container_id}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Attach to the container of :meth:`get_provisioner_info`. Raises EngineError when it is gone."""
        await super().load_provisioner_info(provisioner_info)
        if provisioner_info.get("container_id"):
            await self.attach(provisioner_info["container_id"])


def remove_all(engine: Engine, containers: list[str]) -> None:
    """Remove these containers side by side (blocks); gone already is done."""
    threads = [threading.Thread(target=engine.remove, args=(container,)) for container in containers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
