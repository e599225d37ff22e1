"""Width pruning, alone or after depth: Diff-Pruning through torch-pruning.

Fang et al., arXiv 2305.10924.

Importance is Taylor's, |weight x gradient|, where the gradient is summed over the times whose loss
is above a share of the largest one: L_t / L_max > threshold (published for CIFAR-10: 0.05). Times
of small losses say little of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.models.dit import DiT
from tinyfusion_pl.pruning import find_stacks, remove_blocks
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.decision import Decision, GroupDecision, StackDecision
from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.channels import (
    MISSING,
    check_narrowable,
    count_params,
    is_installed,
    narrowed,
    width_for,
)
from tinyfusion_pl.selection.problem import WIDTH, compute_seed, get_devices
from tinyfusion_pl.selection.select import Selected, Selection


class WidthPruning:
    """Makes a DiT or SiT narrower: hidden states, heads and MLPs alike, in all blocks.

    Args:
        removed: Share of all the model's parameters that goes, in (0, 1); met as nearly as whole
            channels of each head allow.
        threshold: Times count whose mean loss is above this share of the largest one, in [0, 1); 0:
            all.
        num_intervals: Intervals of time whose losses are compared: samples in the order of their
            times, equally many in each.
        num_samples: Samples at random times, as in training.
        batch_size: Samples of one backward pass.
        depth: Chooses blocks first, by any criterion; `removed` counts both. None: all blocks stay.

    Raises:
        ValueError: for numbers out of range, or without torch-pruning.
    """

    def __init__(
        self,
        *,
        removed: float = 0.5,
        threshold: float = 0.05,
        num_intervals: int = 32,
        num_samples: int = 1024,
        batch_size: int = 32,
        depth: Selection | None = None,
    ) -> None:
        if not is_installed():
            raise ValueError(MISSING)
        if not 0 < removed < 1:
            raise ValueError(
                f"removed is {removed}; give a share of the parameters in (0, 1), e.g. 0.5."
            )
        if not 0 <= threshold < 1:
            raise ValueError(
                f"threshold is {threshold}; give a share of the largest loss in [0, 1) "
                "(published: 0.05)."
            )
        for name, value in (("num_intervals", num_intervals), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more.")
        if num_samples < max(2, num_intervals):
            raise ValueError(
                f"num_samples is {num_samples}, fewer than num_intervals={num_intervals}: give "
                "one sample for each, and 2 at least."
            )
        self.removed, self.threshold, self.num_intervals = removed, threshold, num_intervals
        self.num_samples, self.batch_size, self.depth = num_samples, batch_size, depth
        self.name = "diff_pruning" if depth is None else f"{depth.name}, then diff_pruning"

    def check(self, model: nn.Module) -> None:
        """Find out whether the settings fit `model`, before anything runs.

        Raises:
            ValueError: when they do not; says what would.
        """
        check_narrowable(model)
        num_blocks = len(model.blocks)
        if self.depth is not None:
            self.depth.check(model)
            num_blocks = sum(part.num_kept for part in self.depth.space(model).parts)
        self._hidden_size(model, num_blocks)

    def _hidden_size(self, model: DiT, num_blocks: int) -> int:
        return width_for(
            model,
            (1 - self.removed) * count_params(model, depth=len(model.blocks)),
            depth=num_blocks,
        )

    def __call__(
        self,
        model: DiT,
        draw: Callable[[int], Calibration],
        *,
        seed: int = 0,
        watch: Callable[[dict[str, Any]], None] = lambda entry: None,
    ) -> Selected:
        """Choose blocks and channels; the narrower model is the result's `shallow`.

        `model` is not changed.

        Args:
            model: The dense, trained model.
            draw: Makes a `Calibration` of so many samples, with a loss.
            seed: Of all randomness.
            watch: Called at each step of a search for the blocks, see `Selection`.
        """
        check_narrowable(model)
        if self.depth is None:
            found = Selected(_all_blocks(model, self.name), 0, None, [], [])
        else:
            found = self.depth(model, draw, seed=seed, watch=watch)
            for stack in found.decision.stacks.values():
                stack.criterion = f"{stack.criterion}, then diff_pruning"
        wide = remove_blocks(copy.deepcopy(model), found.decision.kept_blocks).eval()
        num_blocks = len(wide.blocks)
        with torch.random.fork_rng(get_devices(model)):
            torch.manual_seed(compute_seed(seed, WIDTH))
            calibration = draw(self.num_samples)
        intervals = self._accumulate(wide, calibration)
        args, _ = calibration.rows(torch.arange(2))
        with torch.enable_grad():
            found.shallow = narrowed(wide, self._hidden_size(model, num_blocks), args)
        num_used = sum(each["num_samples"] for each in intervals if each["used"])
        # a forward pass for the losses, forward and backward for the gradients, and one of two
        # samples for tracing
        found.num_block_runs += num_blocks * (self.num_samples + 3 * num_used + 2)
        before, after = (
            sum(p.numel() for p in each.parameters()) for each in (model, found.shallow)
        )
        found.width = {
            "hidden_size": found.shallow.width,
            "dense_hidden_size": model.width,
            "removed": 1 - after / before,
        }
        found.intervals = intervals
        return found

    def _accumulate(self, model: nn.Module, calibration: Calibration) -> list[dict[str, Any]]:
        """Accumulate gradients of the mean losses of used intervals; describe each interval.

        Raises:
            ValueError: losses or gradients are not finite.
        """
        t = calibration.args[1]
        intervals = []
        for index in t.argsort(stable=True).cpu().tensor_split(self.num_intervals):
            with quiet(model):
                losses = torch.cat(
                    [
                        self._losses(model, calibration, part)
                        for part in index.split(self.batch_size)
                    ]
                )
            ends = t[index[[0, -1]].to(t.device)].tolist()
            intervals.append(
                {"t": ends, "loss": float(losses.mean()), "num_samples": len(index), "index": index}
            )
        largest = max(each["loss"] for each in intervals)
        model.zero_grad()
        model.requires_grad_(True)
        for each in intervals:
            index = each.pop("index")
            each["used"] = not each["loss"] <= self.threshold * largest
            if each["used"]:
                for part in index.split(self.batch_size):
                    with quiet(model), torch.enable_grad():
                        (self._losses(model, calibration, part).sum() / len(index)).backward()
        if not all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None):
            raise ValueError(
                "The gradients that importance is taken from are not finite. Look at the "
                "teacher's weights and the data."
            )
        return intervals

    @staticmethod
    def _losses(model: nn.Module, calibration: Calibration, index: Tensor) -> Tensor:
        args, kwargs = calibration.rows(index)
        return calibration.losses(model(*args, **kwargs), index)


def _all_blocks(model: nn.Module, criterion: str) -> Decision:
    """The decision that every block stays."""
    stacks = {}
    for path, stack in find_stacks(model).items():
        n, every = len(stack), list(range(len(stack)))
        stacks[path] = StackDecision(
            f"{n}:{n}", n, every, [1.0] * n, [GroupDecision(0, n, n, every)], criterion=criterion
        )
    return Decision(stacks)
