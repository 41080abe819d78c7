"""Whether the books of a session balance: what its host processes noted against log, store, metadata and folders."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.cells import SHARED, CellPlan, tag_of
from sandbox_kernel.artifacts.store import ArtifactStore
from sandbox_kernel.audit import verify
from sandbox_kernel.logfile import Problem, iter_log


@dataclass
class Figures:
    """What was counted over all sessions."""

    cells: int = 0
    artifacts: int = 0
    lost: int = 0
    doubled: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def notes_of(path: Path) -> list[dict[str, Any]]:
    """The side file's lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The readable lines of a session's log."""
    if not (folder / "session.log").exists():
        return []
    return [dict(line) for line in iter_log(folder / "session.log") if not isinstance(line, Problem)]


def unwritten(folder: Path, notes: Path) -> list[str]:
    """Results that ``execute()`` returned before their line was in the log; there must be none, at any moment."""
    written = {line["msg_id"] for line in log_of(folder) if line["event"] == "code_execution"}
    return [note["returned"] for note in notes_of(notes) if "returned" in note and note["returned"] not in written]


class Books:
    """One session's."""

    def __init__(self, folder: Path, notes: Path, store: ArtifactStore) -> None:
        self.folder, self.notes, self.store = folder, notes, store
        self.plans: dict[str, CellPlan] = {}
        """By tag, all that were ever planned."""
        self._verified: set[str] = set()
        self.kernels: set[str] = set()
        self.found = Figures()

    def check(self) -> Figures:
        """Compare everything; the session is let go of and nothing runs."""
        self.found = Figures()
        log, notes = log_of(self.folder), notes_of(self.notes)
        self._chain_and_metadata()
        self._cells([line for line in log if line["event"] == "code_execution"], notes)
        self._artifacts(log)
        self.kernels |= {line["kernel_id"] for line in log if line.get("kernel_id")}
        return self.found

    def _say(self, problem: str) -> None:
        self.found.problems.append(f"{self.folder.name}: {problem}")

    def _chain_and_metadata(self) -> None:
        verdict = verify(self.folder)
        if not verdict.intact:
            self._say(f"the chain: {verdict.reason}")
        try:
            metadata = json.loads((self.folder / "session_metadata.json").read_bytes())
            self.kernels.add(metadata["kernel_id"])
            if metadata["session_id"] != self.folder.name:
                self._say("the metadata name another session")
        except (OSError, ValueError, KeyError) as exc:
            self._say(f"the metadata: {exc!r}")
        if (self.folder / ".pending").stat().st_size:
            self._say(f"cells are still pending: {(self.folder / '.pending').read_text()[:300]}")

    def _cells(self, lines: list[dict[str, Any]], notes: list[dict[str, Any]]) -> None:
        for msg_id, count in Counter(line["msg_id"] for line in lines).items():
            if count > 1:
                self.found.doubled += 1
                self._say(f"cell {msg_id} has {count} lines")
        ran = Counter(tag_of(line["code"]) for line in lines if line["status"] != "aborted")
        known = {line["msg_id"]: line for line in lines}
        accepted: dict[str, list[str]] = {}
        for note in notes:
            if "accepted" in note:
                accepted.setdefault(note["tag"], []).append(note["accepted"])
            elif "returned" in note:
                line = known.get(note["returned"])
                if line is None or line["status"] != note["status"]:
                    self._say(f"execute() returned {note}, the log says {line and line['status']}")
        for tag, msg_ids in accepted.items():
            # One that was swept out of the kernel's queue was accepted again under another id.
            if msg_ids[-1] not in known:
                self.found.lost += 1
                self._say(f"cell {tag} ({msg_ids}) was accepted and has no line")
            if ran[tag] > 1:
                self.found.doubled += 1
                self._say(f"cell {tag} ({msg_ids}) has {ran[tag]} lines")
        self.found.cells = len(accepted)
        self.found.statuses.update(line["status"] for line in lines)

    def _artifacts(self, log: list[dict[str, Any]]) -> None:
        rows = [row for line in log if line["event"] == "artifacts_created" for row in line["artifacts"]]
        kept = [artifact for artifact in self.store.list(self.folder.name) if artifact.kind == "file"]
        logged = Counter(row["id"] for row in rows)
        for artifact in kept:
            if logged[artifact.id] != 1:
                self.found.lost += logged[artifact.id] == 0
                self.found.doubled += logged[artifact.id] > 1
                self._say(f"artifact {artifact.path} v{artifact.version} stands {logged[artifact.id]} times in the log")
            if artifact.id not in self._verified:
                self._verified.add(artifact.id)
                if hashlib.sha256(self.store.read(artifact.id)).hexdigest() != artifact.sha256:
                    self._say(f"artifact {artifact.path}: its bytes are not those of its hash")
        for unknown in logged.keys() - {artifact.id for artifact in kept}:
            self._say(f"artifact {unknown} is in the log and not in the store")
        self.found.artifacts = len(kept)
        by_path: dict[str, list[str]] = {}
        for artifact in kept:
            by_path.setdefault(artifact.path, []).append(artifact.sha256)
        for line in log:
            plan = self.plans.get(tag_of(line.get("code", "")))
            if plan is None or line["event"] != "code_execution" or line["status"] != "ok":
                continue
            for path, sha256 in plan.files.items():
                if by_path.get(path) != [sha256]:
                    found = len(by_path.get(path, []))
                    self.found.lost += found == 0
                    self.found.doubled += found > 1
                    self._say(f"{path} of cell {plan.tag}: {found} versions in the store, not the one it wrote")
            if plan.kind == "shared" and hashlib.sha256(plan.tag.encode()).hexdigest() not in by_path.get(SHARED, []):
                self.found.lost += 1
                self._say(f"the version of {SHARED} that cell {plan.tag} wrote is not in the store")
        left = [entry.name for entry in (self.folder / "artifacts").iterdir()]
        if left:
            self._say(f"still in artifacts/: {left[:5]}")
