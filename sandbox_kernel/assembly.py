"""Puts a session together: lock, record, workspace, ledger, Feed, kernel; each closed in the opposite order.

A session directory whose kernel still lives (left alive on purpose, or by a process that died) is taken over: see
:mod:`sandbox_kernel.recovery`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets as random
import shutil
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sandbox_kernel.artifacts.agent import Agent
from sandbox_kernel.artifacts.observer import Observer
from sandbox_kernel.artifacts.remote import RemoteSpool, export_file
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.datasets import Datasets, FetchDataset
from sandbox_kernel.directory import SessionDirectory, SessionLock
from sandbox_kernel.errors import (
    ConnectionFileError,
    ContainerConflict,
    EngineError,
    EngineUnavailable,
    KernelStartError,
    SandboxError,
    SessionNotFound,
    SettingsError,
)
from sandbox_kernel.events import timestamp
from sandbox_kernel.feed import Feed
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.masking import masker
from sandbox_kernel.pool import Pool, Spare
from sandbox_kernel.provisioning import orphans
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.host import KernelHost, kernel_host
from sandbox_kernel.provisioning.runtime import RuntimeDirectory, kernel_ids
from sandbox_kernel.provisioning.survey import lock_path, survivor_of
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.recovery import Takeover, log_unlogged, may_run
from sandbox_kernel.session import Session
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.traffic import TrafficLog
from sandbox_kernel.workspace import BindWorkspace, TmpfsWorkspace, Workspace, read_cells

log = logging.getLogger(__name__)

CONFLICTS = 20
"""Attempts to get a container's name, each a few engine requests long."""

OF_THE_CONTAINER = (
    "image", "transport", "network", "runtime", "memory_limit", "cpus", "pids_limit", "tmpfs_size", "pool_imports",
    "mask_secrets",
)  # fmt: skip
"""Settings that a container keeps for life; recorded, so that a process that takes the session over knows them."""


