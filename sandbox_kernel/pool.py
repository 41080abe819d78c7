"""Spare kernels, started and connected before anybody asks: claiming one takes milliseconds, and it has one tenant.

A spare is made exactly like a session's kernel, limits and mounts included. Its folders lie in
``sessions_root/.pool/<kernel id>/``, laid out like a session's, and are renamed when it is claimed: the bind mounts of
the running container follow. Until then it belongs to this process (the label ``OWNER``, the folder's ``.lock``), so
that ``gc`` can tell the spares of a process that was killed.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import secrets as random
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sandbox_kernel.datasets import Datasets
from sandbox_kernel.directory import SessionDirectory, SessionLock
from sandbox_kernel.errors import KernelStartError, SandboxError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.kernel import Kernel
from sandbox_kernel.launched import answered
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.orphans import OWNER
from sandbox_kernel.provisioning.process import process_identity
from sandbox_kernel.provisioning.runtime import kernel_ids
from sandbox_kernel.settings import DatasetAccess, SessionStorage, Settings
from sandbox_kernel.tree import remove_tree

log = logging.getLogger(__name__)

FOLDER = ".pool"
"""Below ``sessions_root``."""
REFILL_AFTER_S = 0.25
"""A container's start takes the cores that the first cell of the session that has just claimed a spare is to have."""
NOT_IMPORTED = "'; '.join(map(': '.join, __import__('sys').modules['_sandbox_kernel_side'].not_imported.items()))"
"""What of ``pool_imports`` could not be imported, and why: asked of a spare before it has a tenant."""
_POOLED = (DatasetAccess.NONE, DatasetAccess.LOCAL_RO)
"""How all sessions have the same mounts."""


class Spare:
    """A kernel that waits for its session."""

    def __init__(
        self,
        host: DockerProvisioner,
        kernel: Kernel,
        client_session: str,
        dead: asyncio.Future[KernelDeath],
        folder: SpareFolder | None,
    ) -> None:
        """``client_session``: of the messages on ``kernel``'s connection; ``folder``: None for TMPFS."""
        self.host, self.kernel, self.client_session, self.dead = host, kernel, client_session, dead
        self._folder = folder
        self._taken = False

    @property
    def info(self) -> Mapping[str, Any]:
        """The client's connection info."""
        return self.host.connection_info

    def furnish(self, directory: SessionDirectory) -> None:
        """Give the session the folders that the container has mounted. Raises OSError when it has artifacts already."""
        assert self._folder is not None
        self._folder.move_to(directory)

    async def hand_over(self, spec: ContainerSpec) -> None:
        """From now on it is the kernel of ``spec``'s session, which has the connection and ``dead`` already."""
        self.host.assign(spec)
        self._taken = True
        await self._tidy()

    async def _tidy(self) -> None:
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)

    async def close(self) -> None:
        """Remove it, unless it was handed over. Twice is once."""
        if self._taken:
            return
        self._taken = True
        self.dead.cancel()
        self.kernel.close()
        try:
            await self.host.remove()
        finally:
            await self._tidy()


class SpareFolder:
    """A spare's folders on the host, held by this process."""

    def __init__(self, root: Path, kernel_id: str) -> None:
        self.directory = SessionDirectory(root / FOLDER, kernel_id)
        self.directory.create(*kernel_ids())
        self._lock = SessionLock(self.directory.lock)
        self._lock.acquire()

    def move_to(self, session: SessionDirectory) -> None:
        self.directory.artifacts.rename(session.artifacts)  # succeeds only over an empty folder
        # What a kernel before left in state/ tells of variables that are gone.
        session.state_dir.rename(self.directory.path / "state-before")
        self.directory.state_dir.rename(session.state_dir)

    def remove(self) -> None:
        remove_tree(self.directory.path)
        self._lock.release()


