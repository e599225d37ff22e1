"""DiT weights between the published layout and that of diffusers' ``DiTTransformer2DModel``.

Both compute the same, up to what diffusers fixes: its timestep frequencies have a shift of 1 (`DiT`'s ``frequency_shift``), every block
holds a copy of the embedders of timestep and label, the position embedding is computed and not stored, and the MLP is four times as wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.models.dit import sincos_position_embedding
from tinyfusion_pl.models.families import MARKS
from tinyfusion_pl.models.weight_files import read_folder_weights

CONFIG = "config.json"
CLASSES = (
    "DiTTransformer2DModel",
    "Transformer2DModel",
)  # the second is what diffusers called it first
DEFAULT_NORM_EPS = 1e-5  # diffusers' own, for folders that state none
# What diffusers could set and a DiT has one way.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}

# Published part -> diffusers' part; "{}" is the block's number. Each stands for a weight and a bias.
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
MAX_GRID = 512  # patches a side: the position embedding is computed, so that no tensor bounds it


def is_diffusers_folder(folder: str | Path) -> bool:
    """Whether `folder` is a pipeline with a transformer, or a model of diffusers."""
    return (Path(folder) / "transformer" / CONFIG).is_file() or (Path(folder) / CONFIG).is_file()


def read_diffusers_folder(
    folder: str | Path, *, variant: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """The transformer of a pipeline folder, or of its own: state dict in the published layout, arguments of `DiT`, file of the weights.

    Args:
        variant: See `read_folder_weights`.

    Raises:
        ArtifactError: a file is missing or broken, or the folder is another model's.
        ValueError: the model is one that DiT cannot be.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        folder = folder / "transformer"
    config = read_json(folder / CONFIG)
    arguments = dit_arguments(config, folder)
    state, file = read_folder_weights(folder, variant=variant)
    if not state.keys() >= set(MARKS["diffusers' DiT"]):
        raise ArtifactError(
            f"{file} holds no DiT in diffusers' layout; it has {', '.join(list(state)[:5])}."
        )
    return from_diffusers(state, arguments, file), arguments, file


def dit_arguments(config: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Arguments of `DiT` from diffusers' ``config.json``."""
    if not isinstance(config, Mapping):
        raise ArtifactError(
            f"{Path(folder) / CONFIG} holds {type(config).__name__}, where a mapping was expected. Copy the folder again."
        )
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ArtifactError(
            f"{Path(folder) / CONFIG} is of a {name!r:.80}; a {CLASSES[0]!r} was expected. Give the folder of a DiT."
        )
    if wrong := {
        key: config[key] for key, value in FIXED.items() if config.get(key, value) != value
    }:
        raise ValueError(
            f"{folder} cannot be a DiT of this project: it has {', '.join(f'{k}={v!r:.80}' for k, v in wrong.items())}, "
            f"where only {', '.join(f'{k}={FIXED[k]!r}' for k in wrong)} is known."
        )
    if config.get("dropout"):
        raise ValueError(
            f"{folder} is trained with dropout={config['dropout']!r:.80} inside its blocks, which DiT has not. "
            "Set it to 0 in its config.json if it is only to be sampled or pruned: sampling does not use it."
        )
    needed = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "sample_size",
        "patch_size",
        "num_embeds_ada_norm",
    )
    if lacking := [
        key for key in needed if type(config.get(key)) is not int or not 1 <= config[key] < 2**31
    ]:
        raise ArtifactError(
            f"{Path(folder) / CONFIG} does not say {', '.join(lacking)}, which a DiT is built from, as a count. Copy the "
            "folder again."
        )
    if config["sample_size"] // config["patch_size"] > MAX_GRID:
        raise ArtifactError(
            f"{Path(folder) / CONFIG} has sample_size={config['sample_size']}; up to {MAX_GRID} patches a side are read."
        )
    if type(eps := config.get("norm_eps", DEFAULT_NORM_EPS)) not in (int, float) or not 0 < eps < 1:
        raise ArtifactError(
            f"{Path(folder) / CONFIG} has norm_eps={eps!r:.80}; a small positive number was expected. Copy the folder "
            "again."
        )
    in_channels, num_heads = config["in_channels"], config["num_attention_heads"]
    out_channels = config.get("out_channels") or in_channels
    if type(out_channels) is not int or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"{folder} has out_channels={out_channels!r:.80} for in_channels={in_channels}; DiT gives as many or "
            "twice as many."
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
    """Diffusers' ``config.json`` from the arguments of a `DiT`.

    Raises:
        ValueError: for what diffusers' model has not.
    """
    if not config["class_dropout_prob"] > 0:
        raise ValueError(
            "diffusers' DiT always has a label for classifier-free guidance, and this model has none (class_dropout_prob=0): "
            "it cannot be exported to diffusers. Export it as 'published' or 'safetensors'."
        )
    if int(config["hidden_size"] * config["mlp_ratio"]) != 4 * config["hidden_size"]:
        raise ValueError(
            f"diffusers' DiT has mlp_ratio 4, this model has {config['mlp_ratio']}: it cannot be exported to diffusers. "
            "Export it as 'published' or 'safetensors'."
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


def from_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], where: str | Path
) -> dict[str, Tensor]:
    """Published layout of diffusers' `state`.

    Raises:
        ArtifactError: keys are missing.
        ValueError: the blocks' copies of the embedders differ, as they do after fine-tuning in diffusers; DiT has one for all.
    """
    state, depth = dict(state), arguments["depth"]
    state.pop("pos_embed.pos_embed", None)  # some versions store what they compute
    found = {}
    try:
        for ours, theirs in OUTER.items():
            for kind in KINDS:
                found[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
        for ours, theirs in EMBEDDERS.items():
            copies = [state.pop(f"transformer_blocks.{i}.norm1.emb.{theirs}") for i in range(depth)]
            if (
                differing := next(
                    (i for i, copy in enumerate(copies) if not _equal(copy, copies[0])), None
                )
            ) is not None:
                raise ValueError(
                    f"{where} cannot be a DiT: the embedders of blocks 0 and {differing} differ ({theirs}), as after "
                    "fine-tuning in diffusers, where each block has its own; DiT has one for all. Fine-tune here instead."
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
                        f"{where} holds queries, keys and values of block {i} ({kind}) in shapes that do not go together: "
                        f"{', '.join(str(tuple(each.shape)) for each in thirds)}. Copy the folder again."
                    )
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(thirds)
    except KeyError as error:
        raise ArtifactError(
            f"{where} lacks {error.args[0]}, which its config.json asks for ({depth} blocks). "
            "Copy the folder again."
        ) from error
    if state:
        raise ArtifactError(
            f"{where} holds what DiT has not: {', '.join(list(state)[:5])}. Its config.json states {depth} blocks."
        )
    # Where the width is another than the weights have, which is refused later, none that takes memory.
    fits = (
        len(found["x_embedder.proj.bias"].shape) == 1
        and len(found["x_embedder.proj.bias"]) == arguments["hidden_size"]
    )
    with torch.device("cpu" if fits else "meta"):
        found["pos_embed"] = _position_embedding(arguments)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Diffusers' layout of a DiT's `state` with arguments `config`; each block gets a copy of the embedders.

    Raises:
        ValueError: the position embedding is not the computed one, which diffusers would put in its place.
    """
    if not torch.allclose(state["pos_embed"].float().cpu(), _position_embedding(config), atol=1e-4):
        raise ValueError(
            "This model's position embedding is not the sine-cosine one that diffusers computes in its place: it cannot be "
            "exported to diffusers. Export it as 'published' or 'safetensors'."
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
