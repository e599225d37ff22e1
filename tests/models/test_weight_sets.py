"""Which weights are taken of a checkpoint that holds several, and what the record says of it."""

import argparse
import copy
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from small_dit_model import small_dit
from tinyfusion_pl.artifacts import ArtifactError, save_tensors
from tinyfusion_pl.models import create_model, load_checkpoint, load_pretrained

RAW, AVERAGED = (small_dit((0, 2)).state_dict() for _ in range(2))
OPTIONS = {"num_heads": 4, "num_classes": 10}


def file_of(tmp_path, content, name="checkpoint.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def took(path, **options):
    """The kind and the entry that the record states, and whose values they are."""
    model = load_pretrained(path, **OPTIONS, **options)
    found = model.state_dict()
    values = [
        name
        for name, state in (("ema", AVERAGED), ("raw", RAW))
        if all(torch.equal(found[key], state[key]) for key in state)
    ]
    return model.source["weights"], model.source.get("key"), *values


AVERAGED_NAMES = [
    "ema", "ema_state_dict", "state_dict_ema", "ema_model", "model_ema", "model_ema_state",
    "ema_params", "params_ema", "ema_model_state_dict", "averaged_model", "average_model_state",
    "swa_model", "shadow", "ema_0.9999", "EMA", "emaModel", "net_ema", "avg_model", "nnet_ema",
]  # fmt: skip
RAW_NAMES = ["model", "state_dict", "module", "net", "model_state_dict", "denoiser", "nnet"]


@pytest.mark.parametrize("name", AVERAGED_NAMES)
def test_averaged_weights_are_known_by_many_names(tmp_path, name):
    path = file_of(tmp_path, {"model": RAW, name: AVERAGED, "opt": {"state": {}}, "step": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert took(path)[::2] == ("ema", "ema") and took(path, weights="raw")[::2] == (
            "raw",
            "raw",
        )
    assert took(path)[1] == (None if name == "ema" else name)


@pytest.mark.parametrize("name", RAW_NAMES)
def test_raw_weights_are_known_by_many_names(tmp_path, name):
    path = file_of(tmp_path, {name: RAW, "ema": AVERAGED})
    assert took(path) == ("ema", None, "ema") and took(path, weights="raw") == ("raw", name, "raw")


@pytest.mark.parametrize("name", ["smoothed", "best", "teacher", "modelema", "model2"])
def test_an_unknown_entry_of_equal_keys_is_named(tmp_path, name):
    path = file_of(tmp_path, {"model": RAW, name: AVERAGED})
    with pytest.raises(ValueError, match=f"'model'.*'{name}'.*weights='{name}'"):
        load_pretrained(path, **OPTIONS)
    assert took(path, weights=name)[2] == "ema" and took(path, weights="raw")[2] == "raw"


def test_two_averages_are_both_named(tmp_path):
    path = file_of(tmp_path, {"model": RAW, "ema_0.999": AVERAGED, "ema_0.9999": RAW})
    with pytest.raises(ValueError, match="'ema_0.999', 'ema_0.9999'"):
        load_pretrained(path, **OPTIONS)
    assert took(path, weights="ema_0.999") == ("ema", "ema_0.999", "ema")


def test_another_weights_option_names_what_the_file_has(tmp_path):
    path = file_of(tmp_path, {"model": RAW, "ema": AVERAGED})
    with pytest.raises(ValueError, match="'best'; give 'ema' or 'raw'.*'model', 'ema'"):
        load_pretrained(path, weights="best", **OPTIONS)


@pytest.mark.parametrize("name", RAW_NAMES)
def test_raw_weights_alone_are_recorded_as_raw(tmp_path, name):
    path = file_of(tmp_path, {name: RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}})
    with pytest.warns(UserWarning, match=f"raw weights only .under '{name}'.*recorded as.*'raw'"):
        assert took(path) == ("raw", name, "raw")


def test_averaged_weights_alone_are_recorded_as_such(tmp_path):
    path = file_of(tmp_path, {"ema": AVERAGED})
    with pytest.warns(UserWarning, match="averaged weights only"):
        assert took(path, weights="raw") == ("ema", None, "ema")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bare_state_dict_says_neither(tmp_path, suffix):
    path = tmp_path / f"bare{suffix}"
    (save_tensors(path, RAW) if suffix != ".pt" else torch.save(RAW, path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert took(path) == ("unstated", None, "raw")


def test_a_sole_entry_of_an_unknown_name_is_said(tmp_path):
    path = file_of(tmp_path, {"smoothed": AVERAGED, "epoch": 3})
    with pytest.warns(UserWarning, match="'smoothed'.*does not say"):
        assert took(path) == ("unstated", "smoothed", "ema")


def averaged_model():
    model = small_dit((0, 2))
    model.load_state_dict(AVERAGED)
    return AveragedModel(model).state_dict()


def get_parameters(state, keys=None):
    return [state[key].clone() for key in keys or state]


FROZEN = [key for key in RAW if key != "pos_embed"]
NESTED = {
    "in a state dict": {"model": RAW, "ema": {"state_dict": AVERAGED, "decay": 0.999, "step": 4}},
    "ema_pytorch": {
        "model": RAW,
        "ema": {
            "initted": torch.tensor(True), "step": torch.tensor(7),
            **{f"online_model.{k}": v for k, v in RAW.items()},
            **{f"ema_model.{k}": v for k, v in AVERAGED.items()},
        },
    },
    "AveragedModel": {"state_dict": RAW, "averaged": averaged_model()},
    "a callback of Lightning": {"state_dict": RAW, "callbacks": {"EMACallback": {"weights": AVERAGED}}},
    "latent diffusion": {
        "state_dict": {
            **{f"model.{k}": v for k, v in RAW.items()},
            **{f"model_ema.{k.replace('.', '')}": v for k, v in AVERAGED.items()},
            "model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(4),
        },
    },
    "two prefixes": {f"{p}.{k}": v for p, s in (("net", RAW), ("net_ema", AVERAGED)) for k, v in s.items()},
    "torch_ema": {
        "model": RAW,
        "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": get_parameters(AVERAGED), "collected_params": None},
    },
    "shadow_params": {"model": RAW, "shadow_params": get_parameters(AVERAGED)},
    "tensors by number": {"model": RAW, "ema": dict(enumerate(get_parameters(AVERAGED)))},
    "tensors by number as text": {"model": RAW, "ema": {str(i): v for i, v in enumerate(get_parameters(AVERAGED))}},
    "under a number": {"model": RAW, "ema": {0.9999: AVERAGED}},
    "in a list": {"net": RAW, "ema": [AVERAGED]},
    "deep prefixes": {f"a.b.c.{p}.{k}": v for p, s in (("model", RAW), ("ema", AVERAGED)) for k, v in s.items()},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*prefix")
@pytest.mark.parametrize("form", NESTED)
def test_averaged_weights_are_found_inside(tmp_path, form):
    path = file_of(tmp_path, NESTED[form])
    assert took(path)[::2] == ("ema", "ema") and took(path, weights="raw")[::2] == ("raw", "raw")


def test_an_averaged_model_alone_is_recorded_as_ema(tmp_path):
    assert took(file_of(tmp_path, averaged_model()))[::2] == ("ema", "ema")


def test_trainable_shadow_params_leave_out_what_is_frozen(tmp_path):
    content = {"model": RAW, "shadow_params": get_parameters(AVERAGED, FROZEN)}
    with pytest.warns(UserWarning, match="'shadow_params' has no pos_embed; taken from 'model'"):
        assert took(file_of(tmp_path, content))[0] == "ema"
    found = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(torch.equal(found[key], AVERAGED[key]) for key in FROZEN)


def test_an_average_by_name_may_lack_the_fixed_table(tmp_path):
    content = {"model": RAW, "shadow": {f"module.{key}": AVERAGED[key] for key in FROZEN}}
    with pytest.warns(UserWarning, match="'shadow' has no pos_embed; taken from 'model'"):
        assert took(file_of(tmp_path, content)) == ("ema", "shadow", "ema")


def test_two_averages_by_rate_are_both_named(tmp_path):
    path = file_of(tmp_path, {"net": RAW, "ema": {0.999: AVERAGED, 0.9999: RAW}})
    with pytest.raises(ValueError, match="'ema.0.999', 'ema.0.9999'"):
        load_pretrained(path, **OPTIONS)
    assert took(path, weights="ema.0.999") == ("ema", "ema.0.999", "ema")


@pytest.mark.parametrize(
    "content", [{"decay": torch.tensor([0.9]), "step": torch.tensor([3])}, torch.ones(99)]
)
def test_an_average_of_something_else_is_not_taken(tmp_path, content):
    with pytest.warns(
        UserWarning,
        match="raw weights only.*What is under 'ema' is no state dict, and was not read",
    ):
        assert took(file_of(tmp_path, {"model": RAW, "ema": content})) == ("raw", "model", "raw")


def test_a_prefix_of_an_unknown_name_is_recorded_as_unstated(tmp_path):
    path = file_of(
        tmp_path,
        {
            "state_dict": {
                f"{p}.{k}": v
                for p, s in (("model", RAW), ("smooth", AVERAGED))
                for k, v in s.items()
            }
        },
    )
    with (
        pytest.raises(
            ValueError, match="fit under each of 'model.' and 'smooth.'.*prefix='smooth.'"
        ),
        pytest.warns(UserWarning),
    ):
        load_pretrained(path, **OPTIONS)
    with pytest.warns(UserWarning, match="does not say whether they are averaged"):
        assert took(path, prefix="smooth.")[::2] == ("unstated", "ema")


@pytest.mark.parametrize("case", ["too few", "another shape", "alone"])
def test_shadow_params_that_fit_no_names_are_refused(tmp_path, case):
    values = get_parameters(AVERAGED)
    values = values[:-2] if case == "too few" else values
    if case == "another shape":
        values[3] = torch.ones(7)
    content = {"shadow_params": values, **({} if case == "alone" else {"model": RAW})}
    with pytest.raises(ValueError, match="tensors without names"):
        load_pretrained(file_of(tmp_path, content), **OPTIONS)


def test_optimizers_and_other_models_are_not_taken(tmp_path):
    other = torch.nn.Linear(3, 3).state_dict()
    content = {"model": RAW, "ema": AVERAGED, "vae": other, "exp_avg": RAW, "optimizer_ema": RAW}
    assert took(file_of(tmp_path, content)) == ("ema", None, "ema")


@pytest.mark.parametrize("name", ["ema", "model_ema", "shadow_params"])
def test_an_average_that_is_all_zero_is_refused(tmp_path, name):
    zeros = {key: torch.zeros_like(value) for key, value in AVERAGED.items()}
    content = {"model": RAW, name: list(zeros.values()) if name == "shadow_params" else zeros}
    path = file_of(tmp_path, content)
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt.*all zero.*weights=raw"):
        load_pretrained(path, **OPTIONS)
    assert took(path, weights="raw")[2] == "raw"


def test_zeros_beside_the_fixed_embedding_are_refused(tmp_path):
    zeros = {k: v if k == "pos_embed" else torch.zeros_like(v) for k, v in AVERAGED.items()}
    with pytest.raises(ArtifactError, match="all zero, but for"):
        load_pretrained(file_of(tmp_path, {"ema": zeros}), **OPTIONS)


def test_zeros_that_a_model_begins_with_are_fine(tmp_path):
    model = create_model("dit", **small_dit((0, 2)).config)  # adaLN-Zero: its last layer is zeros
    path = file_of(tmp_path, {"ema": model.state_dict()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(path, **OPTIONS)


def test_single_zero_tensors_are_named(tmp_path):
    state = {
        **AVERAGED,
        "blocks.1.attn.qkv.weight": torch.zeros_like(AVERAGED["blocks.1.attn.qkv.weight"]),
    }
    with pytest.warns(UserWarning, match=r"1 of .* all zero.*blocks\.1\.attn\.qkv\.weight"):
        load_pretrained(file_of(tmp_path, {"ema": state}), **OPTIONS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["ema.pt", "bare.safetensors"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, form):
    state = copy.deepcopy(dict(AVERAGED))
    state["blocks.1.mlp.fc1.bias"][3] = value
    path = tmp_path / form
    (save_tensors(path, state) if "safetensors" in form else torch.save({"ema": state}, path))
    with pytest.raises(
        ArtifactError, match=rf"{form}.*not finite, in 1 of .*blocks\.1\.mlp\.fc1\.bias"
    ):
        load_pretrained(path, **OPTIONS)


def test_integers_in_the_place_of_weights_are_refused(tmp_path):
    state = {**AVERAGED, "blocks.0.mlp.fc1.weight": AVERAGED["blocks.0.mlp.fc1.weight"].char()}
    with pytest.raises(ValueError, match="1 of another type: blocks.0.mlp.fc1.weight torch.int8"):
        load_pretrained(file_of(tmp_path, {"ema": state}), **OPTIONS)


def test_a_lightning_average_wins_over_its_state_dict_name(tmp_path):
    content = {
        "state_dict": {f"denoiser.{k}": v for k, v in AVERAGED.items()},
        "current_model_state": {f"denoiser.{k}": v for k, v in RAW.items()},
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    path = file_of(tmp_path, content, "last.ckpt")
    assert took(path) == ("ema", "state_dict", "ema")
    assert took(path, weights="raw") == ("raw", "current_model_state", "raw")


def test_the_name_of_the_training_does_not_hide_the_weights(tmp_path):
    args = argparse.Namespace(model="DiT-D14/2", ema=0.9999)
    assert took(file_of(tmp_path, {"model": RAW, "ema": AVERAGED, "args": args}))[2] == "ema"


def test_a_prefix_that_is_given_finds_its_names_beside_an_average(tmp_path):
    path = file_of(
        tmp_path,
        {
            "state_dict": {
                f"{p}.{k}": v
                for p, s in (("net", RAW), ("net_ema", AVERAGED))
                for k, v in s.items()
            }
        },
    )
    assert took(path, prefix="net_ema.")[::2] == ("ema", "ema")
    with pytest.warns(UserWarning, match="raw weights only"):
        assert took(path, prefix="net.")[::2] == ("raw", "raw")
    assert took(path, prefix="net.", weights="raw")[::2] == ("raw", "raw")


def test_entries_inside_entries_without_end_are_refused(tmp_path):
    content = {"a": torch.ones(1)}
    for _ in range(6):
        content = {f"k{i}": content for i in range(40)}  # a small file: each is there once
    with pytest.raises(ArtifactError, match="more than 100000 entries inside entries"):
        load_pretrained(file_of(tmp_path, content), **OPTIONS)
    content["self"] = content
    with pytest.raises(ArtifactError, match="more than 100000 entries inside entries"):
        load_pretrained(file_of(tmp_path, content), **OPTIONS)


@pytest.mark.parametrize("place", ["shipped", "random", "folder"])
def test_an_entry_by_name_of_no_file_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match="Invalid weights 'best'.*'ema' or 'raw' .model.weights"):
        load_pretrained(tmp_path if place == "folder" else place, name="dit_digits", weights="best")


def test_the_weights_that_a_search_started_from_are_no_second_set(tmp_path):
    trained = {"denoiser.a": torch.ones(2), "denoiser.b": torch.ones(3)}
    before = {name: torch.zeros_like(value) for name, value in trained.items()}
    torch.save(
        {"state_dict": trained, "callbacks": {"DepthPruningCallback": {"original": before}}},
        tmp_path / "last.ckpt",
    )
    with pytest.warns(UserWarning):
        found = load_checkpoint(tmp_path / "last.ckpt", weights="ema")
    assert all(value.eq(1).all() for value in found.values()) and len(found) == 2
