import pytest
import torch
from hydra import compose, initialize_config_module

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)
from tinyfusion_pl.callbacks import EMAWithWarmup
from tinyfusion_pl.callbacks.ema import scaled_decay, warmed_up_decay


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_the_half_life_in_images_does_not_depend_on_the_batch(batch_size):
    decay = scaled_decay(0.9999, batch_size=batch_size, reference_batch_size=256)
    images = 256 * 6931  # half-life of 0.9999 at 256, to a step
    assert decay ** (images / batch_size) == pytest.approx(0.5, abs=1e-4)


def test_the_first_averages_forget_the_initial_weights():
    assert [round(warmed_up_decay(0.99, n), 4) for n in (0, 1, 10)] == [0.1, 0.1818, 0.55]
    assert warmed_up_decay(0.99, 10_000) == 0.99


def test_an_average_is_that_of_the_formula():
    average, value = torch.zeros(3), torch.ones(3)
    EMAWithWarmup(decay=0.9)._average([average], [value], torch.tensor(0))
    assert torch.allclose(average, torch.full((3,), 0.9))


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"batch_size": 0}, {"reference_batch_size": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EMAWithWarmup(**wrong)


def test_a_recipe_gives_the_average_its_batch():
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", ["+experiment=dit_d14", "recover.fit.budget.global_batch_size=64"])
        assert cfg.recover.fit.callbacks.ema.batch_size == 64
        assert compose("main").recover.fit.callbacks.ema.batch_size is None
