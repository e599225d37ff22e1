"""The sections of the page, each rendered from a run and its figures."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from tinyfusion_pl.report.decisions import members
from tinyfusion_pl.report.markup import about, code, fold, image, lines, listing, missing, table
from tinyfusion_pl.report.outside import Html, html
from tinyfusion_pl.report.reading import (
    CONFIG,
    DECISIONS,
    LOGS,
    METRICS,
    RECORD,
    SAMPLES,
    Run,
    models_in,
    numbers,
)
from tinyfusion_pl.report.words import METRICS as EXPLAINED
from tinyfusion_pl.report.words import (
    STAGES,
    duration,
    get_student,
    label,
    metric_keys,
    stage_label,
    value,
)

Images = dict[str, bytes]  # PNG by figure name


def samples(run: Run, images: Images) -> Html:
    """Generated images."""
    if not run.samples:
        return missing(SAMPLES)
    rows = ", ".join(models_in(run.samples))
    return image(
        images,
        "samples",
        alt=f"Generated images in a grid: rows {rows}; columns by label",
        caption=f"All images of a column share noise and label; the rows ({rows}) differ only in "
        "the model.",
    )


def results(run: Run, images: Images) -> Html:
    """Metrics of each model."""
    metrics = run.metrics or {}
    models = {
        model: numbers(metrics.get(model))
        for model in models_in(metrics)
        if numbers(metrics.get(model))
    }
    if not models:
        return missing(METRICS)
    rows = []
    for key in metric_keys(*models.values()):
        cells = [value(key, own.get(key)) for own in models.values()]
        rows.append([label(key), *cells, about(EXPLAINED.get(key, ("", ""))[1])])
    explained = {
        "measured": "images/s of the shallow model relative to the teacher",
        "ideal": "number of blocks of the teacher relative to the shallow model",
    }
    student, speedup = get_student(metrics), numbers(metrics.get("speedup"))
    for key, explanation in explained.items():
        if key in speedup and student:
            cells = [f"{speedup[key]:.2f}x" if model == student else "" for model in models]
            rows.append([f"speed-up, {key}", *cells, about(explanation)])
    header = ["", *(html('<span class="{0}">{0}</span>', model) for model in models), ""]
    parts = [table(header, rows, numeric=range(1, len(models) + 1))]
    if "overview" in images:
        alt = f"Bars of sampling speed, FID and accuracy for {', '.join(models)}"
        parts.append(image(images, "overview", alt=alt, caption="The main results as bars."))
    return lines(parts)


def cost(run: Run, images: Images) -> Html:
    """Time of each stage, and peak memory."""
    metrics = run.metrics or {}
    seconds, peak = numbers(metrics.get("seconds")), numbers(metrics).get("peak_memory_mib")
    if not seconds:
        return missing(f"seconds in {METRICS}")
    total = sum(seconds.values())
    rows = [
        [
            stage_label(stage),
            html('<span title="{:.1f} s">{}</span>', spent, duration(spent)),
            html('<span class="share" style="width: {:.1f}%"></span>', 100 * spent / (total or 1)),
            about(STAGES.get(stage, ("", ""))[1]),
        ]
        for stage, spent in seconds.items()
    ]
    rows.append(["total", html("<strong>{}</strong>", duration(total)), "", ""])
    memory = "" if peak is None else html("<p>Peak memory: <strong>{:,.0f} MiB</strong>.</p>", peak)
    if shared := metrics.get("shared"):
        made = "; ".join(f"{stage_label(str(name))}: {run}" for name, run in shared.items())
        memory = (
            html("<p>Reused from other runs, with their time counted here: {}.</p>", made) + memory
        )
    return (
        table(
            ["stage", "time", html('<span class="about bar">share</span>'), ""],
            rows,
            numeric=range(1, 2),
        )
        + memory
    )


def blocks(run: Run, images: Images) -> Html:
    """Kept blocks, and how they were chosen."""
    parts = [_strip(path, stack) for path, stack in _stored_stacks(run).items()]
    if run.selection:
        parts += _selection(run, images)
    if not run.stacks and run.selection:
        return lines(parts)
    if not run.stacks:
        return lines([*parts, missing(DECISIONS)])
    parts.append(
        image(
            images,
            "decisions",
            alt="For each block, the training steps whose decision keeps it; opacity is the "
            "confidence of its group",
            caption="Marked steps keep the block; opacity shows the confidence of its group. Thin "
            "lines separate groups.",
        )
    )
    parts.append(
        image(
            images,
            "block_probabilities",
            alt="The probability of keeping each block, over the steps as shades and at the last "
            "step as bars",
            caption="Dotted: the probability if all blocks of the group were equally likely.",
        )
    )
    parts.append(fold("Decision of each group", _groups(run)))
    if run.num_torn_lines:
        count = f"{run.num_torn_lines} torn line{'s' if run.num_torn_lines > 1 else ''}"
        parts.append(
            html(
                '<p class="soft">Skipped {} in {}, written by a killed process.</p>',
                count,
                DECISIONS,
            )
        )
    return lines(parts)


def _selection(run: Run, images: Images) -> list[Html]:
    """The choice of a criterion, its cost, and the choice of ShortGPT's simple rule."""
    found = run.selection or {}
    cost, criterion = found.get("num_block_runs"), str(found.get("criterion"))
    parts = [
        html(
            "<p>Chosen by <strong>{}</strong>{}.</p>",
            criterion,
            f", at a cost of {cost:,} runs of a block on a sample (a backward pass counts as two)"
            if isinstance(cost, int)
            else "",
        )
    ]
    if isinstance(width := found.get("width"), dict):
        parts.append(_width(width))
    if isinstance(simple := found.get("shortgpt"), dict):
        same = simple == found.get("kept_blocks")
        kept = "; ".join(
            f"{path}: {', '.join(map(str, blocks))}" for path, blocks in simple.items()
        )
        text = "would have kept the same blocks" if same else f"would have kept {kept}"
        parts.append(html("<p>ShortGPT's block influence, a simple rule, {}.</p>", text))
    kept_blocks = found.get("kept_blocks")
    chosen: dict[str, Any] = kept_blocks if isinstance(kept_blocks, dict) else {}
    for path, history in run.stacks.items():
        alone = [int(block) for block in history.kept[-1].nonzero()[0]]
        if path in chosen and alone != chosen[path]:
            parts.append(
                html(
                    "<p>The search alone, shown in the figure below, would have kept {} of {}. "
                    "Trials of the candidates chose differently.</p>",
                    _joined(alone),
                    code(path),
                )
            )
    if "scores" in images:
        parts.append(
            image(
                images,
                "scores",
                alt="The score of each block by the criterion; kept blocks are dark",
                caption="A higher score means that the criterion rates the block more important.",
            )
        )
    for path, stack in (run.record or {}).get("stacks", {}).items():
        if scores := stack.get("scores"):
            parts.append(fold(f"Scores in {path}", _score_table(stack, scores)))
    if rounds := found.get("rounds"):
        rows = [
            [number + 1, ", ".join(map(str, each["kept_units"])), f"{each['distance']:.3g}"]
            for number, of_round in enumerate(rounds)
            for each in sorted(of_round, key=lambda each: each["distance"])
        ]
        parts.append(
            fold(
                "Trials, round by round",
                table(
                    ["round", "units kept", "distance to the teacher"], rows, numeric=range(2, 3)
                ),
            )
        )
    return parts


