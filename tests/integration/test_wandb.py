"""A pipeline run in W&B, read back from the files that W&B wrote offline."""

import csv
import json

import pytest
import wandb

from tinyfusion_pl.cli import main
from tinyfusion_pl.tasks import Evaluate
from wandb_files import read_runs

SMALL = ["+debug=default", "data.batch_size=4", "logger=wandb", "logger.factory.offline=true"]
SMALL += ["evaluate.num_samples=10", "evaluate.sampling.num_sampling_steps=2", "run_dir=run"]
LEARNED = ["pruning=learned", "learn_mask.fit.trainer.log_every_n_steps=1"]
RECOVER = ["callbacks@recover.fit.callbacks=evaluation", "recover.fit.trainer.log_every_n_steps=1"]
RECOVER += [
    f"recover.fit.callbacks.evaluation.{setting}"
    for setting in ("every_n_steps=2", "num_samples=10", "batch_size=10", "num_shown=0")
]
INDEX = ["pruning=index", "pruning.keep=4", "pruning.criterion.kept=[0,1,2,3]"]


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory):
    """W&B keeps nothing outside the folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("wandb")
        for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(home))
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_MODE", raising=False)
        yield


@pytest.fixture
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A finished pipeline run, run a second time."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _ in range(2):
            assert main([*SMALL, *LEARNED, *RECOVER]) == 0
    return folder / "run"


def get_rows(run_dir, stage):
    with (run_dir / "logs" / stage / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_has_all(run, run_dir, stage, get_run_name):
    """Each cell of the stage's csv file is in the W&B run, at its step, once."""
    rows, num_cells = get_rows(run_dir, stage), 0
    for name in rows[0].keys() - {"step"}:
        cells = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert run.curve(get_run_name(name), f"{stage}/step") == cells, name
        num_cells += len(cells)
    assert num_cells > 10


def test_all_stages_are_in_one_run_with_their_steps(pipeline):
    (run,) = read_runs(pipeline)
    assert run.exit_code == 0 and run.group == "digits_d6"
    assert_has_all(run, pipeline, "learn_mask", lambda name: f"learn_mask/{name}")
    assert_has_all(
        run, pipeline, "recover", lambda name: name if "val/" in name else f"recover/{name}"
    )
    assert run.step_metrics["learn_mask/*"] == "learn_mask/step"
    assert run.step_metrics["recover/*"] == run.step_metrics["val/*"] == "recover/step"


def test_val_fid_is_logged_at_fixed_steps_of_recovery(pipeline):
    (run,) = read_runs(pipeline)
    assert [step for step, _ in run.curve("val/fid", "recover/step")] == [2, 4]


def test_the_final_figures_are_logged_once(pipeline):
    (run,) = read_runs(pipeline)
    metrics = json.loads((pipeline / "metrics.json").read_text())
    recovered = metrics["recovered"]
    wanted = {"num_parameters": recovered["num_params"], "speed_up": metrics["speedup"]["measured"]}
    names = ("fid", "sfid", "inception_score", "precision", "recall", "accuracy", "depth")
    wanted |= {name: recovered[name] for name in names}
    for name, value in wanted.items():
        assert run.summary[f"final/{name}"] == value, name
        assert len(run.curve(f"final/{name}", "_step")) == 1, name


def test_images_and_the_table_of_metrics_are_shown(pipeline):
    (run,) = read_runs(pipeline)
    for name in ("samples", "decisions"):
        assert run.summary[f"final/{name}/_type"] == "image-file"
    (folder,) = pipeline.glob("wandb/offline-run-*/files")
    table = json.loads((folder / run.summary["final/metrics/path"]).read_text())
    metrics = json.loads((pipeline / "metrics.json").read_text())
    fid = table["columns"].index("fid")
    roles = ("teacher", "pruned", "recovered")
    assert {row[0]: row[fid] for row in table["data"]} == {
        role: metrics[role]["fid"] for role in roles
    }


def test_the_run_has_configuration_kept_blocks_and_protocol(pipeline):
    (run,) = read_runs(pipeline)
    metrics = json.loads((pipeline / "metrics.json").read_text())
    record = json.loads((pipeline / "shallow" / "record.json").read_text())
    assert run.config["pruning"]["pattern"] == "1:2" and run.config["name"] == "digits_d6"
    assert run.config["kept_blocks"] == {"blocks": record["stacks"]["blocks"]["kept_blocks"]}
    assert run.config["protocol"] == metrics["protocol"]


