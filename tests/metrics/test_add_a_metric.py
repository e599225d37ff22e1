"""The example of docs/how_to/add_a_metric.md, executed: a metric added to the collection."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from tinyfusion_pl import create_model
from tinyfusion_pl.callbacks import EvaluationCallback
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import GenerationMetrics, load_digits_classifier
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives import GaussianDiffusion

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "add_a_metric.md"


def block(language):
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.fixture
def metrics(monkeypatch):
    """The collection with the metric of the page, over the digit classifier."""
    config = yaml.safe_load(block("yaml"))["metrics"]["mean_distance"]
    name = config["_target_"].rpartition(".")[0]
    module = types.ModuleType(name)
    exec(block("python"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    metric = instantiate({**config, "num_features": 64})
    return GenerationMetrics(load_digits_classifier(), metrics={"mean_distance": metric})


def test_the_example_computes_its_distance(metrics):
    images, labels = DigitsDataModule().reference_images()
    metrics.update_reference(images[:900])
    for _ in range(2):  # the reference survives reset()
        metrics.update(images[900:1000], labels[900:1000])
        metrics.update(images[1000:], labels[1000:])
        features = load_digits_classifier()(images).features.double()
        expected = (features[:900].mean(0) - features[900:].mean(0)).square().sum().item()
        assert metrics.compute() == pytest.approx({"mean_distance": expected}, rel=1e-5)
        metrics.reset()


def test_the_example_is_in_the_protocol(metrics):
    expected = {"metric": "MeanDistance", "of": "features", "power": 2.0}
    assert metrics.protocol()["metrics"] == {"mean_distance": expected}


def test_the_example_is_logged_during_training(metrics, tmp_path):
    torch.manual_seed(0)
    denoiser = create_model("dit_digits", depth=2, hidden_size=16, num_heads=2)
    sampling = {"num_sampling_steps": 2, "sampler": "ddim", "guidance_scale": 1.0}
    evaluation = EvaluationCallback(
        metrics, every_n_steps=1, sampling=sampling, num_samples=4, batch_size=4, num_shown=1
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[evaluation],
        logger=CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Denoising(denoiser, objective=GaussianDiffusion(), optimizer=torch.optim.AdamW)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    assert "val/mean_distance" in (tmp_path / "metrics.csv").read_text()
