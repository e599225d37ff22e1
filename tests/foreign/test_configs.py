"""The shallow model of another library is the one that the library builds from its config."""

import copy

import pytest
import torch
from torch import nn

from foreign.zoo import ZOO, of, randomize, sample_of
from tinyfusion_pl.pruning import Pattern, get_stack, remove_blocks
from tinyfusion_pl.pruning.blocks import get_units
from tinyfusion_pl.pruning.library_configs import check_library_config, fixed_blocks
from tinyfusion_pl.pruning.surgery import blocks_removed

STATING = [
    name for name, row in ZOO.items() if row.library in ("diffusers", "transformers") and row.depths
]
BUILT = [name for name, row in ZOO.items() if row.depths]
SETTINGS = dict(rtol=0, atol=0)


def renamed(state, kept_blocks):
    """The shallow model's state dict out of the dense one's, written without the product."""
    new = {}
    for key, value in state.items():
        for path, kept in kept_blocks.items():
            if key.startswith(f"{path}."):
                index, rest = key.removeprefix(f"{path}.").split(".", 1)
                key = f"{path}.{kept.index(int(index))}.{rest}" if int(index) in kept else None
                break
        if key is not None:
            new[key] = value
    return new


@pytest.mark.parametrize("name", BUILT)
def test_the_cut_model_is_what_the_library_builds(name):
    row = ZOO[name]
    model, make_inputs, stacks = row.build()
    kept = row.kept_blocks(stacks)
    expected = row.build(**row.shallow(kept)).model
    expected.load_state_dict(renamed(model.state_dict(), kept))
    before = sample_of(model(*(call := make_inputs(2))[0], **call[1]))
    remove_blocks(model, kept)
    output = sample_of(model(*call[0], **call[1]))
    torch.testing.assert_close(output, sample_of(expected(*call[0], **call[1])), **SETTINGS)
    assert not torch.allclose(output, before, atol=1e-3)
    if name in STATING:
        read = dict(model.config) if row.library == "diffusers" else model.config.to_dict()
        assert {key: read[key] for key in row.shallow(kept)} == row.shallow(kept)


@pytest.mark.parametrize("name", STATING)
def test_the_check_changes_nothing_and_accepts(name):
    row = ZOO[name]
    model, _, stacks = row.build()
    config, state = (
        copy.deepcopy(dict(model.config) if row.library == "diffusers" else model.config.to_dict()),
        model.state_dict(),
    )
    assert check_library_config(model, row.kept_blocks(stacks)) is None
    assert (dict(model.config) if row.library == "diffusers" else model.config.to_dict()) == config
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["sd35", "flux", "llama", "encoder_batch_first", "vit"])
def test_blocks_come_back_after_a_trial(name):
    row = ZOO[name]
    model, make_inputs, stacks = row.build()
    args, kwargs = make_inputs(2)
    before, keys = sample_of(model(*args, **kwargs)), list(model.state_dict())
    config = (
        copy.deepcopy(model.config.to_dict())
        if name == "llama"
        else dict(getattr(model, "config", {}))
    )
    kept = row.kept_blocks(stacks)
    cut = sample_of(remove_blocks(copy.deepcopy(model), kept)(*args, **kwargs))
    with pytest.raises(RuntimeError, match="inside"):
        with blocks_removed(model, kept):
            assert [len(get_stack(model, path)) for path in stacks] == [
                len(blocks) for blocks in kept.values()
            ]
            torch.testing.assert_close(sample_of(model(*args, **kwargs)), cut, **SETTINGS)
            raise RuntimeError("inside")
    torch.testing.assert_close(sample_of(model(*args, **kwargs)), before, **SETTINGS)
    assert list(model.state_dict()) == keys
    assert (
        model.config.to_dict() if name == "llama" else dict(getattr(model, "config", {}))
    ) == config


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("sd3", {3}),
        ("sd35", {3}),
        ("hunyuandit", {3, 4}),
        ("wan_vace", {0, 3}),
        ("dit", set()),
        ("llama", set()),
        ("vit", set()),
    ],
)
def test_blocks_that_have_to_stay_are_known(name, fixed):
    model, _, (path,) = ZOO[name].build()
    assert fixed_blocks(model, path) == fixed
    if fixed:
        drops = [
            i for i in range(len(get_stack(model, path))) if i not in {min(fixed), 7 - min(fixed)}
        ]
        for refuse in (remove_blocks, check_library_config):
            with pytest.raises(ValueError, match="must stay"):
                refuse(model, {path: drops})


