"""Stopping between steps: the first Ctrl-C asks, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Set by the first SIGINT or SIGTERM (`ray job stop` sends the latter), so that the loop ends
    after the step in progress with a whole checkpoint; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, which has no steps to end after, the first signal interrupts, either of
        them as Ctrl-C does by itself; whoever takes SIGINT over inside gets both."""

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            self.requested = True
            signal.raise_signal(signal.SIGINT)

        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: interrupt}
        with _handled(handlers):
            yield

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Handle the signals inside the block; ``say`` tells the person what will happen."""

        def handle(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            say("stopping after this step; once more to stop at once")

        with _handled({signal.SIGINT: handle, signal.SIGTERM: handle}):
            yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Handle signals so inside the block."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def own_handler() -> Iterator[None]:
    """Have SIGINT handled after the block as before it, whatever handler is left behind inside."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        # Elsewhere nothing can have been left.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)
