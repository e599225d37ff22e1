import copy
import json

import pytest
import torch

from goldens_util import CASES, assert_near, golden_files, load, part
from models.toy_training import learn_masks, stirred
from tinyfusion_pl.distill import feature_loss
from tinyfusion_pl.models import UViT, create_model, load_shallow, save_shallow
from tinyfusion_pl.modules import Recovery
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import DepthGates, remove_blocks, remove_gates
from tinyfusion_pl.pruning.gates import find_gates

STACK = "in_blocks+out_blocks"
SMALL = {
    "input_size": 8,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def small(**overrides):
    return stirred(UViT(**{**SMALL, **overrides}))


def batch(n=3):
    return (
        torch.randn(n, 2, 8, 8),
        torch.tensor([0, 500, 999, 3, 4])[:n],
        torch.tensor([0, 4, 5, 1, 2])[:n],
    )


def of_golden(golden):
    """A U-ViT of the golden's sizes with its weights: the label table of the golden has no null row."""
    state = part(golden, "weights")
    hidden_size, in_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    model = UViT(
        input_size=golden["x"].shape[-1],
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=2 * len({k.split(".")[1] for k in state if k.startswith("in_blocks.")}),
        num_heads=CASES["config"]["heads"],
        mlp_ratio=state["mid_block.mlp.fc1.weight"].shape[0] / hidden_size,
        num_classes=len(state["label_emb.weight"]),
        class_dropout_prob=0.0,
        final_conv="final_layer.weight" in state,
    )
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("uvit*"))
def test_against_reference_output(file):
    golden = load(file)
    with torch.no_grad():
        assert_near(
            of_golden(golden)(golden["x"], golden["t"], golden["y"]), golden["output"], 1e-5
        )


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("uvit*"))
def test_bf16_autocast_stays_within_2_percent_of_the_reference(file):
    golden = load(file)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = of_golden(golden)(golden["x"], golden["t"], golden["y"])
    assert output.dtype == golden["x"].dtype and not torch.equal(output, golden["output"])
    assert_near(output, golden["output"], 2e-2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("U-ViT-S/2", 44), ("U-ViT-M/2", 131), ("U-ViT-L/2", 287), ("uvit_h_2", 501)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert model.label_emb.num_embeddings == 1001 and not list(model.final_layer.parameters())
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


@pytest.mark.parametrize(
    ("name", "num_tokens", "channels"),
    [("U-ViT-M/4", 256, 3), ("U-ViT-L/4", 256, 4), ("uvit_h_4", 256, 4)],
)
def test_patch_4_is_that_of_64_pixels_or_latents(name, num_tokens, channels):
    with torch.device("meta"):
        model = create_model(name, depth=2)
    assert model.pos_embed.shape[1] == 2 + num_tokens and model.patch_embed.proj.weight.shape[
        1:
    ] == (channels, 4, 4)


def test_config_is_json_and_rebuilds_the_model():
    model = small(
        final_conv=True, timestep_offset=1.0, class_dropout_prob=0.0, mlp_ratio=2.0, patch_size=4
    )
    again = UViT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x, t, _ = batch()
    y = torch.tensor([0, 1, 4])
    assert torch.equal(model(x, t, y), again(x, t, y)) and not again.has_null_label


def test_the_timestep_offset_is_added_to_t():
    plain, offset, (x, t, y) = small(), UViT(**SMALL, timestep_offset=1), batch()
    offset.load_state_dict(plain.state_dict())
    assert torch.equal(offset(x, t, y), plain(x, t + 1, y)) and not torch.equal(
        offset(x, t, y), plain(x, t, y)
    )


def test_compiles_in_one_graph_to_the_same_numbers():
    model, (x, t, y) = small().eval(), batch()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(x, t, y), model(x, t, y)
        )


