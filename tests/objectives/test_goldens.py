import pytest
import torch

from goldens_util import assert_near, golden_files, load, new_dit, part
from tinyfusion_pl.models import SiT
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants


def case(file):
    golden = load(file)
    forward = file.with_name(file.name.replace("dit_diffusion", "dit_forward"))
    forward = forward if forward.exists() else file.with_name("dit_forward.safetensors")
    return (
        golden,
        new_dit(part(load(forward), "weights")),
        GaussianDiffusion(num_timesteps=len(golden["betas"])),
    )


def step_counts(golden, prefix):
    return [
        int(k.split(".")[0].removeprefix(prefix))
        for k in golden
        if k.startswith(prefix) and k.endswith((".sample", ".timesteps"))
    ]


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_diffusion*"))
def test_against_reference_tables_and_losses(file):
    golden, model, objective = case(file)
    assert_near(objective.tables.betas, golden["betas"], 1e-10, "betas")
    assert_near(objective.tables.alphas_cumprod, golden["alphas_cumprod"], 1e-10, "alphas_cumprod")
    assert_near(
        objective.tables.posterior_log_variance_clipped,
        golden["posterior_log_variance_clipped"],
        1e-10,
        "posterior",
    )
    draw = objective.draw(golden["x0"], t=golden["t"], noise=golden["noise"])
    assert_near(draw.x_t, golden["x_t"], 1e-5, "x_t")
    with torch.no_grad():
        losses = objective.losses(model(draw.x_t, draw.t, golden["y"]), draw)
    for name in ("loss", "mse", "vb"):
        assert_near(losses[name], golden[f"loss.{name}"], 1e-5, name)


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_diffusion*"))
def test_against_reference_respaced_steps(file):
    golden, _, objective = case(file)
    for count in step_counts(golden, "respaced_"):
        tables, timesteps = objective.respaced(count)
        assert timesteps.tolist() == golden[f"respaced_{count}.timesteps"].tolist()
        assert_near(tables.betas, golden[f"respaced_{count}.betas"], 1e-8, "betas")


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_diffusion*"))
def test_against_reference_ddpm_and_ddim_samples(file):
    golden, model, objective = case(file)
    assert step_counts(golden, "ddpm_") and step_counts(golden, "ddim_")
    for count in step_counts(golden, "ddpm_"):
        ours = objective.sample(
            model,
            golden[f"ddpm_{count}.z"],
            golden["y"],
            num_sampling_steps=count,
            noise=golden[f"ddpm_{count}.noise"],
        )
        assert_near(ours, golden[f"ddpm_{count}.sample"], 1e-4, f"ddpm {count}")
    for count in step_counts(golden, "ddim_"):
        z = golden.get(f"ddim_{count}.z", golden.get(f"ddpm_{count}.z"))
        ours = objective.sample(model, z, golden["y"], num_sampling_steps=count, sampler="ddim")
        assert_near(ours, golden[f"ddim_{count}.sample"], 1e-4, f"ddim {count}")


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("sit*"))
def test_against_reference_interpolant_loss_and_ode_samples(file):
    golden, objective = load(file), Interpolants()
    model = new_dit(part(golden, "weights"), SiT)
    draw = objective.draw(golden["x"], t=golden["t"], noise=golden["noise"])
    with torch.no_grad():
        assert_near(
            objective.losses(model(draw.x_t, draw.t, golden["y"]), draw)["loss"],
            golden["loss"],
            1e-5,
            "loss",
        )
    sampled = [key for key in golden if key.startswith("ode_")]
    assert sampled
    for key in sampled:  # ode_<method>_<intervals>.sample
        _, method, count = key.removesuffix(".sample").split("_")
        ours = objective.sample(
            model,
            golden["z"],
            golden["y"],
            sampler=method.removesuffix("2"),
            num_sampling_steps=int(count),
        )
        assert_near(ours, golden[key], 1e-4, key)
