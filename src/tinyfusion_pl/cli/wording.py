"""How error messages show settings and their values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tinyfusion_pl.cli.references import outline

if TYPE_CHECKING:
    from tinyfusion_pl.cli.kinds import Kind


def shown(value: Any) -> str:
    """A value as written on the command line, at most 80 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(outline(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def hint(value: Any, kind: Kind) -> str:
    """What the user may have meant."""
    if isinstance(value, str) and value.lower() in ("none", "nil", "~") and kind.allows_null:
        return f" {value!r} is a string: write null, or omit the setting."
    if (
        isinstance(value, str)
        and kind.takes(lambda part: part in (int, float))
        and _is_number(value)
    ):
        return " Write the number without quotes."
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and kind.takes(lambda part: part is str)
    ):
        return f""" For a string, add quotes: '"{value}"'."""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def unread(key: str, known: Iterable[str], why: str) -> str:
    """The message for a setting that nothing reads; `known` are the settings that exist there."""
    names = [str(name) for name in known]
    prefix, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, names, n=3)
    prefix = f"{prefix}." if prefix else ""
    remedy = (
        f"Did you mean {' or '.join(prefix + each for each in near)}?"
        if near
        else f"Available settings: {', '.join(names) or 'none'}."
    )
    return f"{key} {why} and would be ignored. {remedy}"
