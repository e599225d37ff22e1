"""The few pieces of HTML that the page's sections are made of; what comes from a run goes through `code` or `text`."""

from __future__ import annotations

import base64
from html import escape

text = escape


def code(content: object) -> str:
    return f"<code>{escape(str(content))}</code>"


def about(explanation: str) -> str:
    return f'<span class="about">{explanation}</span>'


def missing(part: str) -> str:
    return f'<p class="soft">Not there yet: this run has no {code(part)}.</p>'


def fold(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def listing(content: str) -> str:
    return f"<pre>{code(content)}</pre>"


def image(pictures: dict[str, bytes], name: str, *, alt: str, caption: str) -> str:
    """The figure `name` embedded, with its caption and the file that it is also found in."""
    data = base64.b64encode(pictures[name]).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)} {code(f'figures/{name}.png')}</figcaption></figure>"
    )


def table(header: list[str], rows: list[list[str]], *, numeric: range = range(0)) -> str:
    """Cells are HTML; the first of each row is the row's heading; the columns `numeric` are flush right."""

    def line(tags: list[str], cells: list[str]) -> str:
        kinds = [' class="number"' if column in numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for tag, kind, cell in zip(tags, kinds, cells, strict=True))

    head = line(["th"] * len(header), header)
    body = "\n".join(f"<tr>{line(['th'] + ['td'] * (len(row) - 1), row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
