"""JupyterLab on a session that runs: a server of its own for it, and the ways to attach other clients.

The server gets private Jupyter folders with one kernelspec in them, whose provisioner attaches to the session
(:mod:`sandbox_kernel.provisioning.attach`). It has no host kernels, no terminals and no extension installer: what
the session's cells display runs in Lab's page, with Lab's token, and must find nothing there that reaches the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote, urlsplit

from jupyter_core.paths import jupyter_data_dir

from sandbox_kernel.errors import KernelStartError, SandboxError
from sandbox_kernel.provisioning.attach import PROVISIONER, AttachedKernelSpecs, read_connection_file

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 3.0
"""Lab ends in about 1 s; after a refused kernel start it hangs (`shutdown_all` trips over it). Killing does no harm."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class LabTarget:
    """The session to attach to.

    ``connection_file``: Jupyter connection file of its kernel. ``container_id``: the container's id or name, or the
    ``local:...`` id of a kernel without one; by it the kernel is restarted. ``notebook_dir``: folder of the session's
    notebook; made when it is missing.
    """

    session_id: str
    connection_file: Path
    notebook_dir: Path
    container_id: str

    @property
    def kernel_name(self) -> str:
        """Name of the session's kernelspec. Jupyter ignores case there: ``Conv`` becomes ``sandbox-_conv``."""
        return "sandbox-" + re.sub(r"[A-Z_]", lambda match: "_" + match[0].lower(), self.session_id)

    @property
    def notebook(self) -> Path:
        """The session's notebook, ``<notebook_dir>/<session id>.ipynb``."""
        return self.notebook_dir / f"{self.session_id}.ipynb"


def write_kernelspec(target: LabTarget, data_dir: Path | None = None) -> Path:
    """Writes the kernelspec that attaches to the session and returns its folder, ``<data_dir>/kernels/<name>``.

    ``data_dir``: a Jupyter data folder, by default the user's. Any JupyterLab that searches it and has this package
    in its environment then offers the session in its launcher. Raises ConnectionFileError.
    """
    info = read_connection_file(target.connection_file)
    config = {"connection_file": str(target.connection_file.absolute()), "container": target.container_id}
    spec: dict[str, Any] = {
        "argv": [],
        "display_name": f"session {target.session_id}",
        "language": "python",
        # A signal would need a process of ours; the message reaches the kernel wherever it runs.
        "interrupt_mode": "message",
        "metadata": {"kernel_provisioner": {"provisioner_name": PROVISIONER, "config": config}},
    }
    if "curve_publickey" in info:
        spec["metadata"]["supported_encryption"] = ["curve"]
    folder = (data_dir or Path(jupyter_data_dir())) / "kernels" / target.kernel_name
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "kernel.json", spec)
    return folder


