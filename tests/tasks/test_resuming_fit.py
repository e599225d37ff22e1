"""A fit that is killed and resumed, in every way that a process can end, against one that never was."""

import pytest
import torch

from tasks.toy_fit import Killed, differing, fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted fits, by accumulated batches."""
    folders = {n: tmp_path_factory.mktemp(f"whole{n}") for n in (1, 2, 4)}
    for accumulate, folder in folders.items():
        fit(folder, accumulate=accumulate)
    return folders


@pytest.mark.parametrize(("accumulate", "how"), [(1, "kill"), (2, "kill"), (4, "kill"), (2, "sigterm")])
def test_three_kills_change_nothing_with_accumulation(whole, tmp_path, accumulate, how):
    """The second and third kill fall on the first batches of a resumed attempt: within a step."""
    generator = torch.Generator().manual_seed(accumulate)
    kills = [2 * accumulate + int(torch.randint(2 * accumulate, (), generator=generator)), accumulate + 1, 2 * accumulate + 1]
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
