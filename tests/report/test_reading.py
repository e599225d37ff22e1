import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report.page import render
from tinyfusion_pl.report.reading import read_curves, read_decisions, read_run, read_samples


def line(step, kept, probabilities, confidence=0.7, **extra):
    group = {"start": 0, "num_kept": 1, "num_blocks": 2, "confidence": confidence, "entropy": 0.6}
    stack = {"kept_blocks": kept, "block_probabilities": probabilities, "groups": [group], **extra}
    return json.dumps({"step": step, "tau": 4.0, "scaling": 100.0, "stacks": {"blocks": stack}})


def decisions(tmp_path, text):
    path = tmp_path / "decisions.jsonl"
    path.write_text(text)
    return read_decisions(path)


def test_last_line_of_a_step_wins_and_steps_ascend(tmp_path):
    lines = [line(0, [0], [0.6, 0.4]), line(10, [0], [0.7, 0.3]), line(20, [0], [0.8, 0.2])]
    lines.append(line(10, [1], [0.1, 0.9], confidence=0.9))
    stacks, num_torn = decisions(tmp_path, "\n".join(lines) + "\n")
    history = stacks["blocks"]
    assert history.steps.tolist() == [0, 10, 20]
    assert history.kept.tolist() == [[True, False], [False, True], [True, False]]
    assert history.probabilities[1].tolist() == [0.1, 0.9]
    assert history.confidence.tolist() == [[0.7, 0.7], [0.9, 0.9], [0.7, 0.7]]
    assert num_torn == 0


@pytest.mark.parametrize("cut", [1, 30, 120, 150])
def test_torn_last_line_is_skipped_and_counted(tmp_path, cut):
    stacks, num_torn = decisions(
        tmp_path, line(0, [0], [0.6, 0.4]) + "\n" + line(10, [1], [0.4, 0.6])[:cut]
    )
    assert stacks["blocks"].steps.tolist() == [0]
    assert num_torn == 1


def test_torn_line_that_a_resumed_run_appended_to_is_skipped(tmp_path):
    torn = line(10, [0], [0.6, 0.4])[:50] + line(5, [0], [0.6, 0.4])
    stacks, num_torn = decisions(
        tmp_path, "\n".join([line(0, [0], [0.6, 0.4]), torn, line(10, [1], [0.2, 0.8]), ""])
    )
    assert stacks["blocks"].steps.tolist() == [0, 10]
    assert stacks["blocks"].kept[-1].tolist() == [False, True]
    assert num_torn == 1


def test_file_with_a_single_torn_line_reads_as_no_decisions(tmp_path):
    assert decisions(tmp_path, line(0, [0], [0.6, 0.4])[:40]) == ({}, 1)


def test_settled_at_is_the_step_of_the_last_change(tmp_path):
    kept = {0: [0], 10: [1], 20: [0], 30: [0], 40: [0]}
    stacks, _ = decisions(
        tmp_path, "\n".join(line(step, k, [0.5, 0.5]) for step, k in kept.items())
    )
    assert stacks["blocks"].settled_at == 20


def test_confidence_of_mirrored_units_belongs_to_their_blocks(tmp_path):
    units = [[0, 5], [1, 4], [2, 3]]
    stacks, _ = decisions(
        tmp_path, line(0, [0, 5, 2, 3], [0.5] * 6, 0.3, units=units)
    )  # units 0 and 1 are a group
    assert stacks["blocks"].confidence[0].tolist() == [0.3, 0.3, 1, 1, 0.3, 0.3]
    assert stacks["blocks"].groups[0]["members"] == [0, 1, 4, 5]


def test_lines_of_two_runs_are_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"decisions\.jsonl.*'blocks' do not fit together"):
        decisions(tmp_path, line(0, [0], [0.6, 0.4]) + "\n" + line(1, [0], [0.6, 0.2, 0.1]) + "\n")


def test_line_without_stacks_is_an_error_that_names_the_line(tmp_path):
    with pytest.raises(ArtifactError, match="line 2"):
        decisions(tmp_path, line(0, [0], [0.6, 0.4]) + '\n{"step": 3}\n')


