"""Everything this package raises on purpose.

    SandboxError
    ├── SettingsError (ValueError)        a setting is unknown, malformed or contradicts another
    ├── InvalidSessionId (ValueError)     the id breaks the rule
    ├── EngineError                       the container engine said no
    │   ├── EngineUnavailable             nothing answers where the engine should be
    │   ├── ImageNotFound                 the image is not on the engine; never pulled silently
    │   ├── ContainerConflict             the container's name belongs to somebody else
    │   └── LimitExceeded                 the machine has no room for one more session
    ├── KernelStartError                  the container ran, but no kernel answered; carries its last log lines
    ├── SessionError
    │   ├── SessionNotFound (KeyError)    no session of that id, alive or recorded
    │   ├── SessionClosed                 the session was stopped; start it again
    │   ├── SessionHeld                   another living process holds the session
    │   └── KernelGone                    the kernel died and `restart_on_death` is off
    ├── RecordError                       the record cannot be written or read (names the file)
    │   └── RecordFull                    no space left, quota, or a read-only folder
    ├── ArtifactError
    │   ├── ArtifactNotFound (KeyError)   no artifact of that id
    │   ├── ArtifactRefused               too big, not a regular file, or it changed while it was read
    │   └── UntrustedPath                 a link, device, FIFO, socket, or a way out of the folder
    ├── DatasetError
    │   ├── DatasetNotFound (KeyError)    no data set of that id
    │   └── DatasetRefused                the id or the access mode forbids it
    └── ConnectionFileError               a connection file is missing, malformed or not ours

A cell that fails, times out or takes its kernel with it is NOT an exception: it is an
:class:`~sandbox_kernel.events.ExecutionResult` whose ``status`` says so. Exceptions are for what the
caller can mend. Foreign errors are translated in one place each: docker's in
``provisioning/engine.py``, zmq's in ``kernel.py``, the file system's in ``record.py`` and ``artifacts/``.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all errors of this package. The message names the input and the remedy."""

    def __str__(self) -> str:
        # KeyError's own __str__ is repr(); a person should read the sentence itself.
        return str(self.args[0]) if self.args else self.__class__.__name__


class SettingsError(SandboxError, ValueError):
    """A setting is unknown, malformed or contradicts another; the message names it."""


class InvalidSessionId(SandboxError, ValueError):
    """The session id breaks the rule ``[A-Za-z0-9][A-Za-z0-9._-]{0,63}``."""


class EngineError(SandboxError):
    """The container engine refused or failed."""


class EngineUnavailable(EngineError):
    """No engine answers; the message says what to run."""


class ImageNotFound(EngineError):
    """The image is not on the engine; the message names the build command."""


class ContainerConflict(EngineError):
    """The container name is taken by a container that is not ours."""


class LimitExceeded(EngineError):
    """The machine or a configured limit has no room for one more session."""


class KernelStartError(SandboxError):
    """No kernel answered from the container. ``logs`` holds the container's last lines."""

    def __init__(self, message: str, *, logs: str = "") -> None:
        super().__init__(message)
        self.logs = logs


class SessionError(SandboxError):
    """A session cannot do what was asked of it."""


class SessionNotFound(SessionError, KeyError):
    """No session of that id is alive or recorded."""


class SessionClosed(SessionError):
    """The session was stopped."""


class SessionHeld(SessionError):
    """Another living process holds the session; the message names its pid."""


class KernelGone(SessionError):
    """The kernel died and the session was told not to restart it."""


class RecordError(SandboxError):
    """The record cannot be written or read; the message names the file and the cause."""


class RecordFull(RecordError):
    """No space left, over quota, or a read-only folder."""


class ArtifactError(SandboxError):
    """An artifact cannot be stored or read."""


class ArtifactNotFound(ArtifactError, KeyError):
    """No artifact of that id in the store."""


class ArtifactRefused(ArtifactError):
    """The store refuses the file: too big, not a regular file, or changing while it is read."""


class UntrustedPath(ArtifactError):
    """A path from a place the kernel can write is a link, a special file, or leads out of its folder."""


class DatasetError(SandboxError):
    """A data set cannot be provided."""


class DatasetNotFound(DatasetError, KeyError):
    """No data set of that id."""


class DatasetRefused(DatasetError):
    """The data set's id or the session's access mode forbids it."""


class ConnectionFileError(SandboxError):
    """A kernel connection file is missing, malformed or not one of ours."""
