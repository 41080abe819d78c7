"""Python sessions in containers, with a record on disk.

    from sandbox_kernel import SessionManager, Settings

    async with SessionManager(Settings(sessions_root="sessions")) as manager:
        session = await manager.start("conv")
        result = await session.execute("x = 41\\nx + 1")

The names are imported when they are first used: the viewer reads a session directory through this
package without paying for (or needing) an engine's client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandbox_kernel.errors import SandboxError as SandboxError
    from sandbox_kernel.events import Artifact as Artifact
    from sandbox_kernel.events import CellError as CellError
    from sandbox_kernel.events import Dataset as Dataset
    from sandbox_kernel.events import ExecutionResult as ExecutionResult
    from sandbox_kernel.events import KernelDeath as KernelDeath
    from sandbox_kernel.events import PythonState as PythonState
    from sandbox_kernel.events import SessionInfo as SessionInfo
    from sandbox_kernel.events import StreamEvent as StreamEvent
    from sandbox_kernel.events import Variable as Variable
    from sandbox_kernel.manager import SessionManager as SessionManager
    from sandbox_kernel.session import Session as Session
    from sandbox_kernel.settings import DatasetAccess as DatasetAccess
    from sandbox_kernel.settings import SessionStorage as SessionStorage
    from sandbox_kernel.settings import Settings as Settings

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "events",
    "CellError": "events",
    "Dataset": "events",
    "DatasetAccess": "settings",
    "ExecutionResult": "events",
    "KernelDeath": "events",
    "PythonState": "events",
    "SandboxError": "errors",
    "Session": "session",
    "SessionInfo": "events",
    "SessionManager": "manager",
    "SessionStorage": "settings",
    "Settings": "settings",
    "StreamEvent": "events",
    "Variable": "events",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
