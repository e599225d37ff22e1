"""The VAE from every kind of file and folder in which it is published: older names, bin, half precision, several files; and odd configs."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from latents_toys import autoencoder
from odd_values import odd_copies
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data import load_vae, vae

PLAIN = "diffusion_pytorch_model"
OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.fixture(scope="module")
def model():
    return autoencoder()


@pytest.fixture
def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(vae, "_new", lambda architecture: autoencoder(seed=9))


def older(state, *, convolutions=False):
    """The names that attention had in diffusers up to 0.16, and the 1x1 convolutions that it was of before."""
    renamed = {}
    for key, value in state.items():
        if ".attentions." in key:
            for new, old in OLDER.items():
                key = key.replace(new, old)
            value = value[..., None, None] if convolutions and value.ndim == 2 else value
        renamed[key] = value
    assert len(renamed) == len(state) and renamed.keys() != state.keys()
    return renamed


def half(state):
    return {key: value.half() for key, value in state.items()}


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def folder_of(path, model, state, name):
    """A folder as diffusers writes it, with the weights `state` alone under `name`."""
    model.save_pretrained(path)
    (path / f"{PLAIN}.safetensors").unlink()
    write(state, path / name)
    return path


def same(loaded, state):
    found = loaded.model.state_dict()
    return all(torch.equal(found[key], value.float()) for key, value in state.items())


@pytest.mark.parametrize(
    "names",
    [dict, older, lambda state: older(state, convolutions=True)],
    ids=["today's", "older", "convolutions"],
)
@pytest.mark.parametrize("name", ["vae.pt", "vae.ckpt", f"{PLAIN}.bin", f"{PLAIN}.safetensors"])
def test_a_file_loads_with_the_names_of_any_time(tmp_path, state, names, name):
    assert same(load_vae(write(names(state), tmp_path / name)), state)


@pytest.mark.parametrize("prefix", ["module.", "vae.", "first_stage_model."])
def test_a_prefix_is_taken_off_and_said(tmp_path, state, prefix):
    write(
        {"state_dict": {prefix + key: value for key, value in older(state).items()}},
        tmp_path / "vae.ckpt",
    )
    with pytest.warns(UserWarning, match=f"the prefix '{prefix}' was taken off"):
        assert same(load_vae(tmp_path / "vae.ckpt"), state)


@pytest.mark.parametrize("name", [f"{PLAIN}.safetensors", f"{PLAIN}.bin"])
def test_a_folder_loads_with_older_names_and_from_bin(tmp_path, model, state, name):
    assert same(load_vae(folder_of(tmp_path, model, older(state), name)), state)


@pytest.mark.parametrize("name", [f"{PLAIN}.fp16.safetensors", f"{PLAIN}.fp16.bin"])
def test_a_folder_of_one_variant_loads_and_says_so(tmp_path, model, state, name):
    folder_of(tmp_path, model, half(state), name)
    with pytest.warns(UserWarning, match=f"only variant, 'fp16', is taken .{name}"):
        assert same(load_vae(tmp_path), half(state))
    assert same(load_vae(tmp_path, variant="fp16"), half(state))


def test_a_variant_is_taken_by_option_beside_the_plain_file(tmp_path, model, state):
    folder_of(tmp_path, model, state, f"{PLAIN}.safetensors")
    write(
        {key: value + 1 for key, value in half(state).items()},
        tmp_path / f"{PLAIN}.fp16.safetensors",
    )
    assert same(load_vae(tmp_path), state) and same(
        load_vae(tmp_path, variant="fp16"), {k: v + 1 for k, v in half(state).items()}
    )
    with pytest.raises(ArtifactError, match="no weights of variant 'bf16'; it has .*fp16"):
        load_vae(tmp_path, variant="bf16")


def test_weights_in_several_files_load(tmp_path, model, state):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and same(load_vae(tmp_path), state)


def test_a_name_that_is_there_in_both_spellings_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match="name .*to_q.* twice, also as .*query"):
        load_vae(write({**state, **older(state)}, tmp_path / "vae.pt"))


def test_a_variant_of_a_file_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match="variant is 'fp16', which is of a folder"):
        load_vae(write(state, tmp_path / "vae.pt"), variant="fp16")


@pytest.mark.parametrize("kind", ["vae.ckpt", f"{PLAIN}.safetensors", "config.json"])
def test_named_pipes_are_never_opened(tmp_path, model, kind):
    model.save_pretrained(tmp_path)
    (tmp_path / kind).unlink(missing_ok=True)
    os.mkfifo(tmp_path / kind)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load_vae(tmp_path / kind if kind == "vae.ckpt" else tmp_path)


@pytest.mark.parametrize("value", [None, "0.18", True, [1], 0, -1, float("nan"), float("inf")])
def test_a_scaling_factor_that_is_none_is_named(tmp_path, model, value):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": value}))
    with pytest.raises(
        ValueError, match="scaling_factor is .* in the config of .*give a number > 0"
    ):
        load_vae(tmp_path)
    assert load_vae(tmp_path, scaling_factor=0.5).scaling_factor == 0.5


def test_any_odd_value_of_a_config_is_one_sentence(tmp_path, model):
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for where, value, odd in odd_copies(content, num=50):
            (tmp_path / "config.json").write_text(json.dumps(odd))
            try:
                load_vae(tmp_path)
            except (ValueError, ArtifactError) as error:
                assert str(tmp_path) in str(error) and len(str(error)) < 1500, (
                    f"{where} {value!r:.60}: {str(error)[:1500]}"
                )
