"""Opens a session, BIND or TMPFS: lock, record, what still lives or waits in the pool; assembly.py does the rest.

A session directory whose kernel still lives (left alive on purpose, or by a process that died) is taken over: see
:mod:`sandbox_kernel.recovery`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets as random
from contextlib import AsyncExitStack
from dataclasses import replace

from sandbox_kernel.artifacts.observer import Observer
from sandbox_kernel.assembly import OF_THE_CONTAINER, Opening, assemble, not_found
from sandbox_kernel.directory import SessionDirectory, SessionLock
from sandbox_kernel.errors import SettingsError
from sandbox_kernel.events import timestamp
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.masking import masker
from sandbox_kernel.pool import Spare
from sandbox_kernel.provisioning import orphans
from sandbox_kernel.provisioning.base import finished
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, kernel_ids
from sandbox_kernel.provisioning.survey import lock_path, survivor_of
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.recovery import log_unlogged, may_run
from sandbox_kernel.session import Session
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.tree import remove_tree
from sandbox_kernel.workspace import BindWorkspace, read_cells

log = logging.getLogger(__name__)


async def open_session(opening: Opening) -> Session:
    """The session of that id: its living kernel taken over where there is one, else a new one.

    Raises SessionNotFound (``attach_only`` and nothing lives), SessionHeld, EngineError, KernelStartError, RecordError.
    """
    async with AsyncExitStack() as stack:
        session = Session(opening.session_id, opening.settings, opening.store)
        if opening.settings.session_storage is SessionStorage.BIND:
            await _open_bind(session, opening, stack)
        else:
            await _open_tmpfs(session, opening, stack)
        session.owns(stack.pop_all())
        return session


async def _open_bind(session: Session, opening: Opening, stack: AsyncExitStack) -> None:
    settings = opening.settings
    directory = SessionDirectory(settings.sessions_root, opening.session_id)
    if opening.attach_only and not directory.metadata.exists():
        raise not_found(opening)
    directory.create(*kernel_ids())
    stack.enter_context(SessionLock(directory.lock))
    if not directory.metadata.exists() and not directory.log.exists():
        stack.callback(_discard_unopened, session, directory)
    recorder = Recorder.open(directory, durability=settings.durability)
    stack.callback(recorder.close)
    was = dict(recorder.metadata)
    alive = bool(was.get("container_id")) and not was.get("stopped_at")
    kernel_id = str(was.get("kernel_id") or "") if not was.get("stopped_at") else ""
    if alive:
        settings = session.settings = _as_started(settings, was.get("settings"))
        known = RuntimeDirectory(kernel_id).secrets() if kernel_id else {}
        opening = replace(opening, settings=settings, secrets={**known, **opening.secrets})
    elif kernel_id:
        # A process died while it started the session: no cell can have run.
        await finished(
            orphans.clear, ContainerSpec(settings, kernel_id, opening.session_id, root=settings.sessions_root)
        )
        recorder.update_metadata(stopped_at=timestamp())
    if opening.attach_only and not alive:
        raise not_found(opening)
    spare = None if alive else await _claim(opening, stack, directory)
    ledger = Ledger(opening.session_id, recorder, opening.store, masker(opening.secrets))
    if alive or kernel_id:  # a process died: what it was about to take is given back
        await asyncio.to_thread(opening.store.recover)
    log_unlogged(ledger, opening.store)
    observer = Observer(
        directory.artifacts,
        opening.store,
        opening.session_id,
        on_created=ledger.created,
        on_refused=ledger.refusals.add,
    )
    for msg_id in may_run(recorder, read_cells(directory.state_dir)) if alive else ():
        observer.cell_started(msg_id, None)
    await stack.enter_async_context(observer)
    workspace = BindWorkspace(directory, observer)
    spec = ContainerSpec(
        settings=settings,
        session_id=opening.session_id,
        kernel_id=_kernel_id(kernel_id if alive else "", spare),
        artifacts=directory.artifacts,
        state=directory.state_dir,
        root=settings.sessions_root,
    )
    living = str(was["container_id"]) if alive else None
    await assemble(session, opening, stack, recorder, ledger, workspace, spec, living, spare)


def _discard_unopened(session: Session, directory: SessionDirectory) -> None:
    """A session that could not be started the first time leaves no folder; its lock is still held."""
    if not session.opened:
        remove_tree(directory.path)


async def _open_tmpfs(session: Session, opening: Opening, stack: AsyncExitStack) -> None:
    settings = opening.settings
    stack.enter_context(SessionLock(lock_path(settings, opening.session_id)))
    survivor = await survivor_of(settings, opening.session_id)
    if opening.attach_only and (survivor is None or not survivor.alive):
        raise not_found(opening)
    alive = survivor is not None and survivor.alive
    if survivor is not None and alive:
        known = RuntimeDirectory(survivor.kernel_id, survivor.runtime).secrets()
        opening = replace(opening, secrets={**known, **opening.secrets})
    spare = None if alive else await _claim(opening, stack, None)
    recorder = NoRecorder()
    ledger = Ledger(opening.session_id, recorder, opening.store, masker(opening.secrets))
    spec = ContainerSpec(
        settings=settings,
        session_id=opening.session_id,
        kernel_id=_kernel_id(survivor.kernel_id if survivor is not None and alive else "", spare),
        root=settings.sessions_root,
    )
    living = survivor.container_id if survivor is not None and alive else None
    await assemble(session, opening, stack, recorder, ledger, None, spec, living, spare)


async def _claim(opening: Opening, stack: AsyncExitStack, directory: SessionDirectory | None) -> Spare | None:
    """A kernel out of the pool, its folders in ``directory``, on ``stack`` until it is used; None: start one."""
    if opening.secrets or (directory is not None and any(directory.artifacts.iterdir())):
        return None
    spare = opening.pool.take()
    if spare is not None:
        stack.push_async_callback(spare.close)
        if directory is not None:
            try:
                spare.furnish(directory)
            except OSError as exc:
                log.warning("session %s: its folders cannot be those of a spare (%s)", opening.session_id, exc)
                await spare.close()
                return None
    return spare


def _kernel_id(living: str, spare: Spare | None) -> str:
    return living or (spare.host.kernel_id if spare is not None else random.token_hex(6))


def _as_started(settings: Settings, recorded: object) -> Settings:
    """``settings`` with those the living container was made with, so that its successor is made with them too."""
    if not isinstance(recorded, dict):
        return settings
    known = {name: value for name, value in recorded.items() if name in OF_THE_CONTAINER}
    try:
        # Validated as a whole: a contradiction with what this manager wants (storage, data sets) keeps the manager's.
        return Settings(**(settings.model_dump() | known))
    except SettingsError:
        return settings
