"""DiT weights in the published layout and in that of diffusers' ``DiTTransformer2DModel``.

Both models compute the same function, except for what diffusers fixes: its timestep frequencies
have a shift of 1 (`DiT`'s ``frequency_shift``), every block has its own copy of the timestep and
label embedders, the position embedding is computed instead of stored, and the MLP ratio is 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.dit.model import sincos_position_embedding

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is diffusers' former name
SIGNS = ("transformer_blocks.0.norm1.linear.weight", "proj_out_1.weight")
DEFAULT_NORM_EPS = 1e-5  # diffusers' default, for configs without the entry
# Settings that diffusers has and DiT fixes.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
# Entries of the config that must be counts.
COUNTS = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
MAX_GRID = 512  # patches per side; the position embedding is computed, so no tensor bounds it

# Published module -> diffusers' module; each has a weight and a bias.
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
KINDS = ("weight", "bias")


def dit_arguments(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of `DiT` for diffusers' config, which was read from `folder`.

    Raises:
        ArtifactError: An entry is missing or invalid.
        ValueError: The config describes a model that DiT cannot represent.
    """
    file = folder / "config.json"
    if wrong := {
        key: config[key] for key, value in FIXED.items() if config.get(key, value) != value
    }:
        raise ValueError(
            f"{folder} does not hold a supported DiT: it has "
            f"{', '.join(f'{k}={v!r:.80}' for k, v in wrong.items())}; only "
            f"{', '.join(f'{k}={FIXED[k]!r}' for k in wrong)} is supported."
        )
    if config.get("dropout"):
        raise ValueError(
            f"{folder} was trained with dropout={config['dropout']!r:.80} inside its blocks, which "
            "DiT does not have. To sample or prune only, set it to 0 in config.json: sampling does "
            "not use it."
        )
    if invalid := [
        key for key in COUNTS if type(config.get(key)) is not int or not 1 <= config[key] < 2**31
    ]:
        raise ArtifactError(
            f"{file} lacks {', '.join(invalid)}, or has no positive integer there; a DiT is built "
            "from them. Copy the folder again."
        )
    if config["sample_size"] // config["patch_size"] > MAX_GRID:
        raise ArtifactError(
            f"{file} has sample_size={config['sample_size']}; at most {MAX_GRID} patches per side "
            "are supported."
        )
    if type(eps := config.get("norm_eps", DEFAULT_NORM_EPS)) not in (int, float) or not 0 < eps < 1:
        raise ArtifactError(
            f"{file} has norm_eps={eps!r:.80}; expected a small positive number. Copy the folder "
            "again."
        )
    in_channels, num_heads = config["in_channels"], config["num_attention_heads"]
    out_channels = config.get("out_channels") or in_channels
    if type(out_channels) is not int or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"{folder} has out_channels={out_channels!r:.80} for in_channels={in_channels}; DiT "
            "predicts as many channels or twice as many."
        )
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": in_channels,
        "hidden_size": num_heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": num_heads,
        "mlp_ratio": 4.0,
        "num_classes": config["num_embeds_ada_norm"],
        "class_dropout_prob": 0.1,
        "learn_sigma": out_channels == 2 * in_channels,
        "frequency_shift": 1,
        "norm2_eps": eps,
    }


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' ``config.json`` for the arguments of a `DiT`.

    Raises:
        ValueError: diffusers' model does not support them.
    """
    if not config["class_dropout_prob"] > 0:
        raise ValueError(
            "diffusers' DiT always has a null label, and this model has none "
            "(class_dropout_prob=0). Export it as 'published' or 'safetensors'."
        )
    if int(config["hidden_size"] * config["mlp_ratio"]) != 4 * config["hidden_size"]:
        raise ValueError(
            f"diffusers' DiT has mlp_ratio 4, this model has {config['mlp_ratio']}. Export it as "
            "'published' or 'safetensors'."
        )
    return {
        "_class_name": CLASSES[0],
        **FIXED,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "upcast_attention": False,
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"] * (2 if config["learn_sigma"] else 1),
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "norm_eps": config["norm2_eps"],
    }


def convert(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], where: Path
) -> dict[str, Tensor]:
    """Published layout of diffusers' `state`.

    Raises:
        ArtifactError: Keys are missing or unexpected.
        ValueError: The blocks' copies of the embedders differ, as after fine-tuning in diffusers.
    """
    state, depth = dict(state), arguments["depth"]
    state.pop("pos_embed.pos_embed", None)  # some versions store what they compute
    found: dict[str, Tensor] = {}
    try:
        for ours, theirs in OUTER.items():
            for kind in KINDS:
                found[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
        for ours, theirs in EMBEDDERS.items():
            copies = [state.pop(f"transformer_blocks.{i}.norm1.emb.{theirs}") for i in range(depth)]
            differing = [i for i, copy in enumerate(copies) if not _equal(copy, copies[0])]
            if differing:
                raise ValueError(
                    f"{where} does not hold a supported DiT: the embedders of blocks 0 and "
                    f"{differing[0]} differ ({theirs}), as after fine-tuning in diffusers, where "
                    "each block has its own. DiT shares one. Fine-tune with this package instead."
                )
            found[ours] = copies[0]
        for i in range(depth):
            for kind in KINDS:
                for ours, theirs in BLOCK.items():
                    found[f"blocks.{i}.{ours}.{kind}"] = state.pop(
                        f"transformer_blocks.{i}.{theirs}.{kind}"
                    )
                thirds = [state.pop(f"transformer_blocks.{i}.{part}.{kind}") for part in QKV]
                if len({(each.shape, each.dtype) for each in thirds}) > 1 or not thirds[0].ndim:
                    raise ArtifactError(
                        f"{where} holds queries, keys and values of block {i} ({kind}) in "
                        "different shapes: "
                        f"{', '.join(str(tuple(each.shape)) for each in thirds)}. Copy the folder "
                        "again."
                    )
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(thirds)
    except KeyError as error:
        raise ArtifactError(
            f"{where} lacks {error.args[0]}, which its config.json requires ({depth} blocks). Copy "
            "the folder again."
        ) from error
    if state:
        raise ArtifactError(
            f"{where} holds keys that DiT does not have: {', '.join(list(state)[:5])}. Its "
            f"config.json states {depth} blocks."
        )
    # A wrong width raises later; until then it must not allocate memory.
    fits = found["x_embedder.proj.bias"].shape == (arguments["hidden_size"],)
    with torch.device("cpu" if fits else "meta"):
        found["pos_embed"] = _position_embedding(arguments)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Diffusers' layout of the `state` of a DiT with arguments `config`.

    Raises:
        ValueError: The position embedding is not the one that diffusers computes.
    """
    if not torch.allclose(state["pos_embed"].float().cpu(), _position_embedding(config), atol=1e-4):
        raise ValueError(
            "This model's position embedding is not the sine-cosine one that diffusers computes. "
            "Export it as 'published' or 'safetensors'."
        )
    found = {
        f"{theirs}.{kind}": state[f"{ours}.{kind}"]
        for ours, theirs in OUTER.items()
        for kind in KINDS
    }
    for i in range(config["depth"]):
        block = f"transformer_blocks.{i}"
        found |= {f"{block}.norm1.emb.{theirs}": state[ours] for ours, theirs in EMBEDDERS.items()}
        for kind in KINDS:
            found |= {
                f"{block}.{theirs}.{kind}": state[f"blocks.{i}.{ours}.{kind}"]
                for ours, theirs in BLOCK.items()
            }
            found |= {
                f"{block}.{part}.{kind}": third
                for part, third in zip(QKV, state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3))
            }
    return found


def _position_embedding(arguments: Mapping[str, Any]) -> Tensor:
    return sincos_position_embedding(
        arguments["hidden_size"], arguments["input_size"] // arguments["patch_size"]
    )[None]  # (1, T, D)
