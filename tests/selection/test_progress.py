"""A choice that is ended by a signal resumes after its last step, to the same choice."""

import os
import signal

import pytest
import torch

from small_dit_model import small_dit
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.preemption import Preempted, preemptible
from tinyfusion_pl.selection import Calibration, Selection
from tinyfusion_pl.selection.criteria.global_search import GlobalSearch
from tinyfusion_pl.selection.progress import Progress

OPTIONS = {
    "keep": 2,
    "candidates": 3,
    "trial_steps": [2, 2],
    "num_drawn": 20,
    "num_samples": 8,
    "max_rows": 64,
    "trials": {"batch_size": 4, "num_scored": 8},
}


def select(path=None, *, end_at=None, made_from="this", seed=3):
    """The choice; with `end_at` a signal comes while samples are drawn for that time."""
    torch.manual_seed(1)
    model, objective, drawn = small_dit((0, 1, 2, 3)), GaussianDiffusion(), [0]

    def draw(n):
        drawn[0] += 1
        if drawn[0] == end_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return Calibration.of(objective, torch.randn(n, 4, 8, 8), torch.randint(10, (n,)))

    with preemptible():
        found = Selection(GlobalSearch(num_steps=3), **OPTIONS)(
            model, draw, seed=seed, progress=Progress(path, made_from=made_from)
        )
    return found, drawn[0]


@pytest.fixture(scope="module")
def whole():
    return select()


def assert_same(found, expected):
    assert found.decision == expected.decision and found.num_block_runs == expected.num_block_runs
    assert found.history == expected.history
    assert [[each["distance"] for each in of_round] for of_round in found.rounds] == [
        [each["distance"] for each in of_round] for of_round in expected.rounds
    ]


@pytest.mark.parametrize("end_at", [3, 6, 8])
def test_it_resumes_after_the_step_that_the_signal_came_in(whole, tmp_path, end_at):
    """Samples are drawn once for scores, in three steps of the search, in four steps of trials."""
    expected, num_drawn = whole
    path = tmp_path / "progress.pt"
    with pytest.raises(Preempted):
        select(path, end_at=end_at)
    found, drawn = select(path)
    assert_same(found, expected)
    assert num_drawn == 8 and drawn < num_drawn


@pytest.mark.parametrize("how", ["of another choice", "damaged"])
def test_other_progress_is_not_used(whole, tmp_path, how):
    path = tmp_path / "progress.pt"
    with pytest.raises(Preempted):
        select(path, end_at=8)
    if how == "damaged":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found, drawn = select(path, made_from="this" if how == "damaged" else "other")
    assert_same(found, whole[0])
    assert drawn == whole[1]
