"""Which lists of a foreign model are its stacks, and what is left out."""

import pytest
import torch
from torch import nn

from foreign.zoo import COUPLED, ZOO
from pruning.toys import Toy
from tinyfusion_pl.pruning import discover, find_stacks, get_stack, resolve_stacks

FOUND = [name for name, row in ZOO.items() if row.found]
STAGED = [name for name, row in ZOO.items() if not row.found]


def holder(**parts):
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def frozen(module):
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", FOUND)
def test_the_stacks_are_found_unnamed(name):
    model, _, stacks = ZOO[name].build()
    assert list(find_stacks(model)) == stacks
    inside = holder(transformer=model)
    assert list(find_stacks(inside)) == [f"transformer.{path}" for path in stacks]


@pytest.mark.parametrize("name", STAGED)
def test_stages_are_refused_with_their_lists(name):
    model, _, stacks = ZOO[name].build()
    with pytest.raises(ValueError, match="ambiguous.*stages of different width") as error:
        resolve_stacks(model, None)
    assert all(f"'{path}'" in str(error.value) for path in stacks)
    assert resolve_stacks(model, stacks) == stacks


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("hunyuanvideo", "context_embedder.token_refiner.refiner_blocks"),
        ("lumina2", "context_refiner"),
        ("zimage", "noise_refiner"),
        ("wan_vace", "vace_blocks"),
        ("uvit2d", "down_block.res_blocks"),
    ],
)
def test_what_is_left_out_is_reported(name, path):
    model, _, stacks = ZOO[name].build()
    found = discover(model)
    assert path in found.left_out and path in found.describe()
    assert not set(found.left_out) & set(stacks)
    assert resolve_stacks(model, path) == [path]


def test_refiners_as_long_as_the_stack_are_left_out():
    assert list(find_stacks(ZOO["lumina2"].build(num_refiner_layers=4).model)) == ["layers"]


def test_a_longer_frozen_encoder_does_not_win():
    module = holder(text_model=frozen(Toy(9)), denoiser=Toy(4))
    assert list(find_stacks(module)) == ["denoiser.blocks"]
    assert discover(module).left_out == {"text_model.blocks": "frozen"}


def test_a_trainable_text_encoder_by_name_is_left_out():
    found = discover(holder(text_encoder=Toy(9), denoiser=Toy(4)))
    assert list(found.stacks) == ["denoiser.blocks"] and "text_encoder.blocks" in found.left_out


def test_a_wholly_frozen_model_is_found():
    assert list(find_stacks(frozen(Toy(4)))) == ["blocks"]


def test_two_parts_that_train_are_refused_with_both():
    with pytest.raises(
        ValueError, match=r"2 separate parts.*'a.blocks' \(4 Block\), 'b.blocks' \(6 Block\)"
    ):
        find_stacks(holder(a=Toy(4), b=Toy(6)))


def test_lists_of_different_widths_are_refused():
    model = holder(
        **{
            f"layer{i}": nn.ModuleList(Toy(1, dim=d).blocks[0] for _ in range(2))
            for i, d in enumerate((4, 8))
        }
    )
    with pytest.raises(ValueError, match="different widths.*'layer0'.*'layer1'"):
        find_stacks(model)


def test_unequal_unets_of_one_width_are_stages_too():
    model = (
        ZOO["unet2d"]
        .build(
            block_out_channels=(8, 8),
            transformer_layers_per_block=4,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        )
        .model
    )
    with pytest.raises(ValueError, match="'down_blocks.0.attentions.0.transformer_blocks'"):
        find_stacks(model)


def test_a_pattern_mapping_names_its_stacks():
    pattern = {"transformer_blocks": "1:2", "single_transformer_blocks": "2:4"}
    model = ZOO["flux"].build().model
    assert resolve_stacks(model, None, pattern=pattern) == list(pattern)
    held = holder(transformer=model, text_model=Toy(6))
    assert resolve_stacks(held, None, pattern=pattern) == [
        f"transformer.{path}" for path in pattern
    ]
    assert resolve_stacks(held, None, pattern={"text_model.blocks": "1:2"}) == ["text_model.blocks"]
    with pytest.raises(ValueError, match="nothing at 'layers'"):
        resolve_stacks(held, None, pattern={"layers": "1:2"})
    with pytest.raises(ValueError, match="several parts.*'a', 'b'"):
        resolve_stacks(holder(a=Toy(4), b=Toy(4)), None, pattern={"blocks": "1:2"})


def test_compiled_models_keep_their_paths():
    whole = holder(model=torch.compile(Toy(4)))
    in_place = Toy(4)
    for i, block in enumerate(in_place.blocks):
        in_place.blocks[i] = torch.compile(block)
    assert list(find_stacks(whole)) == ["model.blocks"] and list(find_stacks(in_place)) == [
        "blocks"
    ]
    assert list(find_stacks(torch.compile(Toy(4)))) == ["blocks"]
    assert get_stack(whole, "model.blocks") is whole.model._orig_mod.blocks
    assert resolve_stacks(whole, "model._orig_mod.blocks") == ["model.blocks"]


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_models_have_stacks_too(name):
    model, _, stacks = COUPLED[name]()
    assert list(find_stacks(model)) == stacks
