import copy
import json

import pytest
import torch

from goldens_util import CASES, assert_near, golden_files, load, part
from models.toy_training import learn_masks, stirred
from tinyfusion_pl.models import UDiT, create_model, load_shallow, merged, save_shallow
from tinyfusion_pl.models.udit import rotate, rotation
from tinyfusion_pl.pruning import DepthGates, find_stacks, remove_blocks, remove_gates

DEPTHS = (
    "depth_encoder_1",
    "depth_encoder_2",
    "depth_latent",
    "depth_decoder_2",
    "depth_decoder_1",
)
STAGES = ["encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1"]
SMALL = {
    "input_size": 8,
    "in_channels": 2,
    "hidden_size": 8,
    "num_heads": 2,
    "num_classes": 5,
    **dict.fromkeys(DEPTHS, 1),
}


def small(**overrides):
    return stirred(UDiT(**{**SMALL, **overrides}))


def batch(n=3, size=8):
    return (
        torch.randn(n, 2, size, size),
        torch.tensor([0, 500, 999])[:n],
        torch.tensor([0, 4, 5])[:n],
    )


def of_golden(golden):
    """A U-DiT of the golden's sizes with its weights: where cases.json does not say otherwise, its label tables have no null row."""
    state = part(golden, "weights")
    hidden_size, in_channels = state["x_embedder.proj.weight"].shape[:2]
    num_rows = len(state["y_embedder_1.embedding_table.weight"])
    num_classes = CASES.get("udit", {}).get("ncls", num_rows)
    depths = {
        depth: len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")})
        for depth, stage in zip(DEPTHS, STAGES)
    }
    model = UDiT(
        input_size=golden["x"].shape[-1],
        in_channels=in_channels,
        hidden_size=hidden_size,
        **depths,
        num_heads=len(state["latent.0.attn1.logit_scale"]),
        num_classes=num_classes,
        class_dropout_prob=float(num_rows > num_classes),
        mlp_ratio=len(state["latent.0.mlp1.dwconv.0.bias"]) / (4 * hidden_size),
        learn_sigma=golden["output"].shape[1] == 2 * in_channels,
    )
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.golden
@pytest.mark.parametrize("form", [lambda model: model, merged], ids=["published", "merged"])
@pytest.mark.parametrize("file", golden_files("udit*"))
def test_against_reference_output(file, form):
    golden = load(file)
    with torch.no_grad():
        assert_near(
            form(of_golden(golden))(golden["x"], golden["t"], golden["y"]), golden["output"], 1e-5
        )


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("udit*"))
def test_bf16_autocast_stays_within_2_percent_of_the_reference(file):
    golden = load(file)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = of_golden(golden)(golden["x"], golden["t"], golden["y"])
    assert output.dtype == golden["x"].dtype and not torch.equal(output, golden["output"])
    assert_near(output, golden["output"], 2e-2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("U-DiT-L", {False: 916, True: 810}),
        ("udit_b", {False: 231, True: 204}),
        ("U-DiT-S", {False: 59, True: 52}),
    ],
)
@pytest.mark.parametrize("form", [False, True], ids=["published", "merged"])
def test_parameter_counts_are_the_published_ones(name, millions, form):
    with torch.device("meta"):
        model = create_model(name, merged=form)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions[form]) < 1


def test_rotary_products_depend_on_the_distance_in_rows_and_in_columns_only():
    grid, by = 5, rotation(5, 12, torch.device("cpu"))
    q, k = torch.randn(12), torch.randn(12)
    products = rotate(q.expand(25, 12), by) @ rotate(k.expand(25, 12), by).T  # (T, T)
    products = products.view(grid, grid, grid, grid)
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2])
    assert not torch.allclose(products[0, 1, 0, 0], products[1, 0, 0, 0]) and by.shape == (
        1,
        2,
        25,
        6,
    )
    assert torch.equal(rotate(q[None].expand(25, 12), by)[0], q)


def test_merging_changes_no_model_and_no_output_but_the_number_of_parameters():
    model, (x, t, y) = small(depth_latent=2).eval(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.model_name = "udit_s"
    one = merged(model)
    with torch.no_grad():
        assert_near(one(x, t, y), model(x, t, y), 1e-5)
    assert (
        one.config == {**model.config, "merged": True}
        and one.model_name == "udit_s"
        and not one.training
    )
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
        assert all(
            torch.equal(value, before[k]) for k, value in model.state_dict().items()
        )  # no memory in common
    twice = merged(one)
    assert twice is not one and twice.state_dict().keys() == one.state_dict().keys()


def test_config_is_json_and_rebuilds_the_model():
    model = small(learn_sigma=False, class_dropout_prob=0.0, mlp_ratio=3.0, depth_decoder_1=2)
    again = UDiT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x, t, _ = batch()
    y = torch.tensor([0, 1, 4])
    assert (
        torch.equal(model(x, t, y), again(x, t, y))
        and not again.has_null_label
        and again(x, t, y).shape == x.shape
    )


def test_a_new_model_is_the_identity_in_every_block_and_gives_zero():
    model, (x, t, y) = UDiT(**SMALL), batch()
    assert torch.equal(model(x, t, y), torch.zeros(3, 4, 8, 8))
    features = torch.randn(3, 32, 2, 2)
    assert torch.equal(model.stage(model.latent, features, torch.randn(3, 32)), features)


def test_compiles_in_one_graph_to_the_same_numbers():
    model, (x, t, y) = small().eval(), batch()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(x, t, y), model(x, t, y)
        )


