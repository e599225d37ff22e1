"""Losses of all candidates and histograms of hidden states, against models that were cut and run one by one."""

import csv
import json

import pytest
import torch

from tinyfusion_pl.cli import main
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import load_pretrained
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import remove_blocks
from tinyfusion_pl.selection import Problem, Space
from tinyfusion_pl.selection.structures import open_structures
from tinyfusion_pl.tasks.choosing import Draws

NUM_SAMPLES = 6


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figure5")
    settings = [
        f"pruning.num_samples={NUM_SAMPLES}",
        "pruning.keep=2",
        "candidates.criteria=[first,shortgpt]",
        f"run_dir={folder}",
    ]
    assert main(["+experiment=figure5", *settings]) == 0
    return folder


def fixed_samples(model):
    with open_structures(model, Space(model, keep=2)) as structures:
        data = DigitsDataModule(batch_size=8, seed=0)
        return Problem(
            structures,
            Draws(data, GaussianDiffusion(), torch.device("cpu")),
            num_samples=NUM_SAMPLES,
            seed=0,
        ).fixed


@torch.no_grad()
def loss_of_cut(kept):
    model = load_pretrained("shipped")
    samples = fixed_samples(model)
    return float(
        samples.losses(
            remove_blocks(model, {"blocks": kept})(*samples.args), torch.arange(NUM_SAMPLES)
        )
        .double()
        .mean()
    )


def test_every_structure_has_the_loss_of_the_cut_model(scored):
    lines = list(csv.DictReader((scored / "candidate_losses.csv").open()))
    assert len(lines) == len({line["kept_units"] for line in lines}) == 66  # 2 of 12
    for line in (lines[0], lines[40]):
        assert float(line["loss"]) == pytest.approx(
            loss_of_cut([int(i) for i in line["kept_units"].split()]), rel=1e-5
        )


def test_marks_say_how_many_structures_lose_less(scored):
    result = json.loads((scored / "candidate_losses.json").read_text())
    losses = [
        float(line["loss"]) for line in csv.DictReader((scored / "candidate_losses.csv").open())
    ]
    first = result["marks"]["first"]
    assert first["kept_blocks"] == {"blocks": [0, 1]} and first["loss"] == pytest.approx(
        loss_of_cut([0, 1]), rel=1e-5
    )
    assert first["share_below"] == pytest.approx(
        sum(loss < first["loss"] - 1e-9 for loss in losses) / 66, abs=1 / 66
    )
    assert result["num_block_runs"] < result["one_by_one"] == 66 * 2 * NUM_SAMPLES
    assert (scored / "candidate_losses.png").stat().st_size > 1000


def test_candidates_of_learned_masks_are_refused(tmp_path, capsys):
    assert main(["task=candidate_losses", "pruning=learned", f"run_dir={tmp_path / 'run'}"]) == 1
    assert "pruning=index" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_activations_are_those_of_both_models(tmp_path):
    teacher = load_pretrained("shipped")
    student = remove_blocks(load_pretrained("shipped"), {"blocks": [0, 1, 2, 3, 4, 5]})
    assert (
        main(["task=learn_mask", "pruning=first", "pruning.keep=6", f"run_dir={tmp_path / 'cut'}"])
        == 0
    )
    arguments = [
        f"activations.student={tmp_path / 'cut' / 'shallow'}",
        "activations.num_samples=5",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(["task=activations", *arguments]) == 0
    result = json.loads((tmp_path / "run" / "activations.json").read_text())[
        "blocks: block 11 of the teacher, 5 of the student"
    ]
    torch.manual_seed(0)
    call = Draws(DigitsDataModule(batch_size=8, seed=0), GaussianDiffusion(), torch.device("cpu"))(
        5
    )
    states = {}
    for side, block in (("teacher", teacher.blocks[11]), ("student", student.eval().blocks[5])):
        block.register_forward_hook(
            lambda module, args, output, side=side: states.__setitem__(side, output)
        )
    with torch.no_grad():
        teacher(*call.args), student(*call.args)
    for side, hidden in states.items():
        assert result[side]["mean"] == pytest.approx(float(hidden.mean()), rel=1e-4)
        assert result[side]["sigma"] == pytest.approx(float(hidden.std()), rel=1e-4)
        beyond = (hidden - hidden.mean()).abs() >= 2 * hidden.std()
        assert result[side]["share_beyond"]["2.0"] == pytest.approx(
            float(beyond.float().mean()), abs=1e-3
        )
    assert (tmp_path / "run" / "activations.png").exists()
