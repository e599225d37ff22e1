"""A LoRA made for the full model, carried over to the shallow one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tinyfusion_pl.pruning.decision import Decision


def remap_lora(state: Mapping[str, Any], decision: Decision) -> tuple[dict[str, Any], list[str]]:
    """Rename the layers of kept blocks in a LoRA's state dict to their place in the shallow model.

    Keys of diffusers and peft (``transformer.transformer_blocks.3.attn.to_q.lora_A.weight``, any
    prefix) and of kohya's tools (``lora_unet_transformer_blocks_3_attn_to_q.lora_down.weight``) are
    known. Keys outside the pruned stacks stay.

    Args:
        state: The LoRA's state dict; it is not changed.
        decision: What was kept, e.g. ``callback.decision`` or ``load_decision(folder)``.

    Returns:
        The new state dict, and the keys of blocks that were dropped.

    Raises:
        ValueError: when no key is of a pruned stack, or a key has a block that the full model did
            not have.
    """
    patterns = [
        (
            path,
            stack,
            re.compile(rf"(?:(?<=\.)|^){re.escape(path)}\.(\d+)(?=\.)"),
            re.compile(rf"(?<=_){re.escape(path.replace('.', '_'))}_(\d+)(?=_)"),
        )
        for path, stack in sorted(decision.stacks.items(), key=lambda item: -len(item[0]))
    ]
    renamed: dict[str, Any] = {}
    dropped: list[str] = []
    touched = False
    for key, value in state.items():
        new_key: str | None = key
        for path, stack, dotted, kohya in patterns:
            match = dotted.search(key) or (kohya.search(key) if key.startswith("lora_") else None)
            if match is None or _is_longer_name(key, match, path):
                continue
            block, touched = int(match[1]), True
            if block >= stack.num_blocks:
                raise ValueError(
                    f"{key} is of block {block} of '{path}', which had {stack.num_blocks} blocks before the cut; "
                    "the LoRA was made for another model."
                )
            if block in stack.kept_blocks:
                new_key = (
                    f"{key[: match.start(1)]}{stack.kept_blocks.index(block)}{key[match.end(1) :]}"
                )
            else:
                new_key = None
            break
        if new_key is None:
            dropped.append(key)
        else:
            renamed[new_key] = value
    if not touched:
        raise ValueError(
            f"No key of the LoRA is of a pruned stack ({', '.join(decision.stacks)}); its first keys are "
            f"{list(state)[:3]}."
        )
    return renamed, dropped


def _is_longer_name(key: str, match: re.Match, path: str) -> bool:
    """Whether kohya's underscores hide a longer list name: single_transformer_blocks ends in transformer_blocks."""
    before = key[: match.start()]
    return before.startswith("lora_") and before not in (
        "lora_unet_",
        "lora_transformer_",
        "lora_te_",
    )
