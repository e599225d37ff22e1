import math

import pytest
import torch

from goldens_util import assert_near
from objectives.interpolant_oracle import PATHS, Oracle, path_at
from tinyfusion_pl.objectives import ImageSampler, Interpolants
from tinyfusion_pl.objectives.interpolant_sampling import DIFFUSIONS, SamplingOptions
from tinyfusion_pl.objectives.paths import PREDICTIONS

ODE = ["euler", "heun", "dopri5"]
SDE = ["euler_maruyama", "sde_heun"]
BOTH = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


def labels(n):
    return torch.arange(n) % 5


def sampled_normal(path="linear", prediction="velocity", n=4000, num_sampling_steps=60, **options):
    """Mean and spread of samples of normal data of mean 1 and spread 0.5."""
    x = Interpolants(path=path, prediction=prediction).sample(
        Oracle(path, prediction),
        torch.randn(n, 1, 1, 1),
        torch.full((n,), 3),
        num_sampling_steps=num_sampling_steps,
        **options,
    )
    return x.mean().item(), x.std().item()  # standard errors of 4000 samples: 0.008 and 0.006


@pytest.mark.parametrize(("path", "prediction"), BOTH)
@pytest.mark.parametrize("sampler", ODE + SDE)
def test_normal_data_is_sampled_with_its_mean_and_spread(path, prediction, sampler):
    mean, spread = sampled_normal(path, prediction, sampler=sampler)
    assert abs(mean - 1) < 0.04 and abs(spread - 0.5) < 0.03


@pytest.mark.parametrize("sampler", SDE)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_coefficient_leads_to_the_same_data(sampler, diffusion):
    # By the ODE's last step: a step of the SDE's drift without its noise narrows the data, by 16%
    # where the coefficient is constant.
    for path in ("linear", "vp"):
        mean, spread = sampled_normal(path, sampler=sampler, diffusion=diffusion, last_step="euler")
        assert abs(mean - 1) < 0.04 and abs(spread - 0.5) < 0.03


@pytest.mark.parametrize("sampler", SDE)
@pytest.mark.parametrize("last_step", ["none", "mean", "tweedie", "euler"])
def test_every_last_step_leads_to_the_same_data(sampler, last_step):
    mean, spread = sampled_normal(sampler=sampler, last_step=last_step)
    assert abs(mean - 1) < 0.04 and abs(spread - 0.5) < 0.03


@pytest.mark.parametrize("path", PATHS)
def test_the_exact_flow_is_followed(path):
    """The ODE takes a quantile of noise to the same quantile of the data."""
    z, y = torch.randn(5, 1, 2, 2), labels(5)
    objective = Interpolants(path=path, prediction="velocity")
    start, end = SamplingOptions(sampler="heun").interval(objective)
    first, last = (
        [each.item() for each in path_at(path, torch.tensor([t]))[:2]] for t in (start, end)
    )
    mean, spread = (2.0 * y - 5).view(-1, 1, 1, 1), 0.5
    quantile = (z - first[0] * mean) / math.hypot(first[0] * spread, first[1])
    expected = last[0] * mean + math.hypot(last[0] * spread, last[1]) * quantile
    assert_near(
        objective.sample(Oracle(path), z, y, sampler="heun", num_sampling_steps=100), expected, 1e-3
    )
    assert_near(
        objective.sample(Oracle(path), z, y, sampler="dopri5", atol=1e-5, rtol=1e-5), expected, 1e-4
    )


@pytest.mark.parametrize(("path", "prediction"), BOTH)
@pytest.mark.parametrize("sampler", ODE + SDE)
def test_the_denoiser_is_never_asked_outside_of_the_interval(path, prediction, sampler):
    oracle, objective = Oracle(path, prediction), Interpolants(path=path, prediction=prediction)
    objective.sample(
        oracle, torch.randn(2, 1, 2, 2), labels(2), sampler=sampler, num_sampling_steps=3
    )
    start, end = SamplingOptions(sampler=sampler).interval(objective)
    assert all(start - 1e-7 <= t[0] <= end + 1e-6 for _, t, _ in oracle.asked)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_orders_of_the_fixed_step_solvers(sampler):
    z, y = torch.randn(5, 1, 2, 2), labels(5)
    exact = (2.0 * y - 5).view(-1, 1, 1, 1) + 0.5 * z
    few, many = (
        (Interpolants().sample(Oracle(), z, y, sampler=sampler, num_sampling_steps=n) - exact)
        .abs()
        .max()
        for n in (40, 80)
    )
    assert {"euler": 1.8, "heun": 3.5}[sampler] < few / many < {"euler": 2.2, "heun": 4.5}[sampler]


def test_a_step_is_one_call_of_the_denoiser_or_two_by_heun():
    for sampler, options, calls in (
        ("euler", {}, 4),
        ("heun", {}, 8),
        ("euler_maruyama", {}, 4),
        ("sde_heun", {}, 7),
        ("euler_maruyama", {"last_step": "none"}, 4),
    ):
        oracle = Oracle()
        Interpolants().sample(
            oracle,
            torch.randn(2, 1, 2, 2),
            labels(2),
            sampler=sampler,
            num_sampling_steps=4,
            **options,
        )
        assert len(oracle.asked) == calls, sampler