def test_activation_checkpointing_gives_the_same_gradients():
    plain, (x, t, y) = small(), batch()
    again = UViT(**SMALL, activation_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    calls = []
    again.mid_block.attn.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, again):
        model(x, t, y).square().sum().backward()
    assert len(calls) == 2  # recomputed
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert_near(q.grad, p.grad, 1e-5, name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"depth": 5}, "depth is 5; give an even number"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": 3}, "input_size 8 .* patch_size 3"),
        ({"num_heads": 3}, r"hidden_size 16 .* num_heads \(3\)"),
        ({"class_dropout_prob": -1}, "class_dropout_prob is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        UViT(**{**SMALL, **wrong})


# -- pruning in mirrored pairs ---------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 5])  # of the six ways to keep two of the four pairs
def test_the_pruned_model_computes_what_the_gated_one_decided(keep, checkpointing):
    model, (x, t, y) = small(depth=8, activation_checkpointing=checkpointing), batch()
    gates = DepthGates(model, "2:4", average_decay=0.0)
    with torch.no_grad():
        gates.logits()[0][keep] = 1.0
    gates.update_average()
    kept = gates.decide().kept_blocks[STACK]
    assert kept == sorted(7 - i for i in kept) and len(kept) == 4
    expected = model.eval()(x, t, y)
    pruned = copy.deepcopy(model)
    remove_gates(pruned)
    remove_blocks(pruned, {STACK: kept})
    torch.testing.assert_close(pruned(x, t, y), expected, rtol=0, atol=0)
    plain = UViT(**pruned.config)  # an ordinary shallow U-ViT
    plain.load_state_dict(pruned.state_dict())
    assert plain.config["depth"] == 4
    torch.testing.assert_close(plain.eval()(x, t, y), expected, rtol=0, atol=0)


def test_gates_give_the_same_gradients_with_recomputed_activations():
    grads = []
    state = small(depth=4).state_dict()
    x, t, y = batch(5)
    for checkpointing in (False, True):
        model = UViT(**SMALL, activation_checkpointing=checkpointing)
        model.load_state_dict(state)
        gates = DepthGates(model, "1:2", tau=1.0)
        torch.manual_seed(3)
        gates.redraw()
        model(x, t, y).square().sum().backward()
        grads.append([p.grad for p in (*gates.logits(), *model.parameters())])
    assert grads[0][0].abs().max() > 0
    for a, b in zip(*grads, strict=True):
        assert_near(b, a, 1e-5)


def test_mask_learning_leaves_a_shallow_model_that_loads(tmp_path):
    dense = small(depth=8)
    original = copy.deepcopy(dense)
    dense.model_name = "uvit_s_2"
    callback = learn_masks(dense, "1:2", tmp_path, learn_sigma=False, weight_update="lora")
    assert all((logits != 0.02).any() for logits in callback.gates.logits())
    ((path, decision),) = callback.decision.stacks.items()
    assert (
        path == STACK
        and decision.units == [[0, 7], [1, 6], [2, 5], [3, 4]]
        and decision.pattern == "1:2"
    )
    shallow = load_shallow(tmp_path / "shallow")
    assert (
        len(shallow.in_blocks) == len(shallow.out_blocks) == 2
        and shallow.config["depth"] == 4
        and find_gates(shallow) is None
    )
    x, t, y = batch()
    with torch.no_grad():
        expected = remove_blocks(original, {STACK: decision.kept_blocks}).eval()(x, t, y)
        assert torch.equal(shallow(x, t, y), expected)
    again = load_shallow(
        save_shallow(tmp_path / "again", shallow, {"stacks": callback.decision.as_dict()})
    )
    assert torch.equal(again(x, t, y), expected)


def test_recovery_pairs_layers_of_both_halves():
    teacher, objective = small(depth=8), GaussianDiffusion(learn_sigma=False)
    gates = DepthGates(copy.deepcopy(teacher), "2:4")
    student = remove_blocks(
        copy.deepcopy(teacher), gates.decide().kept_blocks
    )  # pairs 0 and 1 of the four
    module = Recovery(student, teacher=teacher, decision=gates.decide(), objective=objective)
    assert module.pairs == {STACK: [(1, 3), (3, 7)]}
    x, _, y = batch()
    draw = objective.draw(x)
    losses = module.distillation.losses(
        student, teacher, objective, draw, y, pairs=module.pairs, feature_weight=1.0
    )
    hidden = {}
    for name, model, blocks in (
        ("s", student, {1: student.in_blocks[1], 3: student.out_blocks[1]}),
        ("t", teacher, {3: teacher.in_blocks[3], 7: teacher.out_blocks[3]}),
    ):
        for i, block in blocks.items():
            block.register_forward_hook(
                lambda m, args, out, key=(name, i): hidden.__setitem__(key, out)
            )
        model(draw.x_t, draw.t, y)
    expected = torch.stack(
        [feature_loss(hidden["s", s], hidden["t", t]) for s, t in module.pairs[STACK]]
    ).mean(0)
    torch.testing.assert_close(losses["loss_feature"], expected)
    assert expected.min() > 0


def test_a_pattern_that_does_not_divide_the_pairs_says_that_it_counts_pairs(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"in_blocks\+out_blocks', where a pattern counts 4 units .* '1:3' covers 3",
    ):
        learn_masks(small(depth=8), "1:3", tmp_path, learn_sigma=False)
