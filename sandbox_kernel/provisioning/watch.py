"""What becomes of containers: one thread per process reads the engine's events and tells whoever waits.

The thread lives while something is watched. When the engine goes away it reconnects, and asks for the state of every
watched container, so that a death during the gap is told too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sandbox_kernel.provisioning.engine import Engine, NotThere, close_stream

log = logging.getLogger(__name__)

_RECONNECT_S = (0.05, 0.2, 1.0, 5.0)


class Watch:
    """One container as the engine's events tell of it. Its fields may be read from any thread."""

    def __init__(self, container: str) -> None:
        self.container = container
        self.exit_code: int | None = None
        self.oom = False
        """The Linux kernel killed a process of it at the memory limit."""
        self.removed = False
        self.paused = False
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def dead(self) -> bool:
        """It ended, or is gone altogether."""
        return self.exit_code is not None or self.removed

    async def until(self, condition: Callable[[Watch], bool]) -> None:
        """Return once ``condition`` holds for this watch."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if condition(self):
                    return
                waiter = loop.create_future()
                entry = (loop, waiter)
                self._waiters.append(entry)
            try:
                await waiter
            finally:
                with self._lock, suppress(ValueError):
                    self._waiters.remove(entry)

    def tell(self, action: str, attributes: dict[str, Any]) -> None:
        """Take in one event; called by the listening thread."""
        with self._lock:
            if action == "die":
                self.exit_code = int(attributes.get("exitCode", -1))
                self.paused = False
            elif action == "oom":
                self.oom = True
            elif action == "destroy":
                self.removed = True
            elif action in ("pause", "unpause"):
                self.paused = action == "pause"
            else:
                return
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_wake, waiter)

    def take_state(self, state: dict[str, Any]) -> None:
        """Take in ``State`` of an inspection, for what no event was seen of."""
        if state.get("OOMKilled"):
            self.tell("oom", {})
        if state.get("Status") in ("exited", "dead", "removing"):
            self.tell("die", {"exitCode": state.get("ExitCode", -1)})
        elif bool(state.get("Paused")) != self.paused:
            self.tell("pause" if state.get("Paused") else "unpause", {})


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Listener(threading.Thread):
    """Reads the event stream until it is closed."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(name="sandbox-kernel events", daemon=True)
        self._watcher = watcher
        self._closed = threading.Event()
        self._stream: Any = None

    def run(self) -> None:
        failures = 0
        while not self._closed.is_set():
            try:
                engine = Engine.shared()
                self._stream = engine.event_stream(None)
                if self._closed.is_set():
                    close_stream(self._stream)
                    return
                failures = 0
                for watch in self._watcher.watches():
                    self._catch_up(engine, watch)
                for event in self._stream:
                    actor = event.get("Actor", {})
                    self._watcher.dispatch(
                        actor.get("ID", ""), str(event.get("Action", "")), actor.get("Attributes", {})
                    )
            except Exception as exc:
                # Whatever docker-py's reader raises when the stream ends under it, in the middle of an event too: were
                # this thread to end, no death would be told any more.
                if not self._closed.is_set():
                    log.info("the engine's events broke off: %r", exc)
            self._closed.wait(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])
            failures += 1

    @staticmethod
    def _catch_up(engine: Engine, watch: Watch) -> None:
        try:
            watch.take_state(engine.inspect(watch.container)["State"])
        except NotThere:
            watch.tell("destroy", {})

    def close(self) -> None:
        self._closed.set()
        if self._stream is not None:
            close_stream(self._stream)


class Watcher:
    """This process's watches; ``Watcher.shared()``."""

    _shared: Watcher | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._watches: dict[str, list[Watch]] = {}
        self._users = 0
        self._listener: _Listener | None = None

    @classmethod
    def shared(cls) -> Watcher:
        """The watcher of this process (another one after a fork)."""
        with cls._guard:
            if cls._shared is None or cls._shared._pid != os.getpid():
                cls._shared = cls()
            return cls._shared

    def open(self) -> None:
        """Begin to listen, so that no event of a container made from now on is missed. Pairs with :meth:`close`."""
        with self._lock:
            self._users += 1
            if self._listener is None:
                self._listener = _Listener(self)
                self._listener.start()

    def close(self) -> None:
        """The opposite of :meth:`open`; the last one ends the thread."""
        with self._lock:
            self._users -= 1
            listener = None
            if self._users == 0:
                listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def watch(self, container: str) -> Watch:
        """Watch a container from now on (opens; end with :meth:`unwatch`)."""
        watch = Watch(container)
        with self._lock:
            self._watches.setdefault(container, []).append(watch)
        self.open()
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Stop watching."""
        with self._lock:
            found = self._watches.get(watch.container, [])
            if watch not in found:
                return
            found.remove(watch)
            if not found:
                del self._watches[watch.container]
        self.close()

    def watches(self) -> list[Watch]:
        """All there are."""
        with self._lock:
            return [watch for found in self._watches.values() for watch in found]

    def dispatch(self, container: str, action: str, attributes: dict[str, Any]) -> None:
        """Tell those who watch ``container``; called by the listening thread."""
        with self._lock:
            found = list(self._watches.get(container, ()))
        for watch in found:
            watch.tell(action, attributes)
