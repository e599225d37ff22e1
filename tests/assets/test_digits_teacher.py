import json
from importlib.resources import files

import pytest
import torch

from tinyfusion_pl.artifacts import sha256
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import load_digits_classifier
from tinyfusion_pl.models import load_denoiser
from tinyfusion_pl.objectives import GaussianDiffusion, ImageSampler, balanced_labels

ASSETS = files("tinyfusion_pl") / "assets"


def named_right(denoiser, num_samples):
    data = DigitsDataModule()
    sampler = ImageSampler(
        denoiser=denoiser,
        objective=GaussianDiffusion(),
        latent_shape=data.latent_shape,
        decode=data.decode,
        seed=123,
        sampling={
            "num_sampling_steps": 25,
            "sampler": "ddim",
            "guidance_scale": 1.5,
            "guidance_channels": None,
        },
    )
    labels = balanced_labels(num_samples, 10)
    images = sampler(torch.arange(num_samples), labels)
    return (load_digits_classifier()(images).logits.argmax(1) == labels).float().mean().item()


def test_a_classifier_names_at_least_95_percent_of_its_samples_right():
    """The classifier was trained on other digits than those it is 97% right on (tests/metrics)."""
    assert named_right(load_denoiser("dit_digits", checkpoint="shipped"), 100) >= 0.95


def test_the_record_is_that_of_the_file_and_states_recipe_seed_and_metrics():
    record = json.loads((ASSETS / "digits_teacher" / "record.json").read_text())
    assert record["weights"]["sha256"] == sha256(ASSETS / "digits_teacher" / "model.safetensors")
    assert record["recipe"].endswith("+experiment=digits_teacher") and record["seed"] == 0
    assert record["metrics"]["accuracy"] >= 0.95 and record["metrics"]["depth"] == 12


def test_what_is_shipped_is_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 5e6


@pytest.mark.slow
def test_a_third_of_the_recipe_reaches_95_percent(tmp_path):
    from tinyfusion_pl.cli import main

    assert (
        main(
            [
                "+experiment=digits_teacher",
                "train.fit.trainer.max_steps=1300",
                f"run_dir={tmp_path}",
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "trained" / "record.json").read_text())["metrics"]["accuracy"]
        >= 0.95
    )
