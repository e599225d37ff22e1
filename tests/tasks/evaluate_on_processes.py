"""Started by test_evaluate.py with a number of processes and a folder: a real evaluation, under DDP one process with less to do.

With a third argument, the process is killed once it has kept so many batches.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer

from tasks.test_evaluate import evaluate, inputs
from tinyfusion_pl.tasks import RunFolder
from tinyfusion_pl.tasks.kept import KeptBatches


def kill_after(num_batches):
    write, seen = KeptBatches.write, []

    def killing(self, *args):
        write(self, *args)
        seen.append(None)
        if len(seen) == num_batches:
            os.kill(os.getpid(), signal.SIGKILL)

    KeptBatches.write = killing


if __name__ == "__main__":
    num, folder = int(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 3:
        kill_after(int(sys.argv[3]))
    trainer = partial(
        Trainer,
        accelerator="cpu",
        devices=num,
        strategy="ddp" if num > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    evaluate(trainer=trainer, batch_size=4, write_npz=True).run(RunFolder(folder), inputs())
