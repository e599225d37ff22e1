"""The sections of the page, each a function from a run and its images to HTML."""

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
    if not run.samples:
        return missing(SAMPLES)
    rows = ", ".join(models_in(run.samples))
    return image(
        images,
        "samples",
        alt=f"Generated images in a grid: rows {rows}; columns by label",
        caption=f"In each column all rows ({rows}) start from the same noise and label: only the model differs.",
    )


def results(run: Run, images: Images) -> Html:
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
        "measured": "the shallow model's images/s over the teacher's",
        "ideal": "the teacher's number of blocks over the shallow model's",
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
        parts.append(image(images, "overview", alt=alt, caption="The same figures as bars."))
    return lines(parts)


def cost(run: Run, images: Images) -> Html:
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
    rows.append(["all together", html("<strong>{}</strong>", duration(total)), "", ""])
    memory = "" if peak is None else html("<p>Peak memory: <strong>{:,.0f} MiB</strong>.</p>", peak)
    if shared := metrics.get("shared"):
        made = "; ".join(f"{stage_label(str(name))}: {run}" for name, run in shared.items())
        memory = html("<p>Taken from other runs, whose time counts here: {}.</p>", made) + memory
    return (
        table(
            ["stage", "time", html('<span class="about bar">share</span>'), ""],
            rows,
            numeric=range(1, 2),
        )
        + memory
    )


def blocks(run: Run, images: Images) -> Html:
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
            alt="For each block, at which training steps the decision keeps it; opacity is the confidence of its group",
            caption="A mark where the decision of that step keeps the block; the more opaque, the surer its group. "
            "Thin lines part the groups.",
        )
    )
    parts.append(
        image(
            images,
            "block_probabilities",
            alt="Each block's probability of staying, over the steps as shades and at the end as bars; kept ones dark",
            caption="Dotted: what every block of the group would have if none were preferred.",
        )
    )
    parts.append(fold("The decision, group by group", _groups(run)))
    if run.num_torn_lines:
        count = f"{run.num_torn_lines} torn line{'s' if run.num_torn_lines > 1 else ''}"
        parts.append(
            html(
                '<p class="soft">{} in {}, left by a killed process, skipped.</p>', count, DECISIONS
            )
        )
    return lines(parts)