def times(objective, **options):
    oracle = Oracle(objective.path, objective.prediction)
    objective.sample(
        oracle, torch.randn(1, 1, 2, 2), labels(1), **{"num_sampling_steps": 5, **options}
    )
    return [t[0] for _, t, _ in oracle.asked]


def test_times_are_evenly_spread_from_noise_to_data():
    assert times(Interpolants(), sampler="euler") == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert times(Interpolants(), sampler="euler_maruyama") == pytest.approx(
        [0, 0.24, 0.48, 0.72, 0.96]
    )
    assert times(Interpolants(), sampler="euler_maruyama", last_step_size=0.2) == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8]
    )
    assert times(Interpolants(), sampler="heun", num_sampling_steps=1) == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("settings", "options", "ends"),
    [
        ({}, {"sampler": "dopri5"}, (0, 1)),
        ({"path": "gvp"}, {"sampler": "heun"}, (0, 1)),
        ({"path": "vp"}, {"sampler": "heun"}, (0, 1 - 1e-3)),
        ({"path": "vp", "prediction": "score"}, {"sampler": "euler"}, (0, 1 - 1e-3)),
        ({"prediction": "noise"}, {"sampler": "euler"}, (1e-3, 1 - 1e-3)),
        ({"prediction": "score", "sample_eps": 0.1}, {"sampler": "euler"}, (0.1, 0.9)),
        ({}, {"sampler": "euler_maruyama"}, (0, 0.96)),
        ({}, {"sampler": "euler_maruyama", "last_step": "none"}, (0, 1 - 1e-3)),
        ({}, {"sampler": "euler_maruyama", "diffusion": "sbdm"}, (1e-3, 0.96)),
        ({"path": "vp"}, {"sampler": "sde_heun", "diffusion": "sbdm"}, (0, 0.96)),
        ({"prediction": "noise"}, {"sampler": "sde_heun"}, (1e-3, 0.96)),
    ],
)
def test_singular_ends_are_kept_off_as_published(settings, options, ends):
    assert SamplingOptions(**options).interval(Interpolants(**settings)) == pytest.approx(ends)


def test_without_guidance_the_batch_is_not_doubled():
    oracle = Oracle()
    Interpolants().sample(
        oracle, torch.randn(3, 1, 2, 2), labels(3), sampler="euler", num_sampling_steps=2
    )
    assert [(n, y) for n, _, y in oracle.asked] == [(3, [0, 1, 2])] * 2


@pytest.mark.parametrize("sampler", ODE + SDE)
@pytest.mark.parametrize(("guidance_channels", "guided"), [(3, 3), (None, 4)])
def test_guidance_moves_the_first_channels_or_all_away_from_the_null_label(
    sampler, guidance_channels, guided
):
    z, y, scale = torch.randn(2, 4, 2, 2), torch.tensor([1, 4]), 1.5
    # Guided velocities and scores are those of data around the guided mean.
    x = Interpolants().sample(
        Oracle(spread=1e-3),
        z,
        y,
        num_sampling_steps=100,
        sampler=sampler,
        last_step="tweedie",
        guidance_scale=scale,
        guidance_channels=guidance_channels,
    )
    plain, null = 2.0 * y - 5, 2.0 * 5 - 5
    expected = torch.stack(
        [null + scale * (plain - null) if c < guided else plain for c in range(4)], 1
    )
    assert_near(x, expected[..., None, None].expand_as(x), 0.02)


