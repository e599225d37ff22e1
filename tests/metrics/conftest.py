"""A file of InceptionV3 weights: nothing is downloaded, so its values are random."""

import pytest
import torch

from tinyfusion_pl.metrics import InceptionFeatures


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory):
    """A file with the keys and shapes of the published one: read off the architecture, its values random."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.warns(UserWarning, match="randomly initialized"):
        torch.save(InceptionFeatures("random").network.state_dict(), path)
    return path
