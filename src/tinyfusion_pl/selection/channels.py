"""Cut a DiT's channels in all layers that share them, by torch-pruning's dependency graph.

DepGraph: Fang et al., arXiv 2301.12900. A channel's importance is torch-pruning's group Taylor
importance: the sum of |weight x gradient| over what goes with it, averaged over layers. Needs the
extra ``width``.
"""

from __future__ import annotations

import importlib.util
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.models.dit import DiT
from tinyfusion_pl.models.registry import create_model

MISSING = (
    "Pruning the width needs torch-pruning, which is not installed. Install it with the extra: "
    "pip install 'tinyfusion_pl[width]'."
)


@dataclass(frozen=True)
class Channels:
    """Channels ranked together: outputs or inputs of layer `path`, in `num_parts` equal parts."""

    path: str
    outputs: bool = True
    num_parts: int = 1

    def size(self, model: nn.Module) -> int:
        """Number of channels in `model`."""
        return model.get_submodule(self.path).weight.shape[0 if self.outputs else 1]

    def kept(self, scores: Tensor, num_kept: int) -> list[int]:
        """The `num_kept` channels with the highest scores (n,), equally many in each part.

        Ties keep the first.
        """
        parts = scores.view(self.num_parts, -1)
        ranked = parts.argsort(dim=1, descending=True, stable=True)[:, : num_kept // self.num_parts]
        starts = torch.arange(self.num_parts)[:, None] * parts.shape[1]
        return (ranked.cpu() + starts).flatten().sort().values.tolist()


def get_channels(model: DiT) -> Iterator[Channels]:
    """All channels whose number follows `hidden_size`.

    Those of hidden states and conditioning, and of each MLP and head.
    """
    yield Channels("x_embedder.proj")
    yield Channels("t_embedder.mlp.2")
    yield Channels("t_embedder.mlp.0")
    for i, block in enumerate(model.blocks):
        yield Channels(f"blocks.{i}.attn.proj", False, block.attn.num_heads)
        yield Channels(f"blocks.{i}.mlp.fc1")


def check_narrowable(model: nn.Module) -> None:
    """`ValueError` for a model whose channels cannot be cut; names those that can."""
    if not isinstance(model, DiT) or not hasattr(model, "model_name"):
        raise ValueError(
            f"The width of a {type(model).__name__} cannot be pruned, only that of a DiT or a SiT "
            "that create_model or load_pretrained made. Depth can be: pruning=learned, shortgpt "
            "or another one of docs/selection.md."
        )


def is_installed() -> bool:
    """Whether torch-pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def count_params(model: DiT, *, depth: int, hidden_size: int | None = None) -> int:
    """Parameters of such a model with other sizes, counted without memory."""
    sizes = {
        **model.config,
        "depth": depth,
        "hidden_size": hidden_size or model.config["hidden_size"],
    }
    return _count(model.model_name, *sizes.items())


@cache
def _count(name: str, *arguments: tuple[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **dict(arguments)).parameters())


def width_for(model: DiT, num_params: float, *, depth: int) -> int:
    """The smaller `hidden_size` closest to `num_params` parameters with `depth` blocks.

    There are as many heads as before, and the MLP is as many times as wide: heads and MLPs get
    narrower alike. So the size is a multiple of the number of heads, and of 4.

    Raises:
        ValueError: the model has fewer parameters at its full width already, or more at the least
            one.
    """
    step = math.lcm(model.config["num_heads"], 4)
    num_sizes = (model.config["hidden_size"] - 1) // step

    def count(size: int) -> int:
        return count_params(model, depth=depth, hidden_size=size)

    most, least = count_params(model, depth=depth), count(step) if num_sizes else math.inf
    if not least <= num_params < most:
        raise ValueError(
            f"removed asks for {num_params / 1e6:.4g}M parameters, but with {depth} blocks the "
            f"model has {most / 1e6:.4g}M at its full "
            + (
                f"width and {least / 1e6:.4g}M at the least ({step}). "
                if num_sizes
                else f"width, the least for {step // 4 * 4} channels. "
            )
            + ("Keep more blocks, or remove more." if num_params >= most else "Remove less.")
        )
    below = bisect_right(range(1, num_sizes + 1), num_params, key=lambda i: count(i * step))
    return min(
        (i * step for i in (below, below + 1) if i <= num_sizes),
        key=lambda size: abs(count(size) - num_params),
    )


def narrowed(model: DiT, hidden_size: int, example: tuple[Tensor, ...]) -> DiT:
    """A new model of `hidden_size` with the most important channels of `model`.

    What attention computes from the channels that stay is as before: its scale, which follows the
    width of a head, is made up for in the queries. Normalisation is over fewer channels.

    Args:
        model: With gradients of all its weights. It is used up.
        hidden_size: See `width_for`.
        example: A call of the model, for tracing.
    """
    import torch_pruning

    config = {**model.config, "hidden_size": hidden_size}
    with torch.device("meta"):
        outline = create_model(model.model_name, **config)
    channels = list(get_channels(model))
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=example, unwrapped_parameters=[(model.pos_embed, 2)]
    )
    importance = torch_pruning.importance.GroupTaylorImportance()
    goes = []
    for each in channels:  # all are scored before the first is cut
        size = each.size(model)
        kept = each.kept(
            importance(_group(graph, model, each, list(range(size)))), each.size(outline)
        )
        goes.append(sorted(set(range(size)) - set(kept)))
    for each, gone in zip(channels, goes):
        _group(graph, model, each, gone).prune()
    narrow = create_model(model.model_name, **config)
    narrow.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block, before in zip(narrow.blocks, model.blocks):
            num_queries = block.attn.proj.in_features
            ratio = math.sqrt(
                block.attn.head_dim / before.attn.head_dim
            )  # torch-pruning leaves the head_dim that was
            block.attn.qkv.weight[:num_queries] *= ratio
            block.attn.qkv.bias[:num_queries] *= ratio
    return narrow.to(next(model.parameters()))


def _group(graph: Any, model: nn.Module, channels: Channels, indices: list[int]) -> Any:
    """torch-pruning's group of all that goes with these channels."""
    layer = model.get_submodule(channels.path)
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(
        layer, pruner.prune_out_channels if channels.outputs else pruner.prune_in_channels, indices
    )
