"""The records that travel: what a cell says while it runs, what it leaves, what died and why.

Imports nothing of ours. All models are frozen and JSON-serialisable (``model_dump(mode="json")``).

Output objects are nbformat 4 dictionaries (https://nbformat.readthedocs.io/en/latest/format_description.html#code-cell-outputs);
message names are those of the Jupyter protocol (https://jupyter-client.readthedocs.io/en/stable/messaging.html).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "error", "timeout", "interrupted", "aborted", "kernel_died", "unknown"]
"""How a cell ended; ``unknown``: nobody saw its end."""

BLOB_MIME = "application/vnd.sandbox-kernel.blob+json"
"""In the log a picture's base64 is replaced by ``{BLOB_MIME: {"sha256", "size_bytes", "mime"}}``: still nbformat."""

STR_LIMIT = 60_000
"""``str(result)`` stays below 64 kB of UTF-8 whatever the cell printed."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")


def utc_now() -> datetime:
    """The current time, in UTC with its offset."""
    return datetime.now(UTC)


def timestamp() -> str:
    """The current time as the log writes it: ISO 8601, UTC, with the offset."""
    return datetime.now(UTC).isoformat()


def strip_ansi(text: str) -> str:
    """``text`` without ANSI escape sequences (ECMA-48 CSI, OSC and two-byte escapes)."""
    return _ANSI.sub("", text)


class Record(BaseModel):
    """Base of the records: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CellError(Record):
    """An exception that ended a cell."""

    name: str
    """The exception's class name, e.g. ``ZeroDivisionError``."""
    value: str
    traceback: str
    """The whole traceback as text, chained causes included, without ANSI codes."""


class Artifact(Record):
    """One version of one file that a session made, as the store knows it."""

    id: str
    """``art_`` and 16 hex digits."""
    filename: str
    """The base name."""
    path: str
    """The path below ``artifacts/`` (POSIX separators)."""
    size_bytes: int
    sha256: str
    content_type: str
    session_id: str
    execution_count: int | None = None
    """The cell that wrote it, where that is known."""
    msg_id: str | None = None
    version: int = 1
    """1 for the first file of this path in this session, then 2, 3, ..."""
    kind: Literal["file", "output", "export"] = "file"
    """``file``: found in ``artifacts/``; ``output``: the whole of an output cut in the log; ``export``: asked for."""
    created_at: datetime

    @classmethod
    def made(cls, **fields: Any) -> Artifact:
        """From all its fields, each of them ours: unchecked. One of very many costs a ninth of the time, and a third of
        the memory, for they share the set of the fields' names."""
        artifact = cls.__new__(cls)
        # What `model_construct` does, without its loop over the fields.
        for name, value in (("__dict__", fields), ("__pydantic_fields_set__", _ARTIFACT_FIELDS), *_NOTHING_MORE):
            object.__setattr__(artifact, name, value)
        return artifact


_ARTIFACT_FIELDS = set(Artifact.model_fields)
_NOTHING_MORE = (("__pydantic_extra__", None), ("__pydantic_private__", None))


class KernelDeath(Record):
    """Why a kernel is gone."""

    cause: Literal["oom", "exit", "signal", "removed", "unresponsive", "unknown"]
    message: str
    """One sentence for a person, e.g. ``killed by the memory limit (2g)``."""
    exit_code: int | None = None
    signal: str | None = None
    """``SIGSEGV``, ..."""


# --- what a running cell says -----------------------------------------------------------------


class CellEvent(Record):
    """Base of what :meth:`Session.stream` yields; ``msg_id`` names the execute request."""

    msg_id: str


class Stdout(CellEvent):
    type: Literal["stdout"] = "stdout"
    text: str


class Stderr(CellEvent):
    type: Literal["stderr"] = "stderr"
    text: str


