"""The published recipes at their real model sizes: several minutes and 12 to 18 GB each."""

import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)

DEPTHS = {
    "dit_d19": (28, 19),
    "dit_d14": (28, 14),
    "dit_d7": (14, 7),
    "sit_d14": (28, 14),
    "mar_d16": (32, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depths"), DEPTHS.items())
def test_a_dry_run_goes_from_mask_learning_to_the_report(name, depths, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tinyfusion_pl",
        f"+experiment={name}",
        "+debug=dry_run",
        f"run_dir={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    model = {"sit_d14": "sit_xl_2", "mar_d16": "mar_large"}.get(name, "dit_xl_2")
    assert all(f"{what} is randomly initiali" in said for what in ("VAE", "InceptionV3", model))
    assert "The latents are random" in said and "real images are noise" in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [metrics[role]["depth"] for role in ("teacher", "pruned", "recovered")] == [
        depths[0],
        depths[1],
        depths[1],
    ]
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= metrics["recovered"].keys()
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("name", "depths"), DEPTHS.items())
def test_a_recipe_is_that_of_table_6(name, depths):
    """TinyFusion, table 6, and the published defaults."""
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", [f"+experiment={name}"])
    search, recover, lora = cfg.learn_mask, cfg.recover, cfg.adapter.weight_update
    assert (search.fit.budget.num_images, search.fit.budget.global_batch_size) == (1_281_167, 128)
    assert (lora.r, lora.lora_alpha, cfg.pruning.logits_lr, search.module.optimizer.lr) == (
        8,
        16,
        1e-3,
        1e-4,
    )
    assert (
        cfg.pruning.tau_start,
        cfg.pruning.tau_end,
        cfg.pruning.scaling,
        cfg.pruning.average_decay,
    ) == (4.0, 0.1, 100.0, 0.999)
    assert recover.module.optimizer.lr == 2e-4 and recover.module.scheduler.final_ratio == 0.5
    assert search.module.optimizer.weight_decay == recover.module.optimizer.weight_decay == 0
    feature = 2e-4 if name == "sit_d14" else 1e-2
    assert (cfg.distill.weight_kd, cfg.distill.weight_data, cfg.distill.weight_feature) == (
        0.9,
        0.1,
        feature,
    )
    assert (
        recover.fit.trainer.gradient_clip_val == 1.0 and recover.fit.callbacks.ema.decay == 0.9999
    )
    images = {"dit_d19": 100_000 * 256, "dit_d14": 500_000 * 256, "dit_d7": 500_000 * 256, "sit_d14": 100 * 1_281_167,
              "mar_d16": 40 * 1_281_167}  # fmt: skip
    assert (recover.fit.budget.num_images, recover.fit.budget.global_batch_size) == (
        images[name],
        256,
    )
    assert search.fit.trainer.precision == recover.fit.trainer.precision == "bf16-mixed"
    sampling = cfg.evaluate.sampling
    if name == "mar_d16":
        assert (sampling.num_iterations, sampling.num_sampling_steps, sampling.guidance_scale) == (
            256,
            100,
            3.0,
        )
        assert (sampling.guidance_schedule, sampling.temperature) == ("linear", 1.0)
    else:
        assert (
            sampling.num_sampling_steps,
            sampling.guidance_scale,
            sampling.guidance_channels,
        ) == (250, 1.5, 3)
    assert cfg.evaluate.num_samples == 50_000
    pattern = "3:4+3:4+2:4+3:4+2:4+3:4+3:4" if name == "dit_d19" else "1:2"
    assert cfg.pruning.pattern == pattern
    assert all(
        max_steps == -1
        for max_steps in (search.fit.trainer.max_steps, recover.fit.trainer.max_steps)
    )
