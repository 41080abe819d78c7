"""What an ipykernel does at each cell that nobody here uses, left out one by one.

Each trim looks exactly for what it changes, and leaves stock behaviour with one line in the container's log where
ipykernel or IPython have moved. Each says what it saves alone (``benchmarks/kernel_trims.py``: time to reply AND idle,
ratio to stock ipykernel 7.4 over ipc, for ``pass`` or for 100 lines). All together: 0.58 for ``pass``, 0.41 for 100
lines, on a machine that was busy otherwise. What saved less than 1 % was left out: memoised signatures, log records.
"""

import ast
import codecs
import contextlib
import os
import select
import sys
import threading
import time
import zlib
from typing import Any, Callable, Iterator, List, Union

Chosen = Union[bool, List[str]]
"""Option ``trims``: all, none, or those named (to measure one)."""


def wants(chosen: Chosen, trim: Callable[..., None]) -> bool:
    return chosen is True or (isinstance(chosen, list) and trim.__name__ in chosen)


UNSENT = 256 * 1024
"""Characters that a stream holds back at most."""
BURST, PER_SECOND = 16 * 2**20, 32 * 2**20
"""Characters that may be printed at once, and in the long run. What is printed faster than a client reads zmq queues
without end, and cannot tell: a loop of prints would end at the container's memory limit."""

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


def memory_history(config: Any) -> None:
    """Keep the history in memory, not in a file on disk written by a thread of its own. ``pass``: 0.82."""
    config.HistoryManager.hist_file = ":memory:"


def no_sleep(config: Any) -> None:
    """Do not sleep 0.5 ms before each reply: our reader waits for idle and needs no delay. ``pass``: 0.88 to 1.0."""
    config.Kernel._execute_sleep = 0.0


def quiet_streams(config: Any) -> None:
    """Flush only when something is buffered: four flushes a cell, two hops each. ``pass``: 0.79 to 0.95."""
    config.IPKernelApp.outstream_class = f"{__name__}.QuietStream"


CONFIGURED = (memory_history, no_sleep, quiet_streams)


def configure(config: Any, chosen: Chosen) -> None:
    """Apply the trims that are configuration; called before the application is made."""
    for trim in CONFIGURED:
        if wants(chosen, trim):
            trim(config)


