"""``python_state.json``: replaced at once, off the main thread."""

import os
import queue
import threading
from typing import Callable, Set, Tuple

from .cells import replace


class Writer(threading.Thread):
    """Replaces the state file. A thread, as a file system may take milliseconds; it runs no Python worth mentioning."""

    def __init__(self, folder: str, say: Callable[[str], None]) -> None:
        super().__init__(name="sandbox-kernel state", daemon=True)
        self.path = os.path.join(folder, "python_state.json")
        self._say = say
        self.names: Set[str] = set()
        """Of the variables in the file."""
        self._newest = self.names
        self._waiting: "queue.SimpleQueue[Tuple[bytes, Set[str]]]" = queue.SimpleQueue()

    def put(self, data: bytes, names: Set[str]) -> None:
        """Have the file replaced by ``data``, soon."""
        self._newest = names
        self._waiting.put((data, names))

    @property
    def behind(self) -> bool:
        """The file is not yet what it was given last."""
        return self.names is not self._newest

    def run(self) -> None:
        while True:
            data, names = self._waiting.get()
            while not self._waiting.empty():
                data, names = self._waiting.get()
            try:
                replace(self.path, data)
                self.names = names
            except OSError as exc:
                self._say(f"cannot write {self.path}: {exc}")
