"""Held against diffusers itself: its models, its folders, its forward passes."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from small_dit_model import relative, small_batch, small_dit
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models import load_denoiser, load_pretrained, load_shallow, save_shallow
from tinyfusion_pl.pruning import remove_blocks

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


def their_model(**overrides):
    """diffusers' DiT with random weights everywhere and equal embedders in all blocks."""
    model = DiTTransformer2DModel(**{**SIZES, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def outputs(ours, theirs):
    x, t, y = small_batch()
    with torch.no_grad():
        return ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


@pytest.mark.parametrize(
    "save",
    [{"safe_serialization": True}, {"safe_serialization": False}, {"max_shard_size": "40KB"}],
    ids=["safetensors", "bin", "several files"],
)
@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "model"])
def test_a_folder_of_diffusers_loads_with_equal_outputs(tmp_path, save, pipeline):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "transformer" if pipeline else tmp_path, **save)
    ours = load_pretrained(tmp_path)
    assert ours.config["frequency_shift"] == 1 and len(ours.blocks) == 3 and not ours.training
    found, expected = outputs(ours, theirs)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_eps": 1e-6},
        {"norm_eps": 1e-3},
        {"out_channels": 4},
        {"out_channels": None},
        {"patch_size": 4},
        {"num_layers": 1},
    ],
)
def test_sizes_and_epsilon_are_those_of_the_config(tmp_path, overrides):
    theirs = their_model(**overrides)
    theirs.save_pretrained(tmp_path)
    assert relative(*outputs(load_pretrained(tmp_path), theirs)) < 1e-6


def test_a_config_of_old_diffusers_states_less_and_loads_alike(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        _class_name="Transformer2DModel",
        norm_eps=None,
        num_vector_embeds=None,
        cross_attention_dim=None,
    )
    assert relative(*outputs(load_pretrained(tmp_path), theirs)) < 1e-6


def test_without_the_shift_the_outputs_are_far_off_and_with_shift_0_there_too_they_are_equal(
    tmp_path,
):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    published = load_pretrained(tmp_path, frequency_shift=0)
    assert relative(*outputs(published, theirs)) > 1e-2
    for module in theirs.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = 0
    assert relative(*outputs(published, theirs)) < 1e-6


def test_the_shift_and_the_epsilon_survive_pruning_and_saving(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = remove_blocks(load_pretrained(tmp_path / "theirs"), {"blocks": [0, 2]})
    del theirs.transformer_blocks[1]
    save_shallow(tmp_path / "shallow", ours, {"stacks": {}})
    again = load_shallow(tmp_path / "shallow")
    assert again.config == ours.config and again.config["norm2_eps"] == 1e-5
    assert relative(*outputs(again, theirs)) < 1e-6


def test_configurations_take_the_folder_too(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours = load_denoiser("dit_xl_2", checkpoint=tmp_path)
    assert relative(*outputs(ours, theirs)) < 1e-6 and ours.source["path"] == str(tmp_path)


def test_blocks_whose_embedders_differ_are_refused(tmp_path):
    theirs = their_model()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1e-3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match="embedders of blocks 0 and 2 differ .class_embedder.*fine-tuning in diffusers",
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"_class_name": "UNet2DModel"}, ArtifactError, "'UNet2DModel'.*'DiTTransformer2DModel'"),
        ({"_class_name": None}, ArtifactError, "describes a None"),
        ({"num_layers": None}, ArtifactError, "lacks num_layers"),
        ({"num_layers": 4}, ArtifactError, r"lacks transformer_blocks\.3.*4 blocks"),
        (
            {"num_layers": 2},
            ArtifactError,
            r"holds keys that DiT does not have: transformer_blocks\.2.*2 blocks",
        ),
        ({"norm_type": "ada_norm"}, ValueError, "norm_type='ada_norm'"),
        ({"activation_fn": "geglu"}, ValueError, "activation_fn='geglu'"),
        ({"dropout": 0.1}, ValueError, "dropout=0.1"),
        ({"out_channels": 5}, ValueError, "out_channels=5"),
        ({"attention_head_dim": 16}, ValueError, r"of another shape: .* instead of"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(tmp_path, changes, error, said):
    their_model().save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(error, match=said):
        load_pretrained(tmp_path)


def test_missing_and_truncated_weights_are_named(tmp_path):
    their_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ArtifactError, match="diffusion_pytorch_model.safetensors is not a whole safetensors file"
    ):
        load_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(
        ArtifactError,
        match="has no weights: diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin",
    ):
        load_pretrained(tmp_path)


def test_a_file_of_diffusers_without_its_config_is_told_from_a_dit(tmp_path):
    their_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="diffusers' DiT"):
        load_pretrained(file)
    with pytest.raises(
        ValueError, match="another family .diffusers' DiT. than dit_xl_2's .DiT or SiT."
    ):
        load_pretrained(file, name="dit_xl_2", hidden_size=32, num_heads=4, depth=1)


@pytest.mark.parametrize(
    "setting", [{"frequency_shift": 2}, {"frequency_shift": 0.5}, {"norm2_eps": 0}]
)
def test_options_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        small_dit(**setting)
