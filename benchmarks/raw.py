"""The baseline: a stock ipykernel in a container made by plain ``docker run``, and jupyter_client's own client.

The same image, ipc over a bind mount, no limits, nothing of ours inside.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import KernelConnectionInfo

UID = 1000 if os.geteuid() == 0 else os.geteuid()


class RawKernel:
    """One such kernel; an async context manager. Its client lives in a thread of its own, as in a plain program."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.folder = Path(tempfile.mkdtemp(prefix="raw-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.name = f"benchmark-{self.folder.name}"
        for part in ("s", "artifacts"):
            (self.folder / part).mkdir()
            if os.geteuid() == 0:
                os.chown(self.folder / part, UID, UID)
        self.info: dict[str, Any] = {
            **{f"{name}_port": number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)},
            "transport": "ipc",
            "ip": "/run/kernel/k",
            "key": secrets.token_hex(16),
            "signature_scheme": "hmac-sha256",
        }
        connection = self.folder / "s" / "connection.json"
        connection.write_text(json.dumps(self.info))
        connection.chmod(0o644)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raw client")
        self.client: BlockingKernelClient | None = None

    def _docker_run(self) -> None:
        command = ["docker", "run", "--detach", "--init", "--network", "none", "--user", f"{UID}:{UID}"]
        command += ["--name", self.name, "--volume", f"{self.folder / 's'}:/run/kernel"]
        command += ["--volume", f"{self.folder / 'artifacts'}:/session/artifacts", "--workdir", "/session"]
        command += ["--env", "HOME=/tmp", "--entrypoint", "python3", self.image]
        command += ["-m", "ipykernel_launcher", "-f", "/run/kernel/connection.json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _start(self) -> None:
        self._docker_run()
        self.client = BlockingKernelClient()
        info = self.info | {"ip": str(self.folder / "s" / "k")}
        self.client.load_connection_info(KernelConnectionInfo(**info))  # type: ignore[typeddict-item]
        self.client.start_channels()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client.wait_for_ready(timeout=60)
                return
            except RuntimeError:  # "Kernel died": what jupyter_client calls a start that is slower than its heartbeat
                if time.monotonic() > deadline:
                    raise

    def run_now(self, code: str) -> tuple[float, int]:
        """Run a cell in this thread: seconds until reply AND idle, and bytes of stream text."""
        client = self.client
        assert client is not None
        began, size = time.perf_counter(), 0
        msg_id = client.execute(code)
        while True:
            message = client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["msg_type"] == "stream":
                size += len(message["content"]["text"])
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
            pass
        return time.perf_counter() - began, size

    async def run(self, code: str) -> float:
        """Seconds that a cell takes."""
        return float((await self.call(self.run_now, code))[0])

    async def call(self, function: Any, *args: Any) -> Any:
        """Call a function in the client's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def first_result_now(self, code: str) -> float:
        """Seconds from ``docker run`` to the first cell's end."""
        began = time.perf_counter()
        self._start()
        self.run_now(code)
        return time.perf_counter() - began

    def _remove(self) -> None:
        if self.client is not None:
            self.client.stop_channels()
        subprocess.run(["docker", "rm", "--force", "--volumes", self.name], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def __aenter__(self) -> Self:
        await self.call(self._start)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.call(self._remove)
        self._thread.shutdown()
