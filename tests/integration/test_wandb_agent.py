"""Arms that `wandb agent` starts, without its server: the words and the environment are those that it gives."""

import json
import os
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.lib.config_util import save_config_file_from_dict

from sweep_files import FILES, arms_of, command_of, config_of, overrides_of
from tinyfusion_pl.cli import main
from wandb_files import read_runs

SMALL = ["+debug=default", "data.batch_size=4", "logger.factory.offline=true"]
SMALL += ["evaluate.num_samples=10", "evaluate.sampling.num_sampling_steps=2"]
SMALL += ["task.stages=[learn_mask,recover,evaluate]", "evaluate.sampled=[recovered]"]
SMALL += [f"{stage}.fit.trainer.log_every_n_steps=1" for stage in ("learn_mask", "recover")]
EVALUATION = [
    f"recover.fit.callbacks.evaluation.{setting}"
    for setting in ("every_n_steps=2", "num_samples=10", "batch_size=10", "num_shown=0")
]
FAST = "gumbel_hyperband"


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """Runs an arm of a sweep's configuration as the agent does, in this process; returns its exit code and its W&B run."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")

    def run(config, arm, run_id, *more):
        params = tmp_path / "wandb" / "sweep-sweep1" / f"config-{run_id}.yaml"
        params.parent.mkdir(parents=True, exist_ok=True)
        save_config_file_from_dict(str(params), {k: {"value": v} for k, v in arm.items()})
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(params))
        wandb.teardown()  # each arm is a process of its own
        words = overrides_of(command_of(config, arm))
        words = [word for word in words if "callbacks.evaluation.every" not in word]
        if "early_terminate" in config:
            more = (*EVALUATION, *more)
        exit_code = main([*words, *SMALL, *more])
        wandb.teardown()  # as the end of its process does: the file is complete
        found = [r for f in Path("runs").glob("*/*") for r in read_runs(f) if r.run_id == run_id]
        return exit_code, found[0]

    yield run
    wandb.teardown()


def file_of(name):
    (file,) = (file for file in FILES if file.stem == name)
    return file


def assert_is_arm(run, exit_code, config, arm, name):
    assert exit_code == 0 and run.exit_code == 0
    assert run.sweep_id == "sweep1" and run.group == name
    assert {key: run.config[key] for key in arm} == arm
    metric = config["metric"]["name"]
    steps = [step for step, _ in run.curve(metric, "recover/step")]
    assert steps == ([2, 4] if metric == "val/fid" else [None])
    assert "final/fid" in run.summary


def test_an_arm_joins_the_sweep_and_logs_its_metric(agent, tmp_path):
    config = config_of(file_of(FAST))
    arm = arms_of(config)[0]
    exit_code, run = agent(config, arm, "arm1")
    assert_is_arm(run, exit_code, config, arm, FAST)
    (record,) = (tmp_path / "runs" / FAST / "arms").glob("*.json")
    assert json.loads(record.read_text())["settings"]["pruning.pattern"] == arm["pruning.pattern"]
    assert list((tmp_path / "runs" / FAST / "results").glob("*.json"))  # for the other arms
    # The same arm once more, in a run of its own: nothing is trained, and its curves are all there.
    exit_code, again = agent(config, arm, "arm2")
    assert_is_arm(again, exit_code, config, arm, FAST)
    for name in ("learn_mask/gates/tau", "recover/train/loss"):
        step = f"{name.partition('/')[0]}/step"
        assert again.curve(name, step) == run.curve(name, step)


def test_an_arm_that_cannot_be_built_is_recorded_as_failed(agent, tmp_path):
    config = config_of(file_of("gumbel_random"))
    arm = arms_of(config)[0] | {"pruning.pattern": "3:2"}
    exit_code, run = agent(config, arm, "failed1")
    assert exit_code == 1 and run.exit_code == 1 and "3:2" in run.summary["error"]
    (record,) = (tmp_path / "runs" / "gumbel_random" / "arms").glob("*.json")
    assert "3:2" in json.loads(record.read_text())["error"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_arm_of_each_file_runs_offline(file, agent):
    config = config_of(file)
    arm = arms_of(config)[-1]
    exit_code, run = agent(config, arm, "arm1")
    assert_is_arm(run, exit_code, config, arm, file.stem)
    assert os.environ["WANDB_RUN_ID"] == run.run_id and yaml.safe_dump(run.config)
