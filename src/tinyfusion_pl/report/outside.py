"""Texts from outside, which files of a run hold: made harmless here, for the page and for the terminal alike.

`printable` is what every text goes through when it is read. `Html` is what may stand on the page as it is; every other text
that gets there is escaped, so that what is forgotten is shown instead of run.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from markupsafe import Markup as Html
from markupsafe import escape

__all__ = ["Html", "escape", "html", "printable", "printable_content", "printable_lines"]

# Control characters (terminal escapes), invisible ones that reorder or hide text, halves of characters, line separators.
HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object) -> str:
    r"""One line in which whatever a terminal or browser would act on stands as its escape, ``\x1b``."""
    written = str(text)
    if written.isprintable():
        return written
    return "".join(ascii(each)[1:-1] if unicodedata.category(each) in HARMFUL else each for each in written)


def printable_lines(text: str) -> str:
    """`printable` of each line."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


def printable_content(content: Any) -> Any:
    """What a JSON file holds, with all its texts `printable`, names too."""
    if isinstance(content, dict):
        return {printable(name): printable_content(each) for name, each in content.items()}
    if isinstance(content, list):
        return [printable_content(each) for each in content]
    return printable(content) if isinstance(content, str) else content


def html(form: str, *parts: object, **named: object) -> Html:
    """`form` with `parts` in its ``{}``: all that is not `Html` already is escaped."""
    return Html(form).format(*parts, **named)
