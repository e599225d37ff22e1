"""Inception score (Salimans et al. 1606.03498, section 4) over blocks of consecutive samples.

The blocks are those of the ADM evaluator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inception_score(logits: Any, block_size: int = 5000) -> Tensor:
    """Return exp E KL(p(y|x) || p(y)), averaged over blocks of `block_size` consecutive samples.

    float64, 1 to the number of classes. The last block may be smaller. Published figures use the
    logits of InceptionV3 without bias, 50,000 samples and blocks of 5000.

    Args:
        logits: (N, classes), N >= 1, in the order of the samples; tensor or array.
        block_size: Samples per block, >= 1.

    Raises:
        ValueError: for another shape, and for logits that are not finite.
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(
            f"Expected logits of shape (N, classes) with N >= 1, got {tuple(logits.shape)}."
        )
    if num_wrong := int((~torch.isfinite(logits)).any(1).sum()):
        raise ValueError(f"The logits of {num_wrong} of {len(logits)} images are not finite.")
    indices = torch.arange(len(logits), device=logits.device)
    return score_of_blocks(block_sums(logits, indices, block_size))


def block_sums(logits: Tensor, indices: Tensor, block_size: int) -> Tensor:
    """Return a row (block, number, sum of sum p log p, sum of p ...) per block of the samples.

    Rows are (blocks, 3 + classes), float64. Rows of the same block may be added, also across
    batches and processes.

    Args:
        logits: (N, classes).
        indices: Numbers (N,) of the samples, which determine their blocks.
        block_size: Samples per block.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; give at least 1 (published: 5000).")
    logits = logits.double()
    log_p = logits.log_softmax(1)  # (N, classes)
    p = log_p.exp()
    number, negative_entropy = torch.ones_like(p[:, :1]), torch.xlogy(p, p).sum(1, keepdim=True)
    values = torch.cat([number, negative_entropy, p], 1)  # (N, 2 + classes)
    return add_blocks((indices // block_size).to(values.device), values)


def add_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """Return one row (block, *values) per block: the sum of `values` (N, V) by `blocks` (N,)."""
    kept, row = blocks.unique(return_inverse=True)
    sums = values.new_zeros(len(kept), values.shape[1]).index_add_(0, row, values)
    return torch.cat([kept.to(values.dtype).unsqueeze(1), sums], 1)


def score_of_blocks(rows: Tensor) -> Tensor:
    """Return the score of `block_sums` rows, one row per block."""
    number, negative_entropy, p = rows[:, 1], rows[:, 2] / rows[:, 1], rows[:, 3:] / rows[:, 1:2]
    assert (number > 0).all()
    return (negative_entropy - torch.xlogy(p, p).sum(1)).exp().mean()
