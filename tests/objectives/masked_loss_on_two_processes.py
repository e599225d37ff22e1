"""Started by test_masked_autoregression.py with a folder: two processes, DDP (gloo), on batches of other sizes, with other masks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for mar_util

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from mar_util import NO_DROPOUT, trained_like
from tinyfusion_pl.objectives import MaskedAutoregression

NUM_SAMPLES, NUM_MASKED = (2, 3), (15, 5)


def work(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.manual_seed(3)
    student, teacher = trained_like(**NO_DROPOUT), trained_like(**NO_DROPOUT, encoder_depth=3)
    batches = [
        {
            "draw": {
                "x0": torch.randn(n, 3, 4, 4),
                "order": torch.rand(n, 16).argsort(1),
                "num_masked": k,
                "t": torch.randint(1, 1000, (n, 2, k)),
                "noise": torch.randn(n, 2, k, 3),
            },
            "y": torch.arange(n) + 2,
        }
        for n, k in zip(NUM_SAMPLES, NUM_MASKED)
    ]
    if rank == 0:
        torch.save(
            {"student": student, "teacher": teacher, "batches": batches}, folder / "start.pt"
        )
    objective, batch = MaskedAutoregression(num_noised=2), batches[rank]
    draw = objective.draw(**batch["draw"])
    parallel = DistributedDataParallel(
        student
    )  # named, for it reduces gradients only while it lives
    output = parallel(draw.x_t, draw.t, batch["y"])
    with torch.no_grad():
        teacher_output = teacher(draw.x_t, draw.t, batch["y"])
    losses = (
        objective.losses(output, draw)["loss"]
        + objective.distillation_losses(output, teacher_output, draw)["loss_kd"]
    )
    losses.mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    torch.save({"loss": losses.mean().detach(), "gradients": gradients}, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that the imports are paid for once; nothing has run backward before.
    multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
