"""A saved shallow model opens with the plain ``from_pretrained`` of its library, and with `load_shallow` alone."""

import json
import logging

import pytest
import torch

from foreign.zoo import ZOO, of, randomize, sample_of
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models import load_shallow, save_shallow
from tinyfusion_pl.pruning import remove_blocks

LIBRARY = [
    name for name, row in ZOO.items() if row.library in ("diffusers", "transformers") and row.depths
]
OTHERS = [name for name, row in ZOO.items() if name not in LIBRARY]


def record(kept_blocks):
    return {
        "stacks": {
            path: {
                "pattern": "1:2",
                "num_blocks": 1 + max(kept),
                "kept_blocks": kept,
                "block_probabilities": [],
                "groups": [],
            }
            for path, kept in kept_blocks.items()
        }
    }


def saved(name, folder):
    row = ZOO[name]
    model, make_inputs, stacks = row.build()
    kept = row.kept_blocks(stacks)
    shallow = remove_blocks(model, kept)
    save_shallow(folder, shallow, record(kept))
    args, kwargs = make_inputs(2)
    return shallow, lambda m: sample_of(m(*args, **kwargs))


@pytest.mark.slow  # the rows of the page on any transformer check the same
@pytest.mark.parametrize("name", LIBRARY)
def test_plain_from_pretrained_opens_it(name, tmp_path):
    shallow, call = saved(name, tmp_path)
    expected = call(shallow)
    opened = of(ZOO[name].library, type(shallow).__name__).from_pretrained(tmp_path)
    loaded = load_shallow(tmp_path)
    if name == "dit":  # the builder of the zoo turned label dropout off
        for block in (*opened.transformer_blocks, *loaded.transformer_blocks):
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    torch.testing.assert_close(call(opened.eval()), expected, rtol=0, atol=0)
    torch.testing.assert_close(call(loaded), expected, rtol=0, atol=0)
    assert {"config.json", "model.safetensors", "record.json"} <= {
        file.name for file in tmp_path.iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_without_config_needs_a_dense_one(name, tmp_path):
    shallow, call = saved(name, tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="does not say how to build its model"):
        load_shallow(tmp_path)
    loaded = load_shallow(tmp_path, model=ZOO[name].build().model)
    torch.testing.assert_close(call(loaded), call(shallow), rtol=0, atol=0)


def test_weights_are_on_disk_once(tmp_path):
    saved("flux", tmp_path)
    assert (tmp_path / "model.safetensors").samefile(
        tmp_path / "diffusion_pytorch_model.safetensors"
    )
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_tied_weights_stay_tied(tmp_path):
    model = ZOO["llama"].build(tie_word_embeddings=True).model
    remove_blocks(model, {"model.layers": [0, 3]})
    ids = torch.randint(0, 50, (2, 5))
    save_shallow(tmp_path, model, record({"model.layers": [0, 3]}))
    loaded = load_shallow(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    other = load_shallow(tmp_path, model=ZOO["llama"].build(tie_word_embeddings=True).model)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_a_library_that_cannot_open_it_is_reported(tmp_path, caplog):
    saved("flux", tmp_path)
    with caplog.at_level(logging.WARNING):
        saved("unet2d", tmp_path)
    assert "UNet2DConditionModel cannot state its depth" in caplog.text
    assert (
        not (tmp_path / "config.json").exists()
        and not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    )


def test_a_class_of_ones_own_is_not_looked_up_in_the_library(tmp_path):
    base = of("transformers", "BertModel")
    mine = type("Mine", (base,), {})
    model = randomize(mine(ZOO["bert"].build().model.config))
    save_shallow(
        tmp_path, remove_blocks(model, {"encoder.layer": [0, 1]}), record({"encoder.layer": [0, 1]})
    )
    assert json.loads((tmp_path / "record.json").read_text())["library"] is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"library": "os", "class": "system"}, "'os'; diffusers and transformers are known"),
        (
            {"library": "diffusers", "class": "DiffusionPipeline"},
            "'DiffusionPipeline', which diffusers .* does not have",
        ),
        ({"library": "diffusers", "class": "models.Other"}, "'models.Other'"),
        ({"library": "diffusers"}, "None"),
    ],
)
def test_only_models_of_known_libraries_are_built(entry, message, tmp_path):
    saved("dit", tmp_path)
    file = tmp_path / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "library": entry}))
    with pytest.raises(ArtifactError, match=message):
        load_shallow(tmp_path)


def test_altered_weights_are_noticed(tmp_path):
    saved("dit", tmp_path)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        load_shallow(tmp_path)


def test_compiled_models_save_plain_keys(tmp_path):
    row = ZOO["pixart"]
    model, make_inputs, (path,) = row.build()
    args, kwargs = make_inputs(2)
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = torch.compile(block, backend="eager")
    remove_blocks(model, {path: [0, 2]})
    save_shallow(tmp_path, model, record({path: [0, 2]}))
    assert all(hasattr(block, "_orig_mod") for block in model.transformer_blocks)
    loaded = load_shallow(tmp_path)
    assert not any("_orig_mod" in key for key in loaded.state_dict())
    expected = row.build().model
    remove_blocks(expected, {path: [0, 2]})
    torch.testing.assert_close(
        sample_of(loaded(*args, **kwargs)), sample_of(expected(*args, **kwargs)), rtol=0, atol=0
    )
