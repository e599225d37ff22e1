import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from goldens_util import assert_near, golden_files, load
from mar_util import NO_DROPOUT, golden_mar, golden_positions, trained_like
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion, MaskedAutoregression
from tinyfusion_pl.objectives.masked_sampling import to_tokens

SCRIPT = Path(__file__).with_name("masked_loss_on_two_processes.py")


def golden_draw(golden):
    """The objective and the draw of a golden, whose noise is for all tokens: (M*N*L, C)."""
    _, masked = golden_positions(golden)
    n, num_tokens, c = golden["tokens"].shape
    t, noise = (
        golden["diffloss.t"].view(-1, n, num_tokens).transpose(0, 1),
        golden["diffloss.noise"].view(-1, n, num_tokens, c),
    )
    index = masked[:, None].expand(-1, t.shape[1], -1)  # (N, M, K)
    noise = noise.transpose(0, 1).gather(2, index[..., None].expand(-1, -1, -1, c))
    objective = MaskedAutoregression(num_noised=t.shape[1])
    order = golden["mask"].argsort(dim=1, descending=True)
    return objective, objective.draw(
        golden["x"], order=order, num_masked=masked.shape[1], t=t.gather(2, index), noise=noise
    )


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mar*"))
def test_against_reference_tokens_and_loss(file):
    golden = load(file)
    model, (objective, draw) = golden_mar(golden), golden_draw(golden)
    assert torch.equal(draw.x_t.tokens, golden["tokens"])
    with torch.no_grad():
        losses = objective.losses(model(draw.x_t, draw.t, golden["y"]), draw)
    assert losses["loss"].shape == golden["y"].shape
    assert_near(losses["loss"].mean(), golden["loss"], 1e-5, "loss")


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mar*"))
def test_a_student_that_is_its_teacher_loses_nothing_to_it_but_the_likelihood_of_the_data(file):
    golden = load(file)
    model, (objective, draw) = golden_mar(golden), golden_draw(golden)
    pairs = {"encoder_blocks": [(0, 0)], "decoder_blocks": [(0, 0)]}
    draw = objective.draw(
        golden["x"], t=draw.t.clamp_min(1), noise=draw.noise, num_masked=draw.x_t.masked.shape[1]
    )  # none at t = 0
    losses = Distillation().losses(
        model, model, objective, draw, golden["y"], pairs=pairs, feature_weight=1e-2
    )
    assert_near(losses["loss_kd"], torch.zeros_like(losses["loss_kd"]), 1e-5)
    assert not losses["loss_feature"].any()
    assert_near(losses["loss"], 0.1 * losses["loss_data"], 1e-5)


def test_a_draw_masks_as_many_tokens_in_each_sample_and_every_position_once():
    x0, objective = torch.randn(5, 3, 4, 4), MaskedAutoregression(num_noised=2)
    draw = objective.draw(x0)
    masked, visible = draw.x_t.masked, draw.x_t.visible
    assert masked.shape[1] >= 12  # 0.7 of 16, rounded up
    assert torch.equal(
        torch.cat([masked, visible], 1).sort(1).values, torch.arange(16).expand(5, -1)
    )
    assert (
        len({tuple(row) for row in masked.tolist()}) > 1 or masked.shape[1] == 16
    )  # each sample has an order of its own
    assert draw.t.shape == (5, 2, masked.shape[1]) and draw.x_t.noised.shape == (*draw.t.shape, 3)
    # Independently: the squared cosine, whose last beta is clipped.
    signal = (
        ((torch.arange(1, 1001).double() / 1000 + 0.008) / 1.008 * torch.pi / 2).cos()
        / torch.tensor(0.008 / 1.008 * torch.pi / 2).double().cos()
    ).square()
    signal[-1] = signal[-2] * 0.001
    a = signal[draw.t][..., None]
    target = to_tokens(x0).gather(1, masked[..., None].expand(-1, -1, 3))[:, None].double()
    assert_near(
        draw.x_t.noised.double(), a.sqrt() * target + (1 - a).sqrt() * draw.noise.double(), 1e-5
    )


