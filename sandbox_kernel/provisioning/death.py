"""Why a kernel's container ended, in words and fields."""

from __future__ import annotations

import signal

from sandbox_kernel.errors import EngineError, KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.provisioning.engine import Engine, NotThere
from sandbox_kernel.provisioning.watch import Watch
from sandbox_kernel.settings import Settings


def size_text(size: int) -> str:
    """``2147483648`` -> ``2g``."""
    for unit, factor in (("g", 2**30), ("m", 2**20), ("k", 2**10)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def from_exit(code: int, *, oom: bool, memory_limit: int | None) -> KernelDeath:
    """A death by its exit code (128 + signal); ``oom``: the Linux kernel killed at the memory limit."""
    if code == 128 + signal.SIGKILL and oom:
        limit = f" ({size_text(memory_limit)})" if memory_limit else ""
        return KernelDeath(cause="oom", message=f"killed by the memory limit{limit}", exit_code=code, signal="SIGKILL")
    if 128 < code < 128 + signal.NSIG:
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            name = f"signal {code - 128}"
        return KernelDeath(cause="signal", message=f"killed by {name}", exit_code=code, signal=name)
    return KernelDeath(cause="exit", message=f"the kernel exited with code {code}", exit_code=code)


def explain(engine: Engine, watch: Watch, settings: Settings) -> KernelDeath:
    """What the events and the engine's own account say; ``unknown`` while the container runs (blocks)."""
    try:
        state = engine.inspect(watch.container)["State"]
        watch.take_state(state)
    except NotThere:
        watch.tell("destroy", {})
    except EngineError as exc:
        if watch.exit_code is None:
            return KernelDeath(cause="unknown", message=f"the engine does not tell ({exc})")
    if watch.exit_code is not None and not (watch.removed and watch.exit_code == 137 and not watch.oom):
        return from_exit(watch.exit_code, oom=watch.oom, memory_limit=settings.memory_limit)
    if watch.removed:
        return KernelDeath(cause="removed", message="its container was removed from outside", exit_code=watch.exit_code)
    return KernelDeath(cause="unknown", message="the container still runs")


def start_failure(engine: Engine, container: str, watch: Watch, settings: Settings) -> KernelStartError:
    """The error for a container that ended before its kernel answered, with its last log lines (blocks)."""
    logs = engine.logs(container)
    death = explain(engine, watch, settings)
    image = settings.image
    if death.cause == "oom" or "Cannot allocate memory" in logs or "MemoryError" in logs:
        why = f"memory_limit ({size_text(settings.memory_limit)}) is too small for it to start"
    elif "no ipykernel" in logs or "No module named 'ipykernel'" in logs:
        why = "the image has no ipykernel that can be imported; install it there: pip install ipykernel"
    elif death.exit_code == 127 or "exec python3 failed" in logs:
        why = "the image has no python3 on its PATH"
    else:
        why = death.message
    return KernelStartError(f"no kernel started in {image!r}: {why}. Its last lines: {logs or 'none'}", logs=logs)
