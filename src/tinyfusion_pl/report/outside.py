"""Makes text from the files of a run harmless for the page and for the terminal.

Every text passes through `printable` when it is read. Only `Html` appears on the page as it is; all
other text is escaped.
"""

from __future__ import annotations

from markupsafe import Markup as Html
from markupsafe import escape

from tinyfusion_pl.printable import printable, printable_content, printable_lines

__all__ = ["Html", "escape", "html", "printable", "printable_content", "printable_lines"]


def html(form: str, *parts: object, **named: object) -> Html:
    """Format `form` with `parts`, escaping all that are not `Html`."""
    return Html(form).format(*parts, **named)
