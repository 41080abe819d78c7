"""Settings: argument, then environment (``SANDBOX_<NAME>``), then ``.env``, then default.

Every value is validated when the object is made; an unknown or contradictory setting is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableValue

from sandbox_kernel.errors import SettingsError
from sandbox_kernel.hosts import parse_hosts

_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kb": 2**10,
    "m": 2**20,
    "mb": 2**20,
    "g": 2**30,
    "gb": 2**30,
    "t": 2**40,
    "tb": 2**40,
}


class SessionStorage(StrEnum):
    """Where a session's files live."""

    BIND = "BIND"
    """In ``sessions_root/<id>`` on the host, with the record."""
    TMPFS = "TMPFS"
    """In the container's memory; the host's disk sees only the artifacts that are ingested."""


class DatasetAccess(StrEnum):
    """How data sets come to ``/data``."""

    NONE = "NONE"
    LOCAL_RO = "LOCAL_RO"
    """Read-only from ``datasets_path``."""
    API = "API"
    """Fetched by the function given to ``SessionManager(fetch_dataset=...)``, staged on demand."""
    HYBRID = "HYBRID"
    """Both; a local data set goes before a fetched one of the same id."""


def parse_size(value: Any) -> int:
    """Bytes from ``"512m"``, ``"2g"``, ``"1.5 GB"`` or a number (units are powers of 1024).

    Raises ValueError for anything else.
    """
    if isinstance(value, bool):
        raise ValueError("a size is bytes or a text like '512m' or '2g'")
    if isinstance(value, (int, float)) and math.isfinite(value):
        size = int(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{value!r} is not a size; write bytes or a text like '512m' or '2g'")
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError(f"{value!r} must be more than 0 bytes")
    return size


class _EnvFile(DotEnvSettingsSource):
    """``.env``, which other programs share: only what begins with ``SANDBOX_`` is meant for us."""

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields
        return {
            name: value for name, value in super().__call__().items() if name in fields or name.startswith("sandbox_")
        }


class Settings(BaseSettings):
    """How sessions are run. Sizes are bytes or texts like ``"2g"``; times are seconds.

    Raises :class:`SettingsError` naming each setting that is unknown, malformed or contradicts another.
    """

    model_config = SettingsConfigDict(
        env_prefix="SANDBOX_",
        env_file=".env",
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        env_parse_none_str="None",
        validate_default=True,
    )

    sessions_root: Path = Path("sessions")
    """Folder of the session directories."""
    store_root: Path | None = None
    """Folder of the artifact store; default ``sessions_root/.store`` (the sessions' file system: no copying)."""
    session_storage: SessionStorage = SessionStorage.BIND
    dataset_access: DatasetAccess = DatasetAccess.NONE
    datasets_path: Path | None = None
    """Host folder of the data sets (LOCAL_RO, HYBRID)."""
    image: str = Field(default="sandbox:latest", min_length=1)
    engine: Literal["docker", "local"] = "docker"
    """``local`` runs the kernel on this machine WITHOUT isolation."""
    transport: Literal["auto", "ipc", "tcp"] = "auto"
    """``auto``: ipc where the sockets of a container reach the host (same Linux, or gVisor so configured); else tcp."""
    network: Literal["none", "full"] | list[str] = "none"
    """``none``, ``full``, or the hosts that may be reached over HTTP and HTTPS, through a proxy that logs
    (``["pypi.org", "*.example.org:8443"]``; see :mod:`.hosts`)."""
    runtime: str | None = Field(default=None, min_length=1)
    """Another OCI runtime of the engine, e.g. ``runsc`` (gVisor)."""
    memory_limit: int = 2 * 2**30
    cpus: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    pids_limit: int = Field(default=256, ge=16)
    tmpfs_size: int = 512 * 2**20
    """Size of each of the container's in-memory folders (``/session``, ``/tmp``)."""
    timeout_s: float | None = Field(default=300.0, gt=0)
    """Longest run of a cell; ``None``: no limit."""
    interrupt_grace_s: float = Field(default=5.0, ge=0)
    """How long an interrupted cell may take to end before its kernel is killed."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for a kernel's first answer."""
    restart_on_death: bool = True
    stop_on_exit: bool = True
    """Leaving ``with SessionManager`` stops its sessions; otherwise they live on for the next manager."""
    idle_timeout_s: float | None = Field(default=None, gt=0)
    """Sessions idle for longer are stopped; ``None``: never."""
    max_output_bytes: int = 1_000_000
    """Output of one cell kept in result and log; the whole goes to the store when it is longer."""
    max_artifact_bytes: int = 2 * 2**30
    """Largest file the store takes."""
    max_session_artifacts_bytes: int = 20 * 2**30
    """All artifacts of one session together."""
    pool_size: int = Field(default=0, ge=0, le=100)
    """Spare kernels kept warm."""
    pool_imports: list[str] = Field(default_factory=list)
    """Modules imported beforehand in every kernel, e.g. ``["numpy", "pandas"]``."""
    durability: Literal["batch", "fsync"] = "batch"
    """A log line survives the death of this process at once, that of the machine within a second (``batch``) or at once
    (``fsync``)."""
    mask_secrets: bool = True
    """Mask the values of variables whose names look like secrets in ``python_state.json``."""

    def __init__(self, **values: Any) -> None:
        unknown = sorted(
            name
            for name in os.environ
            if name.upper().startswith("SANDBOX_") and name[8:].lower() not in type(self).model_fields
        )
        if unknown:
            raise SettingsError(f"unknown setting in the environment: {', '.join(unknown)}. {_known()}")
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise SettingsError(_explain(exc)) from None
        except UnreadableValue as exc:
            name = str(exc).partition('"')[2].partition('"')[0]
            raise SettingsError(
                f"setting {name!r}: write a list as JSON in the environment: SANDBOX_{name.upper()}='[\"first\"]'"
            ) from None
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"the file .env cannot be read: {exc}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Called by pydantic-settings; the first source goes before the next."""
        assert isinstance(dotenv_settings, DotEnvSettingsSource)
        return init_settings, env_settings, _EnvFile(settings_cls, env_file=dotenv_settings.env_file)

    @field_validator("sessions_root", "store_root", "datasets_path")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        """``~`` means the home folder in ``.env`` too, where no shell has looked at it."""
        try:
            return value if value is None else value.expanduser()
        except RuntimeError as exc:
            raise ValueError(str(exc)) from None

    @field_validator(
        "memory_limit",
        "tmpfs_size",
        "max_output_bytes",
        "max_artifact_bytes",
        "max_session_artifacts_bytes",
        mode="before",
    )
    @classmethod
    def _size(cls, value: Any) -> int:
        return parse_size(value)

    @field_validator("memory_limit")
    @classmethod
    def _memory(cls, value: int) -> int:
        if value < 64 * 2**20:
            raise ValueError("a kernel needs at least 64m")
        return value

    @field_validator("tmpfs_size")
    @classmethod
    def _tmpfs(cls, value: int) -> int:
        if value < 2**20:
            raise ValueError("a kernel needs at least 1m")
        return value

    @field_validator("pool_imports")
    @classmethod
    def _modules(cls, value: list[str]) -> list[str]:
        for name in value:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{name!r} is not the name of a module")
        return value

    @field_validator("network", mode="before")
    @classmethod
    def _hosts(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("none", "full"):
            raise ValueError(
                "write 'none', 'full', or a list of host names (in the environment as JSON: '[\"pypi.org\"]')"
            )
        if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
            return [str(rule) for rule in parse_hosts(list(value))]
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        wants_folder = self.dataset_access in (DatasetAccess.LOCAL_RO, DatasetAccess.HYBRID)
        if wants_folder and self.datasets_path is None:
            raise ValueError(
                f"dataset_access={self.dataset_access} needs datasets_path, the host folder of the data sets"
            )
        if not wants_folder and self.datasets_path is not None:
            raise ValueError(
                f"datasets_path is set, but dataset_access={self.dataset_access} never reads it; use LOCAL_RO or HYBRID"
            )
        if self.engine == "local":
            for name in ("runtime",):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a container; engine='local' has none")
            if self.session_storage is SessionStorage.TMPFS:
                raise ValueError("session_storage=TMPFS needs a container; engine='local' has none")
            if self.network != "none" and self.network != "full":
                raise ValueError("network as a list of hosts needs a container; engine='local' has none")
        return self

    @property
    def store_path(self) -> Path:
        """Where the artifact store is."""
        return self.store_root if self.store_root is not None else self.sessions_root / ".store"


def _known() -> str:
    return "Known settings: " + ", ".join(sorted(Settings.model_fields)) + "."


def _explain(exc: ValidationError) -> str:
    """One line per problem, each naming the setting."""
    lines = []
    for problem in exc.errors():
        name = ".".join(str(part) for part in problem["loc"][:1])
        if problem["type"] == "extra_forbidden":
            where = " in .env" if name.startswith("sandbox_") else ""
            lines.append(f"unknown setting {name!r}{where}. {_known()}")
            continue
        text = problem["msg"].removeprefix("Value error, ")
        lines.append(f"setting {name!r}: {text} (got {problem['input']!r})" if name else text)
    return "\n".join(dict.fromkeys(lines))