@pytest.mark.parametrize("sampler", SDE)
def test_the_same_noise_gives_the_same_samples_and_a_generator_can_draw_it(sampler):
    objective, z, y = Interpolants(), torch.randn(3, 1, 2, 2), labels(3)
    options = {"num_sampling_steps": 5, "sampler": sampler}

    def sampled(**more):
        return objective.sample(Oracle(), z, y, **options, **more)

    assert (
        objective.num_noises(**options) == 4
        and objective.num_noises(**options, last_step="none") == 5
    )
    noise = torch.randn(4, 3, 1, 2, 2)
    assert torch.equal(sampled(noise=noise), sampled(noise=noise))
    for step in range(4):
        other = noise.clone()
        other[step] += 1
        assert not torch.equal(sampled(noise=noise), sampled(noise=other))
    ours = sampled(generator=torch.Generator().manual_seed(7))
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(ours, sampled(generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(ours, sampled(generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("sampler", ODE)
def test_an_ode_draws_nothing(sampler):
    state = torch.get_rng_state()
    Interpolants().sample(
        Oracle(), torch.ones(3, 1, 2, 2), labels(3), sampler=sampler, num_sampling_steps=3
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert Interpolants().num_noises(sampler=sampler, num_sampling_steps=3) == 0


@pytest.mark.parametrize(("sde", "ode"), [("euler_maruyama", "euler"), ("sde_heun", "heun")])
def test_an_sde_without_diffusion_is_the_ode(sde, ode):
    objective, z, y = Interpolants(prediction="noise"), torch.randn(3, 1, 2, 2), labels(3)
    expected = objective.sample(Oracle(prediction="noise"), z, y, sampler=ode, num_sampling_steps=6)
    x = objective.sample(
        Oracle(prediction="noise"),
        z,
        y,
        sampler=sde,
        num_sampling_steps=6,
        last_step="none",
        diffusion_norm=0.0,
    )
    assert_near(x, expected, 1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", *SDE])
def test_a_numbered_sample_is_the_same_alone_and_in_a_batch(sampler):
    denoiser = torch.nn.Module()
    denoiser.forward, denoiser.num_classes = Oracle(), 5
    sampler = ImageSampler(
        denoiser=denoiser,
        objective=Interpolants(),
        latent_shape=(1, 2, 2),
        decode=lambda latents: latents,
        sampling={"sampler": sampler, "num_sampling_steps": 6},
        seed=3,
    )
    sampler.check()
    together = sampler(torch.arange(4), labels(4))
    assert_near(sampler(torch.tensor([2]), labels(4)[2:3]), together[2:3], 1e-6)


def test_dopri5_keeps_a_sample_within_its_tolerance_whatever_the_batch():
    z, y = torch.randn(8, 1, 2, 2), labels(8)
    options = {"sampler": "dopri5", "atol": 1e-5, "rtol": 1e-5}
    together = Interpolants(path="gvp").sample(Oracle("gvp"), z, y, **options)
    assert_near(
        Interpolants(path="gvp").sample(Oracle("gvp"), z[2:3], y[2:3], **options),
        together[2:3],
        1e-3,
    )


def test_sampling_keeps_no_graph_and_leaves_the_starting_noise():
    layer = torch.nn.Conv2d(1, 1, 1)
    z = torch.randn(2, 1, 2, 2)
    before = z.clone()
    x = Interpolants().sample(lambda x, t, y: layer(x), z, labels(2), num_sampling_steps=3)
    assert not x.requires_grad and torch.equal(z, before)


@pytest.mark.parametrize("sampler", ["euler", "heun", *SDE])
def test_a_denoiser_that_gives_nan_gives_nan_samples(sampler):
    x = Interpolants().sample(
        lambda x, t, y: x * math.nan,
        torch.randn(2, 1, 2, 2),
        labels(2),
        num_sampling_steps=3,
        sampler=sampler,
    )
    assert x.isnan().all()


def test_dopri5_says_that_it_cannot_go_on():
    with pytest.raises(ValueError, match="dopri5 cannot solve the ODE .* another sampler"):
        Interpolants().sample(
            lambda x, t, y: x * math.nan, torch.randn(2, 1, 2, 2), labels(2), sampler="dopri5"
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"sampler": "ddpm"},
            "sampler is 'ddpm'; give one of 'euler', 'heun', 'dopri5', 'euler_maruyama', "
            "'sde_heun'",
        ),
        ({"diffusion": "none"}, "diffusion is 'none'; give one of 'constant', 'sbdm'"),
        ({"last_step": "first"}, "last_step is 'first'; give one of 'none'"),
        ({"num_sampling_steps": 0, "sampler": "euler"}, "num_sampling_steps is 0; give at least 1"),
        (
            {"num_sampling_steps": 1},
            "num_sampling_steps is 1; give at least 2, including the last step",
        ),
        ({"guidance_channels": 0}, "guidance_channels is 0"),
        ({"atol": 0}, "atol is 0"),
        ({"rtol": -1.0}, "rtol is -1"),
        ({"diffusion_norm": math.nan}, "diffusion_norm is nan"),
        ({"last_step_size": 0.0}, r"last_step_size is 0.0; give a number in \(0, 1\)"),
    ],
)
def test_settings_out_of_range_are_named_before_the_denoiser_runs(wrong, said):
    oracle, options = Oracle(), {"num_sampling_steps": 3, **wrong}
    for call in (
        lambda: Interpolants().check_sampling(**options),
        lambda: Interpolants().sample(oracle, torch.randn(2, 1, 2, 2), labels(2), **options),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not oracle.asked


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 2, 1, 2, 2\); expected \(2, 2, 1, 2, 2\)"):
        Interpolants().sample(
            Oracle(),
            torch.randn(2, 1, 2, 2),
            labels(2),
            num_sampling_steps=3,
            noise=torch.zeros(3, 2, 1, 2, 2),
        )


@pytest.mark.parametrize(
    ("settings", "options", "end"),
    [
        ({"prediction": "noise"}, {}, 0),
        ({"path": "vp"}, {"sampler": "heun"}, 1),
        ({}, {"diffusion": "sbdm"}, 0),
        ({}, {"last_step": "none"}, 1),
    ],
)
def test_no_distance_from_a_singular_end_is_refused(settings, options, end):
    with pytest.raises(ValueError, match=f"sample_eps is 0, .* singular at t = {end}"):
        Interpolants(**settings, sample_eps=0.0).check_sampling(**options)


def test_unknown_options_are_no_options():
    with pytest.raises(TypeError, match="eta"):
        Interpolants().check_sampling(eta=0.5)
