import inspect

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)
from tinyfusion_pl.models.download import without_download
from tinyfusion_pl.objectives import MaskedAutoregression


@pytest.fixture
def cfg():
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        return compose("main", ["model=mar_large", "objective=mar"])


def test_the_objective_is_the_published_one_which_is_also_its_default(cfg):
    assert isinstance(instantiate(cfg.objective), MaskedAutoregression)
    values = OmegaConf.to_container(cfg.objective)
    del values["_target_"]
    assert values == {
        name: p.default for name, p in inspect.signature(MaskedAutoregression).parameters.items()
    }


def test_the_model_asks_for_its_published_checkpoint(cfg):
    with (
        without_download(),
        pytest.raises(InstantiationException, match="mar_large.pth is not there yet"),
    ):
        instantiate(cfg.model)
