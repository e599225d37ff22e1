"""The loggers that configs name."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor

from tasks.toy_fit import Killed, fit, rows
from tinyfusion_pl.artifacts import write_json
from tinyfusion_pl.tasks import TensorBoardTracker, WandbTracker, csv_logger, tensorboard_tracker
from tinyfusion_pl.tasks.outcomes import get_objective
from wandb_files import read_runs


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
    logger.log_metrics({'a, "quoted" name': float("nan")}, step=6)
    wanted = [
        {"step": "2", "loss": "0.5", "fid": "3.25"},
        {"step": "4", "loss": "0.1", "fid": "1"},
        {"step": "6", "loss": "", "fid": ""},
    ]
    for row, want in zip(read(tmp_path), wanted, strict=True):
        assert row | want == row


def test_a_new_logger_continues_the_file(tmp_path):
    for step, value in ((2, 0.5), (4, 0.25), (4, 0.25), (6, 0.125)):
        csv_logger(folder=tmp_path, stage="recover").log_metrics({"loss": value}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,0.0")  # torn
    csv_logger(folder=tmp_path, stage="recover").log_metrics({"loss": 1.5, "fid": 2.5}, step=8)
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [
        ("2", "0.5"),
        ("4", "0.25"),
        ("6", "0.125"),
        ("8", "1.5"),
    ]


def test_random_logging_equals_a_table_of_steps(tmp_path):
    """Against a dictionary by step: rows in order, later values win, whatever the length of names and values."""
    generator, table, step = torch.Generator().manual_seed(0), {}, 0
    for i in range(200):
        step += int(torch.randint(2, (), generator=generator))
        name = f"metric_{int(torch.randint(2 + i // 20, (), generator=generator))}"
        value = round(
            float(torch.rand((), generator=generator, dtype=torch.float64)),
            int(torch.randint(1, 9, (), generator=generator)),
        )
        if i % 40 == 0:
            logger = csv_logger(folder=tmp_path, stage="recover")
        logger.log_metrics({name: value}, step=step)
        table.setdefault(step, {})[name] = value
        found = {
            int(row.pop("step")): {k: float(v) for k, v in row.items() if v}
            for row in read(tmp_path)
        }
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
        fit(
            folder,
            log_every=every,
            every=2,
            more={"monitor": LearningRateMonitor()},
            max_steps=6,
            **kwargs,
        )
        return rows(folder)

    whole = monitored(tmp_path / "whole")
    for kill in (3, 1):
        with pytest.raises(Killed):
            monitored(tmp_path / "cut", kill=kill)
    cut = monitored(tmp_path / "cut")
    assert cut == whole
    assert len({row["step"] for row in cut}) == len(cut)


@pytest.fixture
def _quiet_wandb(tmp_path, monkeypatch):
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("_quiet_wandb")
def test_a_fit_that_is_killed_logs_each_step_to_wandb_once(tmp_path):
    """Against an uninterrupted fit without W&B: after each kill, steps are trained again since the last checkpoint."""
    fit(tmp_path / "whole", log_every=1)
    wanted = rows(tmp_path / "whole")
    for kill in (5, 3, None):
        tracker = WandbTracker(project="p", experiment="e", offline=True)
        try:
            fit(tmp_path / "cut", log_every=1, every=4, kill=kill, logger=tracker)
        except Killed:
            continue
        finally:
            tracker.finish(255 if kill else 0)
    (run,) = read_runs(tmp_path / "cut")
    assert rows(tmp_path / "cut") == wanted and run.exit_code == 0
    assert len(list((tmp_path / "cut" / "wandb").glob("offline-run-*"))) == 3
    for name in wanted[0].keys() - {"step", "epoch"}:
        cells = [(int(row["step"]), float(row[name])) for row in wanted if row[name]]
        assert run.curve(f"learn_mask/{name}", "learn_mask/step") == cells, name


def test_tensorboard_gets_each_step_of_a_killed_fit_once(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard"
    )
    for kill in (5, None):
        try:
            fit(tmp_path, log_every=1, every=4, kill=kill, logger=TensorBoardTracker())
        except Killed:
            continue
    found = events.EventAccumulator(
        str(tmp_path / "tensorboard" / "learn_mask"), size_guidance={"scalars": 0}
    )
    found.Reload()
    shown = {
        tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }
    for name in rows(tmp_path)[0].keys() - {"step", "epoch"}:
        cells = [(int(row["step"]), float(row[name])) for row in rows(tmp_path) if row[name]]
        assert [step for step, _ in shown[name]] == [step for step, _ in cells]
        assert [value for _, value in shown[name]] == pytest.approx(
            [value for _, value in cells], rel=1e-6
        )


def test_a_run_that_a_script_opened_is_used_and_left_open(tmp_path, monkeypatch):
    class Run:
        id, logged = "of_the_script", []

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, metrics):
            self.logged.append(metrics)

        def finish(self, **kwargs):
            raise AssertionError("it is not ours")

    import wandb

    monkeypatch.setattr(wandb, "run", Run())
    tracker = WandbTracker(project="p", experiment="e", offline=True)
    tracker(folder=tmp_path / "logs" / "recover", stage="recover").log_metrics(
        {"val/fid": 3.0, "train/loss": 1.0}, step=7
    )
    tracker.finish(0)
    assert Run.logged == [{"val/fid": 3.0, "recover/train/loss": 1.0, "recover/step": 7}]


def test_a_new_run_gets_the_steps_that_the_folder_has(tmp_path, monkeypatch):
    """As an arm of a sweep that another run has trained already."""
    import wandb

    class Run:
        def __init__(self, name):
            self.id, self.logged = name, []

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, metrics):
            self.logged.append(metrics)

    csv_logger(folder=tmp_path / "logs" / "recover", stage="recover").log_metrics(
        {"val/fid": 3.0}, step=2
    )
    seen = {}
    for name in ("first", "first", "second"):
        monkeypatch.setattr(wandb, "run", run := Run(name))
        WandbTracker(project="p", experiment="e", offline=True).stage_ended(tmp_path, "recover")
        seen.setdefault(name, []).append(run.logged)
    assert seen == {
        "first": [[{"val/fid": 3.0, "recover/step": 2}], []],
        "second": [[{"val/fid": 3.0, "recover/step": 2}]],
    }


def test_a_missing_tensorboard_is_reported_before_training_with_the_extra(monkeypatch):
    monkeypatch.setattr(tensorboard_tracker, "_TENSORBOARD_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"tinyfusion_pl\[tensorboard\]"):
        TensorBoardTracker().check()


def test_tensorboard_shows_the_final_figures_and_the_table(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard"
    )
    models = {
        "teacher": {"depth": 12, "num_params": 9, "fid": 3.5},
        "recovered": {"depth": 6, "num_params": 5, "fid": 4.25},
    }
    write_json(
        tmp_path / "metrics.json",
        models | {"protocol": {"num_samples": 10}, "speedup": {"measured": 1.5}},
    )
    for _ in range(2):
        TensorBoardTracker().stage_ended(tmp_path, "evaluate")
    found = events.EventAccumulator(str(tmp_path / "tensorboard" / "evaluate"))
    found.Reload()
    shown = {tag: [e.value for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    wanted = {"fid": 4.25, "depth": 6.0, "num_parameters": 5.0, "speed_up": 1.5}
    assert shown == {f"final/{name}": [value] for name, value in wanted.items()}
    assert "final/overview" in found.Tags()["images"] and len(found.Tags()["tensors"]) == 2


def test_what_a_sweep_minimizes_is_the_final_fid(tmp_path):
    assert get_objective(tmp_path) is None
    write_json(
        tmp_path / "metrics.json",
        {"teacher": {"fid": 1.0}, "pruned": {"fid": 9.0}, "recovered": {"depth": 6, "fid": 4.25}},
    )
    assert get_objective(tmp_path) == 4.25
    write_json(tmp_path / "metrics.json", {"teacher": {"cmmd": 1.0}, "pruned": {"cmmd": 9.0}})
    assert get_objective(tmp_path) == 9.0
