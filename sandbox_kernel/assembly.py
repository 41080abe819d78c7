"""Puts a session together that has its lock, record and workspace: data sets, Feed, kernel, and the session's face.

What stands on the stack is closed in the opposite order. A kernel that still lives is taken over: see
:mod:`sandbox_kernel.recovery`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets as random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sandbox_kernel.artifacts.agent import Agent
from sandbox_kernel.artifacts.fetching import export_file
from sandbox_kernel.artifacts.remote import RemoteSpool
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.datasets import Datasets, FetchDataset
from sandbox_kernel.errors import (
    ConnectionFileError,
    ContainerConflict,
    EngineError,
    EngineUnavailable,
    KernelStartError,
    SandboxError,
    SessionNotFound,
)
from sandbox_kernel.events import timestamp
from sandbox_kernel.feed import Feed
from sandbox_kernel.ledger import Ledger
from sandbox_kernel.lifecycle import Lifecycle
from sandbox_kernel.masking import masker
from sandbox_kernel.pool import Pool, Spare
from sandbox_kernel.provisioning import orphans
from sandbox_kernel.provisioning.base import finished
from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.host import KernelHost, kernel_host
from sandbox_kernel.record import NoRecorder, Recorder
from sandbox_kernel.recovery import Takeover
from sandbox_kernel.session import Session
from sandbox_kernel.settings import Settings
from sandbox_kernel.traffic import TrafficLog
from sandbox_kernel.workspace import TmpfsWorkspace, Workspace, known_names

log = logging.getLogger(__name__)

CONFLICTS = 20
"""Attempts to get a container's name, each a few engine requests long."""

NAMES_S = 2.0
"""Longest wait for the names that a kernel to be replaced had: its container may answer as slowly as it likes."""

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
    secrets: Mapping[str, str] = field(repr=False)
    attach_only: bool
    """Take over what lives, and start nothing."""
    pool: Pool


async def assemble(
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
    """Give ``session`` its parts and a kernel: the living ``container_id``, ``spare``, or else one that is launched.

    ``workspace``: None where it lies in the container (TMPFS).
    """
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
                on_refused=ledger.refusals.add,
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
        on_late=ledger.late.add,
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
            raise not_found(opening)
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
        lifecycle.tasks.spawn(_rename(spare.host))
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
        death = await asyncio.to_thread(orphans.last_words, spec, container_id, str(exc))
        if isinstance(exc, EngineError) and death.cause == "unresponsive":
            raise  # the engine failed, not the kernel: it may live, with all its variables
        session.spare_kernel(False)
        await host.remove()
        await finished(orphans.clear, spec)
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
            await finished(orphans.clear, spec)
    return await lifecycle.launch()


async def _rename(host: DockerProvisioner) -> None:
    """The container's name is for people: a session goes on without it."""
    try:
        await host.rename()
    except EngineError as exc:
        log.info("a spare's container keeps its name: %s", exc)


async def _known_names(workspace: Workspace) -> list[str]:
    try:
        async with asyncio.timeout(NAMES_S):
            return await known_names(workspace)
    except (SandboxError, TimeoutError):
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


def not_found(opening: Opening) -> SessionNotFound:
    return SessionNotFound(
        f"no living session {opening.session_id!r} in {opening.settings.sessions_root}; start() begins one"
    )
