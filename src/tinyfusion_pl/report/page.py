"""`report.html`: the results of a run on one page that opens offline.

Text from the run is escaped, see `outside`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tinyfusion_pl.artifacts import write_text
from tinyfusion_pl.report import drawing, sections
from tinyfusion_pl.report.figure_curves import plot_curves
from tinyfusion_pl.report.figure_decisions import (
    plot_block_probabilities,
    plot_decisions,
    plot_scores,
)
from tinyfusion_pl.report.figure_overview import plot_overview
from tinyfusion_pl.report.figure_samples import plot_samples
from tinyfusion_pl.report.markup import lines
from tinyfusion_pl.report.outside import Html, html
from tinyfusion_pl.report.reading import Run, models_in, numbers, read_run
from tinyfusion_pl.report.style import CSS
from tinyfusion_pl.report.words import feature_note, headline

SECTIONS = {
    "samples": (
        "Samples",
        "Images that each model generates for each label.",
        sections.samples,
    ),
    "results": (
        "Results",
        "Speed and quality of the teacher, of the pruned model before recovery, and of the "
        "recovered model.",
        sections.results,
    ),
    "cost": ("Cost", "Time and memory that this run took on its machine.", sections.cost),
    "blocks": (
        "Kept blocks",
        "Mask learning gives each block a probability of being kept; a criterion gives it a score. "
        "The best choice is final.",
        sections.blocks,
    ),
    "curves": (
        "Training curves",
        "What each training stage logged: losses decrease, gates become confident.",
        sections.curves,
    ),
    "protocol": (
        "Protocol",
        "How the models were measured. Results of two runs are comparable only if all entries are "
        "equal.",
        sections.protocol,
    ),
    "record": (
        "Record",
        "Stored with the shallow model: the origin of its weights, and which blocks it keeps.",
        sections.record,
    ),
    "config": ("Configuration", "All settings of the run, fully resolved.", sections.config),
}
"""Anchor -> heading, introduction for readers new to the project, function that renders it."""


def write_report(run_dir: str | Path) -> Path:
    """Draw `figures/*.png` and write `report.html` into a run folder, from the files in it.

    A line replaces each part that the run has not produced yet.

    Returns:
        The path of `report.html`.

    Raises:
        ArtifactError: if `run_dir` is not a run folder, a file in it is broken, or the report
            cannot be written.
    """
    run = read_run(run_dir)
    images = {name: file.read_bytes() for name, file in _draw(run).items()}
    target = run.folder / "report.html"
    write_text(target, render(run, images))
    return target


def write_figures(run_dir: str | Path, *, only: Collection[str]) -> dict[str, Path]:
    """Draw the figures of the report whose names are in `only`.

    Returns:
        The path ``figures/<name>.png`` of each figure, by name.

    Raises:
        ArtifactError: see `write_report`.
    """
    return _draw(read_run(run_dir), only=only)


def _draw(run: Run, *, only: Collection[str] | None = None) -> dict[str, Path]:
    files = {}
    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is no math
        for name, figure in _figures(run):
            if only is None or name in only:
                files[name] = run.folder / "figures" / f"{name}.png"
                drawing.save_figure(figure, files[name])
    return files


def _figures(run: Run) -> Iterator[tuple[str, Figure]]:
    metrics = run.metrics or {}
    if run.samples:
        depths = {model: numbers(metrics.get(model)).get("depth") for model in models_in(metrics)}
        yield (
            "samples",
            plot_samples(run.samples, depths={m: depth for m, depth in depths.items() if depth}),
        )
    if overview := plot_overview(metrics):
        yield "overview", overview
    if run.stacks:
        yield "decisions", plot_decisions(run.stacks)
        yield "block_probabilities", plot_block_probabilities(run.stacks)
    if run.selection and (figure := plot_scores((run.record or {}).get("stacks", {}))):
        yield "scores", figure
    for stage, curves in run.curves.items():
        if figure := plot_curves(curves):
            yield f"curves_{stage}", figure


def render(run: Run, images: dict[str, bytes]) -> str:
    """The whole page; `images` are PNG bytes by figure name."""
    metrics = run.metrics or {}
    title = headline(metrics)
    measured = any("fid" in numbers(metrics.get(model)) for model in models_in(metrics))
    note = (
        html('<p class="note">{}</p>', feature_note(metrics.get("protocol", {})))
        if measured
        else ""
    )
    links = Html("").join(
        html('<a href="#{}">{}</a>', anchor, heading)
        for anchor, (heading, _, _) in SECTIONS.items()
    )
    body = lines(
        html(
            '<section id="{0}">\n<h2><a href="#{0}">{1}</a></h2>\n'
            '<p class="soft">{2}</p>\n{3}\n</section>',
            anchor,
            heading,
            introduction,
            render_section(run, images),
        )
        for anchor, (heading, introduction, render_section) in SECTIONS.items()
    )
    return html(
        PAGE,
        name=run.name,
        title=title,
        css=Html(CSS),
        heading=_unbroken(title),
        note=note,
        links=links,
        body=body,
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: {title}</title>
<style>{css}</style>
</head>
<body>
<header>
<p class="soft">Run <strong>{name}</strong> · a pretrained diffusion transformer, pruned:
the blocks that matter least are removed, and the remaining model is trained to recover
(TinyFusion, arXiv 2412.01199).</p>
<h1>{heading}</h1>
{note}
<nav>{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _unbroken(title: str) -> Html:
    """The title with line breaks only between its facts."""
    subject, colon, facts = title.partition(": ")
    spans = [
        html('<span class="fact">{}</span>', fact)
        for fact in facts.replace(", ", ",\n").splitlines()
    ]
    return html("{}{}", subject + colon, Html(" ").join(spans))
