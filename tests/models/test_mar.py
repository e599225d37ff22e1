import copy
import json

import pytest
import torch
from torch import nn

from goldens_util import assert_near, golden_files, load
from mar_util import NO_DROPOUT, SMALL, golden_mar, golden_positions, trained_like
from tinyfusion_pl.models import MAR, MaskedTokens, create_model, load_shallow, save_shallow
from tinyfusion_pl.pruning import DepthGates, find_stacks, remove_blocks


def batch(n=3, num_visible=6, num_noised=2, **sizes):
    """Masked tokens, timesteps, labels (the last one null) of a small MAR."""
    c, num_tokens = sizes.get("in_channels", 3), 16
    order = torch.rand(n, num_tokens).argsort(1)
    masked = order[:, num_visible:]
    x = MaskedTokens(
        torch.randn(n, num_tokens, c),
        order[:, :num_visible],
        masked,
        torch.randn(n, num_noised, masked.shape[1], c),
    )
    return x, torch.randint(1000, x.noised.shape[:3]), torch.tensor([0, 4, 5])[:n]


def num_params(name, **overrides):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "overrides", "millions"),
    [
        ("mar_base", {}, 208),
        ("mar_large", {}, 479),
        ("MAR-H", {}, 943),
        ("mar_large", {"encoder_depth": 8, "decoder_depth": 8}, 277),
    ],
)
def test_parameter_counts_are_the_published_ones_with_the_head(name, overrides, millions):
    assert abs(num_params(name, **overrides) - millions) < 1


@pytest.mark.parametrize(
    ("alias", "name"), [("MAR-B", "mar_base"), ("MAR-L", "mar_large"), ("MAR-H", "mar_huge")]
)
def test_published_names_are_aliases(alias, name):
    with torch.device("meta"):
        assert create_model(alias, encoder_depth=1, decoder_depth=1).model_name == name


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mar*"))
def test_against_reference_encoder_and_decoder(file):
    golden = load(file)
    model, (visible, _) = golden_mar(golden), golden_positions(golden)
    with torch.no_grad():
        hidden = model.encode(golden["tokens"], visible, golden["y"])
        assert_near(hidden, golden["encoder_output"], 1e-5, "encoder")
        assert_near(model.decode(hidden, visible), golden["decoder_output"], 1e-5, "decoder")


def test_masked_tokens_are_not_looked_at_and_visible_ones_are():
    model, (x, t, y) = trained_like().eval(), batch()
    hidden = torch.full_like(x.tokens, float("nan")).scatter(
        1, x.visible[..., None].expand(-1, -1, 3), 0.5
    )
    seen = x._replace(tokens=hidden)
    assert model(seen, t, y).isfinite().all()
    other = seen._replace(tokens=hidden + 1)
    assert not torch.equal(model(seen, t, y), model(other, t, y))


def test_the_order_of_positions_orders_the_output_and_nothing_else():
    model, (x, t, y) = trained_like().eval(), batch()
    expected = model(x, t, y)
    turned = x._replace(visible=x.visible.flip(1), masked=x.masked.flip(1), noised=x.noised.flip(2))
    assert_near(model(turned, t.flip(2), y).flip(2), expected, 1e-5)


@pytest.mark.parametrize("num_visible", [0, 1, 15])
def test_any_number_of_tokens_may_be_visible(num_visible):
    model, (x, t, y) = trained_like(), batch(num_visible=num_visible)
    output = model(x, t, y)
    assert output.shape == (3, 2, 16 - num_visible, 6)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_null_label_is_the_fake_latent_and_no_other_label_touches_it():
    model, (x, t, y) = trained_like(), batch()
    model(x, t, y.clamp(max=4)).square().sum().backward()
    assert not model.fake_latent.grad.any() and model.class_emb.weight.grad[4].any()
    model.zero_grad()
    model(x, t, torch.full_like(y, 5)).square().sum().backward()
    assert model.fake_latent.grad.any() and not model.class_emb.weight.grad.any()


def test_the_head_treats_each_noised_version_on_its_own():
    model, (x, t, y) = trained_like().eval(), batch()
    expected = model(x, t, y)
    for m in range(2):
        assert_near(
            model(x._replace(noised=x.noised[:, m : m + 1]), t[:, m : m + 1], y),
            expected[:, m : m + 1],
            1e-5,
        )
    z, other = torch.randn(7, 16), torch.randn(7, 3)
    alone = torch.cat(
        [model.head(other[i : i + 1], torch.tensor([i]), z[i : i + 1]) for i in range(7)]
    )
    assert_near(model.head(other, torch.arange(7), z), alone, 1e-5)


def test_a_new_head_gives_zero_and_its_blocks_are_the_identity():
    model, (x, t, y) = create_model("mar_base", **SMALL), batch()
    assert not model(x, t, y).any()
    tokens, c = torch.randn(4, 16), torch.randn(4, 16)
    assert all(torch.equal(block(tokens, c), tokens) for block in model.diffloss["net"].res_blocks)


def test_dropout_acts_in_training_alone():
    model, (x, t, y) = trained_like(), batch()
    assert not torch.equal(model(x, t, y), model(x, t, y))
    model.eval()
    assert torch.equal(model(x, t, y), model(x, t, y))
    without = trained_like(**NO_DROPOUT)
    assert torch.equal(without(x, t, y), without(x, t, y))


