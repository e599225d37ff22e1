"""`report.html`: what a run did, on one page that a browser opens offline. What comes from a run is escaped, see `outside`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tinyfusion_pl.artifacts import write_text

from . import figures, sections
from .markup import lines
from .outside import Html, html
from .reading import Run, models_in, numbers, read_run
from .style import CSS
from .words import feature_note, headline

SECTIONS = {
    "samples": (
        "Samples",
        "Images that the models draw when asked for each label.",
        sections.samples,
    ),
    "results": (
        "Results",
        "What was gained and lost: the teacher, the shallow model just after pruning (pruned), and after recovery.",
        sections.results,
    ),
    "cost": ("Cost", "Time and memory that this run took on this machine.", sections.cost),
    "blocks": (
        "Which blocks stay",
        "Learned masks give every block a probability of staying, a criterion a value; the best choice is kept for good.",
        sections.blocks,
    ),
    "curves": (
        "Training curves",
        "What each stage logged while it trained: losses fall, gates become sure.",
        sections.curves,
    ),
    "protocol": (
        "Protocol",
        "How it was measured: figures of two runs can be compared only where all of this is equal.",
        sections.protocol,
    ),
    "record": (
        "Record",
        "What is stored beside the shallow model: where its weights come from and which blocks they are.",
        sections.record,
    ),
    "config": ("Configuration", "Every setting of the run, as it was resolved.", sections.config),
}
"""Anchor -> heading, what it is for readers who know nothing of the project, and the function that fills it."""


def write_report(run_dir: str | Path) -> Path:
    """Draw `figures/*.png` and write `report.html` into a run folder, from its files alone.

    Parts that the run has not reached yet are left out with a line that says so.

    Returns:
        the path of `report.html`.

    Raises:
        ArtifactError: no run folder, a broken file in it, or a disk that cannot be written.
    """
    run = read_run(run_dir)
    images = {name: file.read_bytes() for name, file in _draw(run).items()}
    target = run.folder / "report.html"
    write_text(target, render(run, images))
    return target


def write_figures(run_dir: str | Path, *, only: Collection[str]) -> dict[str, Path]:
    """Draw those of the report's figures whose names are in `only`; returns name -> ``figures/<name>.png``.

    Raises:
        ArtifactError: as `write_report`.
    """
    return _draw(read_run(run_dir), only=only)


def _draw(run: Run, *, only: Collection[str] | None = None) -> dict[str, Path]:
    files = {}
    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is no formula
        for name, figure in _figures(run):
            if only is None or name in only:
                files[name] = run.folder / "figures" / f"{name}.png"
                figures.save_figure(figure, files[name])
    return files


def _figures(run: Run) -> Iterator[tuple[str, Figure]]:
    metrics = run.metrics or {}
    if run.samples:
        depths = {model: numbers(metrics.get(model)).get("depth") for model in models_in(metrics)}
        yield (
            "samples",
            figures.plot_samples(
                run.samples, depths={m: depth for m, depth in depths.items() if depth}
            ),
        )
    if overview := figures.plot_overview(metrics):
        yield "overview", overview
    if run.stacks:
        yield "decisions", figures.plot_decisions(run.stacks)
        yield "block_probabilities", figures.plot_block_probabilities(run.stacks)
    if run.selection and (figure := figures.plot_scores((run.record or {}).get("stacks", {}))):
        yield "scores", figure
    for stage, curves in run.curves.items():
        if figure := figures.plot_curves(curves):
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
            '<section id="{0}">\n<h2><a href="#{0}">{1}</a></h2>\n<p class="soft">{2}</p>\n{3}\n</section>',
            anchor, heading, purpose, fill(run, images),
        )
        for anchor, (heading, purpose, fill) in SECTIONS.items()
    )  # fmt: skip
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
<p class="soft">Run <strong>{name}</strong> · a trained diffusion transformer made smaller: what it can spare is found
and taken out, and the rest is trained to make up for it
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
    """With line breaks only between its facts."""
    subject, colon, facts = title.partition(": ")
    spans = [
        html('<span class="fact">{}</span>', fact)
        for fact in facts.replace(", ", ",\n").splitlines()
    ]
    return html("{}{}", subject + colon, Html(" ").join(spans))
