import copy
import json

import pytest
import torch

from goldens_util import assert_near, golden_files, load, new_dit, part
from tinyfusion_pl.models import DiT, create_model

SMALL = {
    "input_size": 8,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}


def trained_like(**overrides):
    """A small DiT whose zero-initialised parts are not zero any more."""
    model = DiT(**{**SMALL, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch(n=3):
    return torch.randn(n, 2, 8, 8), torch.tensor([0, 500, 999])[:n], torch.tensor([0, 4, 5])[:n]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dit_s_2", 33), ("dit_b_2", 130), ("dit_l_2", 458), ("dit_xl_2", 675)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_half_the_depth_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = create_model("dit_xl_2", depth=14)
    assert len(model.blocks) == model.config["depth"] == 14
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - 340) < 1


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_forward*"))
def test_against_reference_position_embedding(file):
    weights = part(load(file), "weights")
    assert_near(DiT(**new_dit(weights).config).pos_embed, weights["pos_embed"], 1e-5, "pos_embed")


def test_a_new_model_is_the_identity_in_every_block_and_gives_zero():
    model, (x, t, y) = DiT(**SMALL), batch()
    tokens, c = torch.randn(3, 16, 16), torch.randn(3, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    assert torch.equal(model(x, t, y), torch.zeros(3, 4, 8, 8))


def test_without_learned_variance_as_many_channels_come_out_as_go_in():
    assert DiT(**SMALL, learn_sigma=False)(*batch()).shape == (3, 2, 8, 8)


def test_the_position_embedding_is_stored_but_not_trained():
    model = trained_like()
    model(*batch()).square().sum().backward()
    assert "pos_embed" in model.state_dict()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["pos_embed"]


def test_only_label_dropout_makes_the_null_row():
    assert DiT(**SMALL).y_embedder.embedding_table.num_embeddings == 6
    assert DiT(**SMALL, class_dropout_prob=0).y_embedder.embedding_table.num_embeddings == 5


def test_config_is_json_and_rebuilds_the_model():
    model = trained_like(mlp_ratio=2.0, patch_size=4)
    again = DiT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x, t, y = batch()
    assert torch.equal(model(x, t, y), again(x, t, y))


def test_a_deep_copy_shares_nothing():
    model, (x, t, y) = trained_like(), batch()
    before = model(x, t, y)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x, t, y), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.config["depth"] = 1
    assert torch.equal(model(x, t, y), before) and model.config["depth"] == 3


def test_bf16_autocast_gives_the_same_to_its_precision_and_trains_every_weight():
    model, (x, t, y) = trained_like(), batch()
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, y)
    assert output.dtype == x.dtype and not torch.equal(
        output, expected
    )  # what goes in comes out, whatever is between
    assert_near(output.float(), expected, 0.05)
    output.float().square().sum().backward()
    assert all(
        p.grad.isfinite().all() for name, p in model.named_parameters() if name != "pos_embed"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"patch_size": 3}, "input_size 8 .* patch_size 3"),
        ({"num_heads": 3}, r"hidden_size 16 .* num_heads \(3\)"),
        ({"hidden_size": 18}, "hidden_size 18 .* of 4"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": 0, "num_heads": -2}, "patch_size=0, num_heads=-2"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob is 1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        DiT(**{**SMALL, **wrong})