class Pool:
    """``settings.pool_size`` spares, made one after the other in the background; closed by :meth:`close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spares: deque[Spare] = deque()
        self._maker: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._complained = False

    def __len__(self) -> int:
        """How many are ready."""
        return sum(not spare.dead.done() for spare in self._spares)

    @property
    def pools(self) -> bool:
        """Whether sessions of these settings can have a spare at all."""
        settings = self._settings
        return settings.pool_size > 0 and settings.engine == "docker" and settings.dataset_access in _POOLED

    def take(self) -> Spare | None:
        """The spare that is ready for longest, the caller's from now on; None when there is none: start cold."""
        taken: Spare | None = None
        while self._spares and taken is None:
            spare = self._spares.popleft()
            if spare.dead.done():
                self._spawn(spare.close())
            else:
                taken = spare
        self.fill(REFILL_AFTER_S)
        return taken

    def fill(self, after_s: float = 0.0) -> None:
        """Begin to make what is missing in ``after_s`` seconds. After a failure the next :meth:`take` tries again."""
        if self.pools and not self._closed and (self._maker is None or self._maker.done()):
            self._maker = asyncio.create_task(self._fill(after_s), name="pool")

    async def full(self) -> None:
        """Return when all spares are ready, or making them has failed."""
        self.fill()
        while self._maker is not None and not self._maker.done():
            await asyncio.wait({self._maker})

    async def _fill(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while len(self) < self._settings.pool_size:
            try:
                self._spares.append(await self._make())
            except (SandboxError, OSError) as exc:
                log.warning("no spare kernel for the pool: %s", exc)
                return

    async def _make(self) -> Spare:
        settings, kernel_id = self._settings, random.token_hex(6)
        async with AsyncExitStack() as undo:
            folder: SpareFolder | None = None
            if settings.session_storage is SessionStorage.BIND:
                folder = SpareFolder(settings.sessions_root, kernel_id)
                undo.push_async_callback(asyncio.to_thread, folder.remove)
            datasets = Datasets(settings, kernel_id, settings.store_path, None, on_event=_unheard)
            host = DockerProvisioner(
                kernel_id=kernel_id,
                spec=ContainerSpec(
                    settings=settings,
                    kernel_id=kernel_id,
                    artifacts=None if folder is None else folder.directory.artifacts,
                    state=None if folder is None else folder.directory.state_dir,
                    mounts=datasets.mounts(),
                    labels={OWNER: process_identity(os.getpid()) or ""},
                    root=settings.sessions_root,
                ),
            )
            undo.push_async_callback(host.remove)
            client_session = random.token_hex(8)
            kernel = Kernel(await host.launch(), client_session=client_session)
            dead = await answered(host, kernel, None, timeout=settings.start_timeout_s)
            undo.callback(kernel.close)
            undo.callback(dead.cancel)
            await self._warmed(kernel, dead)
            undo.pop_all()
            return Spare(host, kernel, client_session, dead, folder)

    async def _warmed(self, kernel: Kernel, dead: asyncio.Future[KernelDeath]) -> None:
        """Run a kernel's first cell, which takes several times as long as the next; a silent one is no session's."""
        asked = {"not_imported": NOT_IMPORTED} if self._settings.pool_imports else {}
        content = {"code": "None", "silent": True, "store_history": False, "user_expressions": asked}
        answer = asyncio.ensure_future(kernel.request("shell", "execute_request", content))
        try:
            limit = self._settings.start_timeout_s
            await asyncio.wait((answer, dead), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                why = f"it died: {dead.result().message}" if dead.done() else f"it ran nothing within {limit:g} s"
                raise KernelStartError(f"a spare kernel is of no use: {why}")
            reply = await answer
        finally:
            answer.cancel()
        self._complain(reply["content"].get("user_expressions"))

    def _complain(self, answers: Any) -> None:
        """Say once which of the modules that the spares were to have imported they have not."""
        try:
            told = ast.literal_eval(answers["not_imported"]["data"]["text/plain"][:2_000])
        except (
            LookupError,
            TypeError,
            ValueError,
            SyntaxError,
            MemoryError,
            RecursionError,
        ):  # none asked for, or no answer of ours
            return
        if told and not self._complained:
            self._complained = True
            log.warning(
                "pool_imports: the image %r cannot import %s; its kernels do without", self._settings.image, told
            )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="pool")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Remove the spares and make no more."""
        self._closed = True
        if self._maker is not None:
            self._maker.cancel()
            await asyncio.wait({self._maker})
        spares, self._spares = list(self._spares), deque()
        ends = await asyncio.gather(*(spare.close() for spare in spares), *self._tasks, return_exceptions=True)
        for problem in ends:
            if isinstance(problem, BaseException):
                log.warning("a spare kernel may be left behind, gc removes it: %s", problem)


def _unheard(event: str, /, **fields: Any) -> None:
    """A spare has no log."""
