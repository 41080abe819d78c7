"""The container engine: the only room that talks docker-py.

One client per process, used from any thread. All methods block; coroutines call them through
``asyncio.to_thread``. Whatever docker-py or the transport raises leaves this file as an
:class:`~sandbox_kernel.errors.EngineError` (:func:`translated`).
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import docker
import docker.errors
import requests.exceptions

from sandbox_kernel.errors import ContainerConflict, EngineError, EngineUnavailable, ImageNotFound, LimitExceeded

MANAGED = "sandbox-kernel.managed"
"""Label of everything we make on an engine; what lacks it is somebody else's and never touched."""

_POOL = 128
"""Connections kept; as many calls may be under way at once."""

_REMEDIES = (
    (
        r"[Uu]nknown (or invalid )?runtime",
        "the engine does not know the setting runtime={runtime!r}; install it and name it in /etc/docker/daemon.json",
    ),
    (
        r"network enabled in root network namespace",
        "the runtime {runtime!r} (gVisor before August 2024) takes no network on this Linux kernel; give it the "
        "argument --network=none and leave the settings transport and network to their defaults, see SECURITY.md",
    ),
    (r"[Rr]ange of CPUs", "the setting cpus={cpus} is more than the engine's machine has"),
    (r"[Mm]inimum memory limit", "the setting memory_limit is too small for the engine"),
    (r"invalid reference format", "the setting image={image!r} is not the name of an image"),
    (r"seccomp is not enabled", "the engine's Linux kernel has no seccomp: it cannot confine a session"),
    (
        r"(cannot allocate memory|no space left on device|too many open files)",
        "the engine's machine has no room for one more container; stop a session or run: sandbox-kernel gc",
    ),
)


class NotThere(EngineError):
    """The container, network or volume does not exist (any more)."""


class SourceMissing(EngineError):
    """The engine cannot see a folder of this machine: it runs on another one, or in another mount namespace."""


@contextmanager
def translated(doing: str, **context: object) -> Iterator[None]:
    """docker-py's and requests' errors as ours. ``doing`` completes "cannot ..."; ``context`` names the inputs."""
    try:
        yield
    except docker.errors.APIError as exc:
        raise _from_status(exc, doing, context) from exc
    except (docker.errors.DockerException, docker.errors.StreamParseError) as exc:
        if isinstance(
            exc, docker.errors.TLSParameterError | docker.errors.InvalidConfigFile | docker.errors.ContextException
        ):
            raise EngineError(f"cannot {doing}: the docker client's configuration is wrong: {exc}") from exc
        if _unreachable(exc):
            raise _unavailable(exc) from exc
        raise EngineError(f"cannot {doing}: {exc}") from exc
    except (requests.exceptions.RequestException, OSError) as exc:
        raise _unavailable(exc) from exc


def _unreachable(exc: BaseException) -> bool:
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(
            seen, requests.exceptions.RequestException | ConnectionError | FileNotFoundError | PermissionError
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return "Error while fetching server API version" in str(exc)


def _unavailable(exc: BaseException) -> EngineUnavailable:
    where = os.environ.get("DOCKER_HOST", "the default socket")
    if "PermissionError" in repr(exc) or isinstance(exc, PermissionError):
        return EngineUnavailable(
            f"the container engine at {where} refuses this user; join its group: sudo usermod -aG docker $USER"
        )
    return EngineUnavailable(f"no container engine answers at {where}; start one: sandbox-kernel engine up")


def _from_status(exc: docker.errors.APIError, doing: str, context: Mapping[str, object]) -> EngineError:
    """An answer of the engine with an error status as one of ours."""
    text = str(exc.explanation or exc)
    status = exc.status_code
    if isinstance(exc, docker.errors.ImageNotFound) or (status == 404 and "o such image" in text):
        image = context.get("image") or text
        remedy = "build it: sandbox-kernel image build"
        if image != "sandbox:latest":
            remedy = "pull it or build it; ours is made by: sandbox-kernel image build"
        return ImageNotFound(f"the image {image!r} is not on the engine; {remedy}")
    if status == 404:
        return NotThere(f"cannot {doing}: {text}")
    if status == 409 and "already in use" in text:
        return ContainerConflict(f"cannot {doing}: {text}")
    if "bind source path does not exist" in text or "bind mount source path does not exist" in text:
        return SourceMissing(f"cannot {doing}: the engine does not see this machine's files ({text})")
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text):
            known = {name: context.get(name) for name in ("image", "runtime", "cpus")}
            kind = LimitExceeded if "no room" in remedy else EngineError
            return kind(f"cannot {doing}: {remedy.format(**known)} (the engine says: {text})")
    return EngineError(f"cannot {doing}: the engine says: {text}")


