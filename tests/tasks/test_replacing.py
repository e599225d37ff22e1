"""Linear maps at the start of recovery: which there are, what they are fitted on, and what is refused before."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from tinyfusion_pl import create_model
from tinyfusion_pl.models import load_shallow, save_shallow
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import Decision, GroupDecision, StackDecision, remove_blocks
from tinyfusion_pl.pruning.run_maps import get_maps
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.replacing import check_replacing, fit_replacements, with_replacements

KEPT = [0, 3]


class Data:
    def train_set(self):
        g = torch.Generator().manual_seed(3)
        return TensorDataset(torch.randn(64, 2, 4, 4, generator=g), torch.arange(64) % 5)


def inputs_of(teacher, objective=None):
    return Inputs(
        name="x", seed=1, teacher=teacher, objective=objective or GaussianDiffusion(), data=Data()
    )


@pytest.fixture
def run(tmp_path):
    """(inputs, run folder with the bare cut in ``shallow/``)."""
    torch.manual_seed(0)
    teacher = create_model(
        "dit", input_size=4, in_channels=2, hidden_size=16, depth=5, num_heads=2, num_classes=5
    ).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    stack = StackDecision("2:5", 5, KEPT, [], [GroupDecision(0, 2, 5, KEPT)])
    cut = remove_blocks(copy.deepcopy(teacher), {"blocks": KEPT})
    save_shallow(tmp_path / "shallow", cut, {"stacks": Decision({"blocks": stack}).as_dict()})
    return inputs_of(teacher), RunFolder(tmp_path)


def test_maps_begin_as_nothing_and_the_fit_brings_the_student_nearer(run):
    inputs, folder = run
    bare = load_shallow(folder.shallow)
    student = with_replacements(load_shallow(folder.shallow), folder, inputs)
    x, t, y = torch.randn(16, 2, 4, 4), torch.arange(16) * 60, torch.arange(16) % 5
    with torch.no_grad():
        assert torch.equal(student(x, t, y), bare(x, t, y))
        assert [(each.module, each.position) for each in get_maps(student)] == [
            ("blocks.0", "after"),
            ("blocks.1", "after"),
        ]
        fit_replacements(student, folder, inputs, torch.device("cpu"), num_samples=48)
        target = inputs.teacher(x, t, y)
        assert (student(x, t, y) - target).square().mean() < 0.5 * (
            bare(x, t, y) - target
        ).square().mean()


def test_the_seed_decides_the_fit_and_random_numbers_are_left(run):
    inputs, folder = run
    students = []
    for seed in (5, 6):
        bare = load_shallow(folder.shallow)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        students.append(with_replacements(bare, folder, inputs))
        fit_replacements(students[-1], folder, inputs, torch.device("cpu"), num_samples=40)
        assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(one, other)


def test_a_model_whose_runs_are_no_maps_is_refused_before_training():
    teacher = create_model(
        "uvit_s_2", depth=4, hidden_size=16, num_heads=2, input_size=4, in_channels=2, num_classes=5
    )
    with pytest.raises(ValueError, match="only go together"):
        check_replacing(inputs_of(teacher, GaussianDiffusion(learn_sigma=False)))
