"""How settings and their values are shown to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from tinyfusion_pl.cli.references import outline


def shown(value: Any) -> str:
    """A value as it is written on the command line, not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(outline(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def hint(value: Any, kind: Any) -> str:
    """What a person may have meant."""
    if isinstance(value, str) and value.lower() in ("none", "nil", "~") and kind.allows_null:
        return f" {value!r} is a text: write null, or leave it out."
    if (
        isinstance(value, str)
        and kind.takes(lambda part: part in (int, float))
        and _is_number(value)
    ):
        return " A number is written without quotes."
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and kind.takes(lambda part: part is str)
    ):
        return f""" If a text is meant, put it in quotes: '"{value}"'."""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def unread(key: str, known: Iterable[str], why: str) -> str:
    """What to say of a setting that nothing would read."""
    known = [str(name) for name in known]
    prefix, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=3)
    prefix = f"{prefix}." if prefix else ""
    does = (
        f"Did you mean {' or '.join(prefix + each for each in near)}?"
        if near
        else f"It has {', '.join(known) or 'no settings'}."
    )
    return f"{key} {why}, and nothing would read it. {does}"
