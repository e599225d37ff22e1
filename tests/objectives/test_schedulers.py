import diffusers
import pytest
import torch
from torch import nn

from goldens_util import assert_near, golden_files, load, new_dit, part
from objectives.test_sampling import Oracle, labels
from tinyfusion_pl.objectives import GaussianDiffusion, ImageSampler
from tinyfusion_pl.tasks.results import plain

DETERMINISTIC = {
    "ddim": diffusers.DDIMScheduler(clip_sample=False),
    "dpm_solver": diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2
    ),
    "dpm_solver_singlestep": diffusers.DPMSolverSinglestepScheduler(lower_order_final=True),
    "unipc": diffusers.UniPCMultistepScheduler(),
    "euler": diffusers.EulerDiscreteScheduler(),
    "heun": diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
}
RANDOM = {
    "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "ddpm_learned": diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "sde_dpm_solver": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}
ALL = {**DETERMINISTIC, **RANDOM}


def options(scheduler, **more):
    return {"sampler": "diffusers", "scheduler": scheduler, "num_sampling_steps": 20, **more}


@pytest.mark.golden
@pytest.mark.parametrize("num_timesteps", [40, 100])
@pytest.mark.parametrize("file", golden_files("dit_forward*"))
def test_against_diffusers_ddim_on_the_golden_model(file, num_timesteps):
    """diffusers' DDIM takes steps of equal length, ours of a length that reaches the last timestep: equal where both visit all."""
    golden = load(file)
    model, objective = (
        new_dit(part(golden, "weights")),
        GaussianDiffusion(num_timesteps=num_timesteps),
    )
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=num_timesteps,
        trained_betas=objective.tables.betas.tolist(),
        clip_sample=False,
        timestep_spacing="leading",
    )
    z, y = torch.randn(2, *golden["x"].shape[1:]), golden["y"][:2]
    shared = {"num_sampling_steps": num_timesteps, "guidance_scale": 1.5}
    ours = objective.sample(model, z, y, sampler="ddim", **shared)
    assert_near(objective.sample(model, z, y, **options(scheduler, **shared)), ours, 1e-4)


@pytest.mark.parametrize("num_sampling_steps", [2, 10, 100])
def test_diffusers_ddpm_with_the_learned_variance_is_ours(num_sampling_steps):
    objective, z, y = GaussianDiffusion(), torch.randn(1, 1, 2, 2), labels(1)

    class Widening(Oracle):
        def __call__(self, x, t, y):
            epsilon, _ = super().__call__(x, t, y).chunk(2, 1)
            return torch.cat([epsilon, torch.sin(x)], 1)  # a variance between its bounds

    seed = torch.randn(1, *z.shape)
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, variance_type="learned_range", timestep_spacing="linspace"
    )
    theirs = objective.sample(
        Widening(spread=0.5),
        z,
        y,
        **options(scheduler, num_sampling_steps=num_sampling_steps),
        noise=seed,
    )
    first = seed.flatten()[:2].view(torch.int32).tolist()
    generator = torch.Generator().manual_seed(
        ((first[0] % 2**32) + ((first[1] % 2**32) << 31)) % 2**63
    )
    noise = torch.stack(
        [torch.randn(z.shape, generator=generator) for _ in range(num_sampling_steps)]
    )
    assert_near(
        theirs,
        objective.sample(
            Widening(spread=0.5), z, y, num_sampling_steps=num_sampling_steps, noise=noise
        ),
        1e-4,
    )


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("name", [name for name in ALL if name != "ddpm_learned"])
def test_data_of_one_point_is_found(name, learn_sigma):
    z, y = torch.randn(5, 1, 2, 2), labels(5)
    objective, oracle = GaussianDiffusion(learn_sigma=learn_sigma), Oracle(learn_sigma=learn_sigma)
    # Steps of DDIM's equal length stop short of the noisiest timestep by one step unless they
    # trail.
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    else:
        scheduler = ALL[name]
    x = objective.sample(RoundedTimes(oracle), z, y, **options(scheduler))
    assert_near(x, (2.0 * y - 5).view(-1, 1, 1, 1).expand_as(x), 0.02)


class RoundedTimes:
    """Some schedulers ask between timesteps; the oracle's table has none there."""

    num_classes = 5

    def __init__(self, oracle):
        self.oracle = oracle

    def __call__(self, x, t, y):
        return self.oracle(x, t.round().long(), y)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("sde_dpm_solver", "ddpm_learned", "euler_ancestral")
]


@pytest.mark.parametrize("name", ["dpm_solver", "unipc", *SLOW])
def test_normal_data_is_sampled_with_its_mean_and_spread(name):
    n = 4000
    x = GaussianDiffusion().sample(
        RoundedTimes(Oracle(spread=0.5)),
        torch.randn(n, 1, 1, 1),
        torch.full((n,), 3),
        **options(ALL[name], num_sampling_steps=200),
    )
    assert abs(x.mean() - 1) < 0.04 and abs(x.std() - 0.5) < 0.03


