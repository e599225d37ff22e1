"""HTML elements of the report page. Text that is not `Html` is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

from tinyfusion_pl.report.outside import Html, html


def code(content: object) -> Html:
    """Inline code."""
    return html("<code>{}</code>", content)


def about(explanation: str) -> Html:
    """An explanation in small, soft type."""
    return html('<span class="about">{}</span>', explanation)


def missing(part: str) -> Html:
    """A line in place of a part that the run has not produced yet."""
    return html('<p class="soft">Not available yet: this run has no {}.</p>', code(part))


def fold(title: str, body: Html) -> Html:
    """A collapsed section."""
    return html("<details><summary>{}</summary>{}</details>", title, body)


def listing(content: str) -> Html:
    """A block of code."""
    return html("<pre>{}</pre>", code(content))


def image(images: dict[str, bytes], name: str, *, alt: str, caption: str) -> Html:
    """The embedded figure `name` with its caption and the path of its file."""
    data = base64.b64encode(images[name]).decode("ascii")
    return html(
        '<figure><img src="data:image/png;base64,{}" alt="{}">'
        "<figcaption>{} {}</figcaption></figure>",
        data,
        alt,
        caption,
        code(f"figures/{name}.png"),
    )


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], *, numeric: range = range(0)
) -> Html:
    """A table whose rows start with their heading; the columns `numeric` are right-aligned."""

    def line(tags: list[str], cells: Sequence[object]) -> Html:
        kinds = [' class="number"' if column in numeric else "" for column in range(len(cells))]
        return Html("").join(
            html(f"<{tag}{kind}>{{}}</{tag}>", cell)
            for tag, kind, cell in zip(tags, kinds, cells, strict=True)
        )

    head = line(["th"] * len(header), header)
    body = lines(html("<tr>{}</tr>", line(["th"] + ["td"] * (len(row) - 1), row)) for row in rows)
    form = (
        '<div class="scroll"><table>\n<thead><tr>{}</tr></thead>\n'
        "<tbody>\n{}\n</tbody>\n</table></div>"
    )
    return html(form, head, body)


def lines(parts: Iterable[str]) -> Html:
    """Parts on separate lines; text that is not `Html` is escaped."""
    return Html("\n").join(parts)