def test_bf16_autocast_gives_the_same_to_its_precision_and_trains_every_weight():
    model, (x, t, y) = trained_like(**NO_DROPOUT), batch()
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, y)
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    assert_near(output, expected, 2e-2)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16_runs():
    model, (x, t, y) = trained_like().bfloat16(), batch()
    output = model(x, t, y)
    assert output.dtype == torch.float32 and output.isfinite().all()


def test_recomputed_activations_give_the_same_gradients_with_dropout():
    model, (x, t, y) = trained_like(), batch()

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    kept = gradients()
    saved = []
    model.activation_checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        recomputed = gradients()
    for name, ours, theirs in zip(dict(model.named_parameters()), recomputed, kept, strict=True):
        assert_near(ours, theirs, 1e-5, name)
    mlp_hidden = (3, 9, 64)  # of an encoder block, which is not kept
    assert mlp_hidden not in [tuple(tensor.shape) for tensor in saved]


def test_compiles_without_graph_breaks_whatever_the_number_of_visible_tokens():
    model = trained_like(encoder_depth=1, decoder_depth=1, head_depth=1, **NO_DROPOUT)
    torch._dynamo.reset()
    whole, encode, decode = (
        torch.compile(part, fullgraph=True, backend="eager")
        for part in (model, model.encode, model.decode)
    )
    for num_visible in (4, 6):
        x, t, y = batch(num_visible=num_visible)
        assert_near(whole(x, t, y), model(x, t, y), 1e-5)
        hidden = encode(x.tokens, x.visible, y)
        assert_near(
            decode(hidden, x.visible),
            model.decode(model.encode(x.tokens, x.visible, y), x.visible),
            1e-5,
        )


def test_config_is_json_and_rebuilds_the_model():
    model = trained_like(mlp_ratio=2.0).eval()
    again = MAR(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    x, t, y = batch()
    assert torch.equal(model(x, t, y), again(x, t, y))
    assert torch.equal(copy.deepcopy(model)(x, t, y), again(x, t, y))


def test_encoder_and_decoder_are_the_stacks_and_the_head_is_not():
    assert {
        path: len(stack) for path, stack in find_stacks(trained_like(decoder_depth=3)).items()
    } == {"encoder_blocks": 2, "decoder_blocks": 3}


def test_a_shallow_mar_is_saved_with_its_depths_and_loads(tmp_path):
    model, (x, t, y) = trained_like(encoder_depth=4, decoder_depth=2), batch()
    gates = DepthGates(model, {"encoder_blocks": "2:4", "decoder_blocks": "1:2"})
    decision = gates.decide()
    shallow = copy.deepcopy(model)
    for module in shallow.modules():  # the copy's blocks get their own forward back
        module.__dict__.pop("forward", None)
    remove_blocks(shallow, decision.kept_blocks)
    assert (shallow.config["encoder_depth"], shallow.config["decoder_depth"]) == (2, 1)
    save_shallow(tmp_path / "shallow", shallow, {"stacks": decision.as_dict(), "source": {}})
    loaded = load_shallow(tmp_path / "shallow")
    assert (len(loaded.encoder_blocks), len(loaded.decoder_blocks)) == (2, 1)
    assert torch.equal(loaded(x, t, y), shallow.eval()(x, t, y))
    assert_near(
        loaded(x, t, y), model.eval()(x, t, y), 1e-6
    )  # the gates' decision leaves out the same blocks


def test_gates_give_every_gradient_that_the_plain_formula_gives():
    x, t, y = batch(n=3)
    model = trained_like(encoder_depth=4, decoder_depth=4, **NO_DROPOUT)
    gradients = []
    for gather in (True, False):
        twin = copy.deepcopy(model)
        gates = DepthGates(twin, "2:4", tau=1.0, scaling=1.0, gather=gather)
        torch.manual_seed(1)
        gates.redraw()
        twin(x, t, y).square().sum().backward()
        named = [*twin.named_parameters(), *((str(i), p) for i, p in enumerate(gates.logits()))]
        gradients.append({name: p.grad for name, p in named})
    for name in gradients[0]:
        assert_near(gradients[0][name], gradients[1][name], 1e-4, name)
    assert gradients[0]["0"].any() and gradients[0]["1"].any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_heads": 3}, r"hidden_size 16 .* num_heads \(3\)"),
        ({"encoder_depth": 0, "head_depth": -1}, "encoder_depth=0, head_depth=-1"),
        ({"attn_dropout": 1.0}, "attn_dropout=1.0"),
        ({"proj_dropout": float("nan")}, "proj_dropout=nan"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        MAR(**{**SMALL, **wrong})


@pytest.mark.parametrize("shape", [(3, 9, 3), (3, 16, 4)])
def test_tokens_of_another_number_or_width_are_refused(shape):
    model, (x, t, y) = trained_like(), batch()
    with pytest.raises(ValueError, match=r"takes \(N, 16, 3\): latents of 3 channels and 4 x 4"):
        model(x._replace(tokens=torch.zeros(shape)), t, y)


def test_latents_that_another_objective_noised_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="objective=mar draws them, not a Tensor"):
        trained_like()(torch.randn(3, 3, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_labels_beyond_the_null_label_are_an_error():
    model, (x, t, y) = trained_like(), batch()
    with pytest.raises(IndexError):
        model(x, t, y + 1)


def test_attention_is_scaled_dot_product_attention(monkeypatch):
    called, attention = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: called.append(1) or attention(*a, **k),
    )
    trained_like()(*batch())
    assert len(called) == 4
