"""Paths as text, which a configuration holds."""

from __future__ import annotations

import os


def absolute_path(path: str) -> str:
    """`path` from the root, without ``..``; links are kept."""
    return os.path.abspath(path)  # noqa: PTH100  (Path.resolve follows links)


def expand_user(path: str) -> str:
    """`path` with ``~`` or ``~user`` replaced; unchanged if there is no such user."""
    return os.path.expanduser(path)  # noqa: PTH111  (Path.expanduser raises for unknown users)
