"""Started by test_evaluate.py with a number of processes and a folder: a real evaluation under DDP, one process with less to do."""

import sys
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer

from tasks.test_evaluate import evaluate, inputs
from tinyfusion_pl.tasks import RunFolder

if __name__ == "__main__":
    num, folder = int(sys.argv[1]), Path(sys.argv[2])
    trainer = partial(Trainer, accelerator="cpu", devices=num, strategy="ddp", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    evaluate(trainer=trainer, batch_size=4, write_npz=True).run(RunFolder(folder), inputs())
