"""The table of a sweep: rows, averages and shared settings, compared with hand calculations."""

import csv
import json
import statistics

import pytest

import tinyfusion_pl.report
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report import NothingMeasuredError, compare, compare_sweep

PROTOCOL = {"num_samples": 10, "sampler": "ddim"}


def arm(
    folder,
    name,
    settings,
    fid=None,
    *,
    depth=6,
    kept=(0, 1),
    teacher="a",
    protocol=PROTOCOL,
    error=None,
):
    (folder / "arms").mkdir(exist_ok=True)
    (folder / "arms" / f"{name}.json").write_text(
        json.dumps({"settings": settings, "run_dir": name, "error": error})
    )
    if fid is None:
        return
    run = folder / name
    (run / "shallow").mkdir(parents=True)
    (run / "shallow" / "record.json").write_text(
        json.dumps({"stacks": {"blocks": {"num_blocks": 12, "kept_blocks": list(kept)}}})
    )
    (run / "metrics.json").write_text(
        json.dumps(
            {
                "teacher": {"depth": 12, "weights_sha256": teacher, "fid": 1.0},
                "pruned": {"depth": depth, "calibration_loss": 0.5, "fid": 90.0},
                "recovered": {"depth": depth, "fid": fid, "accuracy": 0.5},
                "block_runs": {"learn_mask": 1500, "recover": 3000},
                "protocol": {**protocol, "seed": settings.get("seed")},
            }
        )
    )


@pytest.fixture
def sweep(tmp_path):
    for seed, fid in enumerate((3.0, 4.0, 8.0)):
        arm(
            tmp_path,
            f"f{seed}",
            {"pruning": "first", "pruning.keep": "0.5", "seed": str(seed)},
            fid,
        )
        arm(
            tmp_path,
            f"g{seed}",
            {"pruning": "global", "pruning.keep": "0.5", "seed": str(seed)},
            fid - 2,
            kept=(0, seed + 1),
        )
    return tmp_path


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], line)) for line in cells[2:]]


def test_seeds_become_mean_and_standard_deviation(sweep):
    found = {row["pruning"]: row for row in rows(compare_sweep(sweep))}
    assert found["first"]["FID"] == f"5 ± {statistics.stdev([3, 4, 8]):.2g}"
    assert found["first"]["seeds"] == "3" and found["first"]["kept blocks"] == "0 1"
    assert found["global"]["kept blocks"] == "0 1 (1 of 3 seeds)"


def test_the_best_row_of_one_depth_comes_first(sweep):
    arm(sweep, "shallow", {"pruning": "first", "pruning.keep": "0.25", "seed": "0"}, 2.0, depth=3)
    order = [(row["pruning"], row["pruning.keep"]) for row in rows(compare_sweep(sweep))]
    assert order == [("global", "0.5"), ("first", "0.5"), ("first", "0.25")]


def test_settings_that_all_share_stand_above_the_table(sweep):
    text = compare_sweep(sweep)
    assert "settings: pruning.keep=0.5" in text and "seeds: 0, 1, 2" in text
    assert '"num_samples": 10' in text and "NOT comparable" not in text
    assert all("pruning.keep" not in row for row in rows(text))


def test_costs_and_the_loss_before_recovery_are_columns(sweep):
    row = rows(compare_sweep(sweep))[0]
    assert row["choice (block runs)"] == "1,500" and row["recovery (block runs)"] == "3,000"
    assert (
        row["loss on fixed draws, pruned"] == "0.5"
        and row["FID, pruned"] == "90"
        and row["accuracy"] == "50.0%"
    )


def test_failed_and_diverged_arms_stay_as_rows(sweep):
    arm(
        sweep,
        "bad",
        {"pruning": "oracle", "pruning.keep": "0.5", "seed": "0"},
        error="keep comes to 4 | half",
    )
    arm(sweep, "nan", {"pruning": "max_loss", "pruning.keep": "0.5", "seed": "0"}, float("nan"))
    found = {row["pruning"]: row for row in rows(compare_sweep(sweep).replace("\\|", "/"))}
    assert (
        found["oracle"]["kept blocks"] == "failed: keep comes to 4 / half"
        and found["oracle"]["seeds"] == "0 of 1"
    )
    assert found["max_loss"]["FID"] == "nan"


def test_a_row_with_a_failed_seed_is_not_averaged(sweep):
    arm(
        sweep,
        "cut",
        {"pruning": "first", "pruning.keep": "0.5", "seed": "3"},
        error="the loss was not finite",
    )
    row = {row["pruning"]: row for row in rows(compare_sweep(sweep))}["first"]
    assert (
        row["kept blocks"] == "0 1. failed: the loss was not finite"
        and row["seeds"] == "3 of 4"
        and row["FID"] == "nan"
    )


def test_rows_of_unequal_protocols_are_not_comparable(sweep):
    arm(
        sweep,
        "more",
        {"pruning": "random", "pruning.keep": "0.5", "seed": "0"},
        4.0,
        protocol={**PROTOCOL, "num_samples": 20},
    )
    assert "NOT comparable: the rows differ in num_samples" in compare_sweep(sweep)


def test_the_csv_has_a_line_for_each_arm(sweep):
    compare_sweep(sweep)
    lines = list(csv.DictReader((sweep / "table.csv").open()))
    assert len(lines) == 6 and {line["seed"] for line in lines} == {"0", "1", "2"}
    assert sorted(float(line["FID"]) for line in lines if line["pruning"] == "first") == [3, 4, 8]


def test_names_from_a_run_are_escaped_on_the_page(sweep):
    arm(
        sweep,
        "evil",
        {"pruning": "<script>alert(1)</script>", "pruning.keep": "0.5", "seed": "0"},
        4.0,
    )
    compare_sweep(sweep)
    assert "<script>" not in (sweep / "table.html").read_text()


def test_compare_takes_a_sweep_or_two_runs(sweep):
    assert compare(sweep).startswith(f"# {sweep.name}")
    assert "FID" in compare(sweep / "f0", sweep / "g0")


def test_a_folder_without_arms_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not the folder of a sweep"):
        compare_sweep(tmp_path)


def test_the_old_name_of_the_error_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use NothingMeasuredError"):
        assert tinyfusion_pl.report.NothingMeasured is NothingMeasuredError


def test_timed_arms_get_a_figure_of_speed_against_depth(sweep):
    compare_sweep(sweep)
    assert not (sweep / "speedup.png").exists()
    file = sweep / "f0" / "metrics.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "speedup": {"measured": 1.9, "ideal": 2.0}})
    )
    assert "speedup.png" in compare_sweep(sweep) and (sweep / "speedup.png").stat().st_size > 1000
