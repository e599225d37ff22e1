"""The loggers that configs name."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from tasks.toy_fit import Killed, fit, rows
from tinyfusion_pl import DepthPruningCallback, MaskLearning, create_model
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import csv_logger, wandb_logger


def test_wandb_gets_the_decision_and_a_resumed_stage_goes_on_in_its_run(tmp_path):
    logger = wandb_logger(folder=tmp_path / "logs" / "learn_mask", stage="learn_mask", experiment="digits_d6", project="p", offline=True)
    again = wandb_logger(folder=tmp_path / "logs" / "learn_mask", stage="learn_mask", experiment="digits_d6", project="p", offline=True)
    other = wandb_logger(folder=tmp_path / "logs" / "recover", stage="recover", experiment="digits_d6", project="p", offline=True)
    assert logger.version == again.version != other.version
    module = MaskLearning(create_model("dit_digits", depth=2, hidden_size=16, num_heads=2), objective=GaussianDiffusion())
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=2, logger=logger, log_every_n_steps=1, enable_checkpointing=False,
                      callbacks=[DepthPruningCallback("1:2", save_dir=tmp_path / "shallow")], enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["gates/blocks/kept_0"] + summary["gates/blocks/kept_1"] == 1
    assert summary["gates/tau"] > 0 and list((tmp_path / "logs").rglob("*.wandb"))


def read(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_logged_at_a_step_is_one_row_at_once(tmp_path):
    logger = csv_logger(folder=tmp_path, stage="recover")
    logger.log_metrics({"loss": torch.tensor(0.5)}, step=2)
    logger.log_metrics({"fid": 3.25}, step=2)
    assert read(tmp_path) == [{"step": "2", "loss": "0.5", "fid": "3.25"}]
    logger.log_metrics({"loss": 0.25}, step=4)
    logger.log_metrics({"loss": 0.2501234567, "fid": 1}, step=4)
    logger.log_metrics({"loss": 0.1}, step=4)  # shorter than what stands there
    logger.log_metrics({"a, \"quoted\" name": float("nan")}, step=6)
    wanted = [{"step": "2", "loss": "0.5", "fid": "3.25"}, {"step": "4", "loss": "0.1", "fid": "1"}, {"step": "6", "loss": "", "fid": ""}]
    for row, want in zip(read(tmp_path), wanted, strict=True):
        assert row | want == row


def test_a_new_logger_continues_the_file(tmp_path):
    for step, value in ((2, 0.5), (4, 0.25), (4, 0.25), (6, 0.125)):
        csv_logger(folder=tmp_path, stage="recover").log_metrics({"loss": value}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,0.0")  # torn
    csv_logger(folder=tmp_path, stage="recover").log_metrics({"loss": 1.5, "fid": 2.5}, step=8)
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [("2", "0.5"), ("4", "0.25"), ("6", "0.125"), ("8", "1.5")]


def test_random_logging_equals_a_table_of_steps(tmp_path):
    """Against a dictionary by step: rows in order, later values win, whatever the length of names and values."""
    generator, table, step = torch.Generator().manual_seed(0), {}, 0
    for i in range(200):
        step += int(torch.randint(2, (), generator=generator))
        name = f"metric_{int(torch.randint(2 + i // 20, (), generator=generator))}"
        value = round(float(torch.rand((), generator=generator, dtype=torch.float64)), int(torch.randint(1, 9, (), generator=generator)))
        if i % 40 == 0:
            logger = csv_logger(folder=tmp_path, stage="recover")
        logger.log_metrics({name: value}, step=step)
        table.setdefault(step, {})[name] = value
        found = {int(row.pop("step")): {k: float(v) for k, v in row.items() if v} for row in read(tmp_path)}
        assert found == table


def test_hyperparameters_are_kept_together(tmp_path):
    logger = csv_logger(folder=tmp_path, stage="recover")
    logger.log_hyperparams({"a": 1})
    logger.log_hyperparams({"val/protocol": {"seed": 0}})
    text = (tmp_path / "hparams.yaml").read_text()
    assert "a: 1" in text and "seed: 0" in text


@pytest.mark.parametrize("every", [1, 2])
def test_rows_of_a_learning_rate_monitor_are_not_repeated(tmp_path, every):
    """It logs a step before that is trained, and again in the attempt that resumes."""
    def monitored(folder, **kwargs):
        fit(folder, log_every=every, every=2, more={"monitor": LearningRateMonitor()}, max_steps=6, **kwargs)
        return rows(folder)

    whole = monitored(tmp_path / "whole")
    for kill in (3, 1):
        with pytest.raises(Killed):
            monitored(tmp_path / "cut", kill=kill)
    cut = monitored(tmp_path / "cut")
    assert cut == whole
    assert len({row["step"] for row in cut}) == len(cut)


def test_a_resumed_fit_logs_to_wandb_as_well(tmp_path):
    for kill in (3, None):
        def wandb(*, folder, stage):
            return wandb_logger(folder=folder, stage=stage, experiment="e", project="p", offline=True)

        try:
            fit(tmp_path, kill=kill, logger=wandb)
        except Killed:
            continue
        finally:
            import wandb as library

            library.finish()
    assert list((tmp_path / "logs").rglob("*.wandb")) and (tmp_path / "shallow" / "record.json").exists()
