"""Puts a session together: lock, record, workspace, ledger, Feed, kernel; each closed in the opposite order.

A session directory whose kernel still lives (left alive on purpose, or by a process that died) is taken over: see
:mod:`sandbox_kernel.recovery`.
"""

from __future__ import annotations

import secrets as random
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
from sandbox_kernel.errors import EngineError, SandboxError, SessionNotFound
from sandbox_kernel.events import timestamp
from sandbox_kernel.feed import Feed
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.masking import masker
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.host import KernelHost, kernel_host
from sandbox_kernel.provisioning.runtime import kernel_ids
from sandbox_kernel.provisioning.survey import lock_path, survivor_of
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.recovery import close_books, container_gone, log_unlogged
from sandbox_kernel.session import Session
from sandbox_kernel.settings import SessionStorage, Settings
from sandbox_kernel.workspace import BindWorkspace, TmpfsWorkspace, Workspace


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
    recorder = Recorder.open(directory, durability=settings.durability)
    stack.callback(recorder.close)
    was = dict(recorder.metadata)
    alive = bool(was.get("container_id")) and not was.get("stopped_at")
    if opening.attach_only and not alive:
        raise _not_found(opening)
    kernel_id = str(was.get("kernel_id") or "") if alive else ""
    ledger = Ledger(opening.session_id, recorder, opening.store, masker(opening.secrets))
    log_unlogged(ledger, opening.store)
    observer = await stack.enter_async_context(
        Observer(
            directory.artifacts, opening.store, opening.session_id, on_created=ledger.created, on_refused=ledger.refused
        )
    )
    workspace = BindWorkspace(directory, observer)
    spec = ContainerSpec(
        settings=settings,
        session_id=opening.session_id,
        kernel_id=kernel_id or random.token_hex(6),
        artifacts=directory.artifacts,
        state=directory.state_dir,
        root=settings.sessions_root,
    )
    await _wire(session, opening, stack, recorder, ledger, workspace, spec, str(was["container_id"]) if alive else None)


async def _open_tmpfs(session: Session, opening: Opening, stack: AsyncExitStack) -> None:
    settings = opening.settings
    stack.enter_context(SessionLock(lock_path(settings, opening.session_id)))
    survivor = await survivor_of(settings, opening.session_id)
    if opening.attach_only and (survivor is None or not survivor.alive):
        raise _not_found(opening)
    recorder = NoRecorder()
    ledger = Ledger(opening.session_id, recorder, opening.store, masker(opening.secrets))
    spec = ContainerSpec(
        settings=settings,
        session_id=opening.session_id,
        kernel_id=survivor.kernel_id if survivor is not None and survivor.alive else random.token_hex(6),
        root=settings.sessions_root,
    )
    await _wire(
        session, opening, stack, recorder, ledger, None, spec,
        survivor.container_id if survivor is not None and survivor.alive else None,
    )  # fmt: skip


async def _wire(
    session: Session,
    opening: Opening,
    stack: AsyncExitStack,
    recorder: Recorder | NoRecorder,
    ledger: Ledger,
    workspace: Workspace | None,
    spec: ContainerSpec,
    container_id: str | None,
) -> None:
    settings = opening.settings
    datasets = Datasets(
        settings, opening.session_id, opening.store.root, opening.fetch_dataset, on_event=partial(ledger.append)
    )
    await stack.enter_async_context(datasets)
    host = kernel_host(replace(spec, mounts=datasets.mounts(), tmpfs=datasets.tmpfs(), secrets=opening.secrets))
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
    client_session = str(recorder.metadata.get("client_session") or random.token_hex(8))
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
    stack.push_async_callback(session.end_kernel)
    if container_id is not None:
        try:
            await lifecycle.attach(container_id)
        except EngineError as exc:
            await container_gone(ledger, recorder, workspace, client_session, str(exc))
            await host.remove()
            if opening.attach_only:
                raise _not_found(opening) from exc
        else:
            recorder.append("session_reattached", container_id=host.container_id, host_port=host.host_port)
            await close_books(ledger, recorder, workspace, feed, lifecycle, client_session)
            return
    await lifecycle.launch()
    recorder.started(host.container_id, host.host_port, image=settings.image, kernel_id=host.kernel_id)


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
    }
    recorder.update_metadata(**fields, stopped_at=None, final_execution_count=None)


def _not_found(opening: Opening) -> SessionNotFound:
    return SessionNotFound(
        f"no living session {opening.session_id!r} in {opening.settings.sessions_root}; start() begins one"
    )
