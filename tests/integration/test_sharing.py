"""Arms of a sweep: a teacher is measured once, equal choices are recovered once, and all end in one table."""

import json

import pytest

from tinyfusion_pl.cli import main
from tinyfusion_pl.cli.arms import record_arm
from tinyfusion_pl.tasks import SharedResults

SMALL = [
    "+debug=default",
    "data.batch_size=8",
    "evaluate.num_timing_rounds=0",
    "evaluate.num_draws=16",
    "pruning.num_samples=16",
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """`first` and a list that keeps the same blocks, and one that keeps others."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("sweep")
    patch.chdir(folder)
    command = ["-m", *SMALL, "pruning=index", "pruning.keep=4", "name=toy"]
    assert main([*command, "pruning.criterion.kept=[0,1,2,3],[3,2,1,0],[0,2,4,6]"]) == 0
    patch.undo()
    return folder / "runs" / "toy"


def arms(sweep):
    records = [json.loads(file.read_text()) for file in sorted((sweep / "arms").glob("*.json"))]
    return {
        record["settings"]["pruning.criterion.kept"]: sweep / record["run_dir"]
        for record in records
    }


def mark(run, stage):
    return json.loads((run / "stages" / f"{stage}.json").read_text())


def test_a_teacher_is_measured_once_for_all_arms(sweep):
    runs = list(arms(sweep).values())
    measured_in = {mark(run, "evaluate_teacher").get("run_dir", str(run)) for run in runs}
    assert len(runs) == 3 and len(measured_in) == 1
    assert (
        len({json.dumps(json.loads((run / "metrics.json").read_text())["teacher"]) for run in runs})
        == 1
    )


def test_features_of_the_reference_are_computed_once_for_all_arms(sweep):
    assert len(list((sweep / "results").glob("reference_*.safetensors"))) == 1


def test_equal_choices_are_recovered_once(sweep):
    found = arms(sweep)
    first, same, other = (found[key] for key in ("[0, 1, 2, 3]", "[3, 2, 1, 0]", "[0, 2, 4, 6]"))
    assert "run_dir" not in mark(first, "recover") and "run_dir" not in mark(other, "recover")
    assert mark(same, "recover")["run_dir"] == str(first)
    weights = [
        (run / "recovered" / "model.safetensors").read_bytes() for run in (first, same, other)
    ]
    assert weights[0] == weights[1] != weights[2]


def test_the_sweep_ends_in_one_table(sweep):
    text = (sweep / "table.md").read_text()
    assert text.count("\n| ") == 4 and "0 2 4 6" in text and "distance to the teacher" in text


def test_a_single_run_shares_nothing_unless_asked_to(sweep, tmp_path, capfd):
    command = [
        *SMALL,
        "pruning=index",
        "pruning.keep=4",
        "pruning.criterion.kept=[0,2,4,6]",
        "name=toy",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main([*command, f"paths.results={sweep / 'results'}"]) == 0
    assert "reusing the metrics" in capfd.readouterr().out and "run_dir" in mark(
        tmp_path / "run", "recover"
    )
    mine = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert main([*command[:-1], f"run_dir={tmp_path / 'alone'}"]) == 0
    assert "reusing the metrics" not in capfd.readouterr().out
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert alone["recovered"] == mine["recovered"] and alone["teacher"] == mine["teacher"]


def test_a_folder_of_shared_results_needs_the_settings_that_decide_them(tmp_path):
    with pytest.raises(ValueError, match="settings"):
        SharedResults(tmp_path)


def test_a_rerun_under_other_defaults_takes_the_place_of_its_arm(tmp_path):
    for run_dir in ("old", "new"):
        record_arm(
            sweep_dir=tmp_path, run_dir=tmp_path / run_dir, overrides=["pruning=first", "seed=0"]
        )
    (file,) = (tmp_path / "arms").glob("*.json")
    assert json.loads(file.read_text())["run_dir"] == "new"


def test_a_changed_result_is_not_reused(sweep, tmp_path, capfd):
    results = tmp_path / "results"
    results.mkdir()
    for file in (sweep / "results").glob("*.json"):
        content = json.loads(file.read_text())
        content["result"]["fid"] = 0.0
        (results / file.name).write_text(json.dumps(content))
    command = [
        *SMALL,
        "pruning=index",
        "pruning.keep=4",
        "pruning.criterion.kept=[0,2,4,6]",
        "name=toy",
    ]
    assert (
        main(
            [
                *command,
                f"run_dir={tmp_path / 'run'}",
                f"paths.results={results}",
                "task.stages=[learn_mask,recover]",
            ]
        )
        == 0
    )
    assert "cannot be reused" in capfd.readouterr().out
