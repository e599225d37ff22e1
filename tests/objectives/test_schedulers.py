"""diffusers' schedulers on the project's denoisers, against the project's own samplers and against data of one point."""

import diffusers
import pytest
import torch

from goldens_util import assert_near, golden_files, load, new_dit, part
from objectives.test_sampling import Oracle, labels
from tinyfusion_pl.objectives import GaussianDiffusion, PictureSampler
from tinyfusion_pl.objectives.schedules import linear_betas


def sample(scheduler, denoiser, z, y, *, objective=None, **options):
    objective = objective or GaussianDiffusion()
    return objective.sample(denoiser, z, y, sampler="diffusers", scheduler=scheduler, **{"num_sampling_steps": 8, **options})


def ours(**options):
    """diffusers' DDIM at the very timesteps that ours visits."""
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="linspace", **options)


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_forward*"))
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_ddim_of_diffusers_is_ours_where_both_visit_every_timestep(file, guidance_scale):
    """A process of 50 steps: with fewer steps than timesteps the two space them differently."""
    model = new_dit(part(load(file), "weights"))
    c, objective = model.config, GaussianDiffusion(num_timesteps=50)
    z, y = torch.randn(2, c["in_channels"], c["input_size"], c["input_size"]), torch.tensor([0, 1])
    options = {"num_sampling_steps": 50, "guidance_scale": guidance_scale}
    expected = objective.sample(model, z, y, sampler="ddim", **options)
    scheduler = ours(num_train_timesteps=50, trained_betas=linear_betas(50).numpy())
    assert_near(sample(scheduler, model, z, y, objective=objective, **options), expected, 1e-4)


class AtTimesteps(Oracle):
    """The oracle at the nearest timestep: some schedulers ask between two of them, as a network may be asked."""

    def __call__(self, x, t, y):
        return super().__call__(x, t.round().long(), y)


@pytest.mark.parametrize("scheduler", [
    diffusers.DPMSolverMultistepScheduler(), diffusers.DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True),
    diffusers.UniPCMultistepScheduler(), diffusers.DPMSolverSinglestepScheduler(), diffusers.EulerDiscreteScheduler(),
    diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02), ours(), diffusers.DDPMScheduler(clip_sample=False),
    diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"), diffusers.EulerAncestralDiscreteScheduler(),
], ids=lambda scheduler: type(scheduler).__name__)  # fmt: skip
def test_data_of_one_point_is_found(scheduler):
    z, y = torch.randn(5, 1, 2, 2), labels(5)
    x = sample(scheduler, AtTimesteps(), z, y, num_sampling_steps=25)
    assert_near(x, (2.0 * y - 5).view(-1, 1, 1, 1).expand_as(x), 2e-2)


def test_dpm_solver_needs_few_steps_for_normal_data():
    """In 20 steps it is nearer to the exact flow than DDIM in 20."""
    z, y = torch.randn(200, 1, 1, 1), torch.full((200,), 3)
    exact = GaussianDiffusion().sample(Oracle(0.5), z, y, sampler="ddim", num_sampling_steps=500)
    error = {name: (x - exact).abs().mean() for name, x in {
        "dpm": sample(diffusers.DPMSolverMultistepScheduler(), Oracle(0.5), z, y, num_sampling_steps=20),
        "ddim": GaussianDiffusion().sample(Oracle(0.5), z, y, sampler="ddim", num_sampling_steps=20)}.items()}
    assert error["dpm"] < 0.8 * error["ddim"]


def test_the_scheduler_is_left_as_it_was():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    sample(scheduler, Oracle(), torch.randn(2, 1, 2, 2), labels(2))
    assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000


@pytest.mark.parametrize(("scheduler", "options", "num"), [
    (diffusers.DPMSolverMultistepScheduler(), {}, 0), (ours(), {}, 0), (ours(), {"eta": 1.0}, 1),
    (diffusers.DDPMScheduler(clip_sample=False), {}, 1),
], ids=str)  # fmt: skip
def test_only_schedulers_that_draw_take_noise(scheduler, options, num):
    assert GaussianDiffusion().num_noises(sampler="diffusers", scheduler=scheduler, num_sampling_steps=8, **options) == num


@pytest.mark.parametrize("scheduler", [ours(), diffusers.DDPMScheduler(clip_sample=False)], ids=["ddim", "ddpm"])
def test_a_numbered_sample_is_the_same_alone_and_in_a_batch(scheduler):
    denoiser = torch.nn.Module()
    denoiser.forward, denoiser.num_classes = Oracle(0.5), 5
    sampler = PictureSampler(denoiser=denoiser, objective=GaussianDiffusion(), latent_shape=(1, 2, 2), decode=lambda latents: latents,
                             sampling={"sampler": "diffusers", "scheduler": scheduler, "num_sampling_steps": 6}, seed=3)
    together = sampler(torch.arange(4), labels(4))
    assert_near(sampler(torch.tensor([2]), labels(4)[2:3]), together[2:3], 1e-5)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("scheduler", "options", "said"), [
    (None, {}, "there is no scheduler"),
    (diffusers.FlowMatchEulerDiscreteScheduler(), {}, "no noise schedule"),
    (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), {}, "another noise schedule than the objective"),
    (diffusers.DDIMScheduler(prediction_type="v_prediction"), {}, "prediction_type 'v_prediction'"),
    (diffusers.DPMSolverMultistepScheduler(), {"eta": 0.5}, "has no eta"),
    (ours(), {"clip_denoised": True}, "clipping is the scheduler's own part"),
    (ours(), {"num_sampling_steps": 0}, "num_sampling_steps is 0"),
    (diffusers.DDIMInverseScheduler(), {}, "from data to noise|cannot make"),
], ids=str)  # fmt: skip
def test_a_scheduler_that_does_not_fit_is_refused_before_the_denoiser_runs(scheduler, options, said):
    oracle, options = Oracle(), {"num_sampling_steps": 8, **options}
    with pytest.raises(ValueError, match=said):
        GaussianDiffusion().check_sampling(sampler="diffusers", scheduler=scheduler, **options)
    with pytest.raises(ValueError, match=said):
        sample(scheduler, oracle, torch.randn(2, 1, 2, 2), labels(2), **options)
    assert not oracle.asked


def test_a_learned_variance_needs_a_denoiser_that_predicts_one():
    with pytest.raises(ValueError, match="variance_type 'learned_range', but with learn_sigma=False"):
        GaussianDiffusion(learn_sigma=False).check_sampling(
            sampler="diffusers", scheduler=diffusers.DDPMScheduler(variance_type="learned_range"), num_sampling_steps=8)
