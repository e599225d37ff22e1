"""Logs what gates have decided so far, to the Trainer's loggers and to a file."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Trainer

from tinyfusion_pl.pruning import Decision


class GateMonitor:
    """Writes the decision at each logged step.

    Args:
        decisions_path: File that gets a line of JSON at each logged step; None: no file.
    """

    def __init__(self, decisions_path: str | Path | None = None) -> None:
        self.decisions_path = None if decisions_path is None else Path(decisions_path)
        self.logged_step = -1

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this step is one that the Trainer logs."""
        every = trainer.log_every_n_steps
        return bool(every) and (trainer.global_step % every == 0 or trainer.global_step == 1)

    def log(
        self, trainer: Trainer, decision: Decision, *, tau: float, scaling: float, num_skipped: int
    ) -> None:
        """Log `decision` at the Trainer's step."""
        self.logged_step = trainer.global_step
        metrics = {"gates/num_skipped": num_skipped, **gate_metrics(decision, tau=tau)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.decisions_path is not None and trainer.is_global_zero:
            self.decisions_path.parent.mkdir(parents=True, exist_ok=True)
            line = {
                "step": trainer.global_step,
                "tau": tau,
                "scaling": scaling,
                "stacks": decision.telemetry(),
            }
            with self.decisions_path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def gate_metrics(decision: Decision, *, tau: float | None = None) -> dict[str, float]:
    """The decision as numbers for a logger: per block, per group, and their means; `tau` is None where there is no temperature."""
    groups = [group for stack in decision.stacks.values() for group in stack.groups]
    metrics = {
        **({} if tau is None else {"gates/tau": tau}),
        "gates/entropy": sum(g.entropy for g in groups) / len(groups),
        "gates/confidence": sum(g.confidence for g in groups) / len(groups),
    }
    for path, stack in decision.stacks.items():
        for i, p in enumerate(stack.block_probabilities):
            metrics[f"gates/{path}/probability_{i}"] = p
            metrics[f"gates/{path}/kept_{i}"] = float(i in stack.kept_blocks)
        for i, group in enumerate(stack.groups):
            metrics[f"gates/{path}/entropy_{i}"] = group.entropy
            metrics[f"gates/{path}/confidence_{i}"] = group.confidence
    return metrics
