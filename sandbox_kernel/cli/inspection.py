"""``doctor --sessions``: session folders and artifact store, each against itself and against the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sandbox_kernel.artifacts.checking import logged_artifacts
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.audit import verify
from sandbox_kernel.directory import SessionDirectory, SessionLock
from sandbox_kernel.errors import InvalidSessionId, SandboxError, SessionHeld
from sandbox_kernel.logfile import Problem, iter_log
from sandbox_kernel.record import Recorder
from sandbox_kernel.settings import Settings
from sandbox_kernel.snapshot import read_metadata, read_state


class Finding(NamedTuple):
    """Something that does not add up: where, what, and whether it is mended now."""

    where: str
    problem: str
    mended: bool


def inspect(settings: Settings, *, repair: bool) -> Iterator[Finding]:
    """Everything amiss in ``sessions_root`` and in the store. Reads every log and every blob. Blocking."""
    root = settings.sessions_root
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            yield from _session(root, folder, repair)
    if settings.store_path.is_dir():
        with ArtifactStore.open(settings.store_path) as store:
            yield from _listed(root, store, repair)
            for problem in store.check(repair=repair):
                yield Finding(problem.where, problem.what, problem.repaired)


def _session(root: Path, folder: Path, repair: bool) -> Iterator[Finding]:
    try:
        directory = SessionDirectory(root, folder.name)
    except InvalidSessionId as exc:
        yield Finding(str(folder), f"no session of ours: {exc}", False)
        return
    metadata, problem = read_metadata(folder)
    if metadata is None:
        where, what = directory.metadata, "is missing" if problem is None else problem.message
        yield Finding(str(where), what, repair and _rebuilt(directory))
    _, problem = read_state(folder)
    if problem is not None:
        yield Finding(str(directory.state_link), f"{problem.message}; the next cell writes it anew", False)
    if not directory.log.exists():
        return
    for entry in iter_log(directory.log):
        if isinstance(entry, Problem):
            yield Finding(str(folder / entry.where), entry.message, False)
    try:
        verdict = verify(folder)
    except SandboxError as exc:
        yield Finding(str(directory.log), str(exc), False)
    else:
        if verdict.intact is False:
            yield Finding(str(directory.log), f"the audit chain is broken: {verdict.reason}", False)


def _rebuilt(directory: SessionDirectory) -> bool:
    """Make the metadata anew from the log, as starting the session would; not while somebody holds it."""
    try:
        with SessionLock(directory.lock):
            Recorder.open(directory).close()
    except SessionHeld:
        return False
    return True


def _listed(root: Path, store: ArtifactStore, repair: bool) -> Iterator[Finding]:
    """Artifacts that a log names and the catalog does not know."""
    known = {artifact.id for artifact in store.list()}
    for artifacts, _ in logged_artifacts(root):
        for artifact in artifacts:
            if artifact.id not in known:
                known.add(artifact.id)
                mended = repair and store.catalog.restore([artifact]) == 1
                where = f"{root / artifact.session_id / 'session.log'}: {artifact.id}"
                yield Finding(where, f"the artifact store does not list {artifact.path}", mended)
