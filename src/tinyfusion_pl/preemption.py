"""SIGTERM and SIGUSR1, which schedulers and spot instances send before they stop a machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""Exit code of a preempted command: EX_TEMPFAIL of sysexits.h, "try again later".

One code for all signals, unlike the 143 or 138 of a shell, which a process also returns when a
signal kills it before it saved anything.
"""


class Preempted(KeyboardInterrupt):
    """The process was asked to stop; handled like Ctrl-C.

    Args:
        signum: The signal; None if another process of the run received it.
    """

    def __init__(self, signum: int | None = None) -> None:
        self.signum = signum
        name = "a signal to another process" if signum is None else signal.Signals(signum).name
        super().__init__(f"Stopped by {name}. Rerun the same command to resume.")


class _Handler:
    """Stops immediately or, inside `deferred`, records the signal."""

    def __init__(self) -> None:
        self.process, self.requested, self.depth, self.leave = os.getpid(), None, 0, _raise

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked data worker
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
    """Make `SIGNALS` and `more` raise `Preempted`, or call `leave`, inside the block.

    The previous handlers are restored afterwards. Blocks may be nested. Has no effect outside the
    main thread, the only one that receives signals.
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
    """Record signals inside `preemptible`; the block checks `requested` where it can stop.

    Further signals have no effect: a scheduler and its launcher often send one each. If the block
    ends without stopping, the signal is handled then.
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
    """The signal that asked this process to stop, or None."""
    return None if _handler is None else _handler.requested
