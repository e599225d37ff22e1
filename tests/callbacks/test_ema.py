import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

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


def test_an_update_follows_the_formula():
    average, value = torch.zeros(3), torch.ones(3)
    EMAWithWarmup(decay=0.9)._update([average], [value], torch.tensor(0))
    assert torch.allclose(average, torch.full((3,), 0.9))


@pytest.mark.parametrize(
    "wrong", [{"decay": 1.0}, {"decay": -0.1}, {"batch_size": 0}, {"reference_batch_size": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EMAWithWarmup(**wrong)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(precision, tmp_path):
    trainer = Trainer(
        max_steps=2,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ema := EMAWithWarmup(decay=0.5)],
        default_root_dir=tmp_path,
    )
    module = Line()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    trainer.fit(module, DataLoader(torch.randn(4, 2, dtype=dtype), batch_size=2))
    return ema, module


def test_averages_of_a_double_model_are_double(tmp_path):
    ema, module = fit("64-true", tmp_path)
    weights = (
        ema._average_model.module.line.weight
        if ema._average_model is not None
        else module.line.weight
    )
    assert weights.dtype == module.line.weight.dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_averages_in_half_precision_are_refused(precision, tmp_path):
    with pytest.raises(ValueError, match=precision.replace("true", "mixed")):
        fit(precision, tmp_path)


def test_a_recipe_gives_the_average_its_batch():
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", ["+experiment=dit_d14", "recover.fit.budget.global_batch_size=64"])
        assert cfg.recover.fit.callbacks.ema.batch_size == 64
        assert compose("main").recover.fit.callbacks.ema.batch_size is None
