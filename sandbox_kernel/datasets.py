"""The data sets of one session, as they stand at ``/data`` in its container, which cannot change them.

===========  =====================================  ==============================================================
access       BIND                                   TMPFS
===========  =====================================  ==============================================================
``LOCAL_RO``  ``datasets_path`` bound read-only      the same
``API``      a stage on the host, bound read-only;  a tmpfs that belongs to the container's root, filled by an agent
             hard links into the cache              run as root; nothing on the host's disk
``HYBRID``   stage or tmpfs as above, with links to ``datasets_path``, which is bound read-only elsewhere
===========  =====================================  ==============================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from sandbox_kernel.artifacts.agent import ByteStream
from sandbox_kernel.dataset_cache import DatasetCache, FetchDataset, check_dataset_id
from sandbox_kernel.dataset_stage import ContainerStage, HostStage, Stage
from sandbox_kernel.errors import ArtifactError, DatasetNotFound, DatasetRefused, SettingsError
from sandbox_kernel.events import Dataset
from sandbox_kernel.local_datasets import LocalDatasets
from sandbox_kernel.provisioning.container import Mount, root_hash
from sandbox_kernel.provisioning.survey import survivor_of
from sandbox_kernel.settings import DatasetAccess, SessionStorage, Settings

__all__ = ["Datasets", "FetchDataset"]

DATA = "/data"
LOCAL = "/opt/sandbox-datasets"
"""Where a HYBRID session's container has ``datasets_path``; ``/data`` links into it."""
SELECTED = "/opt/sandbox-selected"
"""Where root's agent notes what it published (see ``kernel_side/agent.py``), for a host that takes over."""

_log = logging.getLogger(__name__)


class ExecStream(Protocol):
    """A kernel host's ``exec_stream``."""

    def __call__(self, argv: list[str], *, user: str | None = None) -> Awaitable[ByteStream]: ...


