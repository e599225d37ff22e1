"""Base class of all families of denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinyfusion_pl.models.hub import HubMixin


class Denoiser(HubMixin, nn.Module):
    """A network called as ``denoiser(x, t, y)``.

    A family defines:

    - ``STACKS``: path of each stack of blocks -> the constructor argument that holds its depth;
    - ``config``: the constructor's arguments, from which an equal model can be built;
    - ``units(stack)``: blocks of a stack that must be kept or dropped together, if any;
    - ``out_channels``: channels of its prediction, if that has the size of the latents;
    - ``num_classes``: labels are 0 .. num_classes - 1; num_classes is the null label of
      classifier-free guidance.

    Args:
        config: See above.
        activation_checkpointing: In training, recompute each block's activations in the backward
            pass instead of keeping them: less memory, about a third more time. A fraction in (0, 1)
            does so for that share of the blocks, evenly spaced. Not part of `config`: results do
            not depend on it.

    Raises:
        ValueError: Invalid fraction.
    """

    STACKS: ClassVar[dict[str, str]] = {}
    out_channels: int | None = None

    def __init__(
        self, config: dict[str, Any], *, activation_checkpointing: bool | float = False
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes: int = config["num_classes"]
        if not 0 <= activation_checkpointing <= 1:
            raise ValueError(
                f"activation_checkpointing is {activation_checkpointing}; give true, false, or "
                "a share of the blocks."
            )
        self.activation_checkpointing, self._due = activation_checkpointing, 0.0

    @property
    def has_null_label(self) -> bool:
        """Whether the label table has a row for the null label, as dropout and guidance require."""
        return self.config.get("class_dropout_prob", 1.0) > 0

    @property
    def width(self) -> int | None:
        """Channels of the hidden states; None if they differ between blocks."""
        return self.config.get("hidden_size")

    def units(self, stack: str) -> tuple[tuple[int, ...], ...] | None:
        """Blocks of `stack` (a key of ``STACKS``) that must be kept or dropped together.

        None: each block on its own.
        """
        return None

    def run(self, block: Callable[..., Any], *args: Any) -> Any:
        """``block(*args)``, recomputing activations as `activation_checkpointing` states."""
        if (
            self.activation_checkpointing
            and self.training
            and torch.is_grad_enabled()
            and self._is_due()
        ):
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _is_due(self) -> bool:
        """Whether the next block is one of those whose activations are recomputed."""
        if self.activation_checkpointing == 1:
            return True
        self._due += self.activation_checkpointing
        due = self._due >= 1
        self._due -= due
        return due
