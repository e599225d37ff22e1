"""Stage 1: learn which blocks to remove, and save the shallow model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import seed_everything

from tinyfusion_pl.callbacks import DepthPruningCallback
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.modules import MaskLearning
from tinyfusion_pl.selection import Selection, WidthPruning
from tinyfusion_pl.tasks.choosing import DECISIONS, SELECTION, choose, describe_kept
from tinyfusion_pl.tasks.fitting import Fit
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.origins import (
    check_asked,
    check_logs,
    check_origin,
    files_left,
    get_log_dir,
    make_origin,
    needs_remaking,
)
from tinyfusion_pl.tasks.processes import first_alone


@dataclass(kw_only=True)
class LearnMask:
    """Mask learning on a copy of the teacher; saves the shallow model to ``shallow/``.

    Args:
        module: Factory of `MaskLearning`, called with a denoiser and ``objective=``.
        pruning: Factory of `DepthPruningCallback`, called with ``save_dir=``, ``decisions_path=``
        and
            ``source=``; or of a `Selection` or `WidthPruning`, whose criterion selects blocks
            without training.
        fit: The training.
    """

    module: Callable[..., MaskLearning]
    pruning: Callable[..., DepthPruningCallback | Selection | WidthPruning]
    fit: Fit

    def __post_init__(self) -> None:
        made = self.pruning()  # finds an invalid pattern or temperature before anything runs
        self.selection = made if isinstance(made, (Selection, WidthPruning)) else None

    def check(self, inputs: Inputs) -> None:
        """Check the settings, and the pattern against the teacher, before anything is trained.

        Raises:
            ValueError: for invalid settings; states valid ones.
        """
        if self.selection is not None:
            self.selection.check(inputs.teacher)
            module = self.module(inputs.teacher, objective=inputs.objective, label_dropout=0.0)
            self.fit.check("learn_mask", module)  # the criterion runs on the Trainer's device
        else:
            module = self.module(inputs.teacher, objective=inputs.objective)
            callback = self._callback()
            callback.check(module)
            callback.check_strategy(self.fit.check("learn_mask", module))

    @property
    def changes_width(self) -> bool:
        """Whether the shallow model's hidden states have fewer channels than the teacher's."""
        return isinstance(self.selection, WidthPruning)

    def num_processes(self) -> int | None:
        """The number of processes; None for a criterion, which runs in the first process only."""
        return None if self.selection is not None else self.fit.num_processes()

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Save the shallow model, unless the stage is finished."""
        if self.selection is None:
            self._run(folder, inputs)
            return
        with first_alone(self.fit.trainer) as is_first:
            if is_first:
                self._run(folder, inputs)
                return
        if folder.result("learn_mask") is None:
            raise ValueError(
                f"{self.selection.name} runs in the first process only, and this is another one. "
                "Run task=learn_mask in one process, then the other stages."
            )

    def _callback(self, **arguments: Any) -> DepthPruningCallback:
        callback = self.pruning(**arguments)
        assert isinstance(callback, DepthPruningCallback)
        return callback

    def _run(self, folder: RunFolder, inputs: Inputs) -> None:
        made_from, asked = make_origin(folder, inputs), {"seed": inputs.seed}
        if self.selection is None:
            asked["num_steps"] = self.fit.num_steps("learn_mask")
        if (done := folder.result("learn_mask")) is not None:
            check_origin(folder, "learn_mask", done, made_from)
            check_asked(folder, "learn_mask", done, asked)
            check_logs(folder, "learn_mask", done)
            if not needs_remaking(
                folder,
                "learn_mask",
                done,
                below=folder.shallow.name,
                repeats=self.selection is not None,
            ):
                say(
                    f"learn_mask: already finished, kept {describe_kept(done['kept_blocks'])}; the "
                    f"shallow model is in {folder.shallow}"
                )
                return
        if self.selection is not None:
            result = choose(
                self.selection,
                folder,
                inputs,
                self.fit.device(),
                made_from=made_from,
                logger=self.fit.logger,
            )
            left = [
                SELECTION,
                *(log for log in (DECISIONS, get_log_dir("learn_mask")) if (folder / log).exists()),
            ]
            folder.finish(
                "learn_mask",
                {
                    **result,
                    **asked,
                    "made_from": made_from,
                    "files": files_left(folder.path, [folder.shallow.name]),
                    "logs": files_left(folder.path, left),
                },
            )
            return
        say(
            f"learn_mask: learning which blocks to remove; decisions will be saved to "
            f"{folder / 'learn_mask'}, the shallow model to {folder.shallow}"
        )
        seed_everything(inputs.seed, workers=True)
        callback = self._callback(
            save_dir=folder.shallow,
            decisions_path=folder / DECISIONS,
            source=getattr(inputs.teacher, "source", None),
        )
        module = self.module(copy.deepcopy(inputs.teacher).train(), objective=inputs.objective)
        seconds = self.fit.run(
            "learn_mask", folder, module, inputs.data, first=[callback], made_from=made_from
        )
        assert callback.decision is not None
        folder.finish(
            "learn_mask",
            {
                "seconds": seconds if done is None else done["seconds"],
                "kept_blocks": callback.decision.kept_blocks,
                "num_skipped_steps": callback.guard.num_skipped,
                "made_from": made_from,
                **asked,
                "num_block_runs": self._num_block_runs(callback, inputs.data),
                "files": files_left(folder.path, [folder.shallow.name]),
                "logs": files_left(folder.path, [DECISIONS, get_log_dir("learn_mask")]),
            },
        )

    def _num_block_runs(self, callback: DepthPruningCallback, data: GenerationDataModule) -> int:
        """Cost of mask learning in block evaluations per sample.

        A forward pass counts 1, and a backward pass, which only kept blocks have, 2.
        """
        assert callback.decision is not None
        stacks = callback.decision.stacks.values()
        runs = sum(stack.num_blocks + 2 * len(stack.kept_blocks) for stack in stacks)
        if callback.search_loss == "teacher":
            runs += sum(stack.num_blocks for stack in stacks)
        return runs * self.fit.num_images("learn_mask", data)
