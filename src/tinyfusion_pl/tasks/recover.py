"""Stage 2: recover the shallow model by distillation from the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.callbacks import NonFiniteGuard
from tinyfusion_pl.checksums import Origin, content_sha256, files_sha256, model_sha256
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.models import (
    load_checkpoint,
    load_decision,
    load_pretrained,
    load_shallow,
    load_weights,
    save_shallow,
)
from tinyfusion_pl.models.records import RECORD, TRAINING_IMAGES, read_record
from tinyfusion_pl.modules import Recovery
from tinyfusion_pl.modules.recovery import UNEQUAL_WIDTHS
from tinyfusion_pl.pruning import Decision, find_stacks
from tinyfusion_pl.tasks.checkpoint_io import verify
from tinyfusion_pl.tasks.fitting import Fit
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.learn_mask import LearnMask
from tinyfusion_pl.tasks.origins import (
    SAMPLES,
    SHALLOW,
    TEACHER,
    check_asked,
    check_logs,
    check_origin,
    files_left,
    get_log_dir,
    make_origin,
    missing_files,
    needs_remaking,
    shallow_sha256,
)
from tinyfusion_pl.tasks.replacing import check_replacing, fit_replacements, with_replacements
from tinyfusion_pl.tasks.shared_results import SharedResults, copy_files


@dataclass(kw_only=True)
class Recover:
    """Recovery of the model in ``shallow/``; saves it to ``recovered/``.

    Args:
        module: Factory of `Recovery`, called with a student and ``teacher=``, ``decision=``,
            ``objective=``.
        fit: The training; needs a weight averaging callback for averaged weights.
        weights: Weights of the recovered model, ``"ema"`` or ``"raw"``.
        teacher: Weights of a teacher other than the pruned model, as `load_pretrained` takes them
            (TinyFusion, table 7); None: the pruned model. With another teacher, only the layer
            pairs of `distillation` are used.
        replace: ``"linear"`` replaces each removed run of blocks by a linear map, fitted in closed
            form before training and then trained (see `tinyfusion_pl.pruning.run_fitting`). None:
            no replacement.
        num_replace_samples: Training samples to fit the maps on, >= 1.
        shared: Results of other runs: a shallow model recovered there in the same way is not
        trained
            again.
    """

    module: Callable[..., Recovery]
    fit: Fit
    weights: str = "ema"
    teacher: str | None = None
    replace: Literal["linear"] | None = None
    num_replace_samples: int = 256
    shared: SharedResults = field(default_factory=SharedResults)

    def __post_init__(self) -> None:
        self.fit.check_weights("recover", self.weights)
        if self.replace not in (None, "linear"):
            raise ValueError(
                f"recover.replace is {self.replace!r}; give 'linear', or null for no replacement."
            )
        if self.num_replace_samples < 1:
            raise ValueError(
                f"recover.num_replace_samples is {self.num_replace_samples}; give a count >= 1."
            )

    def check(self, inputs: Inputs) -> None:
        """Check the settings, and given layer pairs against the teacher, before any training.

        Raises:
            ValueError: for invalid settings.
        """
        # The teacher stands in for the student, which does not exist yet. A copy: `Recovery`
        # freezes it, and mask learning may train it.
        student = copy.deepcopy(inputs.teacher)
        teacher = student if self.teacher is None else self._other_teacher(inputs)
        module = self.module(
            student, teacher=teacher, decision=Decision({}), objective=inputs.objective
        )
        losses = module.distillation
        if self.teacher is not None and (
            losses.weight_interval or (losses.weight_feature and not module.pairs)
        ):
            raise ValueError(
                "recover.teacher is not the pruned model, so its blocks are not paired with the "
                "student's. Use distill=output, or give distill.pairs to compare hidden states."
            )
        trainer = self.fit.check("recover", module)
        if self.replace and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"recover.replace is {self.replace!r}, but linear maps cannot be trained with "
                "sharded weights. Set recover.replace=null, or trainer=ddp."
            )
        if self.replace:
            check_replacing(inputs)
        self.compares_hidden_states = bool(
            losses.weight_feature or losses.weight_interval or self.replace
        )

    def check_follows(self, learn_mask: LearnMask) -> None:
        """Check, after `check`, that the model of `learn_mask` can be recovered.

        Raises:
            ValueError: if hidden states of unequal widths would be compared.
        """
        if learn_mask.changes_width and self.compares_hidden_states:
            raise ValueError(UNEQUAL_WIDTHS)

    def _other_teacher(self, inputs: Inputs) -> nn.Module:
        """The teacher that is not the pruned model."""
        assert self.teacher is not None
        teacher = load_pretrained(self.teacher)
        inputs.data.check_fits(teacher)
        inputs.objective.check_fits(teacher)
        return teacher

    def num_processes(self) -> int:
        """The number of processes of this stage."""
        return self.fit.num_processes()

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Save the recovered model, unless the stage is finished."""
        done, learned = self.shared.own(folder.result("recover")), folder.result("learn_mask")
        if done is None and learned is None and not (folder.shallow / RECORD).exists():
            raise ValueError(
                f"There is no shallow model in {folder.path}; run task=learn_mask (or "
                "task=pipeline) there first."
            )
        made_from, asked = (
            make_origin(folder, inputs),
            {"num_steps": self.fit.num_steps("recover"), "seed": inputs.seed},
        )
        if learned is not None:
            check_origin(folder, "learn_mask", learned, made_from, of=[TEACHER, SAMPLES])
            missing = missing_files(folder, "learn_mask", learned, below=folder.shallow.name)
        if self.teacher is not None:
            made_from["other teacher"] = model_sha256(teacher := self._other_teacher(inputs))
        if (folder.shallow / RECORD).exists():
            made_from[SHALLOW] = shallow_sha256(folder.shallow)
        if done is not None:
            check_origin(folder, "recover", done, made_from)
            check_asked(folder, "recover", done, asked)
            check_logs(folder, "recover", done)
            if not needs_remaking(folder, "recover", done, below=folder.recovered.name):
                say(f"recover: already finished; the recovered model is in {folder.recovered}")
                return
        if learned is not None and missing:
            raise ArtifactError(
                f"{', '.join(missing[:3])} missing from {folder.path}, where recovery starts. "
                "Restore it; or rerun task=learn_mask, which recreates it."
            )
        if (
            done is None
            and (found := self._from_other_run(folder, inputs, self._shared(folder, made_from)))
            is not None
        ):
            folder.finish("recover", {**found, "made_from": made_from, **asked})
            return
        say(
            "recover: training the shallow model; checkpoints will be saved to "
            f"{folder / 'recover'}, the recovered model to {folder.recovered}"
        )
        seed_everything(inputs.seed + 1, workers=True)
        student = self._student(folder, inputs).train()
        if self.replace and not folder.checkpoint("recover").exists():
            fit_replacements(
                student, folder, inputs, self.fit.device(), num_samples=self.num_replace_samples
            )
        student.activation_checkpointing = getattr(
            inputs.teacher, "activation_checkpointing", False
        )
        if self.teacher is None:
            teacher, decision = inputs.teacher, load_decision(folder.shallow)
        else:
            decision = Decision({})  # the pruned model's, not this teacher's
        module = self.module(
            student, teacher=teacher, decision=decision, objective=inputs.objective
        )
        guard = NonFiniteGuard()
        seconds = self.fit.run(
            "recover", folder, module, inputs.data, first=[guard], made_from=made_from
        )
        self.save(folder, inputs, self.trained(folder))
        result: dict[str, Any] = {
            "seconds": seconds if done is None else done["seconds"],
            "num_skipped_steps": guard.num_skipped,
            "num_block_runs": self._num_block_runs(module, inputs.data),
            TRAINING_IMAGES: self.fit.num_images("recover", inputs.data),
            "files": files_left(folder.path, [folder.recovered.name]),
            "logs": files_left(folder.path, [get_log_dir("recover")]),
        }
        self.shared.keep(self._shared(folder, made_from), result, run_dir=folder.path)
        folder.finish("recover", {**result, "made_from": made_from, **asked})

    @staticmethod
    def _shared(folder: RunFolder, made_from: Origin) -> Origin:
        """What determines the recovered weights: of the selection only weights and layer pairs."""
        pairs = {
            path: stack.layer_pairs()
            for path, stack in load_decision(folder.shallow).stacks.items()
        }
        return {
            **made_from,
            SHALLOW: content_sha256([read_record(folder.shallow)["weights"]["sha256"], pairs]),
        }

    def _from_other_run(
        self, folder: RunFolder, inputs: Inputs, made_from: Origin
    ) -> dict[str, Any] | None:
        """The result of a run with the same origin; None if there is none, or if it has changed."""
        if (found := self.shared.find(made_from)) is None:
            return None
        files, other = {**found["files"], **found["logs"]}, RunFolder(found["run_dir"])
        if files_sha256(other.path, list(files)) != files:
            say(f"recover: the recovered model of {other.path} has changed; training it again")
            return None
        say(
            f"recover: reusing the recovered model of {other.path}, which saves "
            f"{found['seconds']:.0f} s (recover.shared.reuse=false trains it again)"
        )
        rank_zero_only(copy_files)(other.path, folder.path, found["logs"])
        self.save(folder, inputs, load_shallow(other.recovered).state_dict())
        return {**found, "files": files_left(folder.path, [folder.recovered.name])}

    def _num_block_runs(self, module: Recovery, data: GenerationDataModule) -> int:
        """Cost in block evaluations, a backward pass counted as two."""
        losses = module.distillation
        depths = [
            sum(map(len, find_stacks(model).values()))
            for model in (module.denoiser, module.teacher)
            if model is not None
        ]
        # With intervals in every step, the student's blocks also run on the teacher's inputs.
        both = bool(losses.weight_interval) and losses.interval_share is None
        runs = 3 * depths[0] * (1 + both) + (depths[1] if losses.needs_teacher else 0)
        fitted = self.num_replace_samples * depths[1] if self.replace else 0
        return self.fit.num_images("recover", data) * runs + fitted

    def _student(self, folder: RunFolder, inputs: Inputs) -> nn.Module:
        """The model in ``shallow/``, with linear maps for its removed runs if `replace` is set."""
        student = load_shallow(folder.shallow)
        return with_replacements(student, folder, inputs) if self.replace else student

    @rank_zero_only
    def save(self, folder: RunFolder, inputs: Inputs, weights: Mapping[str, Tensor]) -> None:
        """Save the student with `weights` to ``recovered/``."""
        student = self._student(folder, inputs)
        load_weights(student, weights)
        record = {
            k: v
            for k, v in read_record(folder.shallow).items()
            if k in ("stacks", "width", "configuration", "seed")
        }
        save_shallow(
            folder.recovered,
            student,
            {
                **record,
                "source": {"path": str(folder.shallow.name), "weights": self.weights},
            },
        )

    def trained(self, folder: RunFolder) -> Mapping[str, Tensor]:
        """The student's weights in the last checkpoint."""
        verify(checkpoint := folder.checkpoint("recover"))
        return load_checkpoint(checkpoint, weights=self.weights)
