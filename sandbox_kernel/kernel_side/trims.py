"""What an ipykernel does at each cell that nobody here uses, left out one by one.

Each trim says what it saves, as measured by ``benchmarks/kernel_trims.py`` (``pass``, ratio of the time to reply AND
idle to stock ipykernel 7.4 over ipc), looks exactly for what it changes, and leaves stock behaviour with one line in
the container's log where ipykernel or IPython have moved.
"""

import contextlib
import sys
import zlib
from typing import Any, Callable, Dict, Iterator, Tuple

# --- before the kernel starts ------------------------------------------------------------------


def skip_debugger() -> None:
    """Let ipykernel find no debugpy: 80 ms of imports and 9 MB. A cell can still import debugpy itself."""
    if "debugpy" in sys.modules or "ipykernel.debugger" in sys.modules:
        return
    sys.modules["debugpy"] = None  # type: ignore[assignment]
    try:
        import ipykernel.debugger  # noqa: F401
    except Exception:  # an ipykernel without that module needs no trim
        pass
    finally:
        del sys.modules["debugpy"]


def configure(config: Any) -> None:
    """Trims that are configuration: history in memory, not on disk by its own thread; no sleep before the reply."""
    config.HistoryManager.hist_file = ":memory:"
    config.Kernel._execute_sleep = 0.0
    config.IPKernelApp.outstream_class = f"{__name__}.QuietStream"


def __getattr__(name: str) -> Any:
    """``QuietStream`` is made when ipykernel asks for it: this module is imported before ipykernel is."""
    if name != "QuietStream":
        raise AttributeError(name)
    from ipykernel.iostream import OutStream

    class QuietStream(OutStream):  # type: ignore[misc, unused-ignore]
        """A stream whose ``flush()`` returns at once when nothing is buffered, saving two hops to the iopub thread."""

        def flush(self) -> None:
            if self.echo is None and getattr(self, "_buffers", True) == {}:
                return
            super().flush()

    globals()["QuietStream"] = QuietStream
    return QuietStream


# --- when the kernel is made -------------------------------------------------------------------


def remember_signatures(shell: Any, kernel: Any) -> None:
    """``inspect.signature`` of ``run_cell`` once instead of at every cell."""
    import ipykernel.ipkernel

    accepts: Callable[[Any, Any], Any] = ipykernel.ipkernel._accepts_parameters
    known: Dict[Tuple[Any, ...], Any] = {}

    def accepts_parameters(method: Any, names: Any) -> Any:
        key = (getattr(method, "__func__", method), *names)
        if key not in known:
            known[key] = accepts(method, names)
        return known[key]

    ipykernel.ipkernel._accepts_parameters = accepts_parameters  # type: ignore[assignment, unused-ignore]


def transform_once(shell: Any, kernel: Any) -> None:
    """ipykernel transforms a cell to decide whether it is async, then IPython transforms it again: keep the first."""
    transform = shell.transform_cell
    last = [None, None]

    def transform_cell(raw: str) -> Any:
        if last[0] is raw:
            result, last[:] = last[1], [None, None]
            return result
        result = transform(raw)
        last[:] = [raw, result]  # type: ignore[list-item]
        return result

    shell.transform_cell = transform_cell


def name_cells_faster(shell: Any, kernel: Any) -> None:
    """A cell's file name is a hash of its code in pure Python, for the debugger to compute again: use zlib's."""
    import ipykernel.compiler

    if not callable(ipykernel.compiler.murmur2_x86):
        raise AttributeError("ipykernel.compiler.murmur2_x86")
    ipykernel.compiler.murmur2_x86 = lambda data, seed: zlib.crc32(data.encode("utf-8", "surrogatepass"), seed)


def keep_no_outputs(shell: Any, kernel: Any) -> None:
    """IPython keeps every output of every cell in ``history_manager.outputs``: after 200 MB of prints, 382 MB."""
    outputs = getattr(shell.history_manager, "outputs", None)
    if outputs is None:  # an IPython before 9.0: nothing is kept
        return
    if hasattr(shell, "_tee"):

        @contextlib.contextmanager
        def tee(channel: str) -> Iterator[None]:
            yield

        shell._tee = tee
    shell.events.register("post_run_cell", lambda result: outputs.clear())


def apply(shell: Any, kernel: Any, say: Callable[[str], None]) -> None:
    """Apply the trims to a kernel that is being made; called by the hook."""
    for trim in (remember_signatures, transform_once, name_cells_faster, keep_no_outputs):
        try:
            trim(shell, kernel)
        except (AttributeError, ImportError) as exc:
            say(f"trim {trim.__name__} left out, ipykernel has moved: {exc}")
