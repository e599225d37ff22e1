"""Inception score (Salimans et al. 1606.03498, section 4) as the ADM evaluator takes it: over consecutive blocks of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inception_score(logits: Any, block_size: int = 5000) -> Tensor:
    """Exp E KL(p(y|x) || p(y)) of each block of `block_size` consecutive samples, averaged over the blocks (float64, 1 to num_classes).

    The last block may be smaller. Published figures use bias-free logits of InceptionV3, 50,000 samples and blocks of 5000.

    Args:
        logits: (N, classes), N >= 1, in the order of the samples; tensor or array.
        block_size: >= 1.

    Raises:
        ValueError: for another shape, and for logits that are not finite.
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; expected (N, classes) with N >= 1."
        )
    if num_wrong := int((~torch.isfinite(logits)).any(1).sum()):
        raise ValueError(f"The logits of {num_wrong} of {len(logits)} images are not finite.")
    indices = torch.arange(len(logits), device=logits.device)
    return score_of_blocks(block_sums(logits, indices, block_size))


def block_sums(logits: Tensor, indices: Tensor, block_size: int) -> Tensor:
    """What the score needs of samples `indices` (N,): a row (block, number, sum of sum p log p, sum of p ...) for each block among them.

    Rows (blocks, 3 + classes), float64; rows of the same block may be added up, whatever process or batch they come from.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; give at least 1 (published: 5000).")
    logits = logits.double()
    log_p = logits.log_softmax(1)  # (N, classes)
    p = log_p.exp()
    values = torch.cat(
        [torch.ones_like(p[:, :1]), torch.xlogy(p, p).sum(1, keepdim=True), p], 1
    )  # (N, 2 + classes)
    return add_blocks((indices // block_size).to(values.device), values)


def add_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """Rows (block, *values) with one row for each block: the sum of `values` (N, V) of the same number in `blocks` (N,)."""
    kept, row = blocks.unique(return_inverse=True)
    sums = values.new_zeros(len(kept), values.shape[1]).index_add_(0, row, values)
    return torch.cat([kept.to(values.dtype).unsqueeze(1), sums], 1)


def score_of_blocks(rows: Tensor) -> Tensor:
    """The score of rows as `block_sums` gives them, one row for each block."""
    number, negative_entropy, p = rows[:, 1], rows[:, 2] / rows[:, 1], rows[:, 3:] / rows[:, 1:2]
    assert (number > 0).all()
    return (negative_entropy - torch.xlogy(p, p).sum(1)).exp().mean()