def _selection(run: Run, images: Images) -> list[Html]:
    """What a criterion chose, what that cost, and what the simple rule would have kept."""
    found = run.selection
    cost, chose = found.get("num_block_runs"), str(found.get("criterion"))
    parts = [
        html(
            "<p>Chosen by <strong>{}</strong>{}.</p>",
            chose,
            f", for {cost:,} runs of a block on a sample (a backward pass counts as two)"
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
        parts.append(html("<p>The simple rule, ShortGPT's block influence, {}.</p>", text))
    chosen = found.get("kept_blocks") if isinstance(found.get("kept_blocks"), dict) else {}
    for path, history in run.stacks.items():
        alone = [int(block) for block in history.kept[-1].nonzero()[0]]
        if path in chosen and alone != chosen[path]:
            parts.append(
                html(
                    "<p>The search alone, which the figure below shows, would have kept {} of {}; the candidates' trials chose "
                    "otherwise.</p>",
                    _joined(alone),
                    code(path),
                )
            )
    if "scores" in images:
        parts.append(
            image(
                images,
                "scores",
                alt="Each block's value by the criterion, kept ones dark",
                caption="The higher, the more the criterion wants to keep the block.",
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
    """The units of a stack, the highest score first."""
    units, kept = stack.get("units") or [[i] for i in range(len(scores))], set(stack["kept_blocks"])
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rows = [
        [_joined(units[i]), f"{scores[i]:.4g}", "stays" if set(units[i]) <= kept else "left"]
        for i in order
    ]
    return table(["blocks", "score", ""], rows, numeric=range(1, 2))


def _stored_stacks(run: Run) -> dict[str, dict[str, Any]]:
    """Of each stack, kept blocks and groups: from the record, else (no shallow model yet) from the last decision."""
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
    """How much narrower the model became, and from which times the importance of its channels was taken."""
    shown = {
        key: value("width", numbers(width).get(key)) for key in ("dense_hidden_size", "hidden_size")
    }
    intervals = [each for each in width.get("intervals") or [] if isinstance(each, dict)]
    used = sum(each.get("used") is True for each in intervals)
    return html(
        "<p>Width: <strong>{} of {}</strong> channels of the hidden states stay, and of heads and MLPs the same share. Of all parameters "
        "{:.1%} went. The importance of channels was taken from {} of {} intervals of time, whose loss is large enough.</p>",
        shown["hidden_size"], shown["dense_hidden_size"], numbers(width).get("removed", math.nan), used, len(intervals),
    )  # fmt: skip


def _strip(path: str, stack: dict[str, Any]) -> Html:
    kept = set(map(int, stack["kept_blocks"]))

    def block(number: int) -> Html:
        kind, word = ("block kept", "stays") if number in kept else ("block", "left")
        return html('<span class="{0}" title="block {1} {2}">{1}</span>', kind, number, word)

    joined = Html("").join
    groups = joined(
        html('<li class="group">{}</li>', joined(map(block, group))) for group in stack["groups"]
    )
    several = max(map(len, stack.get("units") or [[0]])) > 1
    counted = " units of blocks that only go together" if several else ""
    pattern = (
        f", pattern {stack['pattern']} (N:M keeps N of M{counted})" if stack.get("pattern") else ""
    )
    num_blocks = sum(map(len, stack["groups"]))
    return html(
        "<p>Stack {}: <strong>{} of {}</strong> blocks stay{}. Filled: stays. Struck out: left for good.</p>\n"
        '<ol class="strip">{}</ol>',
        code(path), len(kept), num_blocks, pattern, groups,
    )  # fmt: skip


def _groups(run: Run) -> Html:
    rows = []
    for path, history in run.stacks.items():
        for group in history.groups:
            stay = [block for block in group["members"] if history.kept[-1][block]]
            keeps = f"{group['num_kept']} of {group['num_blocks']}"
            if len(group["members"]) > group["num_blocks"]:
                keeps += " units"
            sure, open_ = (
                f"{100 * group['confidence']:.1f}%",
                value("entropy", group.get("entropy")),
            )
            rows.append([f"{path}: {_joined(group['members'])}", keeps, _joined(stay), sure, open_])
    hint = "Confidence: probability of the choice that was made. Entropy: how open the choice still was; 0 is decided."
    header = ["blocks of the group", "keeps", "stay", "confidence", "entropy (nats)"]
    return html('<p class="soft">{}</p>{}', hint, table(header, rows, numeric=range(3, 5)))


def _joined(numbers_: list[int]) -> str:
    return ", ".join(map(str, numbers_))


def curves(run: Run, images: Images) -> Html:
    parts = []
    for stage in run.curves:
        if (name := f"curves_{stage}") in images:
            parts.append(html("<h3>{}</h3>", stage_label(stage).capitalize()))
            parts.append(
                html('<p class="soft">{}.</p>', STAGES[stage][1].capitalize())
                if stage in STAGES
                else ""
            )
            alt = f"Curves logged during {stage_label(stage)}, over its training steps"
            parts.append(
                image(images, name, alt=alt, caption="Losses thin as logged, bold smoothed.")
            )
    return lines(parts) or missing(f"{LOGS}/<stage>/**/metrics.csv")


def protocol(run: Run, images: Images) -> Html:
    settings = (run.metrics or {}).get("protocol")
    if not settings:
        return missing(f"protocol in {METRICS}")
    shown = {
        key: setting if isinstance(setting, str) else json.dumps(setting)
        for key, setting in settings.items()
    }
    return table(["setting", "value"], [[key, code(setting)] for key, setting in shown.items()])


def record(run: Run, images: Images) -> Html:
    if not run.record:
        return missing(RECORD)
    source = run.record.get("source")
    source = source if isinstance(source, dict) else {"source": source} if source else {}
    rows = [[key, code(content)] for key, content in source.items()]
    origin = (
        html("<h3>Where the weights come from</h3>{}", table(["what", "value"], rows))
        if rows
        else Html("")
    )
    return origin + fold(RECORD, listing(_readable_json(_shortened(run.record))))


def _shortened(content: Any, *, longest: int = 64) -> Any:
    """Without the long lists: the candidate probabilities of one group of 7:14 are 3432 numbers."""
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
    """Indented JSON with innermost lists on one line."""
    innermost = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    return innermost.sub(
        lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", json.dumps(content, indent=2)
    )


def config(run: Run, images: Images) -> Html:
    return fold(CONFIG, listing(run.config)) if run.config else missing(CONFIG)