def csv(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_later_version_of_a_resumed_log_wins_step_by_step(tmp_path):
    csv(
        tmp_path / "recover/version_2/metrics.csv",
        "epoch,step,train/loss\n0,0,5.0\n0,10,4.0\n0,20,9.0\n",
    )
    later = "epoch,step,train/loss,val/fid\n0,20,3.0,\n0,30,2.0,\n0,30,,12.5\n"
    csv(tmp_path / "recover/version_10/metrics.csv", later)
    curves = read_curves(tmp_path)["recover"]
    assert [column.tolist() for column in curves["train/loss"]] == [
        [0, 10, 20, 30],
        [5.0, 4.0, 3.0, 2.0],
    ]
    assert [column.tolist() for column in curves["val/fid"]] == [[30], [12.5]]


def test_stages_come_in_the_order_of_the_run(tmp_path):
    for stage in ("recover", "extra", "learn_mask"):
        csv(tmp_path / stage / "metrics.csv", "step,train/loss\n0,1.0\n")
    assert list(read_curves(tmp_path)) == ["learn_mask", "recover", "extra"]


def test_torn_last_row_of_a_log_is_skipped(tmp_path):
    csv(
        tmp_path / "recover/metrics.csv", "step,train/loss\n0,1.25\n10,1.1"
    )  # 1.1 may have been going to be 1.19
    assert read_curves(tmp_path)["recover"]["train/loss"][1].tolist() == [1.25]


def test_nan_losses_stay_in_the_curve(tmp_path):
    csv(tmp_path / "recover/metrics.csv", "step,train/loss\n0,1.0\n10,nan\n20,0.5\n")
    np.testing.assert_equal(read_curves(tmp_path)["recover"]["train/loss"][1], [1.0, np.nan, 0.5])


def test_log_without_steps_is_an_error(tmp_path):
    csv(tmp_path / "recover/metrics.csv", "epoch,train/loss\n0,1.0\n")
    with pytest.raises(ArtifactError, match="'step' column"):
        read_curves(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"teacher": np.zeros((2, 1, 8, 8), np.uint8)}, "'labels'"),
        ({"labels": np.arange(2)}, "at least one of teacher"),
        (
            {"labels": np.arange(3), "teacher": np.zeros((2, 1, 8, 8), np.uint8)},
            "'teacher' is uint8",
        ),
        ({"labels": np.arange(2), "pruned": np.zeros((2, 4, 8, 8), np.uint8)}, "'pruned' is uint8"),
        (
            {"labels": np.arange(2), "pruned": np.zeros((2, 1, 8, 8), np.float32)},
            "'pruned' is float32",
        ),
    ],
)
def test_samples_that_cannot_be_shown_are_an_error(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "samples.safetensors")
    with pytest.raises(ArtifactError, match=message):
        read_samples(tmp_path / "samples.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "digits', "metrics.json"),
        ("[1]", "list"),
        ('{"teacher": 3}', "'teacher' is 3"),
        ("", "metrics.json"),
    ],
)
def test_broken_metrics_are_an_error_that_names_the_file(new_run, text, message):
    run = new_run()
    (run / "metrics.json").write_text(text)
    with pytest.raises(ArtifactError, match=message) as error:
        read_run(run)
    assert str(run / "metrics.json") in str(error.value)


@pytest.mark.parametrize("stacks", [[1], {"blocks": {"num_blocks": 12}}])
def test_record_without_kept_blocks_is_an_error(new_run, stacks):
    run = new_run()
    (run / "shallow/record.json").write_text(json.dumps({"stacks": stacks}))
    with pytest.raises(ArtifactError, match=r"record\.json"):
        read_run(run)


ODD = [
    None,
    {},
    "<script>",
    -1,
    10**9,
    True,
    [0.5],
    [[]],
    [None],
    {"a": 1},
    float("nan"),
    [{"start": 0}],
    [99],
    [{"start": 0, "num_blocks": 10**9}],
    [{"start": 11, "num_blocks": 2}],
    [{"start": 0, "num_blocks": 0}],
]


@pytest.mark.parametrize("field", ["num_blocks", "kept_blocks", "groups", "units"])
def test_record_of_odd_content_is_drawn_or_an_error(new_run, field):
    """And nothing is built as large as it says."""
    run = new_run()
    for name in ("learn_mask/decisions.jsonl", "samples.safetensors", "metrics.json"):
        (run / name).unlink()
    shutil.rmtree(run / "logs")
    record = json.loads((run / "shallow/record.json").read_text())
    for odd in ODD:
        record["stacks"]["blocks"][field] = odd
        (run / "shallow/record.json").write_text(json.dumps(record))
        try:
            assert "<script>" not in render(read_run(run), {})
        except ArtifactError as error:
            assert "record.json: '" in str(error) and "of stack blocks" in str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1e999},
        {"step": None},
        {"stacks": [1]},
        {"start": 10**9},
        {"num_blocks": 10**9},
        {"num_blocks": -1},
        {"kept_blocks": "x"},
        {"block_probabilities": [10**400]},
    ],
    ids=str,
)
def test_decisions_of_odd_content_are_an_error(new_run, change):
    run = new_run()
    lines = (run / "learn_mask/decisions.jsonl").read_text().splitlines()
    entry, (name, value) = json.loads(lines[-1]), next(iter(change.items()))
    stack = entry["stacks"]["blocks"]
    next(part for part in (entry, stack, stack["groups"][0]) if name in part)[name] = value
    (run / "learn_mask/decisions.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(entry)]) + "\n"
    )
    with pytest.raises(ArtifactError, match="decisions.jsonl"):
        read_run(run)


def test_folder_that_no_run_wrote_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has none of"):
        read_run(tmp_path)
    with pytest.raises(ArtifactError, match="not a folder"):
        read_run(tmp_path / "missing")


def test_run_without_a_name_is_called_like_its_folder(new_run):
    run = new_run("5e2f")
    (run / "metrics.json").unlink()
    assert read_run(run).name == "5e2f"
