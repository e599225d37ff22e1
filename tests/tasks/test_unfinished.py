"""A training that stops before its last step is not taken for finished; settings that cause it are refused."""

from datetime import timedelta
from functools import partial

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from tasks.toy_fit import differing, fit, rows
from tinyfusion_pl import create_model
from tinyfusion_pl.callbacks import StepProgressBar
from tinyfusion_pl.cli import main
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import Budget, Fit, RunFolder, UnfinishedError


class StopAt(Callback):
    """Asks the Trainer to stop after `batch` batches, as Timer and EarlyStopping do."""

    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left <= 0


@pytest.mark.parametrize(("accumulate", "batches", "step"), [(1, 3, 3), (2, 3, 2)])
def test_a_stopped_training_is_unfinished_and_resumes(tmp_path, accumulate, batches, step):
    """Also where it is stopped within a step, whose gradients no checkpoint could hold."""
    fit(tmp_path / "whole", accumulate=accumulate)
    with pytest.raises(
        UnfinishedError,
        match=rf"learn_mask stopped at step {step} of 9\. .*Rerun the same command to resume",
    ):
        fit(tmp_path / "cut", accumulate=accumulate, every=100, more={"stop": StopAt(batches)})
    assert not (tmp_path / "cut" / "shallow").exists()
    fit(tmp_path / "cut", accumulate=accumulate, every=100)
    assert set(differing(tmp_path / "cut", tmp_path / "whole")) <= {"rows"}
    assert {row["step"] for row in rows(tmp_path / "whole")} <= {
        row["step"] for row in rows(tmp_path / "cut")
    }


def test_each_attempt_has_all_of_max_time(tmp_path, monkeypatch):
    """Else a rerun of the same command would have no time left, and never end."""
    now = [0.0]
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.timer.time.monotonic",
        lambda: now.__setitem__(0, now[0] + 1.0) or now[0],
    )
    for _ in range(40):
        try:
            fit(tmp_path, every=100, max_time=timedelta(seconds=8))
            break
        except UnfinishedError as stopped:
            assert "when its max_time was reached" in str(stopped)
    else:
        pytest.fail("never finished")
    assert (tmp_path / "shallow" / "record.json").exists()


def test_the_command_ends_unfinished_and_a_rerun_completes_it(tmp_path, capsys, monkeypatch):
    command = [
        f"run_dir={tmp_path}",
        "pruning=learned",
        "task.stages=[learn_mask,recover]",
        "data.batch_size=4",
        "recover.fit.trainer.max_steps=2",
        "learn_mask.fit.trainer.max_steps=6",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            StepProgressBar,
            "on_train_batch_end",
            lambda self, trainer, *_: setattr(trainer, "should_stop", True),
        )
        assert main(command) == 3
    said = capsys.readouterr()
    assert (
        "learn_mask stopped at step 1 of 6" in said.err
        and "Traceback" not in said.err
        and "error" not in said.err
    )
    assert (
        not (tmp_path / "stages" / "learn_mask.json").exists()
        and not (tmp_path / "shallow").exists()
    )
    assert not (tmp_path / "recover").exists()
    assert main(command) == 0
    assert (tmp_path / "stages" / "recover.json").exists()


def test_a_fit_without_batches_is_unfinished(tmp_path):
    training = Fit(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            max_steps=4,
            limit_train_batches=0,
            enable_progress_bar=False,
        )
    )
    with pytest.raises(UnfinishedError, match="train stopped at step 0 of 4"):
        training.run("train", RunFolder(tmp_path), module(), DigitsDataModule(batch_size=4))


def module():
    return Denoising(create_model("dit_digits", depth=1), objective=GaussianDiffusion())


WRONG = [
    {"limit_train_batches": 0},
    {"limit_train_batches": 0.0},
    {"limit_train_batches": 0.01},
    {"fast_dev_run": True},
    {"fast_dev_run": 3},
    {"overfit_batches": 2},
    {"overfit_batches": 0.5},
    {"enable_checkpointing": False},
    {"barebones": True},
    {"max_epochs": 1},
    {"max_time": "00:00:00:00"},
    {"max_time": "an hour"},
    {"limit_train_batches": "half"},
    {"strategy": "ddp_spawn"},
    {"accumulate_grad_batches": 0},
    {"accumulate_grad_batches": 4, "limit_train_batches": 6},
    {"log_every_n_steps": -1},
    {"gradient_clip_val": -1.0},
    {"gradient_clip_val": float("nan")},
    {"logger": True},
    {"callbacks": []},
    {"default_root_dir": "x"},
    {"max_steps": 0},
    {"max_steps": -2},
    {"no_such_setting": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_trainer_that_breaks_its_stage_is_refused(wrong):
    name = list(wrong)[-1]
    training = Fit(trainer=partial(Trainer, **{"accelerator": "cpu", "max_steps": 8, **wrong}))
    with pytest.raises(ValueError, match=rf"learn_mask\.fit\.trainer.*{name}"):
        training.check("learn_mask", module())


@pytest.mark.parametrize(
    "setting",
    [
        "fast_dev_run=true",
        "limit_train_batches=0",
        "enable_checkpointing=false",
        "overfit_batches=1",
    ],
)
def test_a_breaking_trainer_setting_leaves_no_run_folder(tmp_path, capsys, setting):
    assert main([f"run_dir={tmp_path / 'run'}", f"+recover.fit.trainer.{setting}"]) == 1
    assert f"recover.fit.trainer.{setting.partition('=')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"limit_train_batches": 2, "accumulate_grad_batches": 2},
        {"limit_train_batches": 1.0},
        {"max_time": "00:01:00:00"},
        {"gradient_clip_val": None},
        {"gradient_clip_val": 0},
        {"enable_checkpointing": True},
        {"max_epochs": -1},
    ],
    ids=str,
)
def test_a_trainer_that_serves_its_stage_is_taken(right):
    Fit(trainer=partial(Trainer, **{"accelerator": "cpu", "max_steps": 8, **right})).check(
        "learn_mask", module()
    )


def test_a_budget_takes_a_trainer_without_a_length():
    Fit(
        trainer=partial(Trainer, accelerator="cpu"),
        budget=Budget(num_images=8, global_batch_size=4),
    ).check("train", module())


def test_callbacks_of_a_stage_are_checked_by_name():
    def check(callbacks):
        Fit(trainer=partial(Trainer, accelerator="cpu", max_steps=8), callbacks=callbacks).check(
            "recover", module()
        )

    check({"progress": None, "own": ModelCheckpoint(), "time": Timer(timedelta(hours=1))})
    check(None)
    with pytest.raises(
        ValueError, match=r"recover\.fit\.callbacks\.stop is EarlyStopping.*max_steps"
    ):
        check({"stop": EarlyStopping("train/loss")})
    with pytest.raises(ValueError, match=r"recover\.fit\.callbacks\.progress is 5"):
        check({"progress": 5})