def __getattr__(name: str) -> Any:
    """``QuietStream`` is made when ipykernel asks for it: this module is imported before ipykernel is."""
    if name != "QuietStream":
        raise AttributeError(name)
    from ipykernel.iostream import OutStream

    class QuietStream(OutStream):  # type: ignore[misc, unused-ignore]
        """ipykernel's stream with four differences.

        ``flush()`` returns at once when nothing is buffered, saving two hops to the iopub thread; what a child process
        or C code wrote to the descriptor before is flushed too, so that it is this cell's and not an afterthought; and
        a lone surrogate, which no message can carry, is printed as its escape instead of losing the whole message; and
        whoever prints faster than the iopub thread sends waits for it: the buffer, and so a message, is bounded, where
        ``while True: print(...)`` would fill the container's memory in seconds.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._flushing = False
            self._unsent = 0
            self._credit, self._credited = float(BURST), 0.0
            self._pipe_lock = threading.Lock()
            self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            super().__init__(*args, **kwargs)

        def flush(self) -> None:
            fid = getattr(self, "_fid", None)
            # Not in a forked child: the pipe is its parent's, and the lock may have been held at the fork.
            if fid is not None and getattr(self, "_should_watch", False) and self._is_master_process():
                with self._pipe_lock:
                    self._take(fid)
                    rest = self._decode(b"", True)
                    if rest:
                        super().write(rest)
            # In this order: the iopub thread raises the flag before it empties the buffers, and lowers it when what was
            # in them is in its queue. Without the flag the cell's idle message could get there first.
            if self.echo is None and getattr(self, "_buffers", True) == {} and not self._flushing:
                return
            super().flush()

        def _flush(self) -> None:
            self._flushing = True
            self._unsent = 0
            try:
                super()._flush()
            finally:
                self._flushing = False

        def write(self, string: str) -> Any:
            if isinstance(string, str) and not string.isascii():
                string = string.encode("utf-8", "backslashreplace").decode("utf-8")
            written = super().write(string)
            self._unsent += len(string)
            if self._unsent > UNSENT and self._is_master_process():
                self._pace(self._unsent)
                self.flush()
            return written

        def _pace(self, size: int) -> None:
            now = time.monotonic()
            self._credit = min(BURST, self._credit + (now - self._credited) * PER_SECOND) - size
            self._credited = now
            if self._credit < 0:
                time.sleep(-self._credit / PER_SECOND)

        def _take(self, fid: int) -> None:
            """What is in the pipe now; the lock is held, so that flush and the watching thread keep the order."""
            while True:
                try:
                    data = os.read(fid, 65536)
                except BlockingIOError:
                    return
                if not data:
                    return
                super().write(self._decode(data))
                os.write(self._original_stdstream_copy, data)

        def _watch_pipe_fd(self) -> None:
            fid = self._fid
            if fid is None:
                return
            os.set_blocking(fid, False)
            try:
                while self._should_watch:
                    select.select([fid], [], [])
                    with self._pipe_lock:
                        self._take(fid)
            except Exception:
                self._exc = sys.exc_info()

    globals()["QuietStream"] = QuietStream
    return QuietStream


# --- when the kernel is made -------------------------------------------------------------------


def transform_once(shell: Any, kernel: Any) -> None:
    """ipykernel transforms a cell to see whether it awaits, then IPython does again: keep one. 100 lines: 0.75."""
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


def leave_python_alone(shell: Any, kernel: Any) -> None:
    """IPython tokenizes each cell in Python to find magics; a cell that parses as Python has none. 100 lines: 0.80.

    Magics, ``!`` and ``?`` are no Python wherever IPython looks for them. A cell with a backslash takes the usual way:
    parsing it could warn of an invalid escape, which the compiler will do once more.
    """
    manager = shell.input_transformer_manager
    transform, stock = manager.do_token_transforms, list(manager.token_transformers)

    def do_token_transforms(lines: List[str]) -> List[str]:
        source = "".join(lines)
        if "\\" not in source and manager.token_transformers == stock:
            try:
                compile(source, "<cell>", "exec", ast.PyCF_ONLY_AST)
                return lines
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                pass
        result: List[str] = transform(lines)
        return result

    manager.do_token_transforms = do_token_transforms


def see_async_by_its_words(shell: Any, kernel: Any) -> None:
    """Twice a cell IPython compiles it to learn whether it awaits; without the words it cannot. 100 lines: 0.78."""
    should_run_async = shell.should_run_async

    def quickly(raw_cell: str, **kwargs: Any) -> Any:
        cell = kwargs.get("transformed_cell") or raw_cell
        if "await" not in cell and "async" not in cell:
            return False
        return should_run_async(raw_cell, **kwargs)

    shell.should_run_async = quickly


def name_cells_faster(shell: Any, kernel: Any) -> None:
    """A cell's file name is a hash of its code in pure Python, for the debugger: use zlib's. 0.5 ms of 100 lines."""
    import ipykernel.compiler

    if not callable(ipykernel.compiler.murmur2_x86):
        raise AttributeError("ipykernel.compiler.murmur2_x86")
    ipykernel.compiler.murmur2_x86 = lambda data, seed: zlib.crc32(data.encode("utf-8", "surrogatepass"), seed)


def keep_no_outputs(shell: Any, kernel: Any) -> None:
    """IPython keeps every output in ``history_manager.outputs``: after 200 MB of prints, 382 MB. Saves no time."""
    outputs = getattr(shell.history_manager, "outputs", None)
    if outputs is None:  # an IPython before 9.0: nothing is kept
        return
    if hasattr(shell, "_tee"):

        @contextlib.contextmanager
        def tee(channel: str) -> Iterator[None]:
            yield

        shell._tee = tee
    shell.events.register("post_run_cell", lambda result: outputs.clear())


PATCHED = (
    transform_once,
    leave_python_alone,
    see_async_by_its_words,
    name_cells_faster,
    keep_no_outputs,
)


def apply(shell: Any, kernel: Any, chosen: Chosen, say: Callable[[str], None]) -> None:
    """Apply the trims to a kernel that is being made; called by the hook."""
    for trim in PATCHED:
        if not wants(chosen, trim):
            continue
        try:
            trim(shell, kernel)
        except (AttributeError, ImportError, TypeError, ValueError) as exc:
            say(f"trim {trim.__name__} left out, ipykernel has moved: {exc}")
