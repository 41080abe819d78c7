"""The command line ``sandbox-kernel``.

Nothing that takes time is imported here: a Ctrl-C while the commands are imported is one like any other.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code; 130 after Ctrl-C, from the first moment on."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored (nohup)
    if interruptible:
        # There is nothing to undo yet, and an exception in the midst of an import may become any other.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from sandbox_kernel.cli.app import run_command

    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run_command(argv)
    except KeyboardInterrupt:
        sys.exit(130)
