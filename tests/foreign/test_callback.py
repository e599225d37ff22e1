"""`DepthPruningCallback` in a real Trainer on models of other libraries: what it leaves, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from foreign.fits import Fitted, fit
from foreign.zoo import COUPLED, ZOO, of, sample_of
from pruning.toys import Toy
from tinyfusion_pl.callbacks import DepthPruningCallback
from tinyfusion_pl.models import load_shallow
from tinyfusion_pl.pruning import get_stack

MAIN = ("flux", "sd3", "hunyuandit", "wan", "sana", "hf_vit", "llama")
OPENED = [
    name if name in MAIN else pytest.param(name, marks=pytest.mark.slow)
    for name, row in ZOO.items() if row.library in ("diffusers", "transformers") and row.depths
]  # fmt: skip
BOTH = {"transformer_blocks": "1:2", "single_transformer_blocks": "2:4"}


def pattern_of(name, model, stacks):
    if name == "flux":
        return BOTH
    depths = {path: len(get_stack(model, path)) for path in stacks}
    return {path: "1:2" if depth % 2 == 0 else f"1:{depth}" for path, depth in depths.items()}


def output(model, call, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return sample_of(model.eval()(*call[0], **call[1]))


# -- what it leaves ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPENED)
def test_plain_from_pretrained_opens_what_fit_left(name, tmp_path):
    row = ZOO[name]
    model, make_inputs, stacks = row.build()
    dense = copy.deepcopy(model)
    callback = DepthPruningCallback(pattern_of(name, model, stacks), save_dir=tmp_path / "shallow")
    fit(Fitted(model, make_inputs), callback, folder=tmp_path)
    kept = callback.decision.kept_blocks
    if name == "sd3":
        assert 3 in kept["transformer_blocks"]
    if name == "hunyuandit":
        assert {3, 4} < set(kept["blocks"]) == {7 - i for i in kept["blocks"]}
    if name == "flux":
        assert [len(kept[path]) for path in BOTH] == [2, 2]
    call = make_inputs(2)
    expected = output(callback.shallow_model, call)
    opened = of(row.library, type(model).__name__).from_pretrained(tmp_path / "shallow")
    if name == "dit":  # the builder of the zoo turned label dropout off
        for block in opened.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    torch.testing.assert_close(output(opened, call), expected, rtol=0, atol=0)
    # The kept blocks have the weights that they had before the fit.
    for path, blocks in kept.items():
        for new, old in enumerate(blocks):
            pairs = zip(
                get_stack(opened, path)[new].parameters(),
                get_stack(dense, path)[old].parameters(),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["vit", "swin", "encoder_batch_first", "encoder_sequence_first"])
def test_models_without_a_config_load_into_a_dense_one(name, tmp_path):
    model, make_inputs, stacks = ZOO[name].build()
    callback = DepthPruningCallback(
        "1:2", stacks=[f"transformer.{path}" for path in stacks], save_dir=tmp_path / "shallow"
    )
    fit(Fitted(model, make_inputs), callback, folder=tmp_path)
    loaded = load_shallow(tmp_path / "shallow", model=ZOO[name].build().model)
    call = make_inputs(2)
    torch.testing.assert_close(
        output(loaded, call), output(callback.shallow_model, call), rtol=0, atol=0
    )
    assert all(
        len(get_stack(loaded, path)) == len(kept)
        for path, kept in callback.decision.kept_blocks.items()
    )


def test_a_language_models_cache_is_off_only_while_it_is_gated(tmp_path):
    model, make_inputs, _ = ZOO["llama"].build()
    module, callback = (
        Fitted(model, lambda b: ((), {"input_ids": make_inputs(b)[1]["input_ids"]})),
        DepthPruningCallback("1:2"),
    )
    assert model.config.use_cache is True  # the default, which the training step does not touch
    fit(module, callback, folder=tmp_path)
    assert (
        module.transformer.config.use_cache is False
        and callback.shallow_model.config.use_cache is True
    )
    assert not any(
        plan.plain_because
        for gated in callback.gates.gated_forwards
        for plan in gated.plans.values()
    )
    callback.detach(module)
    assert module.transformer.config.use_cache is True


@pytest.mark.parametrize("nested", [False, True])
def test_a_longer_frozen_text_encoder_is_left_alone(nested, tmp_path):
    text = ZOO["bert"].build(num_hidden_layers=6).model.requires_grad_(False)
    before = copy.deepcopy(text.state_dict())
    model, make_inputs, _ = ZOO["pixart"].build()

    class WithText(Fitted):
        def training_step(self, batch, batch_idx):
            parts = self.pipe if nested else self
            hidden = parts.text_encoder(input_ids=torch.randint(0, 50, (3, 7))).last_hidden_state[
                ..., :12
            ]
            args, kwargs = self.make_inputs(3)
            return (
                sample_of(parts.transformer(*args, **{**kwargs, "encoder_hidden_states": hidden}))
                .square()
                .mean()
            )

    module = WithText(model, make_inputs)
    if nested:
        del module.transformer
        module.pipe = nn.Module()
        module.pipe.transformer, module.pipe.text_encoder = model, text
    else:
        module.text_encoder = text
    callback = DepthPruningCallback("1:2", save_dir=tmp_path / "shallow")
    fit(module, callback, folder=tmp_path)
    assert list(callback.decision.kept_blocks) == ["transformer_blocks"]
    assert before.keys() == text.state_dict().keys() and len(list(text.parameters())) == len(before)
    assert all(torch.equal(before[key], value) for key, value in text.state_dict().items())
    assert not any(p.requires_grad for p in text.parameters())
    opened = type(model).from_pretrained(tmp_path / "shallow")
    torch.testing.assert_close(
        output(opened, call := make_inputs(2)), output(callback.shallow_model, call), rtol=0, atol=0
    )


# -- what it refuses -----------------------------------------------------------------------------
COUPLINGS = {
    "sd3_controlnet": ("transformer_blocks", "block_controlnet_hidden_states"),
    "flux_controlnet": ("transformer_blocks", "controlnet_block_samples"),
    "sana_controlnet": ("transformer_blocks", "controlnet_block_samples"),
    "chroma": ("transformer_blocks", "temb"),
    "vit_rope_mixed": ("blocks", "rope"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_blocks_tied_to_their_place_are_refused_at_the_first_call(name, tmp_path):
    model, make_inputs, stacks = COUPLED[name]()
    stack, source = COUPLINGS[name]
    module = Fitted(model, make_inputs)
    callback = DepthPruningCallback("1:2", stacks=[f"transformer.{path}" for path in stacks])
    with pytest.raises(ValueError, match="cannot be pruned as it is called") as refused:
        fit(module, callback, folder=tmp_path)
    said = str(refused.value)
    assert f"Stack '{stack}'" in said and "with block " in said, "stack and block are named"
    assert f"'{source}'" in said, "the input or argument that couples them is named"
    assert "leave out the input" in said and "verify=False" in said, "and what to do"
    assert module.trainer.global_step == 0 and not (tmp_path / "shallow").exists()


def test_without_verification_a_tied_model_is_fitted(tmp_path):
    model, make_inputs, _ = COUPLED["vit_rope_mixed"]()
    callback = DepthPruningCallback("1:2", verify=False)
    fit(Fitted(model, make_inputs), callback, folder=tmp_path)
    assert len(callback.decision.kept_blocks["blocks"]) == 2


def test_more_vace_layers_than_a_group_keeps_are_refused(tmp_path):
    model, make_inputs, _ = ZOO["wan_vace"].build(num_layers=4, vace_layers=[0, 1])
    module = Fitted(model, make_inputs)
    with pytest.raises(ValueError, match="keeps 1 of the units 0..1.*have to stay"):
        fit(module, DepthPruningCallback("1:2"), folder=tmp_path)
    assert module.trainer.global_step == 0 and all(
        "lora" not in name for name, _ in module.named_parameters()
    )


@pytest.mark.parametrize("name", ["swin", "unet2d"])
def test_an_ambiguous_model_is_refused_with_paths_to_copy(name, tmp_path):
    model, make_inputs, stacks = ZOO[name].build()
    with pytest.raises(ValueError, match="ambiguous") as refused:
        fit(Fitted(model, make_inputs), DepthPruningCallback("1:2"), folder=tmp_path)
    paths = [f"transformer.{path}" for path in stacks]
    assert all(f"'{path}'" in str(refused.value) for path in paths)
    DepthPruningCallback("1:2", stacks=paths).check(Fitted(model, make_inputs))


def test_two_models_that_train_are_refused_with_both(tmp_path):
    module = Fitted(Toy(4), None)
    module.other = Toy(6)
    with pytest.raises(ValueError, match="'transformer.blocks' .*'other.blocks'"):
        fit(module, DepthPruningCallback("1:2"), folder=tmp_path)
