import pytest
import torch
from torch import nn

from tinyfusion_pl.distill import Distillation, HiddenStates, feature_loss, within_sigma
from tinyfusion_pl.models import create_model
from tinyfusion_pl.objectives import GaussianDiffusion


def spiky(seed, n=3, t=4, d=5):
    """Hidden states with one massive activation a sample."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, t, d, generator=g)
    x[torch.arange(n), torch.arange(n) % t, seed % d] = 40.0
    return x


def tiny(depth):
    torch.manual_seed(depth)
    model = create_model("dit_digits", depth=depth, hidden_size=16, num_heads=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture
def batch():
    objective = GaussianDiffusion()
    return objective, objective.draw(torch.randn(4, 1, 8, 8)), torch.arange(4)


def test_the_mask_leaves_out_what_lies_k_sigma_from_the_samples_mean():
    x = spiky(0)
    for sample, kept in zip(x, within_sigma(x, 2.0), strict=True):
        mean, sigma = sample.mean(), sample.std(unbiased=True)
        assert torch.equal(kept, (sample - mean).abs() < 2 * sigma)
        assert not kept[sample == 40.0].any() and kept.sum() == kept.numel() - 1


@pytest.mark.parametrize("mask", ["reference", "joint", "none"])
def test_feature_loss_by_an_element_wise_computation(mask):
    student, teacher = spiky(0), spiky(1)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        s_in = (s - s.mean()).abs() < 2 * s.std()
        t_in = (t - t.mean()).abs() < 2 * t.std()
        for a, b, keep_a, keep_b in zip(
            s.flatten(), t.flatten(), s_in.flatten(), t_in.flatten(), strict=True
        ):
            if mask == "joint" and not (keep_a and keep_b):
                continue
            a = a if mask == "none" or keep_a else 0.0
            b = b if mask == "none" or keep_b else 0.0
            total += float(a - b) ** 2
        expected.append(total / s.numel())
    torch.testing.assert_close(feature_loss(student, teacher, mask=mask), torch.tensor(expected))


def test_massive_activations_drown_the_loss_only_without_a_mask():
    student, teacher = spiky(0), spiky(1)
    assert (
        feature_loss(student, teacher, mask="none").min()
        > 100 * feature_loss(student, teacher, mask="joint").max()
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"mask": "both"}, "'reference', 'joint', 'none'"),
        ({"num_sigma": 0.0}, "num_sigma is 0.0"),
    ],
)
def test_unknown_masks_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        feature_loss(spiky(0), spiky(1), **kwargs)


def test_hidden_states_of_unequal_widths_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 4, 6\)"):
        feature_loss(spiky(0), spiky(1, d=6))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"weight_kd": -1.0}, "weight_kd"),
        ({"weight_kd": 0.0, "weight_data": 0.0, "weight_feature": 0.0}, "nothing would be learned"),
        ({"feature_mask": "x"}, "feature mask"),
    ],
)
def test_wrong_weights_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**kwargs)


def test_fine_tuning_never_calls_a_teacher(batch):
    objective, draw, y = batch
    losses = Distillation(weight_kd=0.0, weight_data=1.0, weight_feature=0.0).losses(
        tiny(2), None, objective, draw, y, pairs={"blocks": [(0, 1)]}, feature_weight=0.0
    )
    assert losses.keys() == {"loss", "loss_data"} and torch.equal(
        losses["loss"], losses["loss_data"]
    )


def test_total_is_the_weighted_sum_and_the_feature_term_goes_with_its_weight(batch):
    objective, draw, y = batch
    student, teacher = tiny(2), tiny(4)
    pairs = {"blocks": [(0, 1), (1, 3)]}
    losses = Distillation().losses(
        student, teacher, objective, draw, y, pairs=pairs, feature_weight=0.5
    )
    torch.testing.assert_close(
        losses["loss"],
        0.9 * losses["loss_kd"] + 0.1 * losses["loss_data"] + 0.5 * losses["loss_feature"],
    )
    assert "loss_feature" not in Distillation().losses(
        student, teacher, objective, draw, y, pairs=pairs, feature_weight=0.0
    )


def test_the_teacher_is_run_without_a_graph_on_the_same_inputs(batch):
    objective, draw, y = batch
    student, teacher = tiny(2), tiny(4)
    seen = []

    def spy(module, args, output):
        seen.append((module, args, output.requires_grad))

    for model in (student, teacher):
        model.register_forward_hook(spy)
    Distillation().losses(student, teacher, objective, draw, y, pairs={}, feature_weight=0.0)[
        "loss"
    ].mean().backward()
    (_, args, with_graph), (_, teacher_args, teacher_graph) = seen
    assert with_graph and not teacher_graph
    assert all(a is b for a, b in zip(args, teacher_args, strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_the_feature_weight_falls_in_a_straight_line_to_zero():
    distillation = Distillation(weight_feature=1e-2)
    assert [distillation.feature_weight(step, 5) for step in range(5)] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025, 0.0]
    )
    assert distillation.feature_weight(0, 1) == 0.0  # where the published schedule divides by zero


def test_hidden_states_collect_the_first_item_of_tuples_and_leave_no_hook():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, "weights"

    model = nn.Module()
    model.blocks = nn.ModuleList([Pair(), Pair()])
    with HiddenStates(model, "blocks", [1]) as hidden:
        model.blocks[1](torch.zeros(2))
    assert torch.equal(hidden[1], torch.ones(2))
    assert not model.blocks[1]._forward_hooks
    with pytest.raises(ValueError, match=r"\[2\] are not in 'blocks', which has blocks 0..1"):
        HiddenStates(model, "blocks", [2])
