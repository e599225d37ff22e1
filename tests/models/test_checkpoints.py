import argparse
import os
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tinyfusion_pl.artifacts import ArtifactError, save_tensors
from tinyfusion_pl.models import DiT, load_checkpoint, load_weights


def new_model(depth=2):
    return DiT(input_size=4, in_channels=1, hidden_size=8, depth=depth, num_heads=2, num_classes=3)


@pytest.fixture
def states():
    """Two different state dicts of one model: averaged and raw."""
    return tuple(
        {k: torch.randn_like(v) for k, v in new_model().state_dict().items()} for _ in range(2)
    )


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def text(error):
    return str(error.value)


def test_a_safetensors_file_gives_its_tensors(tmp_path, states):
    save_tensors(tmp_path / "model.safetensors", states[0])
    assert_same(load_checkpoint(tmp_path / "model.safetensors"), states[0])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict_is_read(tmp_path, states, zipped):
    torch.save(states[0], tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint(tmp_path / "model.pt"), states[0])


def test_a_published_training_checkpoint_gives_averaged_or_raw_weights(tmp_path, states):
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save(
        {"model": states[1], "ema": states[0], "opt": {"state": {}}, "args": args},
        tmp_path / "0400000.pt",
    )
    assert_same(load_checkpoint(tmp_path / "0400000.pt"), states[0])
    assert_same(load_checkpoint(tmp_path / "0400000.pt", weights="raw"), states[1])


def test_reading_leaves_the_allowed_classes_as_they_were(tmp_path, states):
    before = set(torch.serialization.get_safe_globals())
    torch.save(states[0], tmp_path / "model.pt")
    load_checkpoint(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == before


class Wrapper(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.other = new_model(), torch.nn.Linear(1, 1)

    def training_step(self, batch):
        return self.other(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_lightning_checkpoint_gives_the_part_under_a_prefix(tmp_path):
    module = Wrapper()
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(2, 1)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same(load_checkpoint(tmp_path / "last.ckpt", prefix="net."), module.net.state_dict())
    with pytest.raises(ValueError, match=r"last\.ckpt starts with 'denoiser\.'"):
        load_checkpoint(tmp_path / "last.ckpt", prefix="denoiser.")


def test_weight_averaging_keeps_both_and_the_choice_is_obeyed(tmp_path, states):
    averaged, raw = ({f"denoiser.{k}": v for k, v in state.items()} for state in states)
    torch.save(
        {"state_dict": averaged, "current_model_state": raw, "epoch": 1}, tmp_path / "last.ckpt"
    )
    assert_same(load_checkpoint(tmp_path / "last.ckpt", prefix="denoiser."), states[0])
    assert_same(
        load_checkpoint(tmp_path / "last.ckpt", weights="raw", prefix="denoiser."), states[1]
    )
    assert_same(
        load_checkpoint(tmp_path / "last.ckpt"), states[0]
    )  # this project's own prefix is known


@pytest.mark.parametrize("weights", ["EMA", "model", ""])
def test_another_kind_of_weights_is_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="'ema' or 'raw'"):
        load_checkpoint(tmp_path / "any.pt", weights=weights)


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_is_refused_by_name_and_never_runs(tmp_path, states, zipped):
    torch.save({"ema": states[0], "extra": Code(tmp_path / "ran")}, tmp_path / "evil.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(
        ArtifactError, match=r"evil\.pt is refused: it holds a pickled \w+\.mkdir.*safetensors"
    ):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(new_model(), tmp_path / "module.pt")
    with pytest.raises(ArtifactError, match=r"module\.pt is refused: it holds a pickled .*DiT"):
        load_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / f"none{suffix}"))):
        load_checkpoint(tmp_path / f"none{suffix}")


@pytest.mark.parametrize("kept", [0, 1, 30, 200, 0.5, 0.99])
@pytest.mark.parametrize("form", ["zip.pt", "legacy.pt", "model.safetensors"])
def test_a_truncated_file_is_named_and_not_called_code(tmp_path, states, form, kept):
    path = tmp_path / form
    if form.endswith(".pt"):
        torch.save(states[0], path, _use_new_zipfile_serialization=form == "zip.pt")
    else:
        save_tensors(path, states[0])
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ArtifactError, match="truncated") as error:
        load_checkpoint(path)
    assert str(path) in text(error) and "refused" not in text(error)


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1", bytes(1000)]
)
def test_a_file_of_another_kind_is_not_called_code(tmp_path, content):
    (tmp_path / "page.pt").write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"page\.pt cannot be read: it is truncated or no torch checkpoint"
    ):
        load_checkpoint(tmp_path / "page.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.ones(2), {}, {0: torch.ones(2)}])
def test_a_file_without_a_state_dict_says_so(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match=r"other\.pt holds no state dict"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("as_file", [True, False])
def test_weights_arrive_in_the_model(tmp_path, states, as_file):
    save_tensors(tmp_path / "model.safetensors", states[0])
    model = new_model()
    assert load_weights(model, tmp_path / "model.safetensors" if as_file else states[0]) is model
    assert_same(model.state_dict(), states[0])


def test_a_prefix_holds_for_a_given_state_dict_too(states):
    model = new_model()
    load_weights(
        model,
        {**{f"net.{k}": v for k, v in states[0].items()}, "other.weight": torch.ones(1)},
        prefix="net.",
    )
    assert_same(model.state_dict(), states[0])


def test_every_way_not_to_fit_is_named_with_keys_and_shapes_and_changes_nothing(tmp_path, states):
    state = dict(states[0])
    del state["pos_embed"]
    state["blocks.0.attn.proj.weight"] = torch.zeros(8, 9)
    state["blocks.7.mlp.fc1.bias"] = torch.zeros(5)
    save_tensors(tmp_path / "other.safetensors", state)
    model = new_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, tmp_path / "other.safetensors")
    for said in ("other.safetensors", "1 missing: pos_embed (1, 4, 8)", "1 unexpected: blocks.7.mlp.fc1.bias (5,)",
                 "1 of another shape: blocks.0.attn.proj.weight (8, 9) instead of (8, 8)"):  # fmt: skip
        assert said in text(error)
    assert_same(model.state_dict(), before)


def test_of_many_wrong_keys_only_a_handful_is_named(states):
    with pytest.raises(ValueError) as error:
        load_weights(new_model(depth=9), states[0])
    assert "70 missing" in text(error) and text(error).count("blocks.") == 5
