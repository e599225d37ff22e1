"""Mask learning (TinyFusion, sections 3.2 and 3.3): the denoiser trains while its gates learn which blocks matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import Teacher
from tinyfusion_pl.modules.denoising import Denoising, get_blocks
from tinyfusion_pl.pruning import find_gates


class MaskLearning(Denoising):
    """Trains a denoiser whose blocks carry gates; the gates come from `DepthPruningCallback` in the Trainer.

    The loss is the objective's on the data (published). With the callback's ``search_loss="teacher"``
    it is the objective's distance of the gated denoiser's output to that of the original weights, its
    "loss_kd", on the same x_t, t and labels.

    See `Denoising` for the arguments. Published: AdamW 1e-4 without weight decay.
    """

    _teacher: Teacher | None = None

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Have the output of `teacher` as the target from now on; None: the data.

        Args:
            teacher: The dense denoiser with its original weights; it is frozen, put into evaluation
                mode, and in no checkpoint.
        """
        self._teacher = None if teacher is None else Teacher(teacher)

    def blocks(self) -> Iterator[nn.Module]:
        yield from super().blocks()
        if self._teacher is not None:
            yield from get_blocks(self._teacher.model)

    def get_ready(self) -> None:
        if find_gates(self.denoiser) is None:
            raise ValueError(
                "The denoiser carries no gates, so there is no mask to learn. Add DepthPruningCallback(pattern) to the "
                "Trainer's callbacks."
            )
        if self._teacher is not None:
            self._teacher.wake(self.device)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self._teacher is None:
            return super().losses(x, y)
        draw = self.objective.draw(x)
        output = self.denoiser(draw.x_t, draw.t, y)
        with torch.no_grad():
            target = self._teacher.model(draw.x_t, draw.t, y)
        distance = self.objective.distillation_losses(output, target, draw)["loss_kd"]
        return {"loss": distance, "loss_kd": distance}
