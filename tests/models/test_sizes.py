"""Parameter counts: those published, to within 1M, and those that docs/models.md states, to the digit."""

import re
from pathlib import Path

import pytest
import torch

from tinyfusion_pl.models import create_model, list_models
from tinyfusion_pl.pruning import get_stack

PUBLISHED = {  # model, arguments -> millions of parameters
    ("DiT-XL/2", ()): 675,
    ("DiT-XL/2", (("depth", 19),)): 459,
    ("DiT-XL/2", (("depth", 14),)): 340,
    ("DiT-XL/2", (("depth", 7),)): 173,
    ("DiT-L/2", ()): 458,
    ("DiT-B/2", ()): 130,
    ("SiT-XL/2", ()): 675,
    ("MAR-B", ()): 208,
    ("MAR-L", ()): 479,
    ("MAR-L", (("decoder_depth", 8), ("encoder_depth", 8))): 277,
    ("U-ViT-H/2", ()): 501,
    ("U-ViT-L/2", ()): 287,
    ("U-DiT-L", ()): 916,
    ("U-DiT-L", (("merged", True),)): 810,
    ("U-DiT-B", ()): 231,
    ("U-DiT-B", (("merged", True),)): 204,
}
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([\w/-]+)` \| (\d+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def on_meta(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


@pytest.mark.parametrize(("model", "count"), PUBLISHED.items(), ids=str)
def test_parameter_counts_are_the_published_ones_to_within_a_million(model, count):
    name, arguments = model
    assert millions(on_meta(name, **dict(arguments))) == pytest.approx(count, abs=1)


@pytest.mark.parametrize(("name", "published", "depth", "count"), ROWS)
def test_the_page_states_depth_and_parameters_of_each_model(name, published, depth, count):
    model = on_meta(published)
    assert model.model_name == name
    assert sum(len(get_stack(model, path)) for path in model.STACKS) == int(depth)
    assert f"{millions(model):.1f}" == count


def test_the_page_has_a_row_for_each_size():
    sizes = {
        re.sub(r"_[248]$", "", name)
        for name in list_models()
        if name not in ("dit", "dit_digits", "dit_digits_deep", "dit_cifar10")
    }
    assert {re.sub(r"_2$", "", name) for name, *_ in ROWS} == sizes


def test_the_page_states_what_pruning_leaves():
    for depth, count in re.findall(r"(?:with|blocks has) (\d+)(?: blocks has)? ([\d.]+)M", PAGE):
        assert f"{millions(on_meta('dit_xl_2', depth=int(depth))):.1f}" == count
