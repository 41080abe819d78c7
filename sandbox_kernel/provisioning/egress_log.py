"""What an egress proxy prints, as it prints it: a thread follows the engine's log of its container."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.engine import Engine, NotThere, close_stream
from sandbox_kernel.provisioning.squid import LISTENING, read_line

_AGAIN_S = 0.2


@dataclass(frozen=True)
class EgressLine:
    """A connection or a refusal. ``proxy`` and ``at`` together name it: a line is printed once."""

    proxy: str
    """Its container's id, 12 digits."""
    at: str
    """The engine's time of the line; sorts as text."""
    event: str
    """``network_connection`` or ``network_refused``."""
    fields: dict[str, Any]


class Traffic(Protocol):
    """Who keeps the lines of a session."""

    def since(self, proxy: str) -> str:
        """``at`` of the last line of that proxy that is kept already, "" for none."""

    def take(self, lines: list[EgressLine]) -> None:
        """Keep these, in the order in which they were printed; called in the session's event loop."""


class EgressLog(threading.Thread):
    """Follows one proxy until its container ends for good, or :meth:`close`.

    ``fresh``: it is started first, beside what the caller does meanwhile.
    """

    def __init__(
        self, engine: Engine, container: str, deliver: Callable[[list[EgressLine]], None], *, since: str, fresh: bool
    ) -> None:
        super().__init__(name=f"sandbox-kernel egress {container[:12]}", daemon=True)
        self._engine = engine
        self._container = container
        self._deliver = deliver
        self._last = since
        self._fresh = fresh
        self.failure: EngineError | None = None
        """Why it could not be started."""
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._listening = False
        self._ended = False
        self._stream: Any = None

    def ready(self, timeout: float) -> bool:
        """Wait until the proxy listens; False when it ended, or did not in ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._listening or self._ended, timeout)
            return self._listening

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        if self._stream is not None:
            close_stream(self._stream)

    def run(self) -> None:
        try:
            if self._fresh:
                self._engine.start(self._container)
            while not self._closed.is_set():
                # ValueError, AttributeError: docker-py's reader when the stream is closed under it
                with suppress(EngineError, ValueError, AttributeError, OSError):
                    self._read()
                if (self._fresh and not self._listening) or not self._goes_on():
                    return
                self._closed.wait(_AGAIN_S)
        except EngineError as exc:
            self.failure = exc
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _goes_on(self) -> bool:
        """Whether there will be more to read."""
        try:
            state = self._engine.inspect(self._container)["State"]
        except NotThere:
            return False
        except EngineError:
            return True  # the engine is away
        return bool(state.get("Running") or state.get("Restarting"))

    def _read(self) -> None:
        self._stream = stream = self._engine.log_stream(self._container, _seconds(self._last))
        if self._closed.is_set():
            close_stream(stream)
            return
        rest, known = b"", True  # the stream begins a little early
        for chunk in stream:
            *whole, rest = (rest + chunk).split(b"\n")
            lines = [line for data in whole if (line := self._line(data.decode("utf-8", "replace"))) is not None]
            if known:
                lines = [line for line in lines if line.at > self._last]
                known = not lines
            if lines:
                self._last = lines[-1].at
                self._deliver(lines)

    def _line(self, text: str) -> EgressLine | None:
        at, _, said = text.partition(" ")
        if LISTENING in said and not said.startswith("{"):
            with self._changed:
                self._listening = True
                self._changed.notify_all()
        found = read_line(said)
        return None if found is None else EgressLine(self._container[:12], at, *found)


def _seconds(at: str) -> float:
    """Engine time as seconds since 1970, a little early: who asks compares the text."""
    try:
        return datetime.fromisoformat(at[:26] + "+00:00").timestamp() - 0.001
    except ValueError:
        return 1.0
