"""Many sessions: started, found again, stopped, listed; the idle ones put away, the orphaned ones cleaned up."""

from __future__ import annotations

import asyncio
import logging
import secrets as random
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.assembly import Opening
from sandbox_kernel.datasets import FetchDataset
from sandbox_kernel.directory import SessionDirectory, SessionLock, check_session_id
from sandbox_kernel.errors import SessionClosed, SessionNotFound
from sandbox_kernel.events import SessionInfo
from sandbox_kernel.gc import collect
from sandbox_kernel.masking import check_secrets
from sandbox_kernel.opening import open_session
from sandbox_kernel.pool import Pool
from sandbox_kernel.provisioning import local
from sandbox_kernel.provisioning.survey import Survivor, survivors
from sandbox_kernel.session import Session
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.snapshot import read_metadata

log = logging.getLogger(__name__)

Listing = list[SessionInfo]  # in the class, `list` is its method
Lines = list[str]

CLOSED = "the SessionManager is closed; a new one takes up what still runs"


class SessionManager:
    """Holds sessions; an async context manager.

    ``settings``: default ``Settings()``, that is environment and ``.env``. ``fetch_dataset(id)``: where data sets come
    from with ``DatasetAccess.API`` or ``HYBRID``. Leaving it stops the sessions it holds, unless
    ``Settings(stop_on_exit=False)``.
    """

    def __init__(self, settings: Settings | None = None, *, fetch_dataset: FetchDataset | None = None) -> None:
        self.settings = settings if settings is not None else Settings()
        self._fetch_dataset = fetch_dataset
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._store: ArtifactStore | None = None
        self.pool = Pool(self.settings)
        """The spare kernels of ``Settings.pool_size``; ``await manager.pool.full()`` waits until all are ready."""
        self._reaper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def sessions(self) -> dict[str, Session]:
        """The sessions this manager holds, by id."""
        return {session_id: session for session_id, session in self._sessions.items() if session.status == "running"}

    # -- life ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._check_open()
        await self._open_store()
        self.pool.fill()
        if self.settings.idle_timeout_s is not None:
            self._reaper = asyncio.create_task(self._reap(self.settings.idle_timeout_s), name="idle sessions")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the sessions (or let go of them: ``stop_on_exit=False``). Twice is once.

        Sessions that are just being started are waited for; calls after it raise SessionClosed.
        """
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            with suppress(asyncio.CancelledError):
                await self._reaper
            self._reaper = None
        for opening in list(self._opening.values()):
            async with opening:
                pass
        await self.pool.close()
        held = list(self._sessions.values())
        ends = [session.stop() if self.settings.stop_on_exit else session.detach() for session in held]
        problems = [problem for problem in await asyncio.gather(*ends, return_exceptions=True) if problem is not None]
        self._sessions.clear()
        if self._store is not None:
            store, self._store = self._store, None
            await asyncio.to_thread(store.close)
        if problems:
            raise problems[0]

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed(CLOSED)

    async def _open_store(self) -> ArtifactStore:
        if self._store is None:
            self._store = await asyncio.to_thread(
                ArtifactStore.open,
                self.settings.store_path,
                max_artifact_bytes=self.settings.max_artifact_bytes,
                max_session_bytes=self.settings.max_session_artifacts_bytes,
            )
        return self._store

    # -- sessions --------------------------------------------------------------------------

    async def start(self, session_id: str | None = None, *, secrets: Mapping[str, str] | None = None) -> Session:
        """Start a session, or return the living one of that id (held here, or left alive by another process).

        Without an id one is made. Starting a stopped id again appends to its record. ``secrets``: environment variables
        of the kernel whose values never reach a log, a state file, metadata or the engine.
        Raises InvalidSessionId, SessionHeld (another living process has it), EngineError, KernelStartError,
        SettingsError.
        """
        session_id = check_session_id(f"session-{random.token_hex(4)}" if session_id is None else session_id)
        check_secrets(secrets or {})
        return await self._opened(session_id, secrets or {}, attach_only=False)

    async def get(self, session_id: str) -> Session:
        """The living session of that id: held here, or left alive by a process that is gone.

        Raises SessionNotFound when there is none (start() begins one), SessionHeld when another process has it.
        """
        return await self._opened(check_session_id(session_id), {}, attach_only=True)

    async def _opened(self, session_id: str, secrets: Mapping[str, str], *, attach_only: bool) -> Session:
        async with self._opening.setdefault(session_id, asyncio.Lock()):
            self._check_open()
            held = self._held(session_id)
            if held is not None:
                return held
            if session_id in self._sessions:
                with suppress(Exception):  # who stops it is told; it has its lock until then
                    await self._sessions[session_id].stop()
            session = await open_session(await self._how(session_id, secrets, attach_only=attach_only))
            self._sessions[session_id] = session
            return session

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.id) is session:
            del self._sessions[session.id]

    def _held(self, session_id: str) -> Session | None:
        session = self._sessions.get(session_id)
        return session if session is not None and session.status == "running" else None

    async def _how(self, session_id: str, secrets: Mapping[str, str], *, attach_only: bool) -> Opening:
        return Opening(
            session_id=session_id,
            settings=self.settings,
            store=await self._open_store(),
            fetch_dataset=self._fetch_dataset,
            secrets=dict(secrets),
            attach_only=attach_only,
            pool=self.pool,
        )

    async def stop(self, session_id: str) -> None:
        """Stop a session: its kernel ends, its record is closed. One left alive by another process is taken over first.

        Raises SessionNotFound for an id nobody knows; one that is stopped already is done.
        """
        check_session_id(session_id)
        session = self._held(session_id)
        if session is None:
            try:
                session = await self.get(session_id)
            except SessionNotFound:
                if (self.settings.sessions_root / session_id / "session_metadata.json").exists():
                    return
                raise
        await session.stop()
        self._forget(session)

    async def list(self) -> Listing:
        """Every session that is alive or recorded in ``sessions_root``, by id."""
        self._check_open()
        alive = {found.session_id: found for found in await survivors(self.settings)}
        return await asyncio.to_thread(self._list, alive)

    def _list(self, alive: dict[str, Survivor]) -> Listing:
        root = self.settings.sessions_root
        recorded = {
            entry.name: read_metadata(entry)[0] or {}
            for entry in (root.iterdir() if root.is_dir() else ())
            if not entry.name.startswith(".") and (entry / "session_metadata.json").exists()
        }
        infos = []
        for session_id in sorted({*recorded, *alive}):
            metadata, survivor = recorded.get(session_id, {}), alive.get(session_id)
            infos.append(
                SessionInfo(
                    session_id=session_id,
                    status=self._status(session_id, metadata, survivor),
                    created_at=_when(metadata.get("created_at")),
                    last_used=_when(metadata.get("last_used")),
                    execution_count=_count(metadata.get("execution_count")),
                    container_id=survivor.container_id if survivor is not None else _text(metadata.get("container_id")),
                    session_storage=_text(metadata.get("session_storage")) or SessionStorage.TMPFS,
                    image=survivor.image if survivor is not None else _text(metadata.get("image")) or "",
                )
            )
        return infos

    def _status(self, session_id: str, metadata: dict[str, Any], survivor: Survivor | None) -> Any:
        if self._held(session_id) is not None:
            return "running"
        on_host = metadata.get("engine") == "local" and local.lives(str(metadata.get("container_id")))
        if on_host or (survivor is not None and survivor.alive):
            lock = SessionDirectory(self.settings.sessions_root, session_id).lock
            held = SessionLock.holder(lock if metadata or survivor is None else survivor.lock)
            return "running" if held is not None else "detached"
        return "stopped" if metadata.get("stopped_at") else "dead"

    # -- housekeeping ----------------------------------------------------------------------

    async def gc(self, *, all: bool = False) -> Lines:
        """Remove what nobody holds any more: containers, networks, runtime folders, temporary files of ours.

        Sessions that a process left alive on purpose (``stop_on_exit=False``) are stopped only with ``all``.
        Returns a line for each thing that was removed.
        """
        self._check_open()
        return await collect(self, everything=all)

    async def _reap(self, idle_s: float) -> None:
        """Stop sessions that nobody has used for ``idle_timeout_s``."""
        loop = asyncio.get_running_loop()
        while True:
            for session in self.sessions.values():
                # Asked when its turn has come: stopping the one before took a while.
                if session.status == "running" and not session.busy and loop.time() - session.last_used >= idle_s:
                    try:
                        await session.stop(reason="idle")
                    except Exception as exc:  # the others are stopped all the same
                        log.warning("session %s, which is idle, cannot be stopped: %s", session.id, exc)
                    self._forget(session)
            ages = [idle_s - (loop.time() - session.last_used) for session in self.sessions.values()]
            await asyncio.sleep(max(0.05, min([idle_s, *ages])))


def _when(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
