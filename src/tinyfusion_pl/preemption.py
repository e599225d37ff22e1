"""SIGTERM and SIGUSR1, which schedulers and spot machines send some time before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""Of a preempted command: EX_TEMPFAIL of sysexits.h, "try again later".

One code for every signal, and not the 143 or 138 of a shell: those are also what a process leaves
that a signal killed before it saved anything.
"""


class Preempted(KeyboardInterrupt):
    """The process was asked to end; what Ctrl-C leaves whole, this leaves whole too.

    Args:
        signum: The signal that asked; None: another process of the run got it.
    """

    def __init__(self, signum: int | None = None) -> None:
        self.signum = signum
        name = "a signal to another process" if signum is None else signal.Signals(signum).name
        super().__init__(f"Stopped by {name}. Rerun the same command to resume.")


class _Handler:
    """Leaves at once, or inside `deferred` notes the signal."""

    def __init__(self) -> None:
        self.process, self.requested, self.depth, self.leave = os.getpid(), None, 0, _raise

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker that was forked off
            if signum == signal.SIGTERM:
                os._exit(EXIT_CODE)
            return
        self.requested = self.requested or signum
        if not self.depth:
            self.leave(signum)


def _raise(signum: int) -> None:
    raise Preempted(signum)


_handler: _Handler | None = None


@contextmanager
def preemptible(*more: int, leave: Callable[[int], None] | None = None) -> Iterator[None]:
    """Inside, `SIGNALS` and `more` raise `Preempted`, or call `leave`; afterwards they do what they did before.

    May be nested. Outside the main thread, which alone gets signals, it does nothing.
    """
    global _handler
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _handler = _handler, _handler or _Handler()
    left, _handler.leave = _handler.leave, leave or _handler.leave
    before = {signum: signal.signal(signum, _handler) for signum in {*SIGNALS, *more}}
    try:
        yield
    finally:
        _handler.leave, _handler = left, outer
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside `preemptible`: a signal is noted, for the block to ask for (`requested`) where it can stop.

    Further ones change nothing: a scheduler and its launcher often send one each. Where a block has
    ended without having asked, the signal does then what it does outside.
    """
    handler = _handler
    if handler is None:
        yield
        return
    handler.depth += 1
    try:
        yield
    finally:
        handler.depth -= 1
    if not handler.depth and handler.requested:
        handler.leave(handler.requested)


def requested() -> int | None:
    """The signal that asked this process to end, if one did."""
    return None if _handler is None else _handler.requested