def test_mirrored_blocks_of_hunyuandit_go_together():
    model = ZOO["hunyuandit"].build().model
    assert get_units(model, "blocks") == ((0, 7), (1, 6), (2, 5), (3, 4))
    with pytest.raises(ValueError, match="only go together"):
        remove_blocks(model, {"blocks": [0, 3, 4, 6]})


def test_candidates_never_drop_a_fixed_unit():
    group = Pattern.parse("2:4").groups(8)[1]
    assert group.candidates(fixed=[7]).tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert len(group.candidates()) == len(group.candidates(fixed=[0])) == 6
    with pytest.raises(ValueError, match="keeps 2 of the units 4..7.*4, 5, 6 have to stay"):
        group.candidates(fixed=[4, 5, 6])


def test_a_width_equal_to_the_depth_stays():
    model = ZOO["llama"].build(hidden_size=16, num_hidden_layers=16, vocab_size=16).model
    remove_blocks(model, {"model.layers": [0, 3]})
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 16)


def test_layer_types_and_indices_follow_the_blocks():
    config = of("transformers", "Gemma2Config")(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=50,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        sliding_window=3,
    )
    model = randomize(of("transformers", "Gemma2Model")(config))
    remove_blocks(model, {"layers": [1, 3]})
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1]


def test_the_depth_of_a_nested_config_is_set():
    text, vision = (
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
        }
        for _ in range(2)
    )
    config = of("transformers", "CLIPConfig")(
        text_config={**text, "vocab_size": 50},
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = of("transformers", "CLIPModel")(config)
    path = next(
        name
        for name, m in model.named_modules()
        if name.startswith("vision_model") and isinstance(m, nn.ModuleList)
    )
    remove_blocks(model, {path: [1, 2]})
    assert (
        model.config.vision_config.num_hidden_layers,
        model.config.text_config.num_hidden_layers,
    ) == (2, 4)


def test_a_model_in_a_module_keeps_its_own_config_true():
    module = nn.Module()
    module.transformer = ZOO["flux"].build().model
    remove_blocks(module, {"transformer.transformer_blocks": [1]})
    assert (module.transformer.config.num_layers, module.transformer.config.num_single_layers) == (
        1,
        4,
    )


@pytest.mark.parametrize("name", ["unet2d", "vit", "encoder_batch_first"])
def test_what_cannot_state_its_depth_says_so(name):
    row = ZOO[name]
    model, make_inputs, stacks = row.build()
    kept = row.kept_blocks(stacks)
    sentence = check_library_config(model, kept)
    assert "state its depth" in sentence and "saved as a state dict" in sentence
    args, kwargs = make_inputs(2)
    remove_blocks(model, kept)(*args, **kwargs)


def test_counting_attributes_follow():
    encoder = ZOO["encoder_batch_first"].build().model
    assert remove_blocks(encoder, {"layers": [0, 2]}).num_layers == 2
    vit = remove_blocks(ZOO["vit"].build().model, {"blocks": [0, 3]})
    assert [info["module"] for info in vit.feature_info] == ["blocks.0", "blocks.1"]


def test_adapters_do_not_hide_the_config():
    from peft import LoraConfig, inject_adapter_in_model

    model = ZOO["sd3"].build().model
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    assert check_library_config(model, {"transformer_blocks": [0, 3]}) is None
    remove_blocks(model, {"transformer_blocks": [0, 3]})
    assert model.config.num_layers == 2
