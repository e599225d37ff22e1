"""Texts from outside, which files of a run hold: made harmless for the page and for the terminal alike.

`printable` is what every text goes through when it is read. `Html` is what may stand on the page as it is; every other text
that gets there is escaped, so that what is forgotten is shown instead of run.
"""

from __future__ import annotations

from markupsafe import Markup as Html
from markupsafe import escape

from tinyfusion_pl.printable import printable, printable_content, printable_lines

__all__ = ["Html", "escape", "html", "printable", "printable_content", "printable_lines"]


def html(form: str, *parts: object, **named: object) -> Html:
    """`form` with `parts` in its ``{}``: all that is not `Html` already is escaped."""
    return Html(form).format(*parts, **named)
