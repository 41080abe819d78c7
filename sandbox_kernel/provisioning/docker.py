"""The provisioner that runs a kernel in a container of its own (entry point ``sandbox-docker``)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo

from sandbox_kernel.errors import EngineError, KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.hosts import parse_hosts
from sandbox_kernel.provisioning.base import SessionProvisioner, finished
from sandbox_kernel.provisioning.container import ContainerSpec, body
from sandbox_kernel.provisioning.death import explain, start_failure
from sandbox_kernel.provisioning.egress import Egress
from sandbox_kernel.provisioning.egress_log import EgressLine
from sandbox_kernel.provisioning.engine import MANAGED, Engine, SourceMissing, tar
from sandbox_kernel.provisioning.memory import check_memory
from sandbox_kernel.provisioning.network import (
    choose_transport,
    network_config,
    port_bindings,
    published_ports,
)
from sandbox_kernel.provisioning.orphans import OWNER, in_its_place, sweep_in_background
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.readiness import SocketFiles, handshake
from sandbox_kernel.provisioning.runtime import BOOT, SOCKETS, RuntimeDirectory
from sandbox_kernel.provisioning.stream import ExecStream
from sandbox_kernel.provisioning.watch import Watch, Watcher

PROVISIONER = "sandbox-docker"
"""Name of the entry point in ``jupyter_client.kernel_provisioners``."""


class DockerProvisioner(SessionProvisioner):
    """See :class:`SessionProvisioner`; ``container_id`` is the container's id once it is made."""

    _engine: Engine | None = None
    _egress: Egress | None = None
    _watch: Watch | None = None
    _death: KernelDeath | None = None
    _paused_by_us = False

    @property
    def container_name(self) -> str:
        """The container's name while it belongs to its session."""
        return self._require_spec().name

    def _running(self) -> tuple[Engine, str]:
        if self._engine is None or self.container_id is None:
            raise EngineError("the kernel was not launched, or is removed; launch it first")
        return self._engine, self.container_id

    # -- launch ----------------------------------------------------------------------------

    async def launch(self) -> KernelConnectionInfo:
        spec = self._require_spec()
        if self.container_id is not None:  # a dead one, whose place this takes
            await self._forget(keep_identity=True)
        watcher = Watcher.shared()
        watcher.open()  # beside the other steps: its connection must stand before the container starts
        try:
            self._engine = engine = await finished(Engine.shared)
            if self.parent is not None:
                sweep_in_background(engine)
            try:
                transport = await finished(choose_transport, spec.settings, engine)
                return await self._launch_over(engine, spec, transport)
            except SourceMissing as exc:
                missing = [str(path) for path in spec.sources() if not path.exists()]
                if missing:
                    raise EngineError(f"a folder to be mounted is missing: {', '.join(missing)}") from exc
                engine.shares_files = False
                if spec.settings.transport == "ipc" or spec.sources():
                    raise SourceMissing(
                        f"{exc}; use session_storage=TMPFS, transport='tcp' and data sets by API, "
                        "or an engine on this machine"
                    ) from exc
                return await self._launch_over(engine, spec, "tcp")
        finally:
            watcher.close()

    async def _launch_over(self, engine: Engine, spec: ContainerSpec, transport: str) -> KernelConnectionInfo:
        self.transport = transport
        self._death = None
        runtime = self._require_runtime()
        if transport == "ipc":
            runtime.check_length()
            await asyncio.to_thread(check_memory)  # over ipc the container is on this machine
        inside = self._inside_info(f"{SOCKETS}/k" if transport == "ipc" else "0.0.0.0")
        files = runtime.boot_files(inside, spec.boot_options(), spec.secrets)
        try:
            await finished(self._create, engine, spec, files, self._deliver_here())
            info = await self._start(engine, spec)
            if self._egress is not None:
                await finished(self._egress.wait_ready, spec.settings.start_timeout_s)
            if self.parent is None:
                await finished(runtime.write_connection_file, info)
        except BaseException:
            await asyncio.shield(self._forget(keep_identity=True))
            raise
        engine.shares_files = engine.shares_files is not False
        self.connection_info = info
        return info

    def _create(
        self,
        engine: Engine,
        spec: ContainerSpec,
        files: dict[str, bytes],
        deliver: Callable[[list[EgressLine]], None],
    ) -> None:
        """Runtime directory, network, container (blocks). Sets ``container_id`` even when nobody awaits it any more."""
        runtime = self._require_runtime()
        runtime.create(files)
        labels = {"sandbox-kernel.runtime": str(runtime.path), "sandbox-kernel.transport": str(self.transport)}
        if self.parent is not None:
            labels[OWNER] = process_identity(os.getpid()) or ""
        remote = engine.shares_files is False
        if isinstance(spec.settings.network, str):
            network = network_config(spec.settings, str(self.transport), engine)
        else:
            self._egress = egress = Egress(engine, spec.kernel_id)
            rules = parse_hosts(spec.settings.network)
            egress.create(rules, published=self.transport == "tcp", labels=spec.root_labels())
            egress.follow(deliver, since="")
            network = egress.host_config()
            spec = replace(spec, env={**egress.environment(), **spec.env})
        document = body(
            spec,
            runtime_dir=None if remote else runtime.path,
            network=network,
            published=port_bindings(self._ports) if self.transport == "tcp" else None,
            labels=labels,
        )
        archive = tar(files) if remote else None
        self.container_id = in_its_place(
            engine, spec, lambda: engine.create(spec.name, document, files=archive, files_at=BOOT)
        )

    def _deliver_here(self) -> Callable[[list[EgressLine]], None]:
        """What another thread calls with the egress proxy's lines: they go to ``traffic``, in this event loop."""
        loop = asyncio.get_running_loop()

        def deliver(lines: list[EgressLine]) -> None:
            if self.traffic is not None:
                with suppress(RuntimeError):  # the loop is closed: the next holder reads them again
                    loop.call_soon_threadsafe(self.traffic.take, lines)

        return deliver

    async def _start(self, engine: Engine, spec: ContainerSpec) -> KernelConnectionInfo:
        """Start, wait for the kernel, and return the client's connection info."""
        container = str(self.container_id)
        self._watch = Watcher.shared().watch(container)
        if self.transport == "ipc":
            with SocketFiles(self._require_runtime().socket_paths()) as files:
                await finished(engine.start, container, runtime=spec.settings.runtime)
                await self._wait_ready(files.fresh)
            self._seal(True)
            return self._client_info()
        await finished(engine.start, container, runtime=spec.settings.runtime)
        self._take_ports(await asyncio.to_thread(engine.inspect, container))
        info = self._client_info()
        async with handshake(info) as connection:
            await self._wait_ready(connection.up)
        return info

    def _take_ports(self, found: dict[str, Any]) -> None:
        self._ports = published_ports(found["NetworkSettings"])
        self.host_port = self._ports[0]

    async def _start_error(self) -> KernelStartError:
        engine, container = self._running()
        return await asyncio.to_thread(
            start_failure, engine, container, self._require_watch(), self._require_spec().settings
        )

    async def attach(self, container_id: str) -> KernelConnectionInfo:
        self._engine = engine = await finished(Engine.shared)
        watch = Watcher.shared().watch(container_id)
        try:
            # Even where the kernel is dead: what its proxy has to say must still be heard before it is removed.
            await self._attach_egress(Egress(engine, self._require_spec().kernel_id))
            found = await asyncio.to_thread(engine.inspect, container_id)
            labels = found["Config"].get("Labels") or {}
            who = f"the container {container_id[:12]}"
            if labels.get(MANAGED) != "1":
                raise EngineError(f"{who} is not ours (no label {MANAGED}); it is left alone")
            if not found["State"]["Running"]:
                raise EngineError(f"{who} has ended ({found['State'].get('Status')}); start the session again")
            self.kernel_id = labels["sandbox-kernel.kernel"]
            self._runtime = RuntimeDirectory(self.kernel_id, Path(labels["sandbox-kernel.runtime"]))
            self._keys = await asyncio.to_thread(self._runtime.keys)
        except BaseException:
            Watcher.shared().unwatch(watch)
            if self.parent is not None:
                self.detach()
            raise
        self.transport = labels["sandbox-kernel.transport"]
        self.container_id = found["Id"]
        self._watch, self._death = watch, None
        watch.take_state(found["State"])
        if self.transport == "tcp":
            self._take_ports(found)
        self.connection_info = self._client_info()
        await asyncio.to_thread(self._runtime.write_connection_file, self.connection_info)
        return self.connection_info

    async def _attach_egress(self, egress: Egress) -> None:
        """Go on reading the proxy's lines, where the kernel has one."""
        if await asyncio.to_thread(egress.attach):
            since = ""
            if self.traffic is not None:
                since = await asyncio.to_thread(self.traffic.since, str(egress.container)[:12])
            egress.follow(self._deliver_here(), since=since)
            self._egress = egress

    # -- while it runs ---------------------------------------------------------------------

    async def restart_in_place(self) -> KernelConnectionInfo:
        if self.transport == "ipc":
            self._seal(False)
            info = await super().restart_in_place()
            self._seal(True)
            return info
        await self._require_alive()
        async with handshake(self.connection_info) as connection:
            await self._wait_ready(connection.up)
            await self._restart_signals()

            async def replaced() -> None:
                await connection.down()
                await connection.up()

            await self._wait_ready(replaced)
        return self.connection_info

    def _seal(self, sealed: bool) -> None:
        self._require_runtime().seal(sealed)

    def _require_watch(self) -> Watch:
        if self._watch is None:
            raise EngineError("the kernel was not launched, or is removed; launch it first")
        return self._watch

    async def wait_dead(self) -> KernelDeath:
        watch = self._require_watch()
        await watch.until(lambda found: found.dead or (found.paused and not self._paused_by_us))
        if not watch.dead:
            return KernelDeath(cause="unresponsive", message="its container was paused from outside")
        return await self.death()

    async def death(self) -> KernelDeath:
        if self._death is not None:
            return self._death
        if self._engine is None or self._watch is None:
            return KernelDeath(cause="removed", message="the kernel was removed")
        watch = self._watch
        death = await asyncio.to_thread(explain, self._engine, watch, self._require_spec().settings)
        if watch.dead:
            self._death = death
        return death

    async def _until_ended(self) -> None:
        if self._watch is not None:
            await self._watch.until(lambda found: found.dead)

    async def logs(self, tail: int = 50) -> str:
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
        """Let a paused kernel go on, whoever paused it."""
        engine, container = self._running()
        await asyncio.to_thread(engine.unpause, container)
        await self._require_watch().until(lambda found: not found.paused)
        self._paused_by_us = False

    def assign(self, spec: ContainerSpec) -> None:
        """Give a spare to the session of ``spec``, which has its kernel id; from now on it outlives this process."""
        assert spec.session_id is not None
        assert spec.kernel_id == self.kernel_id
        self._require_runtime().assign(spec.session_id)
        self.spec = spec

    async def rename(self) -> None:
        """Have the container of a spare that was assigned carry its session's name. Raises ContainerConflict."""
        engine, container = self._running()
        spec = self._require_spec()
        await asyncio.to_thread(in_its_place, engine, spec, lambda: engine.rename(container, spec.name))

    def detach(self) -> None:
        if self._watch is not None:
            Watcher.shared().unwatch(self._watch)
        if self._egress is not None:
            self._egress.detach()
        self._watch = self._egress = None
        self.container_id = None

    def _remove_now(self) -> None:
        container = self.container_id
        egress, self._egress = self._egress, None  # it is read on, to its last line
        self.detach()
        try:
            if egress is not None:
                egress.stop()
            if container is not None and self._engine is not None:
                self._engine.remove(container)
            if egress is not None:
                egress.remove()
        finally:
            if self._runtime is not None:
                self._runtime.remove()

    async def poll(self) -> int | None:
        """None while the kernel runs, else its exit code (128 + signal)."""
        if self._watch is None:
            return 0
        if self._watch.exit_code is not None:
            return self._watch.exit_code
        return 137 if self._watch.removed else None

    async def send_signal(self, signum: int) -> None:
        """SIGINT interrupts the kernel, SIGHUP restarts it, SIGTERM and SIGKILL end it.

        One that has ended is left alone. Raises EngineError when the engine refuses.
        """
        if signum == 0 or self._watch is None or self._watch.dead:
            return
        engine, container = self._running()
        try:
            await asyncio.to_thread(engine.signal, container, signal.Signals(signum).name)
        except EngineError:
            # It may have ended a moment ago, with the event under way.
            death = await self.death()
            if death.cause == "unknown":
                raise
