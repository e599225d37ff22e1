"""`report.html`: what a run did, on one page that a browser opens offline. Everything that comes from the run is escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinyfusion_pl.artifacts import atomic_path, write_text

from . import figures
from .reading import CONFIG, DECISIONS, LOGS, METRICS, MODELS, RECORD, SAMPLES, Run, numbers, read_run
from .style import CSS
from .words import METRICS as EXPLAINED
from .words import STAGES, duration, feature_note, headline, label, metric_keys, stage_label, student_of, value

DPI = 160

SECTIONS = {
    "samples": ("Samples", "Pictures that the models draw when asked for each label."),
    "results": (
        "Results",
        "What was gained and what was lost: the teacher, the shallow model just after blocks left, and the shallow model after recovery.",
    ),
    "cost": ("Cost", "Time and memory that this run took on this machine."),
    "blocks": (
        "Which blocks stay",
        "Every block has a learned probability of staying; in each group the most probable choice is kept for good.",
    ),
    "curves": ("Training curves", "What each stage logged while it trained: losses fall, gates become sure."),
    "protocol": (
        "Protocol",
        "How it was measured: figures of two runs can be compared only where all of this is equal.",
    ),
    "record": (
        "Record",
        "What is stored beside the shallow model: where its weights come from and which blocks they are.",
    ),
    "config": ("Configuration", "Every setting of the run, as it was resolved."),
}


def write_report(run_dir: str | Path) -> Path:
    """Draw `figures/*.png` and write `report.html` into a run folder, from its files alone.

    Parts that the run has not reached yet are left out with a line that says so.

    Returns:
        the path of `report.html`.

    Raises:
        ArtifactError: no run folder, a broken file in it, or a disk that cannot be written.
    """
    run = read_run(run_dir)
    pictures = {name: _save(figure, run.folder / "figures" / f"{name}.png") for name, figure in _figures(run)}
    target = run.folder / "report.html"
    write_text(target, render(run, pictures))
    return target


def _figures(run: Run) -> Iterator[tuple[str, Figure]]:
    metrics = run.metrics or {}
    if run.samples:
        depths = {
            model: numbers(metrics.get(model))["depth"] for model in MODELS if "depth" in numbers(metrics.get(model))
        }
        yield "samples", figures.plot_samples(run.samples, depths=depths)
    if overview := figures.plot_overview(metrics):
        yield "overview", overview
    if run.stacks:
        yield "decisions", figures.plot_decisions(run.stacks)
        yield "block_probabilities", figures.plot_block_probabilities(run.stacks)
    for stage, curves in run.curves.items():
        if figure := figures.plot_curves(curves):
            yield f"curves_{stage}", figure


def _save(figure: Figure, path: Path) -> bytes:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=DPI, metadata={"Software": None}
        )  # no version: equal data, equal bytes
    return path.read_bytes()


def render(run: Run, pictures: dict[str, bytes]) -> str:
    """The whole page; `pictures` are PNG bytes by figure name."""
    metrics = run.metrics or {}
    bodies = {
        "samples": _samples(run, pictures),
        "results": _results(metrics, pictures),
        "cost": _cost(metrics),
        "blocks": _blocks(run, pictures),
        "curves": _curves(run, pictures),
        "protocol": _protocol(metrics),
        "record": _record(run),
        "config": f"<details><summary>{CONFIG}</summary><pre><code>{escape(run.config)}</code></pre></details>"
        if run.config
        else _missing(CONFIG),
    }
    links = "".join(f'<a href="#{anchor}">{SECTIONS[anchor][0]}</a>' for anchor in bodies)
    sections = "\n".join(
        f'<section id="{anchor}">\n<h2><a href="#{anchor}">{SECTIONS[anchor][0]}</a></h2>\n<p class="soft">{SECTIONS[anchor][1]}</p>\n{body}\n</section>'
        for anchor, body in bodies.items()
    )
    title = headline(metrics)
    notes = (
        f'<p class="note">{escape(feature_note(metrics.get("protocol", {})))}</p>'
        if "fid" in metric_keys(*_models(metrics).values())
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}: {escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<p class="soft">Run <strong>{escape(run.name)}</strong> · a trained diffusion transformer made shallow: blocks that it can spare are found by training,
taken out, and the rest is trained to make up for them (TinyFusion, arXiv 2412.01199).</p>
<h1>{_unbroken(title)}</h1>
{notes}
<nav>{links}</nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _unbroken(title: str) -> str:
    """Escaped, with line breaks only between its facts."""
    subject, colon, facts = title.partition(": ")
    spans = ", ".join(f'<span class="fact">{escape(fact)}</span>' for fact in facts.split(", ")) if facts else ""
    return f"{escape(subject + colon)}{spans}"


def _models(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {model: numbers(metrics[model]) for model in MODELS if numbers(metrics.get(model))}


def _missing(part: str) -> str:
    return f'<p class="soft">Not there yet: this run has no <code>{part}</code>.</p>'


def _image(pictures: dict[str, bytes], name: str, *, alt: str, caption: str) -> str:
    data = base64.b64encode(pictures[name]).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)} <code>figures/{escape(name)}.png</code></figcaption></figure>"
    )


def _table(header: list[str], rows: list[list[str]], *, numeric: set[int] = frozenset()) -> str:
    """Cells are HTML; the first of a row is its heading; columns in `numeric` stand right."""

    def cell(tag: str, column: int, content: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    head = "".join(cell("th", column, content) for column, content in enumerate(header))
    body = "\n".join(
        "<tr>" + "".join(cell("td" if c else "th", c, content) for c, content in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _samples(run: Run, pictures: dict[str, bytes]) -> str:
    if not run.samples:
        return _missing(SAMPLES)
    models = [model for model in MODELS if model in run.samples]
    return _image(
        pictures,
        "samples",
        alt=f"Generated pictures in a grid: rows {', '.join(models)}; columns by label",
        caption=f"Each column starts from the same noise and label in every row ({', '.join(models)}), so differences come from the model alone.",
    )


def _results(metrics: dict[str, Any], pictures: dict[str, bytes]) -> str:
    models = _models(metrics)
    if not models:
        return _missing(METRICS)
    rows = []
    for key in metric_keys(*models.values()):
        explanation = EXPLAINED.get(key, ("", ""))[1]
        rows.append(
            [
                escape(label(key)),
                *(value(key, section.get(key)) for section in models.values()),
                f'<span class="about">{explanation}</span>',
            ]
        )
    student = student_of(metrics)
    speedup = numbers(metrics.get("speedup"))
    explained = {
        "measured": "the shallow model's images/s over the teacher's",
        "ideal": "the teacher's number of blocks over the shallow model's",
    }
    for key, text in explained.items():
        if key in speedup and student:
            cells = [f"{speedup[key]:.2f}×" if model == student else "" for model in models]
            rows.append([f"speed-up, {key}", *cells, f'<span class="about">{text}</span>'])
    header = ["", *(f'<span class="{model}">{model}</span>' for model in models), ""]
    table = _table(header, rows, numeric=set(range(1, len(models) + 1)))
    if "overview" not in pictures:
        return table
    alt = "Bars of sampling speed, FID and accuracy for " + ", ".join(models)
    return table + _image(pictures, "overview", alt=alt, caption="The same figures as bars.")


def _cost(metrics: dict[str, Any]) -> str:
    seconds = numbers(metrics.get("seconds"))
    if not seconds:
        return _missing(f"{METRICS} with seconds")
    total = sum(seconds.values()) or 1.0
    rows = [
        [
            escape(stage_label(stage)),
            f'<span title="{spent:.1f} s">{duration(spent)}</span>',
            f'<span class="share" style="width: {100 * spent / total:.1f}%"></span>',
            f'<span class="about">{STAGES.get(stage, ("", ""))[1]}</span>',
        ]
        for stage, spent in seconds.items()
    ]
    rows.append(["all together", f"<strong>{duration(sum(seconds.values()))}</strong>", "", ""])
    peak = metrics.get("peak_memory_mib")
    memory = f"<p>Peak memory: <strong>{peak:,.0f} MiB</strong>.</p>" if isinstance(peak, (int, float)) else ""
    return _table(["stage", "time", '<span class="about bar">share</span>', ""], rows, numeric={1}) + memory


def _blocks(run: Run, pictures: dict[str, bytes]) -> str:
    parts = []
    for path, stack in _stored_stacks(run).items():
        kept, groups = set(stack["kept_blocks"]), stack["groups"] or [{"start": 0, "num_blocks": stack["num_blocks"]}]
        strip = "".join(
            '<li class="group">' + "".join(_block(b, b in kept) for b in _members(group)) + "</li>" for group in groups
        )
        pattern = f", pattern {escape(str(stack['pattern']))} (kept of each group)" if stack.get("pattern") else ""
        parts.append(
            f"<p>Stack <code>{escape(path)}</code>: <strong>{len(kept)} of {stack['num_blocks']}</strong> blocks stay{pattern}. Filled: stays. "
            f'Struck out: left for good.</p>\n<ol class="strip">{strip}</ol>'
        )
    if not run.stacks:
        return "\n".join([*parts, _missing(DECISIONS)])
    parts += [
        _image(
            pictures,
            "decisions",
            alt="For each block, over the training steps, whether the decision at that time keeps it; opacity is the confidence of its group",
            caption="A bar where the decision of that step keeps the block; the more opaque, the surer its group. Thin lines part the groups.",
        ),
        _image(
            pictures,
            "block_probabilities",
            alt="Probability of staying for each block, over the steps as shades and at the end as bars; kept blocks are dark",
            caption="Dotted: what every block of the group would have if none were preferred.",
        ),
        _groups(run),
    ]
    if run.num_torn_lines:
        parts.append(
            f'<p class="soft">{run.num_torn_lines} torn line(s) in {DECISIONS}, left by a killed process, were skipped.</p>'
        )
    return "\n".join(parts)


def _stored_stacks(run: Run) -> dict[str, dict[str, Any]]:
    """The stacks of the record, or, before the shallow model is stored, of the last decision."""
    stored = (run.record or {}).get("stacks")
    if isinstance(stored, dict) and all(
        isinstance(s, dict) and {"kept_blocks", "num_blocks"} <= s.keys() for s in stored.values()
    ):
        return {path: {"groups": [], **stack} for path, stack in stored.items()}
    return {
        path: {
            "kept_blocks": history.kept[-1].nonzero()[0].tolist(),
            "num_blocks": history.num_blocks,
            "groups": list(history.groups),
        }
        for path, history in run.stacks.items()
    }


def _members(group: dict[str, Any]) -> range:
    return range(group["start"], group["start"] + group["num_blocks"])


def _block(number: int, kept: bool) -> str:
    kind, words = ("block kept", "stays") if kept else ("block", "left")
    return f'<span class="{kind}" title="block {number} {words}">{number}</span>'


def _groups(run: Run) -> str:
    rows = []
    for path, history in run.stacks.items():
        for group in history.groups:
            members = _members(group)
            kept = ", ".join(str(block) for block in members if history.kept[-1][block])
            rows.append(
                [f"{escape(path)} {members[0]}–{members[-1]}", f"{group['num_kept']} of {group['num_blocks']}", kept]
                + [f"{100 * group['confidence']:.1f}%", f"{group['entropy']:.3g}" if "entropy" in group else "–"]
            )
    table = _table(["group", "keeps", "blocks that stay", "confidence", "entropy (nats)"], rows, numeric={3, 4})
    about = "Confidence: probability of the choice that was made. Entropy: how open the choice still was; 0 is decided."
    return f'<details><summary>The decision, group by group</summary><p class="soft">{about}</p>{table}</details>'


def _curves(run: Run, pictures: dict[str, bytes]) -> str:
    names = [(stage, f"curves_{stage}") for stage in run.curves if f"curves_{stage}" in pictures]
    if not names:
        return _missing(f"{LOGS}/<stage>/**/metrics.csv".replace("<", "&lt;").replace(">", "&gt;"))
    parts = []
    for stage, name in names:
        alt = f"Curves logged during {stage_label(stage)}, over its training steps"
        about = STAGES.get(stage, ("", ""))[1]
        parts.append(f'<h3>{escape(stage_label(stage).capitalize())}</h3>\n<p class="soft">{about}</p>')
        parts.append(_image(pictures, name, alt=alt, caption="Thin: as logged. Bold: smoothed."))
    return "\n".join(parts)


def _protocol(metrics: dict[str, Any]) -> str:
    protocol = metrics.get("protocol")
    if not protocol:
        return _missing(f"{METRICS} with a protocol")
    rows = [
        [escape(str(key)), f"<code>{escape(setting if isinstance(setting, str) else json.dumps(setting))}</code>"]
        for key, setting in protocol.items()
    ]
    return _table(["setting", "value"], rows)


def _record(run: Run) -> str:
    if not run.record:
        return _missing(RECORD)
    source = run.record.get("source")
    rows = (
        [[escape(str(key)), f"<code>{escape(str(content))}</code>"] for key, content in source.items()]
        if isinstance(source, dict)
        else []
    )
    table = "<h3>Where the weights come from</h3>" + _table(["what", "value"], rows) if rows else ""
    return f"{table}<details><summary>{RECORD}</summary><pre><code>{escape(json.dumps(run.record, indent=2))}</code></pre></details>"
