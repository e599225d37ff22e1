"""Stage 2: recover the shallow model by (masked) distillation from the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.callbacks import NonFiniteGuard
from tinyfusion_pl.models import load_checkpoint, load_decision, load_shallow, load_weights, save_shallow
from tinyfusion_pl.models.records import RECORD, read_record
from tinyfusion_pl.modules import Recovery
from tinyfusion_pl.modules.recovery import UNEQUAL_WIDTHS
from tinyfusion_pl.pruning import Decision
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
    logs_of,
    missing_files,
    needs_remaking,
    origin_of,
    shallow_sha256,
)


@dataclass(kw_only=True)
class Recover:
    """Recovery of the model in ``shallow/``; leaves it in ``recovered/``.

    Args:
        module: Makes `Recovery` from a student and ``teacher=``, ``decision=``, ``objective=``.
        fit: How it trains; weight averaging is among its callbacks where averaged weights are wanted.
        weights: ``"ema"`` or ``"raw"``: which weights the recovered model gets.
    """

    module: Callable[..., Recovery]
    fit: Fit
    weights: str = "ema"

    def __post_init__(self) -> None:
        self.fit.check_weights("recover", self.weights)

    def check(self, inputs: Inputs) -> None:
        """Find out whether the settings hold, before anything is trained; layer pairs that are given are held against the teacher.

        Raises:
            ValueError: when they do not.
        """
        # The student is not there yet; the teacher has at least its blocks. A copy: `Recovery` freezes it, and mask learning may train it.
        teacher = copy.deepcopy(inputs.teacher)
        module = self.module(teacher, teacher=teacher, decision=Decision({}), objective=inputs.objective)
        self.fit.check("recover", module)
        self.compares_hidden_states = module.distillation.weight_feature > 0

    def check_follows(self, learn_mask: LearnMask) -> None:
        """After `check`: find out whether what `learn_mask` leaves can be recovered so.

        Raises:
            ValueError: hidden states are compared, and their widths will not be equal.
        """
        if learn_mask.changes_width and self.compares_hidden_states:
            raise ValueError(UNEQUAL_WIDTHS)

    def num_processes(self) -> int:
        """Processes that it runs on."""
        return self.fit.num_processes()

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        done, learned = folder.result("recover"), folder.result("learn_mask")
        if done is None and learned is None and not (folder.shallow / RECORD).exists():
            raise ValueError(f"There is no shallow model in {folder.path}; run task=learn_mask (or task=pipeline) there first.")
        made_from, asked = origin_of(folder, inputs), {"num_steps": self.fit.num_steps("recover"), "seed": inputs.seed}
        if learned is not None:
            check_origin(folder, "learn_mask", learned, made_from, of=[TEACHER, SAMPLES])
            missing = missing_files(folder, "learn_mask", learned, below=folder.shallow.name)
        if (folder.shallow / RECORD).exists():
            made_from[SHALLOW] = shallow_sha256(folder.shallow)
        if done is not None:
            check_origin(folder, "recover", done, made_from)
            check_asked(folder, "recover", done, asked)
            check_logs(folder, "recover", done)
            if not needs_remaking(folder, "recover", done, below=folder.recovered.name):
                say(f"recover: done before; recovered model in {folder.recovered}")
                return
        if learned is not None and missing:
            raise ArtifactError(f"{', '.join(missing[:3])} gone from {folder.path}, which recovery starts from. Put it back; or rerun "
                                "task=learn_mask, which makes it again.")
        say(f"recover: the shallow model learns from the teacher; checkpoints go to {folder / 'recover'}, the model to {folder.recovered}")
        seed_everything(inputs.seed + 1, workers=True)
        student = load_shallow(folder.shallow).train()
        student.activation_checkpointing = getattr(inputs.teacher, "activation_checkpointing", False)
        module = self.module(student, teacher=inputs.teacher, decision=load_decision(folder.shallow),
                             objective=inputs.objective)
        guard = NonFiniteGuard()
        seconds = self.fit.run("recover", folder, module, inputs.data, first=[guard], made_from=made_from)
        self.save(folder)
        folder.finish("recover", {
            "seconds": seconds if done is None else done["seconds"], "num_skipped_steps": guard.num_skipped,
            "made_from": made_from, **asked, "files": files_left(folder.path, [folder.recovered.name]),
            "logs": files_left(folder.path, [logs_of("recover")]),
        })

    @rank_zero_only
    def save(self, folder: RunFolder) -> None:
        """Leave the student of the last checkpoint in ``recovered/``."""
        student = load_shallow(folder.shallow)
        verify(checkpoint := folder.checkpoint("recover"))
        load_weights(student, load_checkpoint(checkpoint, weights=self.weights))
        record = {k: v for k, v in read_record(folder.shallow).items() if k in ("stacks", "width", "configuration", "seed")}
        save_shallow(folder.recovered, student, {
            **record, "source": {"path": str(folder.shallow.name), "weights": self.weights},
        })
