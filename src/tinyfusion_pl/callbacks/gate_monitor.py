"""Logs the current decision of the gates to the Trainer's loggers and to a file."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Trainer

from tinyfusion_pl.callbacks.trainer_access import get_log_every_n_steps
from tinyfusion_pl.pruning import Decision
from tinyfusion_pl.pruning.decision import GroupDecision


class GateMonitor:
    """Logs decisions.

    Args:
        decisions_path: File that gets a line of JSON at each logged step; None writes no file.

    Attributes:
        logged_step: The last step that was logged; -1 before the first.
    """

    def __init__(self, decisions_path: str | Path | None = None) -> None:
        self.decisions_path = None if decisions_path is None else Path(decisions_path)
        self.logged_step = -1

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the Trainer logs this step."""
        every = get_log_every_n_steps(trainer)
        return bool(every) and (trainer.global_step % every == 0 or trainer.global_step == 1)

    def log(
        self, trainer: Trainer, decision: Decision, *, tau: float, scaling: float, num_skipped: int
    ) -> None:
        """Log `decision` at the Trainer's current step."""
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
    """Metrics of a learned decision: per block, per group, and the means over groups.

    Args:
        decision: The decision.
        tau: The temperature; None if there is none.
    """
    learned = [group for stack in decision.stacks.values() for group in map(_learned, stack.groups)]
    metrics = {
        **({} if tau is None else {"gates/tau": tau}),
        "gates/entropy": sum(entropy for entropy, _ in learned) / len(learned),
        "gates/confidence": sum(confidence for _, confidence in learned) / len(learned),
    }
    for path, stack in decision.stacks.items():
        for i, p in enumerate(stack.block_probabilities):
            metrics[f"gates/{path}/probability_{i}"] = p
            metrics[f"gates/{path}/kept_{i}"] = float(i in stack.kept_blocks)
        for i, (entropy, confidence) in enumerate(map(_learned, stack.groups)):
            metrics[f"gates/{path}/entropy_{i}"] = entropy
            metrics[f"gates/{path}/confidence_{i}"] = confidence
    return metrics


def _learned(group: GroupDecision) -> tuple[float, float]:
    """Entropy and confidence of a group with learned logits."""
    assert group.entropy is not None and group.confidence is not None
    return group.entropy, group.confidence
