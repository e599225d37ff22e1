"""What wrappers and training codes put before names is taken off where every key fits then, and said."""

import itertools
import warnings

import pytest
import torch

from small_dit_model import small_dit
from tinyfusion_pl.models import load_pretrained, load_weights
from tinyfusion_pl.models.shadow_params import name_shadow_params

MODEL = small_dit((0, 2))
STATE = MODEL.state_dict()
OPTIONS = {"num_heads": 4, "num_classes": 10}
KNOWN = ["module.", "_orig_mod.", "model.", "denoiser.", "net.", "transformer.", "ema_model."]
NESTED = ["".join(pair) for pair in itertools.permutations(KNOWN[:4], 2)] + ["a.b.c."]


def under(prefix, state=STATE):
    return {f"{prefix}{key}": value for key, value in state.items()}


def same(model, state=STATE):
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize("prefix", KNOWN + NESTED)
def test_a_prefix_that_every_key_has_is_taken_off(tmp_path, prefix):
    torch.save({"ema": under(prefix)}, tmp_path / "file.pt")
    for name in (None, "dit"):
        options = {**MODEL.config, "name": name} if name else OPTIONS
        if prefix == "denoiser.":  # of this project's own modules: nothing to say
            assert same(load_pretrained(tmp_path / "file.pt", **options))
        else:
            with pytest.warns(UserWarning, match=r"file\.pt: (the prefix|parts that wrappers)"):
                assert same(load_pretrained(tmp_path / "file.pt", **options))


@pytest.mark.parametrize("prefix", KNOWN + NESTED)
def test_a_given_state_dict_may_have_one_too(prefix):
    with pytest.warns(UserWarning, match="The given state dict: (the prefix|parts that wrappers)"):
        assert same(load_weights(small_dit((0, 2)), under(prefix)))


def test_parts_of_compiled_blocks_are_taken_out():
    inside = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in under("module.").items()}
    with pytest.warns(UserWarning, match="module"):
        assert same(load_weights(small_dit((0, 2)), inside))


def test_names_that_fit_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_weights(small_dit((0, 2)), STATE))


@pytest.mark.parametrize("others", ["teacher.", "net."])
def test_weights_that_fit_in_two_places_are_refused(tmp_path, others):
    torch.save({"state_dict": {**under("student."), **under(others)}}, tmp_path / "file.ckpt")
    for load in (
        lambda: load_pretrained(tmp_path / "file.ckpt", **OPTIONS),
        lambda: load_weights(small_dit((0, 2)), tmp_path / "file.ckpt"),
    ):
        with pytest.raises(
            ValueError, match=f"fit under each of (?=.*{others})(?=.*student).*prefix="
        ):
            load()
    assert same(load_pretrained(tmp_path / "file.ckpt", prefix="student.", **OPTIONS))


def test_other_keys_beside_the_model_are_named(tmp_path):
    torch.save({**under("net."), "loss.weight": torch.ones(2, 2)}, tmp_path / "file.pt")
    with pytest.warns(UserWarning, match="'net.'.*1 other keys are left out: loss.weight"):
        assert same(load_pretrained(tmp_path / "file.pt", **OPTIONS))


def test_what_does_not_fit_under_any_prefix_says_the_nearest():
    state = under("module.")
    del state["module.pos_embed"]
    with pytest.raises(ValueError, match=r"under the prefix 'module\.': 1 missing: pos_embed"):
        load_weights(small_dit((0, 2)), state)


def test_a_prefix_of_a_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="prefix='net.' requires a file"):
        load_pretrained(tmp_path, prefix="net.")


@pytest.mark.parametrize(("shapes", "own", "expected"), [
    ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
    ([1, 2, 3], [1, 3], [0, None, 1]),
    ([1, 2, 2, 3], [1, 2, 3], None),  # which of the two?
    ([1, 2], [2, 1], None),
    ([1], [1, 1], None),
])  # fmt: skip
def test_lists_get_names_only_where_one_way_fits(shapes, own, expected):
    state = {f"k{i}": torch.zeros(n) for i, n in enumerate(shapes)}
    values = [torch.ones(n) for n in own]
    named = name_shadow_params(values, state)
    if expected is None:
        assert named is None
    else:
        assert list(named) == list(state)
        for place, i in zip(state, expected):
            assert named[place] is (state[place] if i is None else values[i])
