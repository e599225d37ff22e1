"""A fit that is killed and resumed, in every way that a process can end, against one that never was."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tasks.toy_fit import Killed, differing, fit, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted fits, by accumulated batches."""
    folders = {n: tmp_path_factory.mktemp(f"whole{n}") for n in (1, 2, 4)}
    for accumulate, folder in folders.items():
        fit(folder, accumulate=accumulate)
    return folders


@pytest.mark.parametrize(
    ("accumulate", "how"), [(1, "kill"), (2, "kill"), (4, "kill"), (2, "sigterm")]
)
def test_three_kills_change_nothing_with_accumulation(whole, tmp_path, accumulate, how):
    """The second and third kill fall on the first batches of a resumed attempt: within a step."""
    generator = torch.Generator().manual_seed(accumulate)
    kills = [
        2 * accumulate + int(torch.randint(2 * accumulate, (), generator=generator)),
        accumulate + 1,
        2 * accumulate + 1,
    ]
    for kill in kills:
        with pytest.raises(Killed if how == "kill" else KeyboardInterrupt):
            fit(tmp_path, accumulate=accumulate, kill=kill, how=how)
    fit(tmp_path, accumulate=accumulate)
    assert differing(tmp_path, whole[accumulate]) == []


@pytest.mark.parametrize("limit", [3, 0.5])
def test_epochs_of_few_batches_resume_exactly(tmp_path, limit):
    fit(tmp_path / "whole", limit_train_batches=limit)
    for kill in (3, 1, 3):
        with pytest.raises(Killed):
            fit(tmp_path / "cut", kill=kill, every=1, limit_train_batches=limit)
    fit(tmp_path / "cut", limit_train_batches=limit)
    assert differing(tmp_path / "cut", tmp_path / "whole") == []


def kill_after_replace(monkeypatch, number, name):
    """End the process, so to speak, just after the `number`-th time that a file `name` got its place."""
    replace, left = os.replace, [number]

    def and_die(source, target):
        replace(source, target)
        left[0] -= Path(target).name == name
        if left[0] <= 0:
            raise Killed

    monkeypatch.setattr(os, "replace", and_die)


@pytest.mark.parametrize(
    ("name", "number"), [("last.ckpt", 2), ("last.ckpt", 3), ("last.ckpt", 5), ("metrics.csv", 2)]
)
def test_a_kill_at_a_write_leaves_no_gap_in_the_logs(whole, tmp_path, monkeypatch, name, number):
    """The fifth checkpoint is the last step's; Lightning logs a step after its checkpoint is written."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_replace(patch, number, name)
        fit(tmp_path)
    fit(tmp_path)
    assert differing(tmp_path, whole[1]) == []


def test_logs_have_each_step_once_and_whole(whole):
    """Steps count from 1, by whomever they were logged: the module or the pruning callback."""
    steps = [int(row["step"]) for row in rows(whole[2])]
    assert steps == [1, 2, 4, 6, 8, 9]
    logged = {int(row["step"]): row for row in rows(whole[2])}
    assert all(logged[step]["train/loss"] and logged[step]["gates/tau"] for step in (2, 4, 6, 8))
    assert [path.name for path in (whole[2] / "logs").rglob("*.csv")] == ["metrics.csv"]


def test_log_lines_of_lost_steps_are_dropped(whole, tmp_path):
    """Torn lines, lines of steps that are trained again, and lines that an earlier version wrote twice."""
    with pytest.raises(Killed):
        fit(tmp_path, kill=5)
    csv_file, json_file = (
        tmp_path / "logs" / "learn_mask" / "metrics.csv",
        tmp_path / "learn_mask" / "decisions.jsonl",
    )
    for file in (csv_file, json_file):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text(
            "".join(
                [
                    *lines,
                    lines[-1],
                    lines[-1].replace("4", "5"),
                    lines[-1].replace("4", "77"),
                    lines[-1][:9],
                ]
            )
        )
    fit(tmp_path)
    assert differing(tmp_path, whole[1]) == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    with pytest.raises(Killed):
        fit(folder := tmp_path_factory.mktemp("interrupted"), kill=6)
    return folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("logs/learn_mask/metrics.csv", "cell"),
        ("logs/learn_mask/metrics.csv", "byte"),
        ("logs/learn_mask/metrics.csv", "missing"),
        ("learn_mask/decisions.jsonl", "cell"),
    ],
)
def test_a_damaged_log_of_an_interrupted_fit_is_told(interrupted, tmp_path, capsys, name, damage):
    path = shutil.copytree(interrupted, tmp_path / "out") / name
    content = path.read_bytes()
    place = content.index(b"0.") + 3
    path.unlink() if damage == "missing" else path.write_bytes(
        content[:place] + (b"77" if damage == "cell" else b"\xff") + content[place + 1 :]
    )
    fit(tmp_path / "out")
    what = "missing" if damage == "missing" else "changed or damaged"
    assert f"{path} is {what} since the checkpoint of step 6" in capsys.readouterr().out


def test_whole_logs_of_an_interrupted_fit_are_taken_without_a_word(
    interrupted, whole, tmp_path, capsys
):
    fit(shutil.copytree(interrupted, tmp_path / "out"))
    assert differing(tmp_path / "out", whole[1]) == [] and "damaged" not in capsys.readouterr().out


def test_a_fit_that_begins_anew_begins_its_logs_anew(whole, tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, kill=5, every=100)
    assert len(rows(tmp_path)) == 3
    fit(tmp_path)
    assert differing(tmp_path, whole[1]) == []
