"""Representation distillation and its mask (TinyFusion, section 3.4, "masked knowledge distillation").

Hidden states of trained diffusion transformers hold a few massive activations; matching them drowns the rest. The masked loss leaves out
what lies k standard deviations or more from the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning import get_stack

FEATURE_MASKS = ("reference", "joint", "none")


def check_feature_mask(mask: str, num_sigma: float) -> None:
    """Raise a ValueError for an unknown kind of mask or a width that is not positive."""
    if mask not in FEATURE_MASKS:
        raise ValueError(f"The feature mask is {mask!r}; give one of {', '.join(map(repr, FEATURE_MASKS))}.")
    if not num_sigma > 0:
        raise ValueError(f"num_sigma is {num_sigma}; give a number > 0 (published: 2).")


def within_sigma(hidden: Tensor, num_sigma: float) -> Tensor:
    """True where |x - mean| < num_sigma * sigma; mean and unbiased sigma of each sample over tokens and channels. (N, ...) -> bool."""
    axes = tuple(range(1, hidden.ndim))
    sigma, mean = torch.std_mean(hidden.detach().float(), dim=axes, keepdim=True)
    return (hidden.detach() - mean).abs() < num_sigma * sigma


def feature_loss(student: Tensor, teacher: Tensor, *, mask: str = "reference", num_sigma: float = 2.0) -> Tensor:
    """Mean square of the masked difference of two hidden states, per sample.

    Args:
        student, teacher: Hidden states of equal shape (N, T, D).
        mask: ``"reference"``: each side is zeroed by its own mask, so that where only one is masked the other still counts (what the
            published code does); ``"joint"``: a position masked on either side counts on neither (what the paper says); ``"none"``.
        num_sigma: Half width of the band that stays, in standard deviations, > 0.

    Returns:
        (N,): the mean over all positions, masked ones counted as zero.

    Raises:
        ValueError: for unequal shapes or an unknown mask.
    """
    check_feature_mask(mask, num_sigma)
    if student.shape != teacher.shape:
        raise ValueError(f"Hidden states of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; "
                         "representation distillation needs equal widths and token counts.")
    if mask == "none":
        difference = student - teacher
    else:
        keep_student, keep_teacher = within_sigma(student, num_sigma), within_sigma(teacher, num_sigma)
        if mask == "joint":
            keep_student = keep_teacher = keep_student & keep_teacher
        difference = student * keep_student - teacher * keep_teacher
    return difference.float().square().flatten(1).mean(1)


class HiddenStates:
    """Context manager that collects the hidden states that some blocks of a stack return while a model runs.

    A tensor for each block, or a tuple of them where its blocks carry several streams (see `hidden_streams`).

    Example::

        with HiddenStates(model, "blocks", [3, 7]) as hidden:
            model(x, t, y)
        hidden[7]  # (N, T, D)
    """

    def __init__(self, model: nn.Module, path: str, blocks: Sequence[int]) -> None:
        stack = get_stack(model, path)
        if wrong := [index for index in blocks if not 0 <= index < len(stack)]:
            raise ValueError(f"Blocks {wrong} are not in '{path}', which has blocks 0..{len(stack) - 1}.")
        self.blocks = {index: stack[index] for index in blocks}

    def __enter__(self) -> dict[int, Tensor | tuple[Tensor, ...]]:
        self.found: dict[int, Tensor | tuple[Tensor, ...]] = {}
        self.handles = [block.register_forward_hook(self._collector(index), with_kwargs=True)
                        for index, block in self.blocks.items()]
        return self.found

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def _collector(self, index: int):
        @torch._dynamo.disable
        def collect(module, args, kwargs, output):
            if torch._C._current_graph_task_id() == -1:  # not when activation checkpointing runs the block again in backward
                streams = hidden_streams(args, kwargs, output)
                self.found[index] = streams[0] if len(streams) == 1 else streams
        return collect


def hidden_streams(args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Tensor, ...]:
    """The hidden states that a block returned: of several tensors, those with the shape of one that it was given.

    A two-stream block returns (text, image); attention weights and the like are left out.
    """
    if isinstance(output, Tensor):
        return (output,)
    tensors = float_tensors(output)
    shapes = {tensor.shape for tensor in float_tensors([args, kwargs])}
    return tuple(tensor for tensor in tensors if tensor.shape in shapes) or tuple(tensors[:1])


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings (diffusers' `ModelOutput` is one), in order."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [tensor for item in tree for tensor in float_tensors(item)] if isinstance(tree, (tuple, list)) else []


def paired_feature_loss(student: Any, teacher: Any, **options: Any) -> Tensor:
    """`feature_loss` of one pair of blocks, averaged over their streams. (N,)"""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return feature_loss(student, teacher, **options)
    student, teacher = (list(s) if isinstance(s, tuple) else [s] for s in (student, teacher))
    if len(student) != len(teacher):
        raise ValueError(f"The paired blocks of student and teacher return {len(student)} and {len(teacher)} hidden states. Pair blocks "
                         "of the same class.")
    return torch.stack([feature_loss(s, t, **options) for s, t in zip(student, teacher)]).mean(0)
