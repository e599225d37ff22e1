"""Many structures in one forward pass: the same outputs as cutting each out, at the cost of a tree."""

import itertools

import pytest
import torch

from foreign.zoo import COUPLED, ZOO, randomize
from pruning.toys import PairToy, Toy
from small_dit_model import small_batch
from tinyfusion_pl.models import create_model
from tinyfusion_pl.pruning.surgery import blocks_removed
from tinyfusion_pl.selection import Calibration, Space, select_blocks
from tinyfusion_pl.selection.candidates import (
    all_structures,
    distinct,
    most_probable_structures,
    num_structures,
    sample_structures,
)
from tinyfusion_pl.selection.structures import lexicographic, open_structures


def toy_calibration(num=5):
    torch.manual_seed(0)
    return Calibration((torch.randn(num, 4, 6), torch.randn(num, 6)), num_samples=num)


def one_by_one(model, space, calibration, structures):
    found = []
    for structure in structures:
        with blocks_removed(model, space.kept_blocks(structure)), torch.no_grad():
            output = model(*calibration.args, **calibration.kwargs)
        found.append(
            calibration.distances(output, torch.arange(calibration.num_samples)).double().mean()
        )
    return torch.stack(found)


def distances(model, space, calibration, structures, **kwargs):
    with open_structures(model, space, **kwargs) as runner:
        return runner.means(calibration, structures), runner.num_block_runs


