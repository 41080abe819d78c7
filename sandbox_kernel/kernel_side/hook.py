"""The kernel-side hook: ``python_state.json`` after every cell and ``cells.jsonl`` around it, off the reply's path.

An IPython extension, loaded by ``launch.py``. It wraps three methods of this one kernel object (nothing global):

- ``dispatch_shell``: when the original has returned, reply and idle are on their way; a timer is armed. The next
  request disarms it.
- the ``execute_request`` handler and ``finish_metadata``: who asked for which cell, and how it ended.

The timer's tick writes the cell's end to the journal (else the next cell's start does). Then it describes the namespace
in small slices, gives way to a request that arrives meanwhile, and runs regardless when the state file has lagged for a
second. Nothing here raises into a cell: a folder that cannot be written costs one line in the container's log.
"""

import asyncio
import atexit
import contextlib
import json
import os
import re
import select
import sys
import threading
import time
import types
from contextvars import ContextVar
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from . import trims
from .cells import Cell, Journal, now
from .describe import SMALL, clean, is_kind
from .endings import Endings
from .fragments import Fragments
from .imports import Imports
from .libraries import LibraryDescriber
from .writer import Writer

KEPT = 2_000
"""Variables described; of more, the newest."""
MAX_BYTES = 2_000_000
"""Of the state file."""
DELAY_S = 0.002
"""From a request's end to the first slice: by then the thread that sends the idle message has had the GIL."""
SLICE_S = 0.0005
LAG_S = 1.0
NEWEST = 100
"""Names told of in the journal while the state is behind."""
STEP = 10
"""Variables between two looks at the clock and at the sockets requests come by."""

_IPYTHON = re.compile(r"_(i\d+|\d+|_{0,2}|i{1,3}|[iod]h|exit_code)|__\w+__")
"""Names that IPython and Python keep in the namespace themselves; first the sort that each cell adds."""
_traceback = BaseException.__dict__["__traceback__"].__get__
_log: int = 2
_said: Set[str] = set()
_cell: "ContextVar[Optional[Cell]]" = ContextVar("sandbox_kernel_cell", default=None)


def say(text: str) -> None:
    """One line in the container's log, once; past ipykernel's capture of stderr."""
    if text not in _said and len(_said) < 100:
        _said.add(text)
        with contextlib.suppress(OSError):
            os.write(_log, f"sandbox-kernel: {text}\n".encode("utf-8", "backslashreplace"))