class Engine:
    """One connection pool to one engine. ``Engine.shared()`` is this process's."""

    _shared: Engine | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        with translated("reach the container engine"):
            self._api = docker.from_env(version="auto", timeout=60, max_pool_size=_POOL).api
            about = self._api.version()
        self._pid = os.getpid()
        self.version = str(about.get("Version", ""))
        self.desktop = "docker desktop" in str(about.get("Platform", {}).get("Name", "")).lower()
        self.unix = (
            str(getattr(self._api, "_custom_adapter", "")) != "" and self._api.base_url == "http+docker://localhost"
        )
        self.shares_files: bool | None = None
        """Whether it sees this machine's files; known after the first container was made."""

    @classmethod
    def shared(cls) -> Engine:
        """This process's engine (another one after a fork). Raises EngineUnavailable saying what to run."""
        with cls._lock:
            if cls._shared is None or cls._shared._pid != os.getpid():
                cls._shared = cls()
            return cls._shared

    # -- containers ------------------------------------------------------------------------

    def create(self, name: str, body: Mapping[str, Any], *, files: bytes | None = None, files_at: str = "/") -> str:
        """Make a container from an Engine API document; its id. ``files``: a tar unpacked at ``files_at`` first.

        Raises ImageNotFound, ContainerConflict, SourceMissing, LimitExceeded, EngineError. Never pulls.
        """
        host = body["HostConfig"]
        cpus = host.get("NanoCpus", 0) / 1e9
        with translated(f"create the container {name}", image=body["Image"], runtime=host.get("Runtime"), cpus=cpus):
            container = str(self._api.create_container_from_config(dict(body), name)["Id"])
            if files is not None:
                self._api.put_archive(container, files_at, files)
        return container

    def start(self, container: str, *, runtime: str | None = None) -> None:
        """Start a container that was made. Raises EngineError naming what the OCI runtime refused."""
        with translated(f"start the container {container[:12]}", runtime=runtime):
            self._api.start(container)

    def signal(self, container: str, signum: int | str) -> None:
        """Send a signal to PID 1. Raises NotThere, or EngineError when it does not run."""
        with translated(f"signal the container {container[:12]}"):
            self._api.kill(container, signum)

    def remove(self, container: str) -> None:
        """Kill and remove, with its anonymous volumes; one that is gone or on its way counts as done."""
        try:
            if self.inspect(container)["State"]["Paused"]:
                self.unpause(container)  # gVisor heeds no signal before, and Docker gives up on it after 10 s
            with translated(f"remove the container {container[:12]}"):
                self._api.remove_container(container, v=True, force=True)
        except NotThere:
            return
        except EngineError as exc:
            cause = exc.__cause__
            if not (isinstance(cause, docker.errors.APIError) and cause.status_code == 409):
                raise

    def rename(self, container: str, name: str) -> None:
        """Give a container another name. Raises ContainerConflict, NotThere."""
        with translated(f"rename the container {container[:12]} to {name}"):
            self._api.rename(container, name)

    def pause(self, container: str) -> None:
        """Freeze every process of the container."""
        with translated(f"pause the container {container[:12]}"):
            self._api.pause(container)

    def unpause(self, container: str) -> None:
        """Let the processes of a paused container go on."""
        with translated(f"unpause the container {container[:12]}"):
            self._api.unpause(container)

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container. Raises NotThere."""
        with translated(f"inspect the container {container}"):
            answer: dict[str, Any] = self._api.inspect_container(container)
            return answer

    def logs(self, container: str, tail: int = 50) -> str:
        """The last lines of its output, "" when it is gone."""
        try:
            with translated(f"read the log of the container {container[:12]}"):
                return bytes(self._api.logs(container, tail=tail)).decode("utf-8", "replace").strip()
        except EngineError:
            return ""

    def log_stream(self, container: str, since: float) -> Any:
        """Its output from ``since`` (seconds since 1970) on as an iterator of bytes with ``close()``.

        Each line begins with the engine's time (RFC 3339, nine digits of the second). Ends when the container does.
        """
        with translated(f"follow the log of the container {container[:12]}"):
            return self._api.logs(container, stream=True, follow=True, timestamps=True, since=since)

    def containers(self, **labels: str) -> list[dict[str, Any]]:
        """Ours, in any state, that carry these labels (``session="conv"``): Engine API list entries."""
        wanted = [f"{MANAGED}=1", *(f"sandbox-kernel.{name}={value}" for name, value in labels.items())]
        with translated("list the containers"):
            answer: list[dict[str, Any]] = self._api.containers(all=True, filters={"label": wanted})
            return answer

    def runtimes(self) -> dict[str, list[str]]:
        """The OCI runtimes it knows (``runc``, ``runsc``, ...), each with the arguments that it gives them."""
        with translated("ask the engine about itself"):
            known: dict[str, dict[str, Any]] = self._api.info().get("Runtimes") or {}
        return {name: list(about.get("runtimeArgs") or ()) for name, about in known.items()}

    def is_image(self, image: str) -> bool:
        """Whether the image is on the engine."""
        with translated(f"look for the image {image!r}", image=image):
            try:
                self._api.inspect_image(image)
            except docker.errors.ImageNotFound:
                return False
            return True

    # -- networks --------------------------------------------------------------------------

    def network(self, name: str) -> dict[str, Any] | None:
        """The network of that name, or None."""
        with translated(f"inspect the network {name}"):
            try:
                answer: dict[str, Any] = self._api.inspect_network(name)
            except docker.errors.NotFound:
                return None
            return answer

    def create_network(
        self,
        name: str,
        *,
        ipam: Mapping[str, Any] | None,
        options: Mapping[str, str],
        labels: Mapping[str, str],
        internal: bool = False,
    ) -> None:
        """Make a bridge network. Raises EngineError."""
        with translated(f"create the network {name}"):
            self._api.create_network(
                name,
                driver="bridge",
                ipam=ipam,
                options=dict(options),
                labels=dict(labels),
                internal=internal,
                check_duplicate=True,
            )

    def connect(self, container: str, network: str) -> None:
        """Put a container into one more network."""
        with translated(f"connect the container {container[:12]} to the network {network}"):
            self._api.connect_container_to_network(container, network)

    def remove_network(self, name: str) -> bool:
        """Remove a network that nothing uses; False when it is in use. Gone already is done."""
        try:
            with translated(f"remove the network {name}"):
                self._api.remove_network(name)
        except NotThere:
            return True
        except EngineError as exc:
            if "active endpoints" in str(exc):
                return False
            raise
        return True

    def networks(self) -> list[dict[str, Any]]:
        """Ours: Engine API list entries."""
        with translated("list the networks"):
            answer: list[dict[str, Any]] = self._api.networks(filters={"label": f"{MANAGED}=1"})
            return answer

    # -- streams ---------------------------------------------------------------------------

    def exec_socket(self, container: str, argv: list[str], *, user: str | None = None) -> tuple[str, Any]:
        """Run a command in a container with stdin open: (exec id, the hijacked connection's socket object)."""
        with translated(f"run {argv[0]} in the container {container[:12]}"):
            exec_id = str(self._api.exec_create(container, argv, stdin=True, user=user or "")["Id"])
            return exec_id, self._api.exec_start(exec_id, socket=True)

    def exec_code(self, exec_id: str) -> int | None:
        """Exit code of an exec; None while it runs."""
        with translated("inspect an exec"):
            code = self._api.exec_inspect(exec_id)["ExitCode"]
            return None if code is None else int(code)

    def event_stream(self, since: float | None) -> Any:
        """Events of our containers as an iterator of dictionaries with ``close()``; blocks for ever."""
        with translated("listen to the engine's events"):
            # A client of its own: the shared one's read timeout would end an idle stream.
            api = docker.from_env(version=self._api.api_version, timeout=None).api
            return api.events(decode=True, since=since, filters={"type": "container", "label": f"{MANAGED}=1"})


def tar(files: Mapping[str, bytes]) -> bytes:
    """A tar of ``files`` (path -> content), owned by root and readable by all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def close_stream(stream: Any) -> None:
    """End an event stream from another thread."""
    with suppress(Exception):
        stream.close()