@dataclass(frozen=True)
class Opening:
    """What a session is opened with."""

    session_id: str
    settings: Settings
    store: ArtifactStore
    fetch_dataset: FetchDataset | None
    secrets: Mapping[str, str]
    attach_only: bool
    """Take over what lives, and start nothing."""
    pool: Pool


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
        raise _not_found(opening)
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
        await asyncio.to_thread(
            orphans.clear, ContainerSpec(settings, kernel_id, opening.session_id, root=settings.sessions_root)
        )
        recorder.update_metadata(stopped_at=timestamp())
    if opening.attach_only and not alive:
        raise _not_found(opening)
    spare = None if alive else await _claim(opening, stack, directory)
    ledger = Ledger(opening.session_id, recorder, opening.store, masker(opening.secrets))
    if alive:
        await asyncio.to_thread(opening.store.recover)
    log_unlogged(ledger, opening.store)
    observer = Observer(
        directory.artifacts, opening.store, opening.session_id, on_created=ledger.created, on_refused=ledger.refused
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
    await _wire(session, opening, stack, recorder, ledger, workspace, spec, living, spare)


def _discard_unopened(session: Session, directory: SessionDirectory) -> None:
    """A session that could not be started the first time leaves no folder; its lock is still held."""
    if not session.opened:
        shutil.rmtree(directory.path, ignore_errors=True)


async def _open_tmpfs(session: Session, opening: Opening, stack: AsyncExitStack) -> None:
    settings = opening.settings
    stack.enter_context(SessionLock(lock_path(settings, opening.session_id)))
    survivor = await survivor_of(settings, opening.session_id)
    if opening.attach_only and (survivor is None or not survivor.alive):
        raise _not_found(opening)
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
    await _wire(session, opening, stack, recorder, ledger, None, spec, living, spare)


async def _claim(opening: Opening, stack: AsyncExitStack, directory: SessionDirectory | None) -> Spare | None:
    """A kernel out of the pool, its folders in ``directory``, on ``stack`` until it is used; None: start one."""
    if opening.secrets or (directory is not None and any(directory.artifacts.iterdir())):
        return None
    spare = opening.pool.take()
    if spare is not None:
        await stack.enter_async_context(spare)
        if directory is not None:
            try:
                spare.furnish(directory)
            except OSError as exc:
                log.warning("session %s: its folders cannot be those of a spare (%s)", opening.session_id, exc)
                return None
    return spare


def _kernel_id(living: str, spare: Spare | None) -> str:
    return living or (spare.host.kernel_id if spare is not None else random.token_hex(6))


async def _wire(
    session: Session,
    opening: Opening,
    stack: AsyncExitStack,
    recorder: Recorder | NoRecorder,
    ledger: Ledger,
    workspace: Workspace | None,
    spec: ContainerSpec,
    container_id: str | None,
    spare: Spare | None,
) -> None:
    settings = opening.settings
    datasets = Datasets(
        settings, opening.session_id, opening.store.root, opening.fetch_dataset, on_event=partial(ledger.append)
    )
    await stack.enter_async_context(datasets)
    spec = replace(spec, mounts=datasets.mounts(), tmpfs=datasets.tmpfs(), secrets=opening.secrets)
    host = kernel_host(spec) if spare is None else spare.host
    spool: RemoteSpool | None = None
    if workspace is None:
        spool = await stack.enter_async_context(
            RemoteSpool(
                host.exec_stream,
                opening.store,
                opening.session_id,
                on_created=ledger.created,
                on_refused=ledger.refused,
            )
        )
        workspace = TmpfsWorkspace(spool)
    datasets.connect(host.exec_stream)
    exporter = Agent(host.exec_stream)
    stack.push_async_callback(exporter.close)
    ledger.watch = workspace.watch
    log_path = None if workspace.path is None else workspace.path / "session.log"
    host.traffic = traffic = TrafficLog(ledger, log_path, masker(opening.secrets))
    client_session = str(recorder.metadata.get("client_session") or random.token_hex(8))
    if spare is not None:
        client_session = spare.client_session
    feed = Feed(
        client_session,
        limit=settings.max_output_bytes,
        spool_dir=opening.store.root / "tmp",
        on_started=ledger.started,
        on_finished=ledger.finished,
        on_late=ledger.late,
    )
    lifecycle = Lifecycle(
        opening.session_id,
        settings,
        host,
        feed,
        ledger,
        client_session=client_session,
        known_names=partial(_known_names, workspace),
        on_launched=partial(_launched, opening, recorder, host, client_session, datasets, spool),
    )
    session.wire(
        recorder=recorder,
        ledger=ledger,
        feed=feed,
        lifecycle=lifecycle,
        workspace=workspace,
        datasets=datasets,
        exporter=partial(export_file, exporter, opening.store, opening.session_id),
    )
    stack.push_async_callback(session.last_lines)
    await stack.enter_async_context(ledger)
    stack.callback(traffic.flush)
    stack.push_async_callback(session.end_kernel)
    takeover = Takeover(ledger, recorder, workspace, feed, client_session)
    if container_id is not None:
        if await _attached(session, lifecycle, host, spec, container_id, takeover):
            recorder.append("session_reattached", container_id=host.container_id, host_port=host.host_port)
            await takeover.join(lifecycle)
            return
        if opening.attach_only:
            raise _not_found(opening)
    elif recorder.pending():
        await takeover.bury(None)
    # What a death from here on leaves is found by this.
    recorder.update_metadata(
        kernel_id=spec.kernel_id, client_session=client_session, container_id=None, stopped_at=None
    )
    if spare is None:
        workspace.forget_journal()
        await _launch(lifecycle, spec)
    else:
        spare.host.assign(spec)  # before the metadata name it: a spare whose process has died is anybody's to sweep
        await lifecycle.adopt(spare.kernel, spare.info, spare.dead)
        await spare.hand_over(spec)
        lifecycle.spawn(_rename(spare.host))
    recorder.started(host.container_id, host.host_port, image=settings.image, kernel_id=host.kernel_id)


async def _attached(
    session: Session,
    lifecycle: Lifecycle,
    host: KernelHost,
    spec: ContainerSpec,
    container_id: str,
    takeover: Takeover,
) -> bool:
    """Take the living kernel over; False: there is none any more, its books are closed and its remains removed."""
    session.spare_kernel(True)  # an attempt that is given up must not end it
    try:
        await lifecycle.attach(container_id)
    except EngineUnavailable:
        raise
    except (EngineError, KernelStartError, ConnectionFileError) as exc:
        session.spare_kernel(False)
        death = await asyncio.to_thread(orphans.last_words, spec, container_id, str(exc))
        await host.remove()
        await asyncio.to_thread(orphans.clear, spec)
        await takeover.bury(death)
        session.opened = True  # by the process that died: unless a kernel is launched, it has stopped now
        return False
    session.spare_kernel(False)
    return True


async def _launch(lifecycle: Lifecycle, spec: ContainerSpec) -> None:
    """Launch; the engine may still be busy with what a dead process asked of it under this name."""
    for _ in range(CONFLICTS):
        try:
            return await lifecycle.launch()
        except ContainerConflict:
            await asyncio.to_thread(orphans.clear, spec)
    return await lifecycle.launch()


async def _rename(host: DockerProvisioner) -> None:
    """The container's name is for people: a session goes on without it."""
    try:
        await host.rename()
    except EngineError as exc:
        log.info("a spare's container keeps its name: %s", exc)


async def _known_names(workspace: Workspace) -> list[str]:
    try:
        return sorted((await workspace.read_state()).variables)
    except SandboxError:
        return []


async def _launched(
    opening: Opening,
    recorder: Recorder | NoRecorder,
    host: KernelHost,
    client_session: str,
    datasets: Datasets,
    spool: RemoteSpool | None,
    fresh: bool,
) -> None:
    """A kernel has just answered: its metadata, and what the container's own files need."""
    await datasets.launched(fresh)
    if spool is not None:
        spool.launched()
    settings, now = opening.settings, timestamp()
    fields: dict[str, Any] = {
        "session_id": opening.session_id,
        "created_at": recorder.metadata.get("created_at") or now,
        "last_used": now,
        "container_id": host.container_id,
        "host_port": host.host_port,
        "session_storage": settings.session_storage.value,
        "dataset_access": settings.dataset_access.value,
        "image": settings.image,
        "execution_count": recorder.metadata.get("execution_count") or 0,
        "kernel_id": host.kernel_id,
        "client_session": client_session,
        "engine": settings.engine,
        "kept_alive": not settings.stop_on_exit,
        "settings": settings.model_dump(mode="json", include=set(OF_THE_CONTAINER)),
    }
    recorder.update_metadata(**fields, stopped_at=None, final_execution_count=None)


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


def _not_found(opening: Opening) -> SessionNotFound:
    return SessionNotFound(
        f"no living session {opening.session_id!r} in {opening.settings.sessions_root}; start() begins one"
    )
