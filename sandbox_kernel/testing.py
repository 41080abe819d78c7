"""Steps that a test can be there before, for what no engine and no disk does when it is asked to.

    from sandbox_kernel.testing import just_before

    def gone() -> None:
        raise EngineUnavailable("no engine any more")

    with just_before("kernel_wanted", gone):
        await session.execute("1")  # raises EngineUnavailable

Nothing is replaced: the step itself is taken afterwards, unless what was called raises or does not return. What a cell
can do to its own kernel needs nothing from here (``os._exit(1)``, ``while True: pass``), nor what can be done to a
container from outside (``docker kill``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, Literal, get_args

__all__ = ["STEPS", "Step", "just_before"]

Step = Literal[
    "kernel_wanted",
    "kernel_launched",
    "cell_sent",
    "blobs_placed",
    "artifacts_marked",
    "spare_warmed",
]
"""In the order in which a session comes to them; see :data:`_SEAMS`."""

STEPS: tuple[Step, ...] = get_args(Step)

_SEAMS: dict[Step, tuple[str, str]] = {
    # A cell needs a kernel; one is launched where there is none. Nothing was accepted yet.
    "kernel_wanted": ("lifecycle", "Lifecycle.ready"),
    # A new kernel has answered, and its session's metadata do not name it yet.
    "kernel_launched": ("assembly", "_launched"),
    # A cell stands in ``.pending``, and the kernel does not have it yet.
    "cell_sent": ("kernel", "Kernel.send_execute"),
    # Files of ``artifacts/`` were hashed, and are not in the store yet. In a thread.
    "blobs_placed": ("artifacts.blobs", "BlobFolder.place"),
    # Artifacts stand in the log, and the store does not know that yet.
    "artifacts_marked": ("artifacts.store", "ArtifactStore.mark_logged"),
    # A spare kernel has answered, and is to run its first cell before it goes into the pool.
    "spare_warmed": ("pool", "Pool._warmed"),
}


@contextmanager
def just_before(step: Step, do: Callable[[], Any]) -> Iterator[None]:
    """While the context lasts, ``do()`` is called each time that a session of this process comes to ``step``.

    An awaitable that it returns is awaited, in the steps that can wait (``cell_sent``, ``blobs_placed`` and
    ``artifacts_marked`` cannot). What it raises is raised there. Contexts can be nested, of one step too.
    """
    module, _, name = _SEAMS[step][1].rpartition(".")
    owner: Any = import_module(f"sandbox_kernel.{_SEAMS[step][0]}")
    owner = getattr(owner, module) if module else owner
    taken = getattr(owner, name)

    @wraps(taken)
    async def waiting(*args: Any, **kwargs: Any) -> Any:
        first = do()
        if inspect.isawaitable(first):
            await first
        return await taken(*args, **kwargs)

    @wraps(taken)
    def at_once(*args: Any, **kwargs: Any) -> Any:
        do()
        return taken(*args, **kwargs)

    setattr(owner, name, waiting if inspect.iscoroutinefunction(taken) else at_once)
    try:
        yield
    finally:
        setattr(owner, name, taken)
