"""Signals that ask a training run to save its state and end."""

from __future__ import annotations

import signal
import threading
from typing import Any

_INTERACTIVE = (signal.SIGINT, signal.SIGTERM)
# Windows lacks some of the signals.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""Signals of Ctrl-C, of a job's end, of a closed terminal, and of SLURM before its time limit."""


class StopRequest:
    """Turns a signal of `STOP_SIGNALS` that arrives inside the context into a request to stop.

    A second SIGINT or SIGTERM has its usual effect. Further SIGHUPs or SIGUSR1s have none, also after the context,
    because a terminal that closes sends several. A signal that the process ignores, such as SIGHUP under nohup, stays
    ignored.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Only the main thread receives signals and can set handlers.
        for number in STOP_SIGNALS:
            # A handler that was installed from C is None here, and could not be restored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.received = True
        if number in _INTERACTIVE:
            signal.signal(number, self._previous[number])
        else:
            self._previous[number] = signal.SIG_IGN
