"""LIFT's loss against a loop over samples, channels and groups, in float64; and where it stands in place of the squared error."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from tinyfusion_pl import DistillationCallback
from tinyfusion_pl.distill import Distillation, lift_loss
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants, MaskedAutoregression


def by_hand(student, teacher, size=16):
    """(N, C, E) -> (N,), one number after the other."""
    found = []
    for of_student, of_teacher in zip(student.double(), teacher.double(), strict=True):
        slopes, intercepts, elements = [], [], []
        for s, t in zip(of_student, of_teacher, strict=True):
            places = sorted(range(len(s)), key=lambda i: float((s[i] - t[i]).detach() ** 2))
            for start in range(0, len(places), size):
                group = places[start : start + size]
                x, y = torch.stack([s[i] for i in group]), torch.stack([t[i] for i in group])
                mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
                slope = sum((x - mean_x) * (y - mean_y)) / (sum((x - mean_x) ** 2) + len(x) * 1e-6)
                intercept = mean_y - slope * mean_x
                slopes.append(slope)
                intercepts.append(intercept)
                elements += [
                    (slope.detach() * a + intercept.detach() - b) ** 2
                    for a, b in zip(x, y, strict=True)
                ]
        coarse = sum((a - 1) ** 2 + b**2 for a, b in zip(slopes, intercepts, strict=True)) / len(
            slopes
        )
        off = sum(abs(a - 1) for a in slopes) / len(slopes) + sum(abs(b) for b in intercepts) / len(
            slopes
        )
        found.append(coarse + (1 - min(1.0, float(off.detach()))) * sum(elements) / len(elements))
    return torch.stack(found)


def predictions(shape, *, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=g, dtype=torch.float64)
    student = 0.9 * teacher + 0.05 + noise * torch.randn(shape, generator=g, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("noise", [0.05, 3.0], ids=["fine-counts", "coarse-alone"])
@pytest.mark.parametrize("num_elements", [32, 40, 20, 7], ids=str)
def test_loss_and_gradient_are_those_of_the_loop(num_elements, noise):
    student, teacher = predictions((3, 2, num_elements), noise=noise)
    ours, expected = lift_loss(student, teacher), by_hand(student, teacher)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    grads = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, expected)]
    torch.testing.assert_close(
        *grads, rtol=1e-3, atol=1e-4
    )  # of up to 0.04; 1e-6 beside a small variance


def test_the_gradient_is_that_of_finite_differences():
    student, teacher = predictions(
        (1, 1, 20), noise=3.0
    )  # far off: the detached fine term has weight 0
    assert torch.autograd.gradcheck(lambda s: lift_loss(s, teacher), student)


def test_equal_outputs_have_no_loss_and_a_finite_gradient():
    for x in (torch.randn(2, 3, 17), torch.zeros(2, 3, 5, 5), torch.ones(2, 3, 33)):
        student = x.clone().requires_grad_()
        loss = lift_loss(student, x)
        loss.sum().backward()
        assert torch.equal(loss, torch.zeros(2)) and not student.grad.any()


def test_constant_outputs_have_a_finite_gradient():
    student = torch.zeros(2, 1, 20, requires_grad=True)
    lift_loss(student, torch.randn(2, 1, 20)).sum().backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_a_sample_counts_the_same_in_any_batch():
    student, teacher = predictions((4, 2, 5, 5), noise=0.2)
    alone = torch.cat([lift_loss(s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(lift_loss(student, teacher), alone, rtol=0, atol=0)


def test_channels_may_be_on_any_axis_but_the_first():
    student, teacher = predictions((2, 3, 4, 5), noise=0.2)
    expected = by_hand(student.flatten(2), teacher.flatten(2))
    for axis, order in ((1, (0, 1, 2, 3)), (-1, (0, 2, 3, 1)), (2, (0, 2, 1, 3))):
        moved = lift_loss(student.permute(order), teacher.permute(order), channel_axis=axis)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shapes, kwargs, message",
    [
        (((2, 3, 4), (2, 3, 5)), {}, "differ in shape"),
        (((2, 3, 4),) * 2, {"channel_axis": 3}, "channel_axis is 3"),
        (((2, 3, 4),) * 2, {"channel_axis": 0}, "channel_axis is 0"),
        (((2, 3),) * 2, {}, "has 1"),
        (((2, 3, 4),) * 2, {"group_size": 1}, "group_size is 1"),
    ],
)
def test_what_cannot_be_sorted_is_refused(shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lift_loss(*map(torch.randn, shapes), **kwargs)


class Fixed(nn.Module):
    """A denoiser with one output, whatever it is asked."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x, t, y):
        return self.output


def distilled(objective, draw, output, teacher_output):
    distillation = Distillation(output_loss="lift", weight_feature=0.0)
    losses = distillation.losses(
        Fixed(output), Fixed(teacher_output), objective, draw, None, pairs={}, feature_weight=0.0
    )
    torch.testing.assert_close(losses["loss"], 0.9 * losses["loss_kd"] + 0.1 * losses["loss_data"])
    return losses["loss_kd"]


def test_gaussian_diffusion_compares_epsilon_and_keeps_the_variance():
    objective = GaussianDiffusion()
    draw = objective.draw(torch.randn(3, 2, 5, 5))
    output, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    expected = by_hand(output[:, :2].flatten(2), teacher[:, :2].flatten(2))
    variance = objective.distillation_losses(output, teacher, draw)["vb_kd"]
    torch.testing.assert_close(
        distilled(objective, draw, output, teacher), expected.float() + variance
    )


def test_an_interpolant_compares_its_weighted_prediction():
    objective = Interpolants(prediction="score")
    draw = objective.draw(torch.randn(3, 2, 5, 5))
    output, teacher = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5)
    sigma = 1 - draw.t.view(-1, 1, 1)
    expected = by_hand(output.flatten(2) * sigma, teacher.flatten(2) * sigma)
    torch.testing.assert_close(
        distilled(objective, draw, output, teacher), expected.float(), rtol=1e-3, atol=1e-5
    )


def test_mar_compares_all_noised_tokens_of_a_sample():
    objective = MaskedAutoregression(num_noised=2)
    draw = objective.draw(torch.randn(3, 4, 4, 4), num_masked=10)
    output, teacher = torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    pair = [
        torch.stack([x[i, :, :, :4].reshape(20, 4).T for i in range(3)]) for x in (output, teacher)
    ]
    variance = objective.distillation_losses(output, teacher, draw)["vb_kd"]
    torch.testing.assert_close(
        distilled(objective, draw, output, teacher), by_hand(*pair).float() + variance
    )


class Tokens(LightningModule):
    """Its model returns (N, T, C)."""

    def __init__(self):
        super().__init__()
        self.transformer, self.grad = nn.Linear(3, 3), None

    def training_step(self, batch, batch_idx):
        return self.transformer(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.grad = self.transformer.weight.grad.clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_callback_adds_it_to_the_loss_of_any_module():
    module, teacher, x = Tokens(), nn.Linear(3, 3), torch.randn(2, 20, 3)
    before = copy.deepcopy(module.transformer)
    callback = DistillationCallback(
        teacher, weight_feature=0.0, output_loss="lift", channel_axis=-1
    )
    Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    ).fit(module, DataLoader(x, batch_size=2))
    output = before(x)
    kd = by_hand(output.transpose(1, 2), teacher(x).detach().transpose(1, 2)).mean()
    expected = torch.autograd.grad(0.1 * output.square().mean() + 0.9 * kd.float(), before.weight)[
        0
    ]
    torch.testing.assert_close(module.grad, expected, rtol=1e-3, atol=1e-6)