class Hook:
    """State and journal of one kernel. Values are looked at in the main thread only."""

    def __init__(self, shell: Any, kernel: Any, state_dir: str, mask: bool, secrets: List[str]) -> None:
        self.shell = shell
        self.kernel = kernel
        self.writer = Writer(state_dir, say)
        self.journal = Journal(state_dir)
        self.describer = LibraryDescriber(secrets, mask)
        self.imports = Imports()
        self.main = threading.get_ident()
        self.loop: Optional[asyncio.AbstractEventLoop] = None
        self.busy = 0
        self.timer: Optional[asyncio.TimerHandle] = None
        self.slices: Optional[Iterator[None]] = None
        self.lagging_since: Optional[float] = None
        self.last: Dict[str, Any] = {"execution_count": 0, "msg_id": None}
        self.ended: List[Tuple[str, Optional[int]]] = []
        self.fragments = Fragments(self.describer)
        self.poll: Any = None

    def install(self) -> None:
        """Wrap the kernel's methods, and leave an empty state file so that there is one from the beginning."""
        kernel, shell = self.kernel, self.shell
        dispatch, finish, run_code = kernel.dispatch_shell, kernel.finish_metadata, shell.run_code
        execute = kernel.shell_handlers["execute_request"]

        async def dispatch_shell(msg: Any, *args: Any, **kwargs: Any) -> Any:
            main = threading.get_ident() == self.main and not kwargs.get("concurrent")
            if main:
                self._begin()
            if not kwargs.get("concurrent"):
                _cell.set(None)
            try:
                return await dispatch(msg, *args, **kwargs)
            finally:
                cell = None if kwargs.get("concurrent") else _cell.get()
                if cell is not None:
                    self._cell_ended(cell)
                if main:
                    self.busy -= 1
                    self._arm(DELAY_S)
                elif cell is not None and self.loop is not None:  # a subshell's thread
                    self.loop.call_soon_threadsafe(self._arm, DELAY_S)

        def execute_request(stream: Any, ident: Any, parent: Dict[str, Any]) -> Any:
            if not parent["content"].get("silent"):
                self._cell_started(parent)
            return execute(stream, ident, parent)

        def finish_metadata(parent: Dict[str, Any], metadata: Any, reply: Dict[str, Any]) -> Any:
            cell = _cell.get()
            if cell is None and reply.get("status") == "aborted" and not parent["content"].get("silent"):
                cell = Cell(parent, None, self.describer.hide)
                _cell.set(cell)
            if cell is not None and cell.entry["msg_id"] == parent["header"].get("msg_id"):
                cell.end(reply, self.describer.hide)
            return finish(parent, metadata, reply)

        def run_code_watched(code: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                self.imports.before(code)
            except Exception as exc:
                say(f"imports are not tracked exactly: {type(exc).__name__}: {exc}")
            return run_code(code, *args, **kwargs)

        kernel.dispatch_shell = dispatch_shell
        kernel.shell_handlers["execute_request"] = execute_request
        kernel.finish_metadata = finish_metadata
        shell.run_code = run_code_watched
        atexit.register(self._write_journal)
        self.writer.start()
        self._write([], [])

    # --- around a cell -------------------------------------------------------------------------

    def _begin(self) -> None:
        """A request begins: what we had to do can wait, unless it has waited long."""
        self.busy += 1
        self.loop = self.loop or asyncio.get_running_loop()
        if self.timer is not None:
            self.timer.cancel()
        self.slices = None

    def _cell_started(self, parent: Dict[str, Any]) -> None:
        cell = Cell(parent, self.kernel.execution_count, self.describer.hide)
        _cell.set(cell)
        # If this one takes the kernel with it, the state will never say what the cell before has made.
        behind = self.lagging_since is not None or self.writer.behind
        self.journal.waiting.append({**cell.entry, "names": self._newest()} if behind else cell.entry)
        self._write_journal()

    def _cell_ended(self, cell: Cell) -> None:
        self.journal.waiting.append(cell.ended())  # written by the timer's tick, or with the next cell's start
        count = cell.entry["execution_count"] or self.last["execution_count"]
        self.last = {"execution_count": count, "msg_id": cell.entry["msg_id"]}
        result = getattr(self.shell, "last_execution_result", None)
        source = getattr(getattr(result, "info", None), "transformed_cell", None) or cell.entry["code"]
        if "import" in source:
            self.ended.append((source, _failed_at(result, self.shell.user_ns)))
        if self.lagging_since is None:
            self.lagging_since = time.monotonic()

    def _newest(self) -> List[str]:
        """The names that the state does not have yet, as far as they are at the end of the namespace."""
        namespace, hidden, found = self.shell.user_ns, self.shell.user_ns_hidden, []
        for name in list(islice(reversed(namespace), NEWEST)):  # at once: threads add names and take them away
            if type(name) is not str:
                continue
            if name in self.writer.names:
                break
            plain = name not in hidden and not _IPYTHON.fullmatch(name)
            if plain and not is_kind(type(namespace.get(name)), types.ModuleType):
                found.append(clean(self.describer.hide(name)[:SMALL]))
        return found

    def _write_journal(self) -> None:
        try:
            self.journal.write()
        except (OSError, ValueError) as exc:
            say(f"cannot write {self.journal.path}: {exc}")

    # --- between cells -------------------------------------------------------------------------

    def _request_poll(self) -> Any:
        """A poll of the descriptors behind the sockets a request comes by. Their ``EVENTS`` may not be read: that can
        eat the edge that ipykernel waits for.
        """
        poll = select.poll()
        try:
            import zmq

            poll.register(self.kernel.shell_stream.socket.getsockopt(zmq.FD), select.POLLIN)
            thread = getattr(self.kernel, "shell_channel_thread", None)
            if thread:  # ipykernel 7's own way: it reads the shell socket, and hands on to the main thread
                pair = thread.manager.get_shell_channel_to_subshell_pair(None)
                poll.register(pair.to_socket.getsockopt(zmq.FD), select.POLLIN)
        except Exception as exc:
            say(f"cannot see requests arrive ({type(exc).__name__}: {exc}); giving way between slices only")
        return poll

    def _arm(self, delay: float) -> None:
        if self.lagging_since is None or self.busy or self.loop is None:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        if self.busy or self.lagging_since is None:
            return
        self._write_journal()
        overdue = time.monotonic() - self.lagging_since > LAG_S
        until = time.perf_counter() + SLICE_S
        try:
            self.poll = self.poll or self._request_poll()
            if self.slices is None:
                self.slices = self._describe_all()
            for _ in self.slices:
                if overdue:
                    continue
                if self.poll.poll(0):
                    self._arm(DELAY_S)
                    return
                if time.perf_counter() > until:
                    self._arm(0)
                    return
        except Exception as exc:
            say(f"cannot describe this session: {type(exc).__name__}: {exc}")
        self.slices = None
        self.lagging_since = None

    def _describe_all(self) -> Iterator[None]:
        """Describe every variable and write the file; yields after each few."""
        namespace, hidden = self.shell.user_ns, self.shell.user_ns_hidden
        self.describer.learn()
        while self.ended:
            self.imports.after(*self.ended.pop(0), namespace)
            yield
        self.imports.after("", None, namespace)
        names: List[str] = []
        modules: Dict[int, types.ModuleType] = {}
        history = getattr(self.shell, "history_manager", None)
        caches = {"In": getattr(history, "input_hist_parsed", None), "Out": getattr(history, "output_hist", None)}
        plain = self.describer.known
        for i, name in enumerate(list(namespace)):
            if type(name) is str and not (name.startswith("_") and _IPYTHON.fullmatch(name)):
                value = namespace.get(name)
                if id(type(value)) not in plain and is_kind(type(value), types.ModuleType):
                    if name not in hidden:
                        modules[id(value)] = value
                elif (name not in hidden or hidden[name] is not value) and (
                    name not in caches or caches[name] is not value
                ):
                    names.append(name)
            if i % (20 * STEP) == 0:
                yield
        fragments: List[str] = []
        self.fragments.begin()
        size, value = 0, None
        for i, name in enumerate(names[-KEPT:]):
            value = namespace.get(name)
            fragment = self.fragments.of(name, value)
            size += len(fragment)
            if size > MAX_BYTES - 100_000:
                break
            fragments.append(fragment)
            if i % STEP == STEP - 1 or "shape" in fragment:
                yield  # after each few, and after each that may have taken a while
        del value
        self.fragments.done()
        self._write(fragments, names, self.imports.names(modules))
        if self.journal.too_long:
            yield
            try:
                self.journal.rotate()
            except OSError as exc:
                say(f"cannot shorten {self.journal.path}: {exc}")

    def _write(self, fragments: List[str], names: List[str], modules: Optional[List[str]] = None) -> None:
        ours: Dict[str, Any] = dict(self.last)
        if len(names) > len(fragments):
            ours["variable_count"] = len(names)
        # The document's three fields first, in its order.
        text = f'{{"timestamp": {json.dumps(now())},\n"variables": {{\n' + ",\n".join(fragments) + "\n},\n"
        text += f'"imported_modules": {json.dumps([clean(name[:SMALL]) for name in modules or []])},\n'
        text += json.dumps(ours)[1:] + "\n"
        self.writer.put(text.encode("ascii"), set(names))


def _failed_at(result: Any, namespace: Dict[str, Any]) -> Optional[int]:
    """The cell's line that raised; 0 when none can be named (it did not compile); ``None`` when the cell succeeded."""
    error = getattr(result, "error_in_exec", None)
    if error is None:
        return None if getattr(result, "error_before_exec", None) is None else 0
    trace = _traceback(error)
    while trace is not None:
        if trace.tb_frame.f_globals is namespace:
            return int(trace.tb_lineno)
        trace = trace.tb_next
    return 0


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython when the kernel starts, before it serves requests."""
    global _log
    _log = getattr(sys.stderr, "_original_stdstream_copy", 2)
    kernel = getattr(shell, "kernel", None)
    options = shell.config.SandboxHook if kernel is not None else {}
    trims.apply(shell, kernel, options.get("trims", False), say)
    Endings(shell).install()
    if options.get("state_dir"):
        try:
            hook = Hook(shell, kernel, options["state_dir"], options["mask_secrets"], options.get("secrets", []))
            hook.install()
        except Exception as exc:
            say(f"this kernel keeps no state and no journal, its internals are not known: {type(exc).__name__}: {exc}")
