"""What each trim of ``kernel_side/trims.py`` saves, on a bare local ipykernel over ipc.

    python benchmarks/kernel_trims.py [repetitions]

Every variant is a kernel of its own; all run side by side and take turns, so that a busy machine is as busy for each.
Timed is what a client feels: from sending a cell until its reply AND its idle message are here.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import KernelConnectionInfo

from sandbox_kernel.kernel_side import trims

LAUNCH = Path(__file__).parent.parent / "sandbox_kernel" / "kernel_side" / "launch.py"
TRIMS = ["in_one_thread", *(trim.__name__ for trim in (*trims.CONFIGURED, *trims.PATCHED))]
STOCK = "stock"
VARIANTS: dict[str, dict[str, Any]] = {
    STOCK: {"trims": False, "state_dir": None},
    **{trim: {"trims": [trim], "state_dir": None} for trim in TRIMS},
    "all trims": {"trims": True, "state_dir": None},
    "hook alone": {"trims": False},
    "all trims and hook": {"trims": True},
}
CELLS = {
    "pass": "pass",
    "100 lines": "\n".join(f"value_{i} = [{i} + j for j in range(3)]" for i in range(100)),
    "1,000 prints": "for i in range(1000): print('x' * 99)",
}


@contextmanager
def kernel(options: dict[str, Any], spawn: list[str] | None = None) -> Iterator[BlockingKernelClient]:
    """A running kernel's client. ``spawn``: another command than the supervisor's."""
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        ports = {f"{name}_port": i for i, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        info = {**ports, "ip": f"{folder}/k", "transport": "ipc", "key": "k", "signature_scheme": "hmac-sha256"}
        Path(folder, "connection.json").write_text(json.dumps(info))
        options = {"state_dir": f"{folder}/state", "cwd": folder, **options}
        Path(folder, "options.json").write_text(json.dumps({"connection_file": f"{folder}/connection.json", **options}))
        command = [*(spawn or [sys.executable, str(LAUNCH)]), f"{folder}/{'connection' if spawn else 'options'}.json"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = BlockingKernelClient()
        client.load_connection_info(KernelConnectionInfo(**info))  # type: ignore[typeddict-item]
        client.start_channels()
        try:
            _wait_for(client)
            yield client
        finally:
            client.stop_channels()
            process.terminate()
            process.wait()


def _wait_for(client: BlockingKernelClient, limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            return client.wait_for_ready(timeout=limit)
        except RuntimeError:  # "Kernel died": what jupyter_client calls a start that is slower than its heartbeat
            if time.monotonic() > deadline:
                raise


def seconds(client: BlockingKernelClient, code: str) -> float:
    """From sending until reply and idle."""
    started = time.perf_counter()
    msg_id = client.execute(code)
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == msg_id and message["content"].get("execution_state") == "idle":
            break
    while client.get_shell_msg(timeout=60)["parent_header"]["msg_id"] != msg_id:
        pass
    return time.perf_counter() - started


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with ExitStack() as stack:
        plain = [sys.executable, "-m", "ipykernel_launcher", "-f"]
        clients = {"ipykernel_launcher": stack.enter_context(kernel({}, plain))}
        clients |= {name: stack.enter_context(kernel(options)) for name, options in VARIANTS.items()}
        for label, code in CELLS.items():
            times: dict[str, list[float]] = {name: [] for name in clients}
            for i in range(repetitions + 10):
                for name, client in clients.items():
                    taken = seconds(client, code)
                    if i >= 10:
                        times[name].append(taken)
            base = statistics.median(times["ipykernel_launcher"])
            print(f"\n{label}, {repetitions} repetitions\n{'variant':24}{'median':>10}{'p95':>10}{'ratio':>8}")
            for name, taken_all in times.items():
                median, p95 = statistics.median(taken_all), statistics.quantiles(taken_all, n=20)[-1]
                print(f"{name:24}{median * 1e3:7.2f} ms{p95 * 1e3:7.2f} ms{median / base:8.2f}")


if __name__ == "__main__":
    main()
