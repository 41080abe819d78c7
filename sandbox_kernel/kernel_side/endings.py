"""How a cell ends where ipykernel leaves that open, and a client would wait for ever, or hear of two ends.

- A child that the cell forked and that reaches the cell's end: it would go on as a second kernel, and say on iopub that
  the cell has ended while its parent still runs it. It exits, as a script's child would.
- ``sys.stdout`` or ``sys.stderr`` replaced by something that cannot be flushed, or deleted: ipykernel flushes both
  before it says that it is idle. The session's own stream is put back.
- One replaced by something that writes to it in the end (a tee): ipykernel tells whoever stands there whose cell it is,
  and what later cells print would stand under the one that put it there. The session's own is told, and flushed.
- An exception group: IPython prints it to stderr, and no error is published. It is published like any other.
"""

import builtins
import os
import sys
import traceback
from typing import Any, Dict, List, Optional

_Group: Any = getattr(builtins, "BaseExceptionGroup", ())


class Endings:
    """What is done at the end of each cell of one shell."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.streams: Dict[str, Any] = {"stdout": sys.stdout, "stderr": sys.stderr}
        self.forked = False
        self.show = shell.showtraceback
        self.set_parent = shell.set_parent

    def install(self) -> None:
        self.shell.events.register("post_run_cell", self.cell_ended)
        self.shell.showtraceback = self.showtraceback
        self.shell.set_parent = self.request_begins
        os.register_at_fork(after_in_child=self._in_child)

    def request_begins(self, parent: Any) -> None:
        """Stands in for the shell's own ``set_parent``."""
        self.set_parent(parent)
        for name, own in self.streams.items():
            if getattr(sys, name, None) is not own:
                own.set_parent(parent)

    def cell_ended(self, result: Any) -> None:
        """Called by IPython after each cell, before ipykernel replies."""
        if self.forked:
            self._leave(result)
        for name, own in self.streams.items():
            stream: Any = getattr(sys, name, self)
            if stream is not own and stream is not None:  # ipykernel takes None for no stream
                own.flush()  # what a tee has written to it, whose flush() does nothing
                try:
                    stream.flush()
                except BaseException as exc:  # whatever an object of the cell's raises
                    setattr(sys, name, own)
                    self._warn(f"sys.{name} cannot be flushed ({type(exc).__name__}); it is the session's own again")

    def _warn(self, text: str) -> None:
        print(text, file=self.streams["stderr"])

    # --- children ------------------------------------------------------------------------------

    def _in_child(self) -> None:
        self.forked = True
        self.shell._showtraceback = self._print_traceback  # an error published would be the parent's

    def _print_traceback(self, etype: Any, value: Any, lines: List[str]) -> None:
        print(*lines, sep="\n", file=sys.stderr)

    def _leave(self, result: Any) -> None:
        error = getattr(result, "error_before_exec", None) or getattr(result, "error_in_exec", None)
        code: Optional[int] = 0 if error is None else 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        try:
            for name in self.streams:
                getattr(sys, name).flush()
        finally:
            os._exit(code or 0)

    # --- exception groups ----------------------------------------------------------------------

    def showtraceback(self, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
        """Stands in for the shell's own."""
        value: Any = (exc_tuple or sys.exc_info())[1]
        if not _has_group(value) or isinstance(value, tuple(self.shell.custom_exceptions)):
            self.show(exc_tuple, *args, **kwargs)
            return
        trace = value.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") == "IPython.core.interactiveshell":
            trace = trace.tb_next
        try:
            lines = "".join(traceback.format_exception(type(value), value, trace)).splitlines()
        except Exception:  # what it holds cannot be shown: IPython may know better
            self.show(exc_tuple, *args, **kwargs)
            return
        self.shell._showtraceback(type(value), value, lines)


def _has_group(value: Any) -> bool:
    """As IPython looks for them: the exception, or one that it came after."""
    seen = 0
    while value is not None and seen < 100:
        if isinstance(value, _Group):
            return True
        value, seen = value.__context__, seen + 1
    return False