@pytest.mark.parametrize("name", ALL)
def test_a_numbered_sample_is_the_same_alone_and_in_a_batch_and_nothing_else_is_drawn(name):
    denoiser = nn.Module()
    denoiser.forward, denoiser.num_classes = RoundedTimes(Oracle(spread=0.5)), 5
    sampler = ImageSampler(
        denoiser=denoiser,
        objective=GaussianDiffusion(),
        latent_shape=(1, 2, 2),
        decode=lambda latents: latents,
        sampling=options(ALL[name], num_sampling_steps=6),
        seed=3,
    )
    state = torch.get_rng_state()
    sampler.check()
    together = sampler(torch.arange(4), labels(4))
    assert_near(sampler(torch.tensor([2]), labels(4)[2:3]), together[2:3], 1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert GaussianDiffusion().num_noises(**options(ALL[name])) == (name in RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_other_noise_gives_other_samples(name):
    objective, z, y = GaussianDiffusion(), torch.randn(2, 1, 2, 2), labels(2)

    def sampled(seed):
        return objective.sample(
            RoundedTimes(Oracle(spread=0.5)),
            z,
            y,
            **options(ALL[name]),
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))


def test_ddim_with_eta_draws_and_without_does_not():
    scheduler = DETERMINISTIC["ddim"]
    assert GaussianDiffusion().num_noises(**options(scheduler, eta=1.0)) == 1
    assert GaussianDiffusion().num_noises(**options(scheduler)) == 0


def test_the_scheduler_given_is_not_changed():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    before = scheduler.timesteps.clone()
    GaussianDiffusion().sample(Oracle(), torch.randn(2, 1, 2, 2), labels(2), **options(scheduler))
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None
    assert scheduler.model_outputs == [None, None]


def test_guidance_asks_for_the_null_label_beside_each_label():
    oracle = Oracle()
    GaussianDiffusion().sample(
        oracle,
        torch.randn(3, 1, 2, 2),
        labels(3),
        **options(DETERMINISTIC["dpm_solver"], num_sampling_steps=2, guidance_scale=1.5),
    )
    assert [(n, y) for n, _, y in oracle.asked] == [(6, [0, 1, 2, 5, 5, 5])] * 2


class DrawsOnItsOwn(diffusers.DDPMScheduler):
    def step(self, model_output, timestep, sample):
        return super().step(model_output, timestep, sample)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scheduler": None}, "but scheduler is None"),
        (
            {"scheduler": "DPMSolverMultistepScheduler"},
            "scheduler is a str, which has no discrete noise schedule",
        ),
        (
            {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()},
            "has no discrete noise schedule",
        ),
        (
            {"scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear")},
            "noise schedule of DDIMScheduler differs from the objective",
        ),
        (
            {"scheduler": diffusers.DDIMScheduler(num_train_timesteps=500)},
            "500 steps .* not 1000",
        ),
        (
            {"scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction")},
            "prediction_type 'v_prediction'",
        ),
        ({"scheduler": diffusers.DDIMInverseScheduler()}, "from data to noise"),
        (
            {"scheduler": diffusers.DPMSolverMultistepScheduler(variance_type="learned")},
            "failed to run 20 steps .*variance_type",
        ),
        (
            {"scheduler": DrawsOnItsOwn()},
            "DrawsOnItsOwn draws noise from the global generator",
        ),
        ({"eta": 0.5}, "DPMSolverMultistepScheduler has no eta"),
        ({"eta": 2.0, "scheduler": diffusers.DDIMScheduler()}, "eta is 2.0"),
        ({"clip_denoised": True}, "the scheduler does its own clipping"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps is 1001"),
        ({"guidance_channels": 0}, "guidance_channels is 0"),
        ({"sampler": "ddim"}, "A scheduler is given, but sampler 'ddim'"),
    ],
)
def test_settings_that_do_not_go_together_are_named_before_the_denoiser_runs(wrong, said):
    oracle, given = Oracle(), {**options(diffusers.DPMSolverMultistepScheduler()), **wrong}
    with pytest.raises(ValueError, match=said):
        GaussianDiffusion().check_sampling(**given)
    if given["sampler"] == "diffusers":
        with pytest.raises(ValueError, match=said):
            GaussianDiffusion().sample(oracle, torch.randn(2, 1, 2, 2), labels(2), **given)
    assert not oracle.asked


def test_a_learned_variance_needs_one():
    with pytest.raises(
        ValueError, match="variance_type 'learned_range', but with learn_sigma=False"
    ):
        GaussianDiffusion(learn_sigma=False).check_sampling(**options(RANDOM["ddpm_learned"]))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(20, 2, 1, 2, 2\); expected \(1, 2, 1, 2, 2\)"):
        GaussianDiffusion().sample(
            Oracle(),
            torch.randn(2, 1, 2, 2),
            labels(2),
            **options(RANDOM["ddpm"]),
            noise=torch.zeros(20, 2, 1, 2, 2),
        )


def test_a_protocol_holds_a_scheduler_as_plain_settings():
    given = plain(options(DETERMINISTIC["dpm_solver"]))
    assert (
        given["num_sampling_steps"] == 20
        and given["scheduler"]["name"] == "DPMSolverMultistepScheduler"
    )
    assert (
        given["scheduler"]["solver_order"] == 2
        and given["scheduler"]["lambda_min_clipped"] == "-inf"
    )
