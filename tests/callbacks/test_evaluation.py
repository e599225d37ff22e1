"""Sampling and measuring during training: the averaged weights, without a trace in the training."""

import csv

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn

from tinyfusion_pl import DepthPruningCallback, MaskLearning, create_model
from tinyfusion_pl.callbacks import EMAWithWarmup, EvaluationCallback
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import GenerationMetrics, load_digits_classifier
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives import GaussianDiffusion, ImageSampler, balanced_labels

SAMPLING = {"num_sampling_steps": 2, "sampler": "ddim", "guidance_scale": 1.0}


def denoiser():
    torch.manual_seed(0)
    model = create_model("dit_digits", depth=2, hidden_size=16, num_heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def evaluation(**kwargs):
    settings = {
        "every_n_steps": 2,
        "sampling": SAMPLING,
        "num_samples": 11,
        "batch_size": 4,
        "num_shown": 4,
    }
    return EvaluationCallback(GenerationMetrics(load_digits_classifier()), **{**settings, **kwargs})


class Loss(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


def fit(folder, *callbacks, max_steps=5, module=None, **kwargs):
    seed_everything(1)
    module = module or Denoising(
        denoiser(), objective=GaussianDiffusion(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **kwargs,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    return module


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path):
    plain, watched = Loss(), Loss()
    a = fit(tmp_path / "a", EMAWithWarmup(decay=0.9), plain)
    b = fit(tmp_path / "b", EMAWithWarmup(decay=0.9), watched, evaluation())
    assert plain.seen == watched.seen
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_averaged_weights_are_measured_and_logged_with_a_grid(tmp_path):
    class Averaged(Callback):
        """The averaged denoiser's own measurement at step 4, made apart."""

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                average = next(
                    c for c in trainer.callbacks if isinstance(c, EMAWithWarmup)
                )._average_model.module.denoiser
                raw = [p.clone() for p in pl_module.denoiser.parameters()]
                assert not all(torch.equal(x, y) for x, y in zip(raw, average.parameters()))
                data, metrics = trainer.datamodule, GenerationMetrics(load_digits_classifier())
                metrics.update_reference(data.reference_images()[0])
                sampler = ImageSampler(
                    denoiser=average,
                    objective=pl_module.objective,
                    latent_shape=data.latent_shape,
                    decode=data.decode,
                    sampling=SAMPLING,
                )
                metrics.update(sampler(torch.arange(11), labels := balanced_labels(11, 10)), labels)
                self.expected = metrics.compute()

    averaged, callback = Averaged(), evaluation()
    fit(tmp_path, EMAWithWarmup(decay=0.9), averaged, callback)
    assert list(callback.results) == [2, 4]
    assert callback.protocol["weights"] == "averaged" and callback.protocol["num_samples"] == 11
    with (tmp_path / "hparams.yaml").open() as file:
        assert yaml.safe_load(file)["val/protocol"] == callback.protocol
    assert callback.results[4] == pytest.approx(averaged.expected, rel=1e-3)
    with (tmp_path / "metrics.csv").open() as file:
        logged = {
            int(row["step"]): float(row["val/fid"])
            for row in csv.DictReader(file)
            if row["val/fid"]
        }
    assert logged == pytest.approx(
        {step: result["fid"] for step, result in callback.results.items()}
    )
    for step in (2, 4):
        with Image.open(tmp_path / "samples" / f"{step:08d}.png") as grid:
            assert grid.size[1] >= 64


def test_it_works_beside_depth_pruning_and_accumulation(tmp_path):
    callback = evaluation(num_shown=0)
    module = MaskLearning(denoiser(), objective=GaussianDiffusion())
    fit(
        tmp_path,
        DepthPruningCallback("1:2"),
        callback,
        module=module,
        max_steps=4,
        accumulate_grad_batches=2,
    )
    assert list(callback.results) == [2, 4] and not (tmp_path / "samples").exists()
    assert module.denoiser.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"num_samples": 1}, "num_samples is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_counts_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        evaluation(**settings)


def test_invalid_sampling_stops_before_the_first_step(tmp_path):
    for settings, said in (
        ({"num_samples": 3}, "'precision_recall' needs 4"),
        ({"sampling": {"num_sampling_steps": 0}}, "num_sampling_steps"),
        ({"labels": "all"}, "labels is 'all'"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(tmp_path, evaluation(**settings))


def test_a_module_without_denoiser_is_refused_by_name(tmp_path):
    from callbacks.toy_module import InInit

    with pytest.raises(ValueError, match="LightningModule InInit has no denoiser, objective"):
        fit(tmp_path, evaluation(), module=InInit())
