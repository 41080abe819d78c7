"""The kernel's stdout and stderr; imported when ipykernel makes them (trim ``quiet_streams``)."""

import codecs
import collections
import contextlib
import io
import os
import select
import sys
import threading
import time
import types
from typing import Any, Dict, Tuple

from ipykernel.iostream import OutStream

UNSENT = 256 * 1024
"""Characters that a stream holds back at most."""
BURST, PER_SECOND = 16 * 2**20, 32 * 2**20
"""Characters that may be printed at once, and in the long run. What is printed faster than a client reads zmq queues
without end, and cannot tell: a loop of prints would end at the container's memory limit."""
PIPE = 1 << 20
"""Bytes that a pipe holds at most."""

_WRITE = {
    "OSError", "TypeError", "ValueError", "__stderr__", "_buffer_lock", "_buffers", "_flush", "_is_master_process",
    "_schedule_flush", "_subprocess_flush_pending", "echo", "frozenset", "isinstance", "items", "len", "parent_header",
    "print", "pub_thread", "schedule", "str", "sys", "type", "write",
}  # fmt: skip
"""What ``OutStream.write`` speaks of in the ipykernel whose way of doing it was read."""
_KNOWN = set(OutStream.write.__code__.co_names) == _WRITE
if not _KNOWN:
    print("sandbox-kernel: quicker prints left out, ipykernel has moved: OutStream.write", file=sys.stderr)


class QuietStream(OutStream):  # type: ignore[misc, unused-ignore]
    """ipykernel's stream with seven differences.

    ``flush()`` returns at once when nothing is buffered, saving two hops to the iopub thread; what a child process
    or C code wrote to the descriptor before is flushed too, so that it is this cell's and not an afterthought; and
    a lone surrogate, which no message can carry, is printed as its escape instead of losing the whole message; and
    whoever prints faster than the iopub thread sends waits for it: the buffer, and so a message, is bounded, where
    ``while True: print(...)`` would fill the container's memory in seconds, and so would a child; and what a thread of
    a cell's own code prints is that cell's, also while a later one runs; and whose a write is, is not worked out anew
    for each; and a forked child begins with nothing to send.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._flushing = False
        self._unsent = 0
        self._credit, self._credited = float(BURST), 0.0
        self._pipe_lock = threading.RLock()  # a signal's handler may flush while its thread does
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._newest: Any = {}
        self._threads: Dict[int, Tuple[threading.Thread, Any]] = {}
        self._whose: Tuple[Any, Any] = (None, None)
        super().__init__(*args, **kwargs)
        os.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        """What was not sent yet is the parent's to send; and a thread that is not here may have held the lock."""
        if _KNOWN:
            self._buffer_lock = threading.RLock()
            self._buffers: Any = collections.defaultdict(io.StringIO)

    @property
    def _parent_header_global(self) -> Any:
        """The request that a thread's output belongs to; ipykernel asks in threads only, and takes the newest."""
        _, header = self._threads.get(id(threading.current_thread()), (None, None))
        return self._newest if header is None else header

    @_parent_header_global.setter
    def _parent_header_global(self, header: Any) -> None:
        """A request begins: a thread that was not there when the one before began was started by that."""
        threads, known = threading.enumerate(), self._threads
        if len(threads) != len(known) or not all(id(thread) in known for thread in threads):
            new = [(thread, self._newest if _is_a_cells(thread) else None) for thread in threads]
            self._threads = {id(thread): known.get(id(thread), (thread, header)) for thread, header in new}
        self._newest = header

    def flush(self) -> None:
        fid = getattr(self, "_fid", None)
        # Not in a forked child: the pipe is its parent's, and the lock may have been held at the fork.
        if fid is not None and getattr(self, "_should_watch", False) and self._is_master_process():
            with self._pipe_lock:
                self._take(fid)
                self._add(self._decode(b"", True))
        # In this order: the iopub thread raises the flag before it empties the buffers, and lowers it when what was
        # in them is in its queue. Without the flag the cell's idle message could get there first.
        if self.echo is None and getattr(self, "_buffers", True) == {} and not self._flushing:
            return
        if self._is_master_process():
            self._pace()
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
        own = self._is_master_process()
        if not (own and _KNOWN and self.echo is None and self.pub_thread is not None and isinstance(string, str)):
            written = super().write(string)
        else:
            header = self.parent_header
            of, whose = self._whose  # both at once: threads write, too
            if header is not of:
                whose = frozenset(header.items())
                self._whose = header, whose
            with self._buffer_lock:
                self._buffers[whose].write(string)
            if not self._flush_pending:
                self._schedule_flush()
            written = len(string)
        self._unsent += len(string)
        if own and self._unsent > UNSENT:
            self.flush()
        return written

    def _pace(self) -> None:
        now, size, self._unsent = time.monotonic(), self._unsent, 0
        self._credit = min(BURST, self._credit + (now - self._credited) * PER_SECOND) - size
        self._credited = now
        if self._credit < 0:
            time.sleep(-self._credit / PER_SECOND)

    def _take(self, fid: int) -> None:
        """What is in the pipe now; the lock is held, so that flush and the watching thread keep the order."""
        left = PIPE
        while left > 0:  # whoever writes without a pause would keep us here for ever
            try:
                data = os.read(fid, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            left -= len(data)
            self._add(self._decode(data))
            with contextlib.suppress(OSError):  # the container's log may be full or gone; a cell's output is not
                os.write(self._original_stdstream_copy, data)

    def _add(self, text: str) -> None:
        if text:
            super().write(text)
            self._unsent += len(text)

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
                if self._unsent > UNSENT:
                    self.flush()
        except Exception:
            self._exc = sys.exc_info()


def _is_a_cells(thread: threading.Thread) -> bool:
    """Whether a thread runs a cell's own code. A pool's worker does not: it works for whichever cell asks."""
    own = object.__getattribute__(thread, "__dict__")
    run = own.get("_target") or own.get("function")  # a Timer's
    run = run.__func__ if type(run) is types.MethodType else run
    home = run.__module__ if type(run) is types.FunctionType else type.__getattribute__(type(thread), "__module__")
    return type(home) is str and home == "__main__"
