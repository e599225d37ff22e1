"""A long search neither grows nor keeps files open."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from soak import growth, soak


@pytest.mark.slow  # minutes
def test_memory_and_files_stay_as_they_are_over_2000_steps(tmp_path):
    found = soak(tmp_path, steps=2000, batch_size=16, every=20)
    memory, files = growth(found, warm_up=200)
    assert memory <= 0.02 and files <= 0, found[::10]


def test_growth_is_that_after_the_warm_up():
    """50 bytes until step 100, 100 after it, then 1% more, and a file that stays open."""
    found = [
        (step, 50 if step <= 100 else 100 + (step > 300), 7 + (step > 300))
        for step in range(10, 401, 10)
    ]
    assert growth(found, warm_up=100) == (pytest.approx(0.01), 1)
