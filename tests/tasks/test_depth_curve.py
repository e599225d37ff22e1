"""The models between a student and its teacher, measured as an evaluation measures them."""

import csv
import json

import pytest
import torch

from tinyfusion_pl.cli import main
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import load_pretrained, load_shallow
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks.choosing import Draws

KEPT = [0, 1, 2, 3, 6, 7, 8, 9, 10]
SMALL = [
    "evaluate.num_samples=4",
    "evaluate.batch_size=4",
    "evaluate.num_shown=2",
    "evaluate.num_draws=8",
    "evaluate.sampling.num_sampling_steps=2",
    "depth_curve.num_samples=4",
]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    choice = ["pruning=index", f"pruning.criterion.kept={KEPT}", "pruning.keep=9"]
    assert main(["task=learn_mask", *choice, f"run_dir={folder}"]) == 0
    return folder / "shallow"


@pytest.fixture(scope="module")
def curve(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    assert (
        main(["task=depth_curve", f"depth_curve.student={cut}", *SMALL, f"run_dir={folder}"]) == 0
    )
    return folder


def test_a_cut_model_grows_back_to_its_teacher(curve):
    rows = list(csv.DictReader((curve / "depth_curve.csv").open()))
    depths = [int(row["depth"]) for row in rows]
    assert depths in ([9, 11, 12], [9, 10, 12])  # runs 3..5 and 10..11, one after the other
    assert float(rows[0]["teacher_distance"]) > float(rows[1]["teacher_distance"]) > 0
    assert float(rows[-1]["teacher_distance"]) == pytest.approx(0, abs=1e-9)
    assert all(float(row["fid"]) > 0 for row in rows)
    assert (curve / "depth_curve.png").stat().st_size > 1000


def test_models_of_the_curve_are_kept_as_shallow_folders(curve):
    measured = json.loads((curve / "metrics.json").read_text())["depth_12"]
    model = load_shallow(curve / "depths" / "12")
    torch.manual_seed(1)
    call = Draws(DigitsDataModule(batch_size=8, seed=0), GaussianDiffusion(), torch.device("cpu"))(
        3
    )
    with torch.no_grad():
        assert torch.allclose(model(*call.args), load_pretrained("shipped")(*call.args), atol=1e-6)
    assert measured["num_params"] == sum(p.numel() for p in model.parameters())


def test_a_student_of_another_teacher_is_refused(cut, tmp_path, capsys):
    other = [f"model.checkpoint={cut}", f"depth_curve.student={cut}", f"run_dir={tmp_path / 'run'}"]
    assert main(["task=depth_curve", *other]) == 1
    assert "was pruned from a model with 12 blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_beside_the_curve_are_refused(cut, tmp_path, capsys):
    settings = [
        f"depth_curve.student={cut}",
        f"+evaluate.models.mine={cut}",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(["task=depth_curve", *settings]) == 1
    assert "evaluate.models is mine" in capsys.readouterr().err


def test_a_curve_without_draws_is_refused(cut, tmp_path, capsys):
    settings = [
        f"depth_curve.student={cut}",
        "depth_curve.num_samples=0",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(["task=depth_curve", *settings]) == 1
    assert "depth_curve.num_samples" in capsys.readouterr().err
