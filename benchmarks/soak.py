"""Run a long search in one process and measure resident memory and open files after the warm-up.

Mask learning on the digits teacher with the settings of `pruning=learned`, through `Fit` with its
logs, averaged weights and checkpoints. Memory is resident memory after a garbage collection; its
growth compares the means of the first and last ten measurements after the warm-up.

    python benchmarks/soak.py [--steps 2000] [--batch-size 128] [--every 20] [--warm-up 200]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from gated_blocks import resident
from lightning.pytorch import Callback, Trainer, seed_everything

from tinyfusion_pl import DepthPruningCallback, MaskLearning
from tinyfusion_pl.callbacks import EMAWithWarmup
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import load_pretrained
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import Fit, RunFolder, csv_logger


class Watch(Callback):
    """Measures this process every so many steps: (step, bytes, open files)."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, []

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        if trainer.global_step % self.every == 0:
            gc.collect()
            self.found.append(
                (trainer.global_step, resident("VmRSS"), len(os.listdir("/proc/self/fd")))
            )

    def __deepcopy__(self, memo: dict) -> Watch:  # `Fit` copies its callbacks
        return self


def soak(folder: Path, *, steps: int, batch_size: int, every: int) -> list[tuple[int, int, int]]:
    """Search for `steps`; returns what was measured."""
    seed_everything(0)
    watch = Watch(every)
    fit = Fit(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=5,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        ),
        callbacks={"ema": EMAWithWarmup(decay=0.99), "watch": watch},
        logger=csv_logger,
    )
    module = MaskLearning(
        load_pretrained("shipped", name="dit_digits").train(), objective=GaussianDiffusion()
    )
    pruning = DepthPruningCallback(
        "1:2", save_dir=folder / "shallow", decisions_path=folder / "learn_mask" / "decisions.jsonl"
    )
    fit.run(
        "learn_mask",
        RunFolder(folder),
        module,
        DigitsDataModule(batch_size=batch_size),
        first=[pruning],
    )
    return watch.found


def growth(found: list[tuple[int, int, int]], *, warm_up: int) -> tuple[float, int]:
    """Relative growth of memory, and files that were open at the end and not after the warm-up."""
    later = [each for each in found if each[0] > warm_up]
    count = min(10, len(later) // 2)
    first, last = (
        statistics.mean(memory for _, memory, _ in part) for part in (later[:count], later[-count:])
    )
    return last / first - 1, later[-1][2] - later[0][2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("steps", 2000), ("batch-size", 128), ("every", 20), ("warm-up", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), steps=args.steps, batch_size=args.batch_size, every=args.every)
    for step, memory, files in found[:: max(1, len(found) // 10)]:
        print(f"step {step}: {memory / 2**20:.1f} MiB, {files} open files")
    memory, files = growth(found, warm_up=args.warm_up)
    print(
        f"{args.steps} steps of {args.batch_size} in {time.monotonic() - start:.0f} s: memory "
        f"{memory:+.2%} and {files:+d} open files "
        f"after step {args.warm_up}"
    )


if __name__ == "__main__":
    main()
