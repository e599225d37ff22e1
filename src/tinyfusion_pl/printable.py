"""Text from files, escaped for a terminal: file names, checkpoint keys, model names."""

from __future__ import annotations

import unicodedata
from typing import Any

# Unicode categories: control characters (terminal escapes), invisible characters that reorder or
# hide text, surrogates, private and unassigned characters, line separators.
HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object) -> str:
    r"""`text` on one line, with everything that a terminal interprets escaped, e.g. ``\x1b``."""
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
    """`text` for printing: keeps lines and tabs, otherwise `printable`."""
    return "\t".join(map(printable_lines, text.split("\t")))


def printable_content(content: Any) -> Any:
    """The content of a JSON file with all strings and keys `printable`."""
    if isinstance(content, dict):
        return {printable(name): printable_content(each) for name, each in content.items()}
    if isinstance(content, list):
        return [printable_content(each) for each in content]
    return printable(content) if isinstance(content, str) else content
