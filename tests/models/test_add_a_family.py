"""docs/how_to/add_a_family.md: its code, written as one folder, is a family."""

import re
import sys
from pathlib import Path

import pytest
import torch

from tinyfusion_pl import models
from tinyfusion_pl.models import (
    create_model,
    export_model,
    list_models,
    load_pretrained,
    registry,
    save_shallow,
)
from tinyfusion_pl.models.detection import detect_family
from tinyfusion_pl.pruning import remove_blocks

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "add_a_family.md"
BLOCK = re.compile(r"```python\n# (\S+)\n(.*?)```", re.S)


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The package of the page, beside our own."""
    for name in ("_FACTORIES", "_ALIASES", "_FAMILIES"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    folder = tmp_path / "families"
    for path, code in BLOCK.findall(PAGE.read_text()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    registry.discover_families([str(folder)])
    yield
    for name in [name for name in sys.modules if "models.conv_toy" in name]:
        del sys.modules[name]


def batch():
    return torch.randn(2, 4, 8, 8), torch.zeros(2), torch.tensor([1, 10])


def test_the_page_is_short():
    assert len(PAGE.read_text().splitlines()) <= 60


def test_a_folder_registers_its_sizes():
    assert list_models("conv_toy*") == ["conv_toy_b", "conv_toy_s"]
    model = create_model("conv_toy_b", depth=2)
    assert (len(model.layers), model.width, model(*batch()).shape[1]) == (2, None, 4)


def test_a_checkpoint_is_recognized_by_its_keys(tmp_path):
    model = create_model("conv_toy_s", width=6, depth=3).eval()
    assert detect_family(model.state_dict()) == "ConvToy"
    torch.save(
        {"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "x.pt"
    )
    with pytest.warns(UserWarning, match=r"'module\.'|'model'"):
        loaded = load_pretrained(tmp_path / "x.pt", weights="raw")
    assert loaded.config == {"width": 6, "depth": 3, "num_classes": 10}
    inputs = batch()
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_weights_of_another_family_are_refused(tmp_path):
    torch.save(create_model("conv_toy_s").state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"another family \(ConvToy\)"):
        load_pretrained(tmp_path / "x.pt", name="dit_digits")


def test_it_is_pruned_saved_and_exported(tmp_path):
    shallow = remove_blocks(create_model("conv_toy_s").eval(), {"layers": (0, 3)})
    file = export_model(shallow, tmp_path / "x.safetensors")
    folder = save_shallow(tmp_path / "folder", shallow, {})
    inputs = batch()
    for path in (file, folder):
        loaded = load_pretrained(path)
        assert loaded.config["depth"] == 2
        assert torch.equal(loaded(*inputs), shallow(*inputs))