@pytest.mark.parametrize(
    "model",
    [Toy(depth=6), Toy(depth=6, mode="keyword"), PairToy(depth=6)],
    ids=["positional", "keyword", "pair"],
)
@pytest.mark.parametrize("max_rows", [1000, 12])
def test_every_structure_gives_what_cutting_gives(model, max_rows):
    space, calibration = Space(model, keep=3, stacks="blocks"), toy_calibration()
    structures = all_structures(space)
    found, _ = distances(model.eval(), space, calibration, structures, max_rows=max_rows)
    torch.testing.assert_close(
        found, one_by_one(model, space, calibration, structures), atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("name, options", [("dit", {}), ("uvit_s_2", {"depth": 8})])
def test_units_of_several_blocks_go_together(name, options):
    torch.manual_seed(0)
    model = create_model(
        name,
        **{
            **dict(
                input_size=8, in_channels=4, hidden_size=32, depth=4, num_heads=4, num_classes=10
            ),
            **options,
        },
    )
    randomize(model)
    space, calibration = Space(model.eval(), keep=0.5), Calibration(small_batch(), num_samples=6)
    structures = all_structures(space)
    found, _ = distances(model, space, calibration, structures)
    torch.testing.assert_close(
        found, one_by_one(model, space, calibration, structures), atol=1e-7, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["flux", "sd3", "bert", "auraflow"])
def test_two_streams_and_two_stacks(name):
    model, make_inputs, _ = ZOO[name].build()
    torch.manual_seed(0)
    args, kwargs = make_inputs(2)
    space = Space(model.eval(), keep=0.5)
    calibration = Calibration(args, kwargs, num_samples=2)
    structures = sample_structures(space, torch.zeros(space.num_units), 6)
    found, _ = distances(model, space, calibration, structures)
    torch.testing.assert_close(
        found, one_by_one(model, space, calibration, structures), atol=1e-7, rtol=1e-3
    )


def test_a_block_runs_once_for_each_distinct_prefix():
    model = Toy(depth=8).eval()
    space, calibration = Space(model, pattern="1:2", stacks="blocks"), toy_calibration(3)
    structures = all_structures(space)
    assert len(structures) == 16
    _, cost = distances(model, space, calibration, structures, max_rows=10_000)
    prefixes = {tuple(row[: i + 1]) for row in structures.tolist() for i in range(8) if row[i]}
    # Of prefixes that end in a kept block; a dropped one costs nothing. With the dense model's own
    # pass.
    assert cost == 3 * (len(prefixes) + 8) == 3 * (30 + 8)


def test_each_sample_may_have_structures_of_its_own():
    model = Toy(depth=5).eval()
    space, calibration = Space(model, keep=2, stacks="blocks"), toy_calibration(4)
    structures = sample_structures(space, torch.zeros(5), 12)
    index = torch.arange(4).repeat_interleave(3)
    with open_structures(model, space) as runner:
        runner.ask(calibration)
        found = runner.per_sample(calibration, structures, index)
    for row, (structure, sample) in enumerate(zip(structures, index)):
        with blocks_removed(model, space.kept_blocks(structure)), torch.no_grad():
            output = model(*calibration.rows(sample[None])[0])
        torch.testing.assert_close(found[row], calibration.distances(output, sample[None])[0])


def test_the_model_is_as_it_was():
    model = Toy(depth=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    distances(
        model,
        Space(model, keep=2, stacks="blocks"),
        toy_calibration(),
        torch.ones(1, 4, dtype=torch.bool),
    )
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_inputs_whose_samples_cannot_be_told_apart_are_refused():
    model, make_inputs, _ = ZOO["flux"].build()
    torch.manual_seed(0)
    args, kwargs = make_inputs(2)
    ids = kwargs["img_ids"]
    kwargs = {
        k: v.repeat(len(ids) // 2, *[1] * (v.ndim - 1))
        if isinstance(v, torch.Tensor) and len(v) == 2
        else v
        for k, v in kwargs.items()
    }  # as many samples as the image has tokens
    space = Space(model.eval(), keep=0.5)
    with (
        open_structures(model, space) as runner,
        pytest.raises(ValueError, match="first axis is as long as the batch"),
    ):
        runner.check(Calibration(args, kwargs, num_samples=len(ids)))


def test_order_puts_structures_with_common_prefixes_side_by_side():
    structures = torch.tensor(list(itertools.product([False, True], repeat=4)))[torch.randperm(16)]
    assert structures[lexicographic(structures)].tolist() == sorted(structures.tolist())


# -- spaces -------------------------------------------------------------------
def test_structures_are_counted_listed_and_drawn_by_budget():
    model = Toy(depth=6)
    for options, number in (
        ({"keep": 3}, 20),
        ({"keep": 0.5}, 20),
        ({"pattern": "1:2"}, 8),
        ({"pattern": "2:3"}, 9),
    ):
        space = Space(model, stacks="blocks", **options)
        structures = all_structures(space)
        assert num_structures(space) == number == len(distinct(structures))
        assert {tuple(s.tolist()) for s in sample_structures(space, torch.zeros(6), 300)} == {
            tuple(s.tolist()) for s in structures
        }
        theta = torch.randn(6).double()
        best = most_probable_structures(space, theta, 4)
        values = (structures.double() @ theta).sort(descending=True).values
        torch.testing.assert_close(best.double() @ theta, values[:4])
        assert torch.equal(best[0], space.top(theta))


def test_one_budget_over_two_stacks_and_blocks_that_have_to_stay():
    model, _, _ = ZOO["sd3"].build()
    space = Space(model, keep=2)
    assert space.fixed == {space.num_units - 1}  # its last block gives no text
    assert all_structures(space)[:, -1].all() and num_structures(space) == space.num_units - 1
    model, _, _ = ZOO["flux"].build()
    space = Space(model, keep=3)
    assert len(space.paths) == 2 and len(space.parts) == 1
    assert len({len(space.kept_blocks(s)[space.paths[0]]) for s in all_structures(space)}) > 1


def test_no_stack_loses_all_its_blocks():
    model, _, _ = ZOO["flux"].build()
    space = Space(model, keep=2)
    structures = [
        *all_structures(space),
        *sample_structures(space, torch.zeros(space.num_units), 50),
        *most_probable_structures(space, torch.arange(space.num_units).double(), 5),
        space.top(torch.arange(space.num_units)),
    ]
    assert all(space.is_valid(s) and s.sum() == 2 for s in structures)
    assert all(
        len(kept) == 1
        for kept in space.kept_blocks(space.top(torch.arange(space.num_units))).values()
    )
    with pytest.raises(ValueError, match="keeps no block of"):
        space.check([space.num_units - 2, space.num_units - 1], what="kept")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "neither is given"),
        ({"keep": 2, "pattern": "1:2"}, "both are given"),
        ({"keep": 6}, "from 1 to 5"),
        ({"keep": 0}, "from 1 to 5"),
        ({"keep": 1.5}, "from 1 to 5"),
        ({"keep": 0.01}, "from 1 to 5"),
        ({"keep": "3"}, "a count of units"),
        ({"keep": True}, "a count"),
        ({"pattern": "1:4"}, "does not divide"),
        ({"pattern": "2:2"}, "nothing to choose"),
        ({"keep": {"other": 2}}, "other"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Space(
            Toy(depth=6),
            **{"stacks": None if isinstance(options.get("keep"), dict) else "blocks", **options},
        )


@pytest.mark.parametrize("name", ["flux_controlnet", "chroma"])
def test_models_whose_blocks_are_tied_to_their_place_are_refused(name):
    model, make_inputs, stacks = COUPLED[name]()
    torch.manual_seed(0)
    args, kwargs = make_inputs(2)
    with pytest.raises(ValueError, match="goes to blocks by their place"):
        select_blocks(
            model.eval(),
            lambda n: Calibration(args, kwargs, num_samples=2),
            criterion="first",
            keep=0.5,
            stacks=stacks,
            num_samples=2,
        )


def test_rows_of_a_search_are_run_in_parts_of_max_rows():
    model = Toy(depth=5).eval()
    space, calibration = Space(model, keep=2, stacks="blocks"), toy_calibration(4)
    structures, index = (
        sample_structures(space, torch.zeros(5), 12),
        torch.arange(4).repeat_interleave(3),
    )
    found = []
    for max_rows in (100, 5):
        with open_structures(model, space, max_rows=max_rows) as runner:
            found.append(runner.per_sample(runner.ask(calibration), structures, index))
    torch.testing.assert_close(*found)
