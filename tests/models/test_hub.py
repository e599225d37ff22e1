"""Our models on the Hugging Face Hub, whose part a local folder plays."""

import inspect
import json
import shutil
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import pytest
import torch

from small_dit_model import small_batch, small_dit
from tinyfusion_pl.artifacts import ArtifactError, sha256, write_json
from tinyfusion_pl.models import Denoiser, DiT, SiT, load_pretrained, load_shallow, save_shallow
from tinyfusion_pl.pruning import remove_blocks

STACKS = {
    "blocks": {
        "pattern": "2:3",
        "num_blocks": 3,
        "kept_blocks": [0, 2],
        "block_probabilities": [],
        "groups": [],
    }
}


@pytest.fixture
def run(tmp_path):
    """A run folder with a shallow model and its figures."""
    shallow = remove_blocks(small_dit(), {"blocks": (0, 2)})
    save_shallow(tmp_path / "run" / "shallow", shallow, {"stacks": STACKS, "seed": 7})
    figures = {"depth": 2, "num_params": 5, "fid": 22.296}
    content = {"name": "run", "recovered": figures, "protocol": {"num_samples": 1000}}
    write_json(tmp_path / "run" / "metrics.json", content)
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the Hub."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    return tmp_path / "hub"


@pytest.mark.parametrize("load", [load_shallow, load_pretrained, DiT.from_pretrained])
def test_a_saved_folder_holds_weights_record_and_card(run, tmp_path, load):
    model = load(run / "shallow")
    model.save_pretrained(tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "record.json", "README.md"}
    old = json.loads((run / "shallow" / "record.json").read_text())
    new = json.loads((tmp_path / "out" / "record.json").read_text())
    assert old == new
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| `blocks` | 2 of 3 | 0, 2 |", "| recovered | 2 | 5 | 22.3 |", "num_samples"):
        assert line in card
    again, inputs = DiT.from_pretrained(tmp_path / "out"), small_batch()
    assert torch.equal(again(*inputs), model(*inputs)) and not again.training


def test_figures_of_other_weights_are_left_out(run, tmp_path):
    model = load_shallow(run / "shallow")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight += 1
    model.save_pretrained(tmp_path / "out")
    assert "22.3" not in (tmp_path / "out" / "README.md").read_text()


def test_a_dense_model_is_saved_without_a_decision(tmp_path):
    model = small_dit().eval()
    model.save_pretrained(tmp_path / "out")
    again, inputs = Denoiser.from_pretrained(tmp_path / "out"), small_batch()
    assert torch.equal(again(*inputs), model(*inputs))
    assert "Kept blocks" not in (tmp_path / "out" / "README.md").read_text()


def test_push_to_hub_uploads_the_same_files(run, hub):
    url = load_shallow(run / "shallow").push_to_hub("me/tiny")
    assert url == "https://hub/me/tiny"
    assert sha256(hub / "me/tiny/model.safetensors") == sha256(run / "shallow/model.safetensors")
    assert len(DiT.from_pretrained(hub / "me" / "tiny").blocks) == 2


def test_a_repository_is_downloaded_and_opened(run, monkeypatch):
    asked = []

    def download(repo_id, **kwargs):
        asked.append((repo_id, kwargs["revision"]))
        return str(run / "shallow")

    monkeypatch.setattr("tinyfusion_pl.models.hub.snapshot_download", download)
    assert len(DiT.from_pretrained("me/tiny", revision="v1").blocks) == 2
    assert asked == [("me/tiny", "v1")]


def test_another_class_is_refused(run):
    with pytest.raises(ValueError, match=r"holds a DiT, not a SiT. Call DiT\.from_pretrained"):
        SiT.from_pretrained(run / "shallow")


def test_a_record_that_no_longer_fits_is_refused(run, tmp_path):
    model = remove_blocks(load_shallow(run / "shallow"), {"blocks": (0,)})
    with pytest.raises(ArtifactError, match="2 blocks of 'blocks'"):
        model.save_pretrained(tmp_path / "out")


def test_the_mixin_leaves_the_signature_of_a_family():
    assert "hidden_size" in inspect.signature(DiT).parameters
    assert "_hub_mixin_config" not in vars(small_dit())
