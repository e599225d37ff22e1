import pytest
import torch
from torch import nn

from tinyfusion_pl.models import create_model, list_models, register_model, registry


def test_every_published_size_and_patch_is_there_under_both_names():
    with torch.device("meta"):
        for size in ("S", "B", "L", "XL", "H"):
            for patch in (2, 4, 8):
                model = create_model(f"DiT-{size}/{patch}", depth=1)
                assert model.model_name == f"dit_{size.lower()}_{patch}"
                assert model.config["patch_size"] == patch


def test_patterns_list_the_names_that_match():
    assert list_models("dit_xl_*") == ["dit_xl_2", "dit_xl_4", "dit_xl_8"]
    assert {"dit_digits", "dit_s_8"} <= set(list_models())
    assert list_models("nothing*") == []


def test_overrides_replace_arguments():
    model = create_model("dit_digits", depth=2, learn_sigma=False)
    assert len(model.blocks) == 2
    assert model(
        torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    ).shape == (1, 1, 8, 8)


def test_a_registered_model_is_made_by_its_name_and_alias(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    register_model("my_line", lambda *, width=2: nn.Linear(width, 1), alias="My-Line/1")
    assert create_model("my_line").in_features == 2
    assert create_model("My-Line/1", width=5).in_features == 5
    assert "my_line" in list_models()


@pytest.mark.parametrize(
    ("name", "near"), [("dit_xl2", "dit_xl_2"), ("DiT-XL-2", "dit_xl_2"), ("digits", "dit_digits")]
)
def test_an_unknown_name_is_told_the_near_ones(name, near):
    with pytest.raises(ValueError, match=f"Unknown model '{name}'.*Did you mean .*{near}"):
        create_model(name)


@pytest.mark.parametrize("overrides", [{"width": 3}, {"depth": "many"}])
def test_arguments_the_model_does_not_take_are_a_plain_error_that_names_it(overrides):
    with pytest.raises(ValueError, match="dit_digits"):
        create_model("dit_digits", **overrides)
