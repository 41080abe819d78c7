"""The life of a session's kernel: launched, connected, interrupted, overdue, dead, restarted.

Whatever ends a kernel, the cells that were running are ended with the cause, the log says what was lost, and
(``restart_on_death``) the next kernel is on its way before anybody asks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from sandbox_kernel.errors import KernelGone, KernelStartError, SandboxError
from sandbox_kernel.events import KernelDeath, Status
from sandbox_kernel.feed import Cell, Feed
from sandbox_kernel.kernel import Kernel, SocketReplaced
from sandbox_kernel.launched import DiedAtStart, Provisioner, answered
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.settings import Settings
from sandbox_kernel.tasks import Tasks

log = logging.getLogger(__name__)

INTERRUPT_EVERY_S = 1.0
"""An interrupt that was lost (in a finally block, say) is repeated so often during the grace."""
IN_PLACE_S = 3.0
"""Longest wait for a restart within the container (it takes some 100 ms); then the container is replaced."""
AT_ONCE_S, DRAIN_S, NAMES_S = 0.4, 0.3, 0.2
"""Of the second within which the caller of an overdue cell is back: how long the restart is waited for, then what the
old kernel had said, and (before them) the names of its variables. What takes longer goes on without the caller."""
REJOIN_S = 1.0
"""One attempt to reach a kernel that somebody else restarted."""


class Lifecycle:
    """One session's kernel, one after the other."""

    def __init__(
        self,
        session_id: str,
        settings: Settings,
        provisioner: Provisioner,
        feed: Feed,
        ledger: Ledger,
        *,
        client_session: str,
        known_names: Callable[[], Awaitable[list[str]]],
        on_launched: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._session_id = session_id
        self._settings = settings
        self.provisioner = provisioner
        self._feed = feed
        self._ledger = ledger
        self._client_session = client_session
        self._known_names = known_names
        self._on_launched = on_launched
        """Called after each launch or attachment (True: the container is another one), before the first cell."""
        self.kernel: Kernel | None = None
        self._ready = asyncio.Event()
        self._changing = asyncio.Lock()
        """Held while the kernel is being replaced."""
        self._mourner: asyncio.Task[None] | None = None
        self._rejoining: Kernel | None = None
        self._failure: SandboxError | None = None
        self.tasks = Tasks(session_id)
        self.connection_info: Mapping[str, Any] = {}

    # -- start and end ---------------------------------------------------------------------

    async def launch(self) -> None:
        """Start the container and its kernel. Raises EngineError or KernelStartError; nothing is left behind then."""
        await self._connect(await self.provisioner.launch(), fresh=True)

    async def attach(self, container_id: str) -> None:
        """Take over the living kernel of a process that died; one that is just being restarted is waited for.

        Raises EngineError when it is gone, ConnectionFileError when its keys are, KernelStartError when it dies or does
        not answer within ``start_timeout_s``.
        """
        info = await self.provisioner.attach(container_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.start_timeout_s
        while True:
            try:
                return await self._connect(info, fresh=False, timeout=REJOIN_S)
            except KernelStartError as exc:
                if isinstance(exc, DiedAtStart | SocketReplaced) or loop.time() > deadline:
                    raise
                await asyncio.sleep(0.02)  # until the fresh kernel's sockets are there

    async def adopt(self, kernel: Kernel, info: Mapping[str, Any], dead: asyncio.Future[KernelDeath]) -> None:
        """Take a spare's kernel, which is connected; ``dead`` is its provisioner's ``wait_dead``."""
        kernel.feed = self._feed
        await self._begin(kernel, info, dead, fresh=True)

    async def _connect(self, info: Mapping[str, Any], *, fresh: bool, timeout: float | None = None) -> None:
        kernel = Kernel(info, client_session=self._client_session)
        try:
            dead = await answered(
                self.provisioner, kernel, self._feed, timeout=timeout or self._settings.start_timeout_s
            )
        except BaseException:
            if fresh:
                await self.provisioner.remove()
            raise
        await self._begin(kernel, info, dead, fresh=fresh)

    async def _begin(
        self, kernel: Kernel, info: Mapping[str, Any], dead: asyncio.Future[KernelDeath], *, fresh: bool
    ) -> None:
        self.kernel, self.connection_info = kernel, info
        kernel.on_disconnected = self._lost
        self._mourner = self.tasks.spawn(self._mourn(dead))
        self._mourner.add_done_callback(lambda _: dead.cancel())  # also when it is cancelled before it has begun
        try:
            await self._on_launched(fresh)
        except BaseException:
            self._mourner.cancel()
            self.kernel = None
            kernel.close()
            if fresh:
                await self.provisioner.remove()
            raise
        self._failure = None
        self._ready.set()

    async def detach(self) -> None:
        """Let go of the kernel without ending it."""
        await self._let_go()
        self.provisioner.detach()

    async def _let_go(self) -> None:
        self._ready.clear()
        if self.kernel is not None:
            self.kernel.close()
        await self.tasks.end()

    async def close(self, before_remove: Callable[[], Awaitable[Any]] | None = None) -> None:
        """End the kernel; running cells end as interrupted. ``before_remove``: a last look into the container."""
        await self._let_go()
        self._feed.abandon_all("interrupted")
        try:
            if before_remove is not None:
                with suppress(SandboxError):
                    await before_remove()
        finally:
            await self.provisioner.remove()

    async def ready(self) -> Kernel:
        """The kernel, once it answers. Raises KernelGone or why it could not be started."""
        if not self._ready.is_set():
            await self.revive()
        assert self.kernel is not None
        return self.kernel

    async def revive(self, *, asked: bool = False) -> None:
        """Start a kernel where there is none; ``asked``: by the caller, so whatever ``restart_on_death`` says."""
        await self.tasks.to_the_end(self._revive(asked))

    async def _revive(self, asked: bool) -> None:
        if self.kernel is not None:
            # Somebody else restarts it: the fresh one is awaited, and only without one a container is made.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), self._settings.start_timeout_s)
        async with self._changing:
            if self._ready.is_set():
                return
            if self._failure is not None and not self._settings.restart_on_death and not asked:
                raise self._failure
            await self._relaunch([])

    # -- interrupt and timeout -------------------------------------------------------------

    def watch(self, cell: Cell, timeout: float | None) -> asyncio.TimerHandle | None:
        """Arm the timeout of a cell that is about to be sent; the caller cancels the handle when the cell has ended."""
        if timeout is None:
            return None
        return asyncio.get_running_loop().call_later(timeout, self._expire, cell, timeout)

    def _expire(self, cell: Cell, timeout: float, put_off: bool = False) -> None:
        if cell.finished.is_set() or cell.msg_id not in self._feed.cells:
            return
        others = any(other.running for other in self._feed.cells.values() if other is not cell)
        if not cell.running and others and not put_off:
            # Somebody else's cell holds the kernel: our time has not begun. Once only: hostile code can say that there
            # is such a cell, and a caller who gave a timeout must come back.
            asyncio.get_running_loop().call_later(timeout, self._expire, cell, timeout, True)
            return
        self.tasks.spawn(self.end_cell(cell, "timeout"))

    async def end_cell(self, cell: Cell, verdict: Status) -> None:
        """Interrupt a cell, see that it ends; after the grace its kernel is killed and restarted."""
        cell.verdict = cell.verdict or verdict
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.interrupt_grace_s
        while not cell.finished.is_set():
            left = deadline - loop.time()
            if left <= 0:
                break
            if self.kernel is not None:
                self.kernel.interrupt()
            with suppress(TimeoutError):
                await asyncio.wait_for(cell.finished.wait(), min(left, INTERRUPT_EVERY_S))
        if not cell.finished.is_set() and not self.tasks.closed:
            await self.replace("timeout" if verdict == "timeout" else "would not be interrupted", cell)

    # -- restart ---------------------------------------------------------------------------

    async def replace(self, reason: str, cell: Cell | None = None) -> list[str]:
        """Kill the kernel and start a fresh one; the names of the variables that were lost.

        ``cell``: the one that does not end; has it ended before its kernel's turn has come, nothing is done.
        """
        return await self.tasks.to_the_end(self._replace(reason, cell))

    async def _replace(self, reason: str, cell: Cell | None) -> list[str]:
        async with self._changing:
            if cell is not None and cell.finished.is_set():
                return []  # by its kernel's death, or by whoever gave it up as well: this kernel is another one
            self._ready.clear()
            lost = await self._names()
            if self._mourner is not None:
                self._mourner.cancel()
            for running in self._feed.cells.values():
                self._ledger.notes[running.msg_id] = {"state_preserved": False, "lost_names": lost}
            old, self.kernel = self.kernel, None
            restart = self.tasks.spawn(self._in_place())
            try:
                await asyncio.wait({restart}, timeout=AT_ONCE_S)
                if old is not None:
                    await old.drain(DRAIN_S)
            finally:
                if old is not None:
                    old.close()
            self._feed.abandon_all("interrupted")
            info = await restart
            if info is None:
                await self.provisioner.remove()
                await self._relaunch(lost, reason=reason)
            else:
                await self._connect(info, fresh=False)
                self._ledger.append("kernel_restarted", reason=reason, lost_names=lost)
            return lost

    async def _in_place(self) -> Mapping[str, Any] | None:
        try:
            return await asyncio.wait_for(self.provisioner.restart_in_place(), IN_PLACE_S)
        except (SandboxError, TimeoutError) as exc:
            log.warning("session %s: restart in place failed (%s); a new container", self._session_id, exc)
            return None

    async def _names(self) -> list[str]:
        """The variables there are, where that can be learnt at once."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._known_names(), NAMES_S)
        return []

    async def _relaunch(self, lost: list[str], *, reason: str = "kernel died") -> None:
        try:
            await self.launch()
        except SandboxError as exc:
            self._failure = exc
            self._ledger.append("kernel_start_failed", reason=str(exc))
            raise
        self._ledger.append(
            "kernel_restarted", reason=reason, lost_names=lost, container_id=self.provisioner.container_id
        )

    # -- death -----------------------------------------------------------------------------

    async def _mourn(self, dead: asyncio.Future[KernelDeath]) -> None:
        death = await dead
        async with self._changing:
            await self._bury(death)

    async def _bury(self, death: KernelDeath) -> None:
        """End the cells of a kernel that is gone with the cause, and launch the next one."""
        self._ready.clear()
        lost = await self._names()
        kernel, self.kernel = self.kernel, None
        if kernel is not None:
            try:
                await kernel.drain()
            finally:
                kernel.close()
        for cell in self._feed.cells.values():
            self._ledger.notes[cell.msg_id] = {"state_preserved": False, "lost_names": lost, "death": death}
        self._ledger.append("kernel_died", **death.model_dump(), lost_names=lost)
        self._feed.abandon_all("kernel_died")
        self._failure = KernelGone(
            f"the kernel of session {self._session_id!r} died: {death.message}. restart() starts a new one"
        )
        with suppress(SandboxError):
            if self._settings.restart_on_death:
                with suppress(SandboxError):
                    await self.provisioner.remove()
                await self._relaunch(lost)

    # -- restarted by somebody else --------------------------------------------------------

    def _lost(self, kernel: Kernel) -> None:
        """The kernel let go of its sockets: it died (its container is about to), or Lab's Restart was pressed."""
        current = kernel is self.kernel and kernel is not self._rejoining
        if current and not self._changing.locked() and not self.tasks.closed:
            self._rejoining = kernel
            self._ready.clear()
            self.tasks.spawn(self._rejoin(kernel))

    async def _rejoin(self, lost_kernel: Kernel) -> None:
        lost = await self._names()
        deadline = asyncio.get_running_loop().time() + self._settings.start_timeout_s
        fresh: Kernel | None = None
        while fresh is None and self.kernel is lost_kernel and asyncio.get_running_loop().time() < deadline:
            kernel = Kernel(self.connection_info, client_session=self._client_session)
            try:
                await kernel.connect(self._feed, timeout=REJOIN_S)
                fresh = kernel
            except SandboxError:
                await asyncio.sleep(0.02)  # until the fresh kernel's sockets are there, or the mourner has the kernel
        try:
            async with self._changing:
                if self.kernel is lost_kernel and fresh is None:
                    # Nobody reaches it any more: whatever still runs in there, it is as good as dead.
                    if self._mourner is not None:
                        self._mourner.cancel()
                    await self._bury(KernelDeath(cause="unresponsive", message="the kernel closed its sockets"))
                elif self.kernel is lost_kernel and fresh is not None:
                    for cell in self._feed.cells.values():
                        self._ledger.notes[cell.msg_id] = {"state_preserved": False, "lost_names": lost}
                    lost_kernel.close()
                    self._feed.abandon_all("interrupted")
                    self.kernel, fresh = fresh, None
                    self.kernel.on_disconnected = self._lost
                    self._ledger.append("kernel_restarted", reason="by another client", lost_names=lost)
                    self._ready.set()
        finally:
            if fresh is not None:
                fresh.close()
