"""Linear maps in place of removed runs: fitted as numpy does it, part of their block, saved and loaded with it."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from pruning.toys import AttnToy, Toy, TwoStreamToy
from tinyfusion_pl import create_model
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.distill import restore
from tinyfusion_pl.models import export_model, load_pretrained, load_shallow, save_shallow
from tinyfusion_pl.pruning import (
    Decision,
    DepthGates,
    GroupDecision,
    StackDecision,
    find_stacks,
    remove_blocks,
    remove_gates,
)
from tinyfusion_pl.pruning.run_fitting import fill_maps, fit_maps, stream_widths
from tinyfusion_pl.pruning.run_maps import RunMap, attach_maps, get_maps, maps_for, removed_runs

KEPT = {"blocks": [1, 2, 5]}
DECISION = Decision(
    {"blocks": StackDecision("3:7", 7, [1, 2, 5], [], [GroupDecision(0, 3, 7, [1, 2, 5])])}
)
MAPS = [
    RunMap("blocks.0", "before", 16),
    RunMap("blocks.1", "after", 16),
    RunMap("blocks.2", "after", 16),
]


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = create_model(
        "dit", input_size=4, in_channels=2, hidden_size=16, depth=7, num_heads=2, num_classes=5
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def calls(num=2):
    g = torch.Generator().manual_seed(1)
    return [
        ((torch.randn(8, 2, 4, 4, generator=g), torch.arange(8) * 100, torch.arange(8) % 5), {})
        for _ in range(num)
    ]


def mapped(teacher, ridge=1e-3):
    shallow = attach_maps(
        remove_blocks(copy.deepcopy(teacher), KEPT), maps_for(KEPT, {"blocks": 7}, {"blocks": 16})
    )
    return fill_maps(shallow, KEPT, fit_maps(teacher, KEPT, calls(), ridge=ridge))


def states_of(teacher, args):
    """Hidden states before block 0, 1, ..., and after the last, by calling the blocks."""
    x, t, y = args
    with torch.no_grad():
        c = teacher.t_embedder(t) + teacher.y_embedder(y)
        states = [teacher.x_embedder(x) + teacher.pos_embed]
        for block in teacher.blocks:
            states.append(block(states[-1], c))
    return states, c


def test_runs_are_what_lies_between_kept_blocks():
    assert removed_runs([1, 2, 5], 7) == [(0, 0), (3, 4), (6, 6)] and removed_runs([0, 1], 2) == []
    assert maps_for(KEPT, {"blocks": 7}, {"blocks": 16}) == MAPS


def test_the_fit_is_the_ridge_regression_of_what_a_run_adds(teacher):
    shallow = mapped(teacher)
    states = [
        torch.cat(each).flatten(0, 1).double().numpy()
        for each in zip(*(states_of(teacher, args)[0] for args, _ in calls()))
    ]
    for (first, last), linear in (((0, 0), shallow.blocks[0].run_before), ((3, 4), shallow.blocks[1].run_after),
                                  ((6, 6), shallow.blocks[2].run_after)):  # fmt: skip
        x, y = states[first], states[last + 1] - states[first]
        penalty = np.sqrt(1e-3 * x.var(0).mean() * len(x))
        left = np.vstack(
            [
                np.hstack([x, np.ones((len(x), 1))]),
                np.hstack([penalty * np.eye(16), np.zeros((16, 1))]),
            ]
        )
        solution = np.linalg.lstsq(left, np.vstack([y, np.zeros((16, 16))]), rcond=None)[0]
        np.testing.assert_allclose(
            linear.weight.detach().numpy(), solution[:16].T, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(linear.bias.detach().numpy(), solution[16], rtol=1e-3, atol=1e-5)


def test_a_mapped_model_is_the_stack_with_maps_in_the_runs_places(teacher):
    shallow, ((x, t, y), _) = mapped(teacher), calls(1)[0]
    with torch.no_grad():
        states, c = states_of(teacher, (x, t, y))
        h = states[0]
        maps = [
            shallow.blocks[0].run_before,
            shallow.blocks[1].run_after,
            shallow.blocks[2].run_after,
        ]
        for before, block, after in ((maps[0], teacher.blocks[1], None), (None, teacher.blocks[2], maps[1]),
                                     (None, teacher.blocks[5], maps[2])):  # fmt: skip
            h = h if before is None else h + h @ before.weight.T + before.bias
            h = block(h, c)
            h = h if after is None else h + h @ after.weight.T + after.bias
        found = []
        shallow.final_layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        shallow(x, t, y)
        shallow(x=x, t=t, y=y)
    torch.testing.assert_close(found[0], h)


def test_maps_bring_the_cut_nearer_to_the_teacher(teacher):
    bare, args = (
        remove_blocks(copy.deepcopy(teacher), KEPT),
        calls(3)[2][0],
    )  # of samples that were not fitted
    with torch.no_grad():
        target = teacher(*args)
        plain, filled = (
            (model(*args) - target).square().mean() for model in (bare, mapped(teacher))
        )
    assert filled < 0.5 * plain


def test_stacks_keep_their_depth_and_maps_are_parameters(teacher):
    shallow, bare = mapped(teacher), remove_blocks(copy.deepcopy(teacher), KEPT)
    assert {path: len(stack) for path, stack in find_stacks(shallow).items()} == {
        "blocks": 3
    } and shallow.config["depth"] == 3
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shallow, bare)]
    assert (
        sizes[0] - sizes[1] == 3 * (16 * 16 + 16)
        and get_maps(shallow) == MAPS
        and get_maps(bare) == []
    )
    shallow(*calls(1)[0][0]).square().mean().backward()
    assert all(p.grad is not None for name, p in shallow.named_parameters() if "run_" in name)


def test_copies_have_maps_of_their_own(teacher):
    shallow, args = mapped(teacher), calls(1)[0][0]
    before, copied = shallow(*args), copy.deepcopy(shallow)
    assert torch.equal(copied(*args), before)
    nn.init.ones_(copied.blocks[1].run_after.weight)
    assert torch.equal(shallow(*args), before) and not torch.equal(copied(*args), before)


def test_gates_treat_a_map_as_part_of_its_block(teacher):
    shallow, args = mapped(teacher), calls(1)[0][0]
    plain, whole = shallow(*args), copy.deepcopy(shallow)
    gates, seen = DepthGates(shallow, {"blocks": "2:3"}, average_decay=0.0), []
    for candidate in range(3):
        with torch.no_grad():
            gates.logits()[0].copy_(torch.eye(3)[candidate] * 9)
        gates.update_average()
        kept = gates.decide().kept_blocks
        seen.append(kept["blocks"])
        torch.testing.assert_close(
            shallow.eval()(*args), remove_blocks(copy.deepcopy(whole), kept)(*args)
        )
    assert sorted(seen) == [[0, 1], [0, 2], [1, 2]] and get_maps(shallow) == MAPS
    remove_gates(shallow)
    assert torch.equal(shallow(*args), plain)


def test_a_mapped_model_is_saved_and_loaded(teacher, tmp_path):
    shallow, args = mapped(teacher), calls(1)[0][0]
    folder = save_shallow(tmp_path / "a", shallow, {"stacks": DECISION.as_dict()})
    record = json.loads((folder / "record.json").read_text())
    assert record["run_maps"][0] == {"module": "blocks.0", "position": "before", "width": 16}
    for loaded in (
        load_shallow(folder),
        load_pretrained(folder),
        load_shallow(folder, model=teacher),
    ):
        assert get_maps(loaded) == MAPS and torch.equal(loaded(*args), shallow(*args))
    bare = save_shallow(
        tmp_path / "b", remove_blocks(copy.deepcopy(teacher), KEPT), {"stacks": DECISION.as_dict()}
    )
    assert "run_maps" not in json.loads((bare / "record.json").read_text())


@pytest.mark.parametrize(
    "entry",
    [{"width": 17}, {"width": -1}, {"position": "beside"}, {"module": "blocks.9"}, {"module": 5}],
    ids=str,
)
def test_a_record_that_states_other_maps_is_refused(teacher, tmp_path, entry):
    folder = save_shallow(tmp_path, mapped(teacher), {"stacks": DECISION.as_dict()})
    record = json.loads((folder / "record.json").read_text())
    record["run_maps"][0].update(entry)
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"run_maps\[0\]"):
        load_shallow(folder)


def test_other_programs_formats_are_refused(teacher, tmp_path):
    for path in ("a.pt", "a.safetensors", "a"):
        with pytest.raises(ValueError, match="linear maps in place of removed blocks"):
            export_model(mapped(teacher), tmp_path / path)


def test_a_restored_depth_keeps_the_maps_of_the_blocks_that_stay(teacher, tmp_path):
    shallow, args = mapped(teacher), calls(1)[0][0]
    model, decision = restore(shallow, teacher, DECISION, [("blocks", 1)])
    assert get_maps(model) == [RunMap("blocks.0", "before", 16), RunMap("blocks.4", "after", 16)]
    assert torch.equal(model.blocks[4].run_after.weight, shallow.blocks[2].run_after.weight)
    loaded = load_shallow(save_shallow(tmp_path, model, {"stacks": decision.as_dict()}))
    assert torch.equal(loaded(*args), model(*args))


class OuterResidual(Toy):
    def forward(self, x, c=None):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h, c)
        return self.head(h)


def test_widths_are_those_of_the_stream(teacher):
    assert stream_widths(teacher, ["blocks"], calls(1)[0]) == {"blocks": 16}
    toy = Toy(mode="keyword")
    x = torch.randn(3, 5, 6)
    assert stream_widths(toy, ["blocks"], ((x,), {})) == {"blocks": 6}
    kept = {"blocks": [0, 3]}
    shallow = attach_maps(
        remove_blocks(copy.deepcopy(toy), kept), maps_for(kept, {"blocks": 4}, {"blocks": 6})
    )
    fill_maps(shallow, kept, fit_maps(toy, kept, [((x,), {})]))
    assert shallow.blocks[0].run_after.weight.any() and not torch.equal(
        shallow(x), remove_blocks(copy.deepcopy(toy), kept)(x)
    )


@pytest.mark.parametrize(
    "model, path, args, message",
    [
        (
            TwoStreamToy(),
            "transformer_blocks",
            (torch.randn(2, 5, 6), torch.randn(2, 6)),
            "returns a tuple",
        ),
        (AttnToy(), "blocks", (torch.randn(2, 5, 6),), "returns a tuple"),
        (
            OuterResidual(),
            "blocks",
            (torch.randn(2, 5, 6),),
            "block 1 does not take what block 0 returned",
        ),
        (Toy(), "blocks", (torch.randn(2, 6),), "where its first argument"),
        (
            create_model(
                "uvit_s_2", depth=4, hidden_size=16, num_heads=2, input_size=4, num_classes=5
            ),
            "in_blocks+out_blocks",
            (torch.randn(2, 4, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long)),
            r"only go together, as \[0, 3\]",
        ),
        (
            create_model("udit_s", input_size=8, hidden_size=16, num_heads=1, num_classes=5),
            "latent",
            (torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)),
            "where its first argument",
        ),
    ],
    ids=["two-streams", "extras", "residual-outside", "no-tokens", "mirrored", "images"],
)
def test_blocks_that_are_no_chain_of_tokens_are_refused(model, path, args, message):
    with pytest.raises(ValueError, match=message) as error:
        stream_widths(model, [path], (args, {}))
    assert "recover.replace=null" in str(error.value)