def test_bfloat16_weights_give_the_same_to_their_precision():
    model, (x, t, y) = small().eval(), batch()
    with torch.no_grad():
        expected = model(x, t, y)
        assert_near(model.bfloat16()(x, t, y), expected, 5e-2)


def test_activation_checkpointing_gives_the_same_gradients():
    plain, (x, t, y) = small(), batch()
    again = UDiT(**SMALL, activation_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    calls = []
    again.latent[0].attn2.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, again):
        model(x, t, y).square().sum().backward()
    assert len(calls) == 2  # recomputed
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert_near(q.grad, p.grad, 1e-5, name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_size": 12}, "input_size 12 is not a multiple of 8"),
        ({"depth_latent": 0}, "depth_latent=0"),
        ({"num_heads": 4}, r"hidden_size 8 .* 4 times num_heads \(4\)"),
        ({"class_dropout_prob": 2}, "class_dropout_prob is 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        UDiT(**{**SMALL, **wrong})


def test_latents_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(16, 16\); this U-DiT has input_size 8"):
        small()(*batch(size=16))


# -- pruning by stage ------------------------------------------------------------------------------
def test_the_stages_are_the_stacks_and_each_keeps_its_own_depth():
    model = small(depth_encoder_2=3, depth_latent=4)
    assert list(find_stacks(model)) == STAGES
    remove_blocks(model, {"encoder_level_2": [1], "latent": [0, 3]})
    assert [model.config[name] for name in DEPTHS] == [1, 1, 2, 1, 1]
    again = UDiT(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*(one := batch())), model(*one))


def test_the_pruned_model_computes_what_the_gated_one_decided():
    model, (x, t, y) = small(depth_encoder_1=2, depth_latent=4), batch()
    gates = DepthGates(model, {"encoder_level_1": "1:2", "latent": "2:4"}, average_decay=0.0)
    with torch.no_grad():
        gates.stacks[0].logits[0][1] = 1.0
        gates.stacks[1].logits[0][4] = 1.0
    gates.update_average()
    decision = gates.decide()
    assert decision.kept_blocks == {"encoder_level_1": [1], "latent": [1, 3]}
    expected = model.eval()(x, t, y)
    pruned = copy.deepcopy(model)
    remove_gates(pruned)
    remove_blocks(pruned, decision.kept_blocks)
    torch.testing.assert_close(pruned(x, t, y), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert_near(merged(pruned)(x, t, y), expected, 1e-5)


def test_gathered_samples_give_the_gradients_of_the_plain_formula():
    x, t, y = batch(size=16)
    sizes = {
        **SMALL,
        "input_size": 16,
        "depth_latent": 2,
    }  # more than one token in the latent stage's attention
    grads, state = [], small(**sizes).state_dict()
    for gather in (True, False):
        model = UDiT(**sizes)
        model.load_state_dict(state)
        gates = DepthGates(model, "1:2", stacks="latent", tau=1.0, gather=gather)
        torch.manual_seed(3)
        gates.redraw()
        model(x, t, y).square().sum().backward()
        assert "plain" not in gates.describe_batches() or not gather
        grads.append([p.grad for p in (*gates.logits(), *model.parameters())])
    assert grads[0][0].abs().max() > 0
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, 2e-5)


def test_mask_learning_leaves_a_shallow_model_that_loads(tmp_path):
    dense = small(**dict.fromkeys(DEPTHS, 2))
    original = copy.deepcopy(dense)
    dense.model_name = "udit_s"
    callback = learn_masks(
        dense,
        {**dict.fromkeys(STAGES, "1:2"), "latent": "2:2"},
        tmp_path,
        learn_sigma=True,
        weight_update="full",
    )
    assert all(
        (logits != 0.02).any()
        for gates in callback.gates.stacks
        for logits in gates.logits
        if len(logits) > 1
    )
    shallow = load_shallow(tmp_path / "shallow")
    assert [shallow.config[name] for name in DEPTHS] == [1, 1, 2, 1, 1]
    x, t, y = batch()
    with torch.no_grad():
        expected = remove_blocks(original, callback.decision.kept_blocks).eval()(x, t, y)
        assert torch.equal(shallow(x, t, y), expected)
        folder = save_shallow(
            tmp_path / "merged", merged(shallow), {"stacks": callback.decision.as_dict()}
        )
        assert_near(load_shallow(folder)(x, t, y), expected, 1e-5)


def test_a_pattern_that_does_not_divide_a_stage_names_it(tmp_path):
    with pytest.raises(
        ValueError, match="Stack 'denoiser.encoder_level_2': .* depth 3.* pattern of its own"
    ):
        learn_masks(
            small(**{**dict.fromkeys(DEPTHS, 2), "depth_encoder_2": 3}),
            "1:2",
            tmp_path,
            learn_sigma=True,
        )
