"""Loss of a model and distance to its teacher on fixed draws, without sampling."""

from __future__ import annotations

import torch
from torch import nn

from tinyfusion_pl.selection.problem import get_devices
from tinyfusion_pl.tasks.choosing import Draws
from tinyfusion_pl.tasks.folder import Inputs

SEED = 0  # the same draws for every run, whatever its own seed
BATCH_SIZE = 256


@torch.no_grad()
def closeness(
    model: nn.Module, inputs: Inputs, num_draws: int, *, device: torch.device
) -> dict[str, float]:
    """Loss and distance to the teacher's output, averaged over fixed draws of the training data.

    Returns:
        ``"calibration_loss"``, and ``"teacher_distance"``: mean squared difference of the outputs
        that distillation compares, 0 for the teacher.
    """
    model, teacher = model.to(device).eval(), inputs.teacher.to(device).eval()
    draw, loss, distance = Draws(inputs.data, inputs.objective, device), 0.0, 0.0
    with torch.random.fork_rng(get_devices(model)):
        torch.manual_seed(SEED)
        for size in [BATCH_SIZE] * (num_draws // BATCH_SIZE) + [num_draws % BATCH_SIZE] * bool(
            num_draws % BATCH_SIZE
        ):
            calibration, index = draw(size).ask(teacher), torch.arange(size)
            output = model(*calibration.args, **calibration.kwargs)
            loss += float(calibration.losses(output, index).double().sum())
            distance += float(calibration.distances(output, index).double().sum())
    return {"calibration_loss": loss / num_draws, "teacher_distance": distance / num_draws}