def _score_table(stack: dict[str, Any], scores: list[float]) -> Html:
    """The units of a stack by descending score."""
    units, kept = stack.get("units") or [[i] for i in range(len(scores))], set(stack["kept_blocks"])
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rows = [
        [_joined(units[i]), f"{scores[i]:.4g}", "kept" if set(units[i]) <= kept else "removed"]
        for i in order
    ]
    return table(["blocks", "score", ""], rows, numeric=range(1, 2))


def _stored_stacks(run: Run) -> dict[str, dict[str, Any]]:
    """Kept blocks and groups of each stack, from the record or else from the last decision."""
    if run.record and (stacks := run.record.get("stacks")):
        together = {
            path: [
                {"start": 0, "num_blocks": len(stack.get("units") or range(stack["num_blocks"]))}
            ]
            for path, stack in stacks.items()
        }
        return {
            path: {
                **stack,
                "groups": [
                    members(group, stack.get("units"))
                    for group in stack.get("groups") or together[path]
                ],
            }
            for path, stack in stacks.items()
        }
    return {
        path: {
            "kept_blocks": history.kept[-1].nonzero()[0],
            "groups": [group["members"] for group in history.groups],
        }
        for path, history in run.stacks.items()
    }


def _width(width: dict[str, Any]) -> Html:
    """The new width, and the time intervals that the importance of channels was computed on."""
    shown = {
        key: value("width", numbers(width).get(key)) for key in ("dense_hidden_size", "hidden_size")
    }
    intervals = [each for each in width.get("intervals") or [] if isinstance(each, dict)]
    used = sum(each.get("used") is True for each in intervals)
    return html(
        "<p>Width: <strong>{} of {}</strong> channels of the hidden states are kept, and the same "
        "fraction of heads and MLPs. {:.1%} of all parameters were removed. The importance of "
        "channels comes from the {} of {} time intervals with a large enough loss.</p>",
        shown["hidden_size"],
        shown["dense_hidden_size"],
        numbers(width).get("removed", math.nan),
        used,
        len(intervals),
    )


