"""Samples are asked to be of the classes of the images that they are held against."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset

from tinyfusion_pl import create_model
from tinyfusion_pl.callbacks import EvaluationCallback
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import FrechetDistance, GenerationMetrics, load_digits_classifier
from tinyfusion_pl.objectives import GaussianDiffusion, ImageSampler
from tinyfusion_pl.tasks import Evaluate, Inputs

CLASSES = [3, 5, 701]


class FewDigits(DigitsDataModule):
    """Images of the digits 0, 1 and 2, which are the model's classes 3, 5 and 701."""

    def train_set(self):
        x, y = self.of_three(*super().train_set().tensors)
        return TensorDataset(x, y)

    def reference_images(self):
        return self.of_three(*super().reference_images())

    def of_three(self, x, y):
        return x[y < 3], torch.tensor(CLASSES)[y[y < 3]]

    @property
    def classes(self):
        return CLASSES


def denoiser(num_classes):
    return create_model("dit_digits", depth=1, hidden_size=16, num_heads=2, num_classes=num_classes)


def inputs(num_classes=1000):
    return Inputs(
        name="x",
        seed=0,
        teacher=denoiser(num_classes),
        objective=GaussianDiffusion(),
        data=FewDigits(),
    )


def metrics():
    return GenerationMetrics(load_digits_classifier(), metrics={"fid": FrechetDistance(64)})


def evaluate(**settings):
    trainer = partial(
        Trainer,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    return Evaluate(
        trainer=trainer,
        metrics=metrics(),
        num_samples=40,
        batch_size=8,
        num_shown=4,
        sampling={"num_sampling_steps": 2, "sampler": "ddim"},
        **settings,
    )


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_labels_are_of_the_reference_images_classes(labels, capsys):
    task, given = evaluate(labels=labels), inputs()
    task.check(given)
    assert (
        "sampling from the data's 3 classes, of 1000 that the model knows"
        in capsys.readouterr().out
    )
    found = task.get_labels(task.sampler(given.teacher, given), given)
    assert found.unique().tolist() == CLASSES and len(found) == 40
    assert task.protocol(given)["classes"] == CLASSES


def test_with_a_reference_file_they_are_of_the_data(tmp_path, capsys):
    images = DigitsDataModule().reference_images()[0][:50]
    np.savez(tmp_path / "ref.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    task, given = evaluate(reference=str(tmp_path / "ref.npz")), inputs()
    task.check(given)
    assert "ref.npz are unknown and should be the same" in capsys.readouterr().out
    assert task.get_labels(task.sampler(given.teacher, given), given).unique().tolist() == CLASSES


def test_a_model_of_fewer_classes_is_refused():
    with pytest.raises(
        ValueError, match="The data's classes are 3 to 701, but the model has classes 0 to 9"
    ):
        evaluate().check(inputs(num_classes=10))
    with pytest.raises(ValueError, match="has labels 3 to 701, but the model has classes 0 to 9"):
        FewDigits().check_fits(denoiser(10))


def test_all_classes_are_sampled_as_before():
    task = evaluate()
    given = Inputs(
        name="x",
        seed=0,
        teacher=denoiser(10),
        objective=GaussianDiffusion(),
        data=DigitsDataModule(),
    )
    assert task.get_labels(task.sampler(given.teacher, given), given).tolist() == [
        i % 10 for i in range(40)
    ]
    assert "classes" not in task.protocol(given)


def test_evaluation_during_training_samples_them_too():
    callback = EvaluationCallback(metrics(), every_n_steps=1, num_samples=9)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = FewDigits()
    sampler = ImageSampler(
        denoiser=denoiser(1000), objective=GaussianDiffusion(), latent_shape=(1, 8, 8), decode=None
    )
    assert callback._get_labels(trainer, sampler).tolist() == CLASSES * 3