class DisplayData(CellEvent):
    """``display(...)``; with ``update`` it replaces the earlier one of the same ``display_id``."""

    type: Literal["display_data"] = "display_data"
    data: dict[str, Any]
    """MIME bundle; binary types are base64 text."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    display_id: str | None = None
    update: bool = False


class ClearOutput(CellEvent):
    type: Literal["clear_output"] = "clear_output"
    wait: bool = False


class ResultData(CellEvent):
    """The value of the last expression."""

    type: Literal["result"] = "result"
    data: dict[str, Any]
    metadata: dict[str, Any] = Field(default_factory=dict)
    execution_count: int | None = None

    @property
    def text(self) -> str:
        return str(self.data.get("text/plain", ""))


class ErrorData(CellEvent):
    type: Literal["error"] = "error"
    error: CellError


class ArtifactCreated(CellEvent):
    type: Literal["artifact"] = "artifact"
    artifact: Artifact


class ExecutionResult(Record):
    """A finished cell. Never an exception: ``status`` says how it ended."""

    session_id: str
    msg_id: str
    code: str
    status: Status
    origin: str
    """Which client ran it: ``sandbox-kernel`` for :meth:`Session.execute`, else the kind of client and its session,
    e.g. ``jupyterlab:1a2b3c4d``."""
    stdout: str = ""
    stderr: str = ""
    outputs: list[dict[str, Any]] = Field(default_factory=list)
    """nbformat output objects."""
    result: str | None = None
    """``text/plain`` of the last expression."""
    error: CellError | None = None
    execution_count: int | None = None
    started_at: datetime
    duration_s: float = 0.0
    artifacts: list[Artifact] = Field(default_factory=list)
    truncated: bool = False
    """Output passed ``max_output_bytes``: the middle is left out here, the whole is in ``output_artifacts``."""
    output_artifacts: list[Artifact] = Field(default_factory=list)
    state_preserved: bool = True
    """False when the kernel had to be restarted: the variables are gone."""
    lost_names: list[str] = Field(default_factory=list)
    """The variables that the last known state had and that a restart lost."""
    death: KernelDeath | None = None

    @property
    def success(self) -> bool:
        """True when the cell ran to its end without an exception."""
        return self.status == "ok"

    def __str__(self) -> str:
        """What one would show a person or a model: the output, the result, what went wrong, what was made."""
        parts = [strip_ansi(self.stdout).rstrip("\n"), strip_ansi(self.stderr).rstrip("\n")]
        if self.result is not None:
            parts.append(strip_ansi(self.result))
        if self.error is not None:
            parts.append(self.error.traceback or f"{self.error.name}: {self.error.value}")
        if self.death is not None:
            parts.append(f"[kernel died: {self.death.message}]")
        if self.status not in ("ok", "error", "kernel_died"):
            parts.append(f"[{self.status} after {self.duration_s:.1f} s]")
        if not self.state_preserved:
            lost = ", ".join(self.lost_names[:50]) or "none were known"
            parts.append(f"[the kernel was restarted; variables lost: {lost}]")
        for artifact in self.artifacts[:50]:
            parts.append(f"[artifact {artifact.path} ({artifact.size_bytes} bytes): {artifact.id}]")
        if len(self.artifacts) > 50:
            parts.append(f"[and {len(self.artifacts) - 50} more artifacts]")
        for artifact in self.output_artifacts:
            parts.append(f"[output cut here; the whole ({artifact.size_bytes} bytes): {artifact.id}]")
        return shorten("\n".join(part for part in parts if part), STR_LIMIT)


class Finished(CellEvent):
    """The last event of a stream."""

    type: Literal["finished"] = "finished"
    result: ExecutionResult


StreamEvent = Annotated[
    Stdout | Stderr | DisplayData | ClearOutput | ResultData | ErrorData | ArtifactCreated | Finished,
    Field(discriminator="type"),
]


GAP = re.compile(r"\n\.\.\. \[\d+ bytes left out\] \.\.\.\n")
"""What :func:`gap` writes."""


def gap(left_out: int) -> str:
    """What stands between head and tail of a text that was cut."""
    return f"\n... [{left_out} bytes left out] ...\n"


def shorten(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` bytes of UTF-8: head, a line that says how much is missing, tail."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text
    half = max(0, (limit - 80) // 2)
    head = data[:half].decode("utf-8", "ignore")
    tail = data[-half:].decode("utf-8", "ignore") if half else ""
    return head + gap(len(data) - 2 * half) + tail


# --- what a session knows of itself -----------------------------------------------------------


class Variable(BaseModel):
    """One entry of ``python_state.json``'s ``variables``; further fields (shape, dtype, ...) are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: str
    value: str


class PythonState(BaseModel):
    """``python_state.json``; unknown fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")
    timestamp: datetime | None = None
    variables: dict[str, Variable] = Field(default_factory=dict)
    imported_modules: list[str] = Field(default_factory=list)
    execution_count: int | None = None
    """The cell after which it was written."""
    msg_id: str | None = None
    variable_count: int | None = None
    """How many there are, when more than are listed."""


class SessionInfo(Record):
    """One line of :meth:`SessionManager.list`."""

    session_id: str
    status: Literal["running", "stopped", "dead", "detached"]
    """``running``: held by a living process; ``detached``: its kernel lives, nobody holds it; ``dead``: its container
    is gone unasked."""
    created_at: datetime | None = None
    last_used: datetime | None = None
    execution_count: int = 0
    container_id: str | None = None
    session_storage: str = "BIND"
    image: str = ""


class Dataset(Record):
    """A data set as a session sees it below ``/data``."""

    id: str
    status: Literal["PENDING", "LOADED", "FAILED"]
    path: str
    """Where the kernel finds it: ``/data/<id>``."""
    source: Literal["local", "api"]
    size_bytes: int | None = None
    error: str | None = None
