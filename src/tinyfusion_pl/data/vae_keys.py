"""Names of an autoencoder's weights into those of diffusers' AutoencoderKL: the CompVis layout (latent diffusion, and MAR's kl16.ckpt), and
the names that diffusers' attention layers had first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinyfusion_pl.models.prefixes import plain_names, prefixes_with, under_prefix

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(\d+|conv)\.(.+)"
)
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|block_2|attn_1)\.(.+)")
# As diffusers named them up to version 0.16.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(.+\.attentions\.\d+)\.({'|'.join(_OLDER)})\.(weight|bias)")
# Layers that an autoencoder of either layout has, and no other part of a model that contains one.
MARKS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")


def without_prefix(state: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The autoencoder in `state`, which may be under a prefix beside other models (``first_stage_model.`` in latent diffusion).

    Raises:
        ValueError: when there are two.
    """
    plain = plain_names(state)
    alone = prefixes_with(plain, MARKS) == [""] and plain.keys() == state.keys()
    return dict(state) if alone else under_prefix(state, MARKS, where)


def as_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names of today, from any of the layouts above. ValueError for an older name beside its newer one."""
    if is_compvis(state):
        return compvis_to_diffusers(state)
    renamed = {}
    for key, tensor in state.items():
        if found := _OLD_NAME.fullmatch(key):
            key = f"{found[1]}.{_OLDER[found[2]]}.{found[3]}"
            if key in state:
                raise ValueError(
                    f"The weights name {key} twice, also as {found[0]}. Leave one of them."
                )
        renamed[key] = _linear(key, tensor)
    return renamed


def _linear(key: str, tensor: Tensor) -> Tensor:
    """Attention is made of 1x1 convolutions (C, C, 1, 1) in older layouts and of linear layers (C, C) in diffusers."""
    return (
        tensor.flatten(1)
        if "attentions." in key and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        else tensor
    )


def is_compvis(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are CompVis's."""
    return any(key.startswith(("encoder.down.", "decoder.up.")) for key in state)


def compvis_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names; those of the training loss (``loss.``) are left out.

    The decoder's levels are numbered from the image inward in one layout and outward in the other.
    """
    num_levels = 1 + max(
        (int(found[2]) for key in state if (found := _LEVEL.fullmatch(key))), default=0
    )
    renamed = {}
    for key, tensor in state.items():
        if key.startswith("loss."):
            continue
        new = _renamed(key, num_levels)
        renamed[new] = _linear(new, tensor)
    return renamed


def _renamed(key: str, num_levels: int) -> str:
    if found := _LEVEL.fullmatch(key):
        side, level, kind, number, rest = found.groups()
        number_of_level = int(level) if side == "encoder.down" else num_levels - 1 - int(level)
        prefix = f"{side}_blocks.{number_of_level}"
        if kind in ("downsample", "upsample"):
            return f"{prefix}.{kind}rs.0.conv.{rest}"
        return (
            f"{prefix}.{_attention(number, rest)}"
            if kind == "attn"
            else f"{prefix}.{_resnet(number, rest)}"
        )
    if found := _MIDDLE.fullmatch(key):
        side, kind, rest = found.groups()
        return f"{side}.mid_block.{_attention('0', rest) if kind == 'attn_1' else _resnet(str(int(kind[-1]) - 1), rest)}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def _resnet(number: str, rest: str) -> str:
    return f"resnets.{number}.{rest.replace('nin_shortcut', 'conv_shortcut')}"


def _attention(number: str, rest: str) -> str:
    layer, _, parameter = rest.partition(".")
    return f"attentions.{number}.{_ATTENTION.get(layer, layer)}.{parameter}"
