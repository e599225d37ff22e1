"""Warnings that point to the caller's line, on the first process only."""

from __future__ import annotations

import os
import sys
import warnings

from torch import distributed

PACKAGE = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Warn on the first process; the warning names the line that called into this package."""
    if _rank():
        return
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of the message of another library's error, shortened."""
    said = str(error).strip().split("\n")[0]
    return said if len(said) <= length else f"{said[:length]}..."


def _rank() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    found = os.environ.get(
        "RANK", os.environ.get("LOCAL_RANK", "0")
    )  # before the processes know each other
    return int(found) if found.isdigit() else 0
