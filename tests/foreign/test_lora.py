"""A LoRA of the full model, renamed for the shallow one."""

import pytest

from tinyfusion_pl.pruning import Decision, StackDecision
from tinyfusion_pl.pruning.lora import remap_lora

DECISION = Decision(
    {
        "transformer_blocks": StackDecision("1:2", 4, [1, 3], []),
        "single_transformer_blocks": StackDecision("1:2", 4, [0, 2], []),
    }
)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.{}.{}.attn.to_q.lora_A.weight",
        "base_model.model.{}.{}.attn.to_q.lora_A.default.weight",
        "{}.{}.attn.to_q.lora_B.weight",
        "lora_unet_{}_{}_attn_to_q.lora_down.weight",
    ],
)
def test_kept_layers_are_renamed_and_others_listed(key):
    full = {key.format(name, i): (name, i) for name in DECISION.stacks for i in range(4)}
    renamed, dropped = remap_lora({**full, "proj_out.lora_A.weight": 0}, DECISION)
    assert renamed == {
        key.format("transformer_blocks", 0): ("transformer_blocks", 1),
        key.format("transformer_blocks", 1): ("transformer_blocks", 3),
        key.format("single_transformer_blocks", 0): ("single_transformer_blocks", 0),
        key.format("single_transformer_blocks", 1): ("single_transformer_blocks", 2),
        "proj_out.lora_A.weight": 0,
    }
    assert dropped == [
        key.format(n, i)
        for n, i in [
            ("transformer_blocks", 0),
            ("transformer_blocks", 2),
            ("single_transformer_blocks", 1),
            ("single_transformer_blocks", 3),
        ]
    ]


def test_a_lora_of_another_model_is_refused():
    with pytest.raises(ValueError, match="block 7 of 'transformer_blocks', which had 4"):
        remap_lora({"transformer_blocks.7.attn.to_q.lora_A.weight": 0}, DECISION)
    with pytest.raises(ValueError, match="No key"):
        remap_lora({"blocks.7.attn.to_q.lora_A.weight": 0}, DECISION)