def test_the_share_of_masked_tokens_follows_the_truncated_normal():
    objective = MaskedAutoregression()
    ratios = torch.tensor([objective.mask_ratio() for _ in range(20_000)])
    assert ratios.min() >= 0.7 and ratios.max() <= 1
    # Independently: rejection from the normal distribution.
    normal = 1 + 0.25 * torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    expected = normal[(normal >= 0.7) & (normal <= 1)]
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(ratios.quantile(q) - expected[:200_000].quantile(q)) < 0.005


def test_the_share_does_not_come_from_a_device_that_would_have_to_be_waited_for():
    draw = MaskedAutoregression().draw(
        torch.empty(2, 3, 4, 4, device="meta")
    )  # has no values to read
    assert draw.x_t.noised.device.type == "meta"


def test_losses_are_means_over_the_samples_own_masked_tokens():
    model, objective, x0 = trained_like(), MaskedAutoregression(), torch.randn(3, 3, 4, 4)
    draw = objective.draw(x0)
    output, teacher_output = (
        model(draw.x_t, draw.t, torch.tensor([0, 1, 5])) for _ in range(2)
    )  # dropout: two outputs
    alone = GaussianDiffusion(noise_schedule="cosine")
    losses, distilled = (
        objective.losses(output, draw),
        objective.distillation_losses(output, teacher_output, draw),
    )
    for i in range(3):
        tokens = alone.draw(
            draw.x0[i].reshape(-1, 3), t=draw.t[i].flatten(), noise=draw.noise[i].reshape(-1, 3)
        )
        for ours, theirs in (
            (losses, alone.losses(output[i].reshape(-1, 6), tokens)),
            (
                distilled,
                alone.distillation_losses(
                    output[i].reshape(-1, 6), teacher_output[i].reshape(-1, 6), tokens
                ),
            ),
        ):
            assert ours.keys() == theirs.keys()
            for name, values in theirs.items():
                assert_near(ours[name][i], values.mean(), 1e-5, name)


def test_two_processes_have_the_loss_and_the_gradients_of_one_batch(tmp_path):
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = torch.load(tmp_path / "start.pt", weights_only=False)
    student, teacher, batches = saved["student"], saved["teacher"], saved["batches"]
    objective, sums, count = MaskedAutoregression(num_noised=2), 0.0, 0
    for (
        batch
    ) in batches:  # in one process the share is 1, and a sample's loss the mean over its tokens
        draw = objective.draw(**batch["draw"])
        output, teacher_output = (
            student(draw.x_t, draw.t, batch["y"]),
            teacher(draw.x_t, draw.t, batch["y"]),
        )
        losses = (
            objective.losses(output, draw)["loss"]
            + objective.distillation_losses(output, teacher_output, draw)["loss_kd"]
        )
        sums, count = (
            sums + (losses * draw.x_t.masked.shape[1]).sum(),
            count + draw.x_t.masked.numel(),
        )
    joined = sums / count
    joined.backward()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_near((ranks[0]["loss"] + ranks[1]["loss"]) / 2, joined.detach(), 1e-5, "loss")
    for name, p in student.named_parameters():
        for rank in ranks:
            assert_near(rank["gradients"][name], p.grad, 1e-4, name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mask_ratio_min": 1.0}, "mask_ratio_min is 1.0"),
        ({"mask_ratio_min": -0.1}, "mask_ratio_min is -0.1"),
        ({"num_noised": 0}, "num_noised is 0"),
        ({"num_timesteps": 0}, "num_timesteps is 0, .* at least 1 "),
    ],
)
def test_numbers_out_of_range_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        MaskedAutoregression(**wrong)


@pytest.mark.parametrize("num_masked", [0, 17])
def test_masking_none_or_more_than_all_is_refused(num_masked):
    with pytest.raises(ValueError, match=f"num_masked is {num_masked}; give 1 to 16"):
        MaskedAutoregression().draw(torch.zeros(1, 3, 4, 4), num_masked=num_masked)


def test_without_dropout_the_same_draw_gives_the_same_losses():
    model, objective = trained_like(**NO_DROPOUT), MaskedAutoregression()
    draw, y = objective.draw(torch.randn(2, 3, 4, 4)), torch.tensor([1, 5])
    first, second = (objective.losses(model(draw.x_t, draw.t, y), draw)["loss"] for _ in range(2))
    assert torch.equal(first, second)
