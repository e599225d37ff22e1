import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tinyfusion_pl.callbacks import StepProgressBar
from tinyfusion_pl.cli import main
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import create_model
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import Budget, Fit, RunFolder


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(1_281_167, 128, 10_010), (25_600_000, 256, 100_000), (256, 256, 1)],
)
def test_images_become_steps_that_see_at_least_as_many(images, batch, steps):
    assert Budget(num_images=images, global_batch_size=batch).num_steps == steps


@pytest.mark.parametrize(
    ("batch", "limit", "devices", "expected"),
    [
        (256, 32, 8, (32, 1)),
        (256, 32, 1, (32, 8)),
        (256, None, 4, (64, 1)),
        (96, 20, 2, (16, 3)),
        (7, 2, 1, (1, 7)),
    ],
)
def test_the_batch_is_divided_over_devices_and_accumulated_steps(batch, limit, devices, expected):
    size, accumulated = Budget(
        num_images=batch, global_batch_size=batch, max_device_batch_size=limit
    ).divide(devices)
    assert (size, accumulated) == expected and size * accumulated * devices == batch


@pytest.mark.parametrize(("batch", "devices", "would"), [(256, 3, "255 or 258"), (2, 4, "4")])
def test_a_batch_that_devices_cannot_share_is_refused_with_batches_that_they_can(
    batch, devices, would
):
    with pytest.raises(
        ValueError, match=f"global_batch_size is {batch}.*{devices} devices.*Give {would}"
    ):
        Budget(num_images=batch, global_batch_size=batch).divide(devices)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_images": 0},
        {"global_batch_size": -1},
        {"max_device_batch_size": 0},
        {"num_images": 1.5},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"budget.{next(iter(wrong))}"):
        Budget(**{"num_images": 100, "global_batch_size": 10, **wrong})


class SeenLabels(Callback):
    def __init__(self, until):
        self.batches, self.until = [], until

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.until:
            raise KeyboardInterrupt
        self.batches.append((trainer.global_step, batch[1]))


def seen(tmp_path, limit, *, until=None):
    """Labels of the optimizer steps of a fit with this limit of a device's batch, perhaps interrupted, and the number of its batches."""
    torch.manual_seed(0)
    watch = SeenLabels(until)
    module = Denoising(
        create_model("dit_digits", depth=1), objective=GaussianDiffusion(), label_dropout=0.0
    )
    fit = Fit(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            max_epochs=-1,
            max_steps=-1,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            enable_model_summary=False,
        ),
        budget=Budget(num_images=44, global_batch_size=12, max_device_batch_size=limit),
        checkpoint_every_n_steps=1,
    )
    data = DigitsDataModule(batch_size=100)
    fit.check("train", module)
    with nullcontext() if until is None else pytest.raises(KeyboardInterrupt):
        fit.run("train", RunFolder(tmp_path), module, data, first=[watch])
    steps = sorted({at for at, _ in watch.batches})
    return [
        torch.cat([y for at, y in watch.batches if at == step]).tolist() for step in steps
    ], len(watch.batches)


def test_a_step_sees_the_same_images_however_its_batch_is_divided(tmp_path, capsys):
    whole, num_whole = seen(tmp_path / "whole", None)
    assert [len(step) for step in whole] == [12] * 4 and num_whole == 4
    parts, num_parts = seen(tmp_path / "parts", 5)
    assert parts == whole and num_parts == 12
    assert (
        "4 steps; global batch 12 = 4 per device x 1 device x 3 accumulation steps"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(("before", "after"), [(5, None), (None, 5), (5, 2), (2, 5)])
def test_a_training_goes_on_with_whole_steps_where_its_batch_is_divided_otherwise(
    tmp_path, before, after
):
    """As on another number of devices."""
    whole, _ = seen(tmp_path / "whole", None)
    assert seen(tmp_path / "parts", before, until=2)[0] == whole[:2]
    assert seen(tmp_path / "parts", after)[0] == whole[2:]


def test_accumulation_by_hand_beside_a_budget_is_refused():
    fit = Fit(
        trainer=partial(
            Trainer, accelerator="cpu", max_steps=-1, max_epochs=-1, accumulate_grad_batches=2
        ),
        budget=Budget(num_images=44, global_batch_size=12),
    )
    with pytest.raises(ValueError, match="learn_mask.fit.trainer.accumulate_grad_batches is 2"):
        fit.check(
            "learn_mask",
            Denoising(create_model("dit_digits", depth=1), objective=GaussianDiffusion()),
        )


def test_a_stage_follows_its_budget_from_the_command_line(tmp_path, capsys):
    """The batch of the averaged weights follows too: their half-life in images stays."""
    words = [
        "task=learn_mask",
        "pruning=learned",
        f"run_dir={tmp_path}",
        "+budget@learn_mask.fit.budget=imagenet_epoch",
        "learn_mask.fit.budget.num_images=48",
        "learn_mask.fit.budget.global_batch_size=16",
        "learn_mask.fit.trainer.max_steps=-1",
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert "learn_mask: 3 steps; global batch 16" in capsys.readouterr().out
    lines = (tmp_path / "learn_mask" / "decisions.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3


def test_the_progress_bar_counts_optimizer_steps_where_batches_are_accumulated(tmp_path, capsys):
    fit = Fit(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            max_epochs=-1,
            max_steps=-1,
            use_distributed_sampler=False,
            enable_model_summary=False,
        ),
        callbacks={"progress": StepProgressBar()},
        budget=Budget(num_images=44, global_batch_size=12, max_device_batch_size=5),
    )
    module = Denoising(create_model("dit_digits", depth=1), objective=GaussianDiffusion())
    fit.run("train", RunFolder(tmp_path), module, DigitsDataModule(batch_size=100))
    assert "4/4" in (said := capsys.readouterr().out) and "12/" not in said