def test_the_report_draws_the_curves_of_a_run_in_wandb(pipeline):
    assert (pipeline / "figures" / "curves_recover.png").exists()


@pytest.mark.usefixtures("_there")
def test_a_stage_that_raises_marks_the_run_as_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("it went wrong")

    monkeypatch.setattr(Evaluate, "run", fail)
    assert main([*SMALL, *INDEX, "task.stages=[learn_mask,evaluate]"]) == 1
    (run,) = read_runs(tmp_path / "run")
    assert run.exit_code == 1 and run.config["kept_blocks"] == {"blocks": [0, 1, 2, 3]}
    assert wandb.run is None


@pytest.mark.usefixtures("_there")
def test_a_later_command_joins_the_run(tmp_path):
    for stage in ("learn_mask", "recover"):
        assert main([*SMALL, *INDEX, RECOVER[1], f"task={stage}"]) == 0
    (run,) = read_runs(tmp_path / "run")
    assert run.curve("recover/train/loss", "recover/step") and "kept_blocks" in run.config
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.usefixtures("_there")
def test_each_arm_of_a_multirun_is_a_run_of_its_own(tmp_path):
    command = ["-m", *SMALL[:-1], "task=learn_mask", "name=toy", *INDEX[:2]]
    assert main([*command, "pruning.criterion.kept=[0,1,2,3],[0,2,4,6]"]) == 0
    runs = [run for folder in (tmp_path / "runs" / "toy").glob("*") for run in read_runs(folder)]
    kept = [run.config["kept_blocks"]["blocks"] for run in runs]
    assert sorted(kept) == [[0, 1, 2, 3], [0, 2, 4, 6]] and len({run.run_id for run in runs}) == 2
    assert {run.group for run in runs} == {"toy"} and {run.exit_code for run in runs} == {0}


@pytest.mark.usefixtures("_there")
def test_models_are_uploaded_only_when_asked(tmp_path):
    for name, value in (("without", "false"), ("uploaded", "true")):
        command = [*SMALL[:-1], f"logger.factory.log_models={value}", f"run_dir={name}"]
        assert main([*command, *INDEX, "task=learn_mask"]) == 0
    assert read_runs(tmp_path / "without")[0].artifacts == []
    assert read_runs(tmp_path / "uploaded")[0].artifacts == ["digits_d6-uploaded-shallow"]


@pytest.mark.usefixtures("_there")
def test_the_steps_of_a_search_are_logged(tmp_path):
    search = ["search.num_steps=3", "pruning.candidates=0", "search.trial_steps=[]"]
    search += ["pruning.with_simple_rule=false", "pruning.criterion.num_samples=4"]
    assert main([*SMALL, "task=learn_mask", *search]) == 0
    (run,) = read_runs(tmp_path / "run")
    lines = (tmp_path / "run" / "learn_mask" / "decisions.jsonl").read_text().splitlines()
    decisions = [json.loads(line) for line in lines]
    assert [line["step"] for line in decisions] == [1, 2, 3]
    assert_has_all(run, tmp_path / "run", "learn_mask", lambda name: f"learn_mask/{name}")
    for line in decisions:
        (stack,) = line["stacks"].values()
        shown = next(r for r in run.history if r.get("learn_mask/step") == line["step"])
        assert shown["learn_mask/search/loss"] == line["loss"]
        assert shown["learn_mask/gates/entropy"] == pytest.approx(
            stack["groups"][0]["entropy"], abs=1e-6
        )
        assert shown["learn_mask/gates/confidence"] == pytest.approx(
            stack["groups"][0]["confidence"], abs=1e-6
        )
        blocks = range(12)
        kept = [i for i in blocks if shown[f"learn_mask/gates/blocks/kept_{i}"]]
        chances = [shown[f"learn_mask/gates/blocks/probability_{i}"] for i in blocks]
        assert kept == stack["kept_blocks"]
        assert chances == pytest.approx(stack["block_probabilities"], abs=1e-6)


@pytest.mark.usefixtures("_there")
def test_without_an_account_nothing_is_trained(tmp_path, monkeypatch, capfd):
    wandb.teardown()  # W&B keeps the settings of earlier runs for the process
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    monkeypatch.setattr("sys.stdin", None)
    command = [each for each in SMALL if "offline" not in each]
    assert main([*command, *INDEX, "task=learn_mask"]) == 1
    assert "wandb login" in capfd.readouterr().err and not (tmp_path / "run").exists()