class Datasets:
    """An async context manager; before it starts anything it has checked what the settings promise.

    What was fetched for a kernel that is left alive stays staged; else leaving removes the stage. The cache stays.
    """

    def __init__(
        self,
        settings: Settings,
        session_id: str,
        store_root: Path,
        fetch: FetchDataset | None,
        *,
        on_event: Callable[..., Any],
        on_progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """``on_event(name, **fields)`` writes a log line; ``on_progress(id, bytes so far)`` hears of a fetch.

        Raises SettingsError: ``datasets_path`` is no folder.
        """
        self._settings = settings
        self._session_id = session_id
        self._fetch = fetch
        self._on_event = on_event
        self._on_progress = on_progress
        self._known: dict[str, Dataset] = {}
        self._loading: dict[str, asyncio.Task[Dataset]] = {}
        self._selected: set[str] = set()
        self._restored = False
        access = settings.dataset_access
        self._local: LocalDatasets | None = None
        if access in (DatasetAccess.LOCAL_RO, DatasetAccess.HYBRID):
            if settings.datasets_path is None or not settings.datasets_path.is_dir():
                raise SettingsError(
                    f"datasets_path {str(settings.datasets_path)!r} is not a folder; "
                    f"dataset_access={access} needs one: make it or name another"
                )
            self._local = LocalDatasets(settings.datasets_path.absolute())
        cache = DatasetCache(store_root)
        name = f"{session_id}-{root_hash(settings.sessions_root)}"
        self._host_stage = HostStage(cache, cache.root.absolute() / ".sessions" / name)
        self._stage: Stage | None = None
        if access in (DatasetAccess.API, DatasetAccess.HYBRID):
            in_memory = settings.session_storage is SessionStorage.TMPFS
            self._stage = ContainerStage(cache) if in_memory else self._host_stage
        self._root: Path | str = DATA
        if settings.engine == "local":  # no container: the kernel sees the host's own folders
            self._root = settings.datasets_path or DATA if self._stage is None else self._host_stage.data

    async def __aenter__(self) -> Self:
        """Raises SettingsError: a session is to be started and there is no function to fetch with."""
        alive = await self._kernel_lives() if self._stage is not None else False
        if self._stage is not None and self._fetch is None and not alive:
            raise SettingsError(
                f"dataset_access={self._settings.dataset_access} needs a function: "
                "SessionManager(..., fetch_dataset=function)"
            )
        if self._stage is self._host_stage:
            if not alive:
                await self._host_stage.remove()  # of a process that died
            await self._host_stage.create()
            await self._mirror()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        # Whatever the access is now: a process that died may have left a stage behind.
        if self._host_stage.data.exists() and not await self._kernel_lives():
            await self._host_stage.remove()

    async def _kernel_lives(self) -> bool:
        survivor = await survivor_of(self._settings, self._session_id)
        return survivor is not None and survivor.alive

    # --- the container ------------------------------------------------------------------------

    def mounts(self) -> tuple[Mount, ...]:
        """What the container needs bound, read-only."""
        mounts = []
        if self._local is not None:
            mounts.append(Mount(self._local.root, LOCAL if self._stage is not None else DATA))
        if self._stage is self._host_stage:
            mounts.append(Mount(self._host_stage.data, DATA))
        return tuple(mounts)

    def tmpfs(self) -> dict[str, str]:
        """The tmpfs the container needs: target to options. It is the container root's, and counts as its memory."""
        if isinstance(self._stage, ContainerStage):
            # Half: a data set that is too large is to fail by itself, not to get the kernel killed.
            return {DATA: f"size={self._settings.memory_limit // 2},mode=0755", SELECTED: "size=4m,mode=0700"}
        return {}

    def connect(self, exec_stream: ExecStream) -> None:
        """How commands are run in the container; called before it starts."""
        if isinstance(self._stage, ContainerStage):
            self._stage.connect(partial(exec_stream, user="0"))

    async def launched(self, fresh: bool) -> None:
        """The container runs. ``fresh``: it is a new one, whose tmpfs is empty; what was selected is fetched again."""
        if not isinstance(self._stage, ContainerStage):
            return
        self._restored = fresh
        if fresh:
            self._stage.emptied()
            try:
                await self._mirror()
            except ArtifactError as exc:
                # The next list() or select() tries again; a session without its data sets is still one.
                _log.warning("session %s: %s", self._session_id, exc)
                self._on_event("datasets_unavailable", error=str(exc))
            for dataset_id in [known.id for known in self._known.values() if known.status == "LOADED"]:
                self._begin(dataset_id)

    # --- for the session ----------------------------------------------------------------------

    async def list(self) -> list[Dataset]:
        """The files of the local folder, and what was selected from elsewhere, by id."""
        await self._restore()
        found = dict(self._known)
        if self._local is not None:
            await self._mirror()
            for dataset_id, size in await asyncio.to_thread(self._local.files):
                found.setdefault(dataset_id, self._dataset(dataset_id, "local", "LOADED", size))
        return [found[name] for name in sorted(found)]

    async def select(self, dataset_id: str) -> Dataset:
        """The data set, staged at ``/data/<id>`` once its status is LOADED. FAILED says why in ``error``; try again.

        A local one goes before a fetched one. Calls for one id at once fetch it once; a cancelled caller does not end
        the fetch. Raises DatasetRefused (the id, or access NONE), DatasetNotFound (LOCAL_RO, and it is not there).
        """
        check_dataset_id(dataset_id)
        if self._settings.dataset_access is DatasetAccess.NONE:
            raise DatasetRefused(f"no data set {dataset_id!r} here: the session has dataset_access=NONE")
        await self._restore()
        dataset = self._known.get(dataset_id)
        if dataset is None and self._local is not None:
            size = await asyncio.to_thread(self._local.size, dataset_id)
            if size is not None:
                await self._mirror()
                dataset = self._dataset(dataset_id, "local", "LOADED", size)
        if dataset is None and self._stage is None and self._local is not None:
            names = ", ".join(name for name, _ in (await asyncio.to_thread(self._local.files))[:20])
            raise DatasetNotFound(f"no data set {dataset_id!r} in {self._local.root}; there are: {names or 'none'}")
        if dataset is None or dataset.status != "LOADED":
            if self._fetch is None:
                raise DatasetRefused(f"data set {dataset_id!r} cannot be fetched: give the manager a fetch_dataset")
            dataset = await asyncio.shield(self._begin(dataset_id))
        if dataset.status == "LOADED" and dataset_id not in self._selected:
            self._selected.add(dataset_id)
            fields = dataset.model_dump(mode="json")
            self._on_event("dataset_selected", dataset=fields, selected=sorted(self._selected))
        return dataset

    # --- fetching -----------------------------------------------------------------------------

    def _begin(self, dataset_id: str) -> asyncio.Task[Dataset]:
        if dataset_id not in self._loading:
            self._known[dataset_id] = self._dataset(dataset_id, "api", "PENDING", None)
            task = asyncio.create_task(self._load(dataset_id), name=f"data set {dataset_id}")
            self._loading[dataset_id] = task
            task.add_done_callback(lambda _: self._loading.pop(dataset_id, None))
        return self._loading[dataset_id]

    async def _load(self, dataset_id: str) -> Dataset:
        assert self._stage is not None
        assert self._fetch is not None

        def progress(size: int) -> None:
            self._known[dataset_id] = self._dataset(dataset_id, "api", "PENDING", size)
            if self._on_progress is not None:
                self._on_progress(dataset_id, size)

        try:
            size = await self._stage.load(dataset_id, self._fetch, progress)
        except Exception as exc:  # whatever the caller's function raises is the data set's failure, not the session's
            text = f"{type(exc).__name__}: {exc}"[:1000]
            _log.warning("session %s: data set %r: %s", self._session_id, dataset_id, text)
            self._known[dataset_id] = self._dataset(dataset_id, "api", "FAILED", None, text)
            self._on_event("dataset_failed", dataset=self._known[dataset_id].model_dump(mode="json"))
        except BaseException:
            self._known[dataset_id] = self._dataset(dataset_id, "api", "FAILED", None, "the session was closed")
            raise
        else:
            self._known[dataset_id] = self._dataset(dataset_id, "api", "LOADED", size)
        return self._known[dataset_id]

    async def _restore(self) -> None:
        """After a takeover: what the process before had staged."""
        if self._stage is None or self._restored:
            return
        self._restored = True
        for dataset_id, size in await self._stage.staged():
            self._known.setdefault(dataset_id, self._dataset(dataset_id, "api", "LOADED", size))
            self._selected.add(dataset_id)
        await self._mirror()

    async def _mirror(self) -> None:
        """HYBRID: links from ``/data`` to what the local folder has now."""
        if self._local is not None and self._stage is not None:
            target = Path(LOCAL) if self._settings.engine != "local" else self._local.root
            await self._stage.link(await asyncio.to_thread(self._local.links, target))

    def _dataset(
        self, dataset_id: str, source: Any, status: Any, size: int | None, error: str | None = None
    ) -> Dataset:
        path = f"{self._root}/{dataset_id}"
        return Dataset(id=dataset_id, status=status, path=path, source=source, size_bytes=size, error=error)
