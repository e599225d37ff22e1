"""Texts from outside, which files hold, made harmless for a terminal: names of files, keys of checkpoints, names of models."""

from __future__ import annotations

import unicodedata
from typing import Any

# Control characters (terminal escapes), invisible ones that reorder or hide text, halves of characters, line separators.
HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object) -> str:
    r"""One line in which whatever a terminal or browser would act on stands as its escape, ``\x1b``."""
    written = str(text)
    if written.isprintable():
        return written
    return "".join(
        ascii(each)[1:-1] if unicodedata.category(each) in HARMFUL else each for each in written
    )


def printable_lines(text: str) -> str:
    """`printable` of each line."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


def for_terminal(text: str) -> str:
    """`text` as it is printed: lines and tabs stay, all else is `printable`."""
    return "\t".join(map(printable_lines, text.split("\t")))


def printable_content(content: Any) -> Any:
    """What a JSON file holds, with all its texts `printable`, names too."""
    if isinstance(content, dict):
        return {printable(name): printable_content(each) for name, each in content.items()}
    if isinstance(content, list):
        return [printable_content(each) for each in content]
    return printable(content) if isinstance(content, str) else content
