"""Mask learning (TinyFusion, sections 3.2 and 3.3): gates learn which blocks to keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import Teacher
from tinyfusion_pl.modules.denoising import Denoising, get_blocks
from tinyfusion_pl.pruning import find_gates


class MaskLearning(Denoising):
    """Trains a denoiser with gates on its blocks, which `DepthPruningCallback` adds.

    The loss is the objective's own (published). With the callback's ``search_loss="teacher"`` it is
    the objective's distillation loss, "loss_kd", between the gated denoiser and the original
    weights on the same x_t, t and labels.

    See `Denoising` for the arguments. Published: AdamW, learning rate 1e-4, no weight decay.
    """

    _teacher: Teacher | None = None

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Use the output of `teacher` as the target from now on; None uses the data.

        Args:
            teacher: The dense denoiser with its original weights. It is frozen, set to evaluation
                mode and kept out of checkpoints.
        """
        self._teacher = None if teacher is None else Teacher(teacher)

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of the denoiser and, with a teacher, of the teacher."""
        yield from super().blocks()
        if self._teacher is not None:
            yield from get_blocks(self._teacher.model)

    def get_ready(self) -> None:
        """Check that the denoiser has gates, and move the teacher to the device."""
        if find_gates(self.denoiser) is None:
            raise ValueError(
                "The denoiser has no gates, so there is no mask to learn. Add "
                "DepthPruningCallback(pattern) to the Trainer's callbacks."
            )
        if self._teacher is not None:
            self._teacher.wake(self.device)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Per-sample losses (N,) against the data or the teacher."""
        if self._teacher is None:
            return super().losses(x, y)
        draw = self.objective.draw(x)
        output = self.denoiser(draw.x_t, draw.t, y)
        with torch.no_grad():
            target = self._teacher.model(draw.x_t, draw.t, y)
        distance = self.objective.distillation_losses(output, target, draw)["loss_kd"]
        return {"loss": distance, "loss_kd": distance}