def _strip(path: str, stack: dict[str, Any]) -> Html:
    kept = set(map(int, stack["kept_blocks"]))

    def block(number: int) -> Html:
        kind, word = ("block kept", "kept") if number in kept else ("block", "removed")
        return html('<span class="{0}" title="block {1} {2}">{1}</span>', kind, number, word)

    joined = Html("").join
    groups = joined(
        html('<li class="group">{}</li>', joined(map(block, group))) for group in stack["groups"]
    )
    several = max(map(len, stack.get("units") or [[0]])) > 1
    counted = " units of blocks that are only removed together" if several else ""
    pattern = (
        f", pattern {stack['pattern']} (N:M keeps N of M{counted})" if stack.get("pattern") else ""
    )
    num_blocks = sum(map(len, stack["groups"]))
    return html(
        "<p>Stack {}: <strong>{} of {}</strong> blocks are kept{}. Filled: kept. Struck through: "
        "removed.</p>\n"
        '<ol class="strip">{}</ol>',
        code(path),
        len(kept),
        num_blocks,
        pattern,
        groups,
    )


def _groups(run: Run) -> Html:
    rows = []
    for path, history in run.stacks.items():
        for group in history.groups:
            kept = [block for block in group["members"] if history.kept[-1][block]]
            keeps = f"{group['num_kept']} of {group['num_blocks']}"
            if len(group["members"]) > group["num_blocks"]:
                keeps += " units"
            confidence = f"{100 * group['confidence']:.1f}%"
            entropy = value("entropy", group.get("entropy"))
            name = f"{path}: {_joined(group['members'])}"
            rows.append([name, keeps, _joined(kept), confidence, entropy])
    hint = (
        "Confidence: probability of the final choice. Entropy: uncertainty of the choice; 0 is "
        "certain."
    )
    header = ["blocks of the group", "keeps", "kept blocks", "confidence", "entropy (nats)"]
    return html('<p class="soft">{}</p>{}', hint, table(header, rows, numeric=range(3, 5)))


def _joined(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def curves(run: Run, images: Images) -> Html:
    """Training curves of each stage."""
    parts: list[Html] = []
    for stage in run.curves:
        if (name := f"curves_{stage}") in images:
            parts.append(html("<h3>{}</h3>", stage_label(stage).capitalize()))
            if stage in STAGES:
                purpose = STAGES[stage][1]
                parts.append(html('<p class="soft">{}.</p>', purpose[0].upper() + purpose[1:]))
            alt = f"Curves logged during {stage_label(stage)} over the training steps"
            parts.append(
                image(images, name, alt=alt, caption="Losses: logged values thin, smoothed bold.")
            )
    return lines(parts) or missing(f"{LOGS}/<stage>/**/metrics.csv")


def protocol(run: Run, images: Images) -> Html:
    """The protocol of the evaluation."""
    settings = (run.metrics or {}).get("protocol")
    if not settings:
        return missing(f"protocol in {METRICS}")
    shown = {
        key: setting if isinstance(setting, str) else json.dumps(setting)
        for key, setting in settings.items()
    }
    return table(["setting", "value"], [[key, code(setting)] for key, setting in shown.items()])


def record(run: Run, images: Images) -> Html:
    """The record of the shallow model."""
    if not run.record:
        return missing(RECORD)
    source = run.record.get("source")
    source = source if isinstance(source, dict) else {"source": source} if source else {}
    rows = [[key, code(content)] for key, content in source.items()]
    origin = (
        html("<h3>Origin of the weights</h3>{}", table(["entry", "value"], rows))
        if rows
        else Html("")
    )
    return origin + fold(RECORD, listing(_readable_json(_shortened(run.record))))


def _shortened(content: Any, *, longest: int = 64) -> Any:
    """Replace long lists by their length: a group of pattern 7:14 has 3432 probabilities."""
    if isinstance(content, dict):
        return {key: _shortened(inner) for key, inner in content.items()}
    if isinstance(content, list):
        return (
            [_shortened(inner) for inner in content]
            if len(content) <= longest
            else f"({len(content)} entries)"
        )
    return content


def _readable_json(content: Any) -> str:
    """Indented JSON with the innermost lists on one line."""
    innermost = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    return innermost.sub(
        lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", json.dumps(content, indent=2)
    )


def config(run: Run, images: Images) -> Html:
    """The configuration of the run."""
    return fold(CONFIG, listing(run.config)) if run.config else missing(CONFIG)
