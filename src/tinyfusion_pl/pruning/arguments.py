"""Selecting samples out of a block's arguments: which tensors are per sample, which are shared by the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` (nested tuples, lists, dicts) with `fn` applied to its tensors."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(fn, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: map_tensors(fn, item) for key, item in tree.items()}
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of `tree`, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


class BatchAxes:
    """Knows, argument by argument, whether a block's extra tensors have the batch as their first axis.

    A size can agree with the batch by chance (16 tokens, batch of 16; an attention bias of as many heads as samples). What is seen with an
    unmistakable batch size, or to follow the batch from one size to another, is remembered for the ambiguous ones; where nothing is known
    yet, the answer is None and the caller must not split the batch.

    `announced` is shared by the blocks of a model: the first that meets an unknown axis logs it, the others need not.
    """

    def __init__(self, name: str, announced: list[str]) -> None:
        self.name, self.announced = name, announced
        self.seen: dict[int, bool] = {}
        self.sizes: dict[int, set[int]] = {}  # batch sizes with which an argument's first axis agreed

    def per_sample(self, extras: list[Tensor], hidden: Tensor) -> list[bool] | None:
        """For each of `extras` True (index it by sample) or False (shared); None when one of them cannot be told."""
        answers = [self._one(index, tensor, hidden) for index, tensor in enumerate(extras)]
        if None not in answers:
            return answers
        if not self.announced:
            shapes = [tuple(tensor.shape) for tensor, answer in zip(extras, answers) if answer is None]
            log.info(
                "Block %s: the batch axis of an argument of shape %s is unknown beside hidden states of shape %s; the plain formula "
                "m*block(x) + (1-m)*x is used, which is right but saves no time.", self.name, shapes, tuple(hidden.shape)
            )
            self.announced.append(self.name)
        return None

    def _one(self, index: int, tensor: Tensor, hidden: Tensor) -> bool | None:
        num_samples = hidden.shape[0]
        if tensor.ndim == 0 or isinstance(tensor, nn.Parameter) or (tensor.shape[0] == 1 and num_samples > 1):
            return False
        if tensor.shape[0] == num_samples:
            sizes = self.sizes.setdefault(index, set())
            sizes.add(num_samples)
            if len(sizes) > 1 or (num_samples not in (*hidden.shape[1:], *tensor.shape[1:]) and not _may_be_bias(tensor, hidden)):
                self.seen.setdefault(index, True)
        elif num_samples in tensor.shape or tensor.shape[0] % num_samples == 0:
            return None  # the batch may be another axis, or folded into the first (batch * heads)
        else:
            self.seen[index] = False
        return self.seen.get(index)


def _may_be_bias(tensor: Tensor, hidden: Tensor) -> bool:
    """Whether it looks like something between two tokens, (..., T, T): its first axis may then be heads."""
    return tensor.ndim >= 3 and (tensor.shape[-1] == tensor.shape[-2] or tensor.shape[-1] == hidden.shape[1])


def select(tree: Any, per_sample: list[bool], index: Tensor) -> Any:
    """`tree` with the per-sample tensors indexed along their first axis."""
    answers = iter(per_sample)
    return map_tensors(lambda tensor: tensor.index_select(0, index) if next(answers) else tensor, tree)


def detached_storage_key(tensor: Tensor) -> int:
    """Identifies the memory that a tensor lies in; the same for the tensor that a checkpoint hands back on recomputation."""
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


def random_state_key() -> int:
    """A hash of the CPU generator's state, which activation checkpointing restores before it recomputes."""
    return hash(torch.get_rng_state().numpy().tobytes())
