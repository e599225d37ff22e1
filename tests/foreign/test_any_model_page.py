"""Every row of the table in docs/any_model.md is what running that model gives.

``TINYFUSION_WRITE_DOCS=1 pytest tests/foreign/test_any_model_page.py`` writes the tables anew.
"""

import copy
import os
import re
from pathlib import Path

import pytest
import torch

from foreign.zoo import COUPLED, ZOO, of, sample_of
from tinyfusion_pl.models import load_shallow, save_shallow
from tinyfusion_pl.pruning import DepthGates, find_stacks, get_stack, remove_blocks, remove_gates
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.verification import earliest_drops, verify

PAGE = Path(__file__).parents[2] / "docs" / "any_model.md"
WRITE = bool(os.environ.get("TINYFUSION_WRITE_DOCS"))
ROUNDING = 1e-6
rows: dict[str, str] = {}


def code(names):
    return ", ".join(f"`{name}`" for name in names)


def class_of(name, model):
    extra = {"sd35": " (dual attention)", "encoder_sequence_first": "(batch_first=False)",
             "encoder_batch_first": "(batch_first=True)"}  # fmt: skip
    library = "timm " if ZOO[name].library == "timm" else ""
    return f"{library}`{type(model).__name__}{extra.get(name, '')}`"


def found(model):
    try:
        return list(find_stacks(model))
    except ValueError:  # ambiguous: to be named
        return []


def structure_of(gates):
    return {g.path: g.get_blocks(earliest_drops(g)) for g in gates.stacks}


def gated_against_cut(model, gates, make_inputs):
    """The largest difference between dropping blocks by gates and a model without them."""
    args, kwargs = make_inputs(3)
    with (
        quiet(model, seed=1),
        gates.masks.forced({g.path: earliest_drops(g) for g in gates.stacks}),
    ):
        by_gates = sample_of(model(*args, **kwargs))
    bare = copy.deepcopy(model)
    remove_gates(bare)
    cut = remove_blocks(bare, structure_of(gates))
    with quiet(cut, seed=1):
        return cut, float((by_gates - sample_of(cut(*args, **kwargs))).abs().max())


def reopens(name, cut, dense, gates, make_inputs, folder):
    """How the saved shallow model opens, its output equal."""
    args, kwargs = make_inputs(2)
    kept = structure_of(gates)
    stacks = {path: {"pattern": "1:2", "num_blocks": len(get_stack(dense, path)), "kept_blocks": kept[path], "groups": [],
                     "block_probabilities": []} for path in kept}  # fmt: skip
    save_shallow(folder, cut, {"stacks": stacks})
    if (folder / "config.json").exists():
        opened, how = (
            of(ZOO[name].library, type(cut).__name__).from_pretrained(folder),
            "`from_pretrained`",
        )
    else:
        opened, how = load_shallow(folder, model=dense), "`load_shallow(path, model=dense)`"
    outputs = []
    for model in (cut, opened):
        with quiet(model, seed=1), torch.no_grad():
            outputs.append(sample_of(model(*args, **kwargs)))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    return how


def measured_row(name, folder):
    model, make_inputs, stacks = ZOO[name].build()
    dense, by_search = copy.deepcopy(model), found(model)
    model.train()
    pattern = {
        p: "1:2" if len(get_stack(model, p)) % 2 == 0 else f"1:{len(get_stack(model, p))}"
        for p in stacks
    }
    gates = DepthGates(model, pattern, stacks=stacks)
    cut, difference = gated_against_cut(model, gates, make_inputs)
    verify(model, gates, *make_inputs(2))
    plans = {
        g.path: next(
            p for each in gates.gated_forwards if each.gates is g for p in each.plans.values()
        )
        for g in gates.stacks
    }
    streams = dict.fromkeys(code(plan.streams.names) for plan in plans.values())
    plain = dict.fromkeys(plan.plain_because for plan in plans.values() if plan.plain_because)
    assert difference <= ROUNDING
    assert not by_search or by_search == stacks
    cells = [class_of(name, model), code(stacks) + ("" if by_search else " (named)"), "; ".join(streams),
             f"plain: {'; '.join(plain)}" if plain else "gathered", "0" if difference == 0 else f"< {ROUNDING:g}",
             reopens(name, cut, dense, gates, make_inputs, folder)]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def refusal_row(name):
    model, make_inputs, stacks = (
        COUPLED[name]() if callable(COUPLED[name]) else COUPLED[name].build()
    )
    model.train()
    gates = DepthGates(model, "1:2", stacks=stacks)
    with pytest.raises(ValueError, match="cannot be pruned as it is called") as error:
        verify(model, gates, *make_inputs(2))
    where, why = re.search(
        r"Stack '([^']*)'.* cut out of \w+, (.*?)(?: So the shallow|$)", str(error.value)
    ).groups()
    why = re.sub(r"the outputs differ by .* \(they reach [^)]*\); ", "", why)
    return f"| {name.replace('_', ' ')} | `{type(model).__name__}` | `{where}` | {why} |"


def check_or_write(row, name):
    rows[name] = row
    if not WRITE:
        assert row in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ZOO)
def test_the_row_is_what_running_gives(name, tmp_path):
    check_or_write(measured_row(name, tmp_path), name)


@pytest.mark.parametrize("name", COUPLED)
def test_the_refusal_is_what_running_gives(name):
    check_or_write(refusal_row(name), name)


def test_the_page_has_these_rows_only():
    page = PAGE.read_text(encoding="utf-8")
    for table, names in (("models", ZOO), ("refusals", COUPLED)):
        before, start, rest = page.partition(f"<!-- {table} -->\n")
        body, end, after = rest.partition(f"<!-- end of {table} -->\n")
        lines = body.splitlines()
        if WRITE and all(name in rows for name in names):
            lines = [*lines[:2], *(rows[name] for name in names)]
            page = "".join([before, start, *(f"{line}\n" for line in lines), end, after])
            PAGE.write_text(page, encoding="utf-8")
        assert len(lines) == 2 + len(names)
