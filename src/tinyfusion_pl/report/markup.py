"""The few pieces of HTML that the page's sections are made of. What is not `Html` is escaped wherever it is put in."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

from .outside import Html, html


def code(content: object) -> Html:
    return html("<code>{}</code>", content)


def about(explanation: str) -> Html:
    return html('<span class="about">{}</span>', explanation)


def missing(part: str) -> Html:
    return html('<p class="soft">Not there yet: this run has no {}.</p>', code(part))


def fold(title: str, body: Html) -> Html:
    return html("<details><summary>{}</summary>{}</details>", title, body)


def listing(content: str) -> Html:
    return html("<pre>{}</pre>", code(content))


def image(images: dict[str, bytes], name: str, *, alt: str, caption: str) -> Html:
    """The figure `name` embedded, with its caption and the file that it is also found in."""
    data = base64.b64encode(images[name]).decode("ascii")
    return html(
        '<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{} {}</figcaption></figure>',
        data, alt, caption, code(f"figures/{name}.png"),
    )  # fmt: skip


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], *, numeric: range = range(0)
) -> Html:
    """The first cell of each row is the row's heading; the columns `numeric` are flush right."""

    def line(tags: list[str], cells: Sequence[object]) -> Html:
        kinds = [' class="number"' if column in numeric else "" for column in range(len(cells))]
        return Html("").join(
            html(f"<{tag}{kind}>{{}}</{tag}>", cell)
            for tag, kind, cell in zip(tags, kinds, cells, strict=True)
        )

    head = line(["th"] * len(header), header)
    body = lines(html("<tr>{}</tr>", line(["th"] + ["td"] * (len(row) - 1), row)) for row in rows)
    form = '<div class="scroll"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table></div>'
    return html(form, head, body)


def lines(parts: Iterable[object]) -> Html:
    """Parts below each other."""
    return Html("\n").join(parts)