def write_notebook(target: LabTarget) -> Path:
    """Makes the session's notebook if there is none yet, and returns its path. One that is there stays as it is."""
    target.notebook_dir.mkdir(parents=True, exist_ok=True)
    introduction = (
        f"Session **{target.session_id}**: the cells run in its kernel, with its variables. "
        f"Shutting the kernel down here only detaches; `sandbox-kernel stop {target.session_id}` ends the session."
    )
    notebook = {
        "cells": [
            {"cell_type": "markdown", "id": "about", "metadata": {}, "source": introduction},
            {"cell_type": "code", "execution_count": None, "id": "first", "metadata": {}, "outputs": [], "source": ""},
        ],
        "metadata": {
            # With the kernelspec named here, Lab opens the notebook on it without asking.
            "kernelspec": {
                "display_name": f"session {target.session_id}",
                "language": "python",
                "name": target.kernel_name,
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    with contextlib.suppress(FileExistsError), target.notebook.open("x", encoding="utf-8") as file:
        json.dump(notebook, file, indent=1)
    return target.notebook


def check_jupyterlab() -> None:
    """Raises SandboxError, with the command that installs it, when there is no JupyterLab in this environment."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise SandboxError("JupyterLab is not installed; run: pip install 'sandbox-kernel[lab]'")


class LabServer:
    """JupyterLab as a child process on loopback, with the session's notebook open.

    ``async with LabServer(target) as lab`` returns once Lab answers at ``lab.url`` (which carries its token) and ends
    Lab, with all processes it started, on leaving; the session lives on. ``port`` 0 takes a free one.
    Raises SandboxError without JupyterLab, ConnectionFileError, or KernelStartError with Lab's last log lines.
    """

    def __init__(self, target: LabTarget, *, port: int = 0, open_browser: bool = False) -> None:
        self.target = target
        self.port = port
        self.url = ""
        self.pid = 0
        """Process id of the server, which leads a process group of its own."""
        self._open_browser = open_browser
        self._token = secrets.token_urlsafe(32)
        self._stack = contextlib.AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None
        self._signalled: asyncio.Future[int]

    async def __aenter__(self) -> Self:
        check_jupyterlab()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._signals())
            home = Path(tempfile.mkdtemp(prefix="sandbox-lab-"))
            stack.callback(shutil.rmtree, home, ignore_errors=True)
            write_notebook(self.target)
            write_kernelspec(self.target, home / "data")
            self._process = await self._spawn(home)
            self.pid = self._process.pid
            stack.push_async_callback(self._end)
            self.port = await self._answering(home)
            # `reset` opens the session's notebook instead of whatever the browser remembers of an earlier Lab.
            path = quote(self.target.notebook.name)
            self.url = f"http://127.0.0.1:{self.port}/lab/tree/{path}?token={self._token}&reset"
            if self._open_browser:
                await asyncio.to_thread(webbrowser.open, self.url)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def wait(self) -> int:
        """Waits until Lab ends by itself (its File → Shut Down); its exit code.

        SIGTERM and SIGHUP end the waiting too (minus the signal's number), as Ctrl-C does in asyncio's own way,
        so that ``async with`` ends Lab before this process.
        """
        assert self._process is not None, "wait() belongs inside `async with`"
        ended = asyncio.ensure_future(self._process.wait())
        try:
            done, _ = await asyncio.wait({ended, self._signalled}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            ended.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Notes SIGTERM and SIGHUP instead of dying of them; in other threads their owner deals with signals."""
        loop = asyncio.get_running_loop()
        self._signalled = loop.create_future()

        def note(number: int) -> None:
            if not self._signalled.done():
                self._signalled.set_result(-number)

        numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
        for number in numbers:
            loop.add_signal_handler(number, note, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _flags(self) -> list[str]:
        """The server's settings, as arguments: these go before any configuration file of the machine."""
        name = self.target.kernel_name
        specs = f"{AttachedKernelSpecs.__module__}.{AttachedKernelSpecs.__name__}"
        return [
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={self.target.notebook_dir.absolute()}",
            "--ServerApp.terminals_enabled=False",
            "--ServerApp.jpserver_extensions=jupyter_server_terminals=False",
            # It starts language servers on the host.
            "--ServerApp.jpserver_extensions=jupyter_lsp=False",
            f"--ServerApp.kernel_spec_manager_class={specs}",
            f"--AttachedKernelSpecs.allowed_kernelspecs={name}",
            "--AttachedKernelSpecs.ensure_native_kernel=False",
            f"--MultiKernelManager.default_kernel_name={name}",
            # Outputs that come while no page is open are in the record; a buffer of them would only grow.
            "--MappingKernelManager.buffer_offline_messages=False",
            # A busy session answers late: the page must not wait a minute for it.
            "--MappingKernelManager.kernel_info_timeout=3",
            "--LabApp.extension_manager=readonly",
        ]

    async def _spawn(self, home: Path) -> asyncio.subprocess.Process:
        labconfig = home / "config" / "labconfig"
        labconfig.mkdir(parents=True)
        # The one asks for consent to fetch news, the other sets breakpoints in a kernel that has no debugger.
        extensions = ("@jupyterlab/apputils-extension:announcements", "@jupyterlab/debugger-extension")
        _write_json(labconfig / "page_config.json", {"disabledExtensions": dict.fromkeys(extensions, True)})
        env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
        env |= {
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_CONFIG_PATH": str(home / "config"),
            "JUPYTER_PATH": str(home / "data"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            # In the environment, not in the arguments, which every user of the machine can read.
            "JUPYTER_TOKEN": self._token,
        }
        with (home / "log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", "from sandbox_kernel.lab import serve; serve()", *self._flags()),
                # A group of its own: Ctrl-C reaches us alone and we end it in order, asking nobody "y/n".
                start_new_session=True,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def _answering(self, home: Path) -> int:
        """Waits until the server answers; its port. The server writes the file that names it once it listens."""
        assert self._process is not None
        info_file = home / "runtime" / f"jpserver-{self._process.pid}.json"
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while self._process.returncode is None and not self._signalled.done():
                    with contextlib.suppress(OSError, ValueError):
                        port = int(json.loads(info_file.read_bytes())["port"])
                        await _get(port, f"/api?token={self._token}")
                        return port
                    await asyncio.sleep(0.05)
            cause = "was ended before it answered"
            if self._process.returncode is not None:
                cause = f"ended with exit code {self._process.returncode}"
        except TimeoutError:
            cause = f"did not answer within {_START_TIMEOUT_S:g} s"
        log = (home / "log").read_text(errors="replace")[-4000:]
        raise KernelStartError(f"JupyterLab for session {self.target.session_id!r} {cause}:\n{log}", logs=log)

    async def _end(self) -> None:
        """Ends the whole process group: asked first, so that Lab lets go of the kernel, then by force."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()


async def _get(port: int, path: str) -> None:
    """An HTTP request to loopback; OSError unless the answer is 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
        await writer.drain()
        status = (await reader.readline()).split()
    finally:
        writer.close()
    if status[1:2] != [b"200"]:
        raise OSError(f"no 200 from port {port} but {status!r}")


def serve() -> None:
    """The child process: JupyterLab, which ends when its parent does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    from jupyterlab.labapp import main

    main()


def how_to_attach(target: LabTarget, *, url: str = "") -> str:
    """What a person types to attach another client; ``url`` is that of a running :class:`LabServer`."""
    # VS Code wants the server's root, not a page of it.
    page = urlsplit(url)
    token = parse_qs(page.query).get("token", [""])[0]
    server = f"http://{page.netloc}/?token={token}" if url else f"what `sandbox-kernel lab {target.session_id}` prints"
    return f"""\
A JupyterLab that runs already (sandbox-kernel in its environment): choose the kernel "session {target.session_id}",
  listed after: sandbox-kernel lab {target.session_id} --kernelspec
VS Code: Select Kernel → Existing Jupyter Server, and give {server}
Terminal: jupyter console --kernel {target.kernel_name}
  after: sandbox-kernel lab {target.session_id} --kernelspec. Its exit only detaches.
  (jupyter console --existing {target.connection_file.name} needs a jupyter_client that hands it
  the file's CurveZMQ keys; 8.10 does not, and it waits for ever.)
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
