"""The settings of a checkpoint that errors advise are accepted on the command line, and read."""

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)
from tinyfusion_pl.cli.settings import checked
from tinyfusion_pl.models import load_denoiser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file with two entries of equal keys, and one of two models under prefixes."""
    folder = tmp_path_factory.mktemp("files")
    state = load_denoiser("dit_digits", checkpoint="shipped").state_dict()
    twice = {key: 2 * value for key, value in state.items()}
    torch.save({"model": state, "smooth": twice}, folder / "entries.pt")
    torch.save(
        {
            f"{name}.{key}": value
            for name, each in (("student", state), ("teacher", twice))
            for key, value in each.items()
        },
        folder / "prefixes.pt",
    )
    return folder


@pytest.mark.parametrize(("file", "setting", "is_twice"), [
    ("entries.pt", "model.weights=smooth", True), ("entries.pt", "model.weights=raw", False),
    ("prefixes.pt", "model.prefix=teacher.", True), ("prefixes.pt", "model.prefix=student.", False),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(raw weights only|does not say):UserWarning")
def test_an_entry_and_a_prefix_are_settings(files, file, setting, is_twice):
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose(
            "main",
            overrides=[
                "task=learn_mask",
                f"model.checkpoint={files / file}",
                setting,
                "run_dir=x",
                "paths.output_dir=x",
            ],
        )
    found = instantiate(checked(cfg).model).state_dict()
    expected = load_denoiser("dit_digits", checkpoint="shipped").state_dict()
    assert all(
        torch.equal(found[key], (2 if is_twice else 1) * value) for key, value in expected.items()
    )
