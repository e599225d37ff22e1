"""Types of the settings that belong to no class, and bounds of settings by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tinyfusion_pl.cli.kinds import Built, Kind

MAX_SEED = 2**32 - 1  # NumPy's, which Lightning seeds too
NAME = re.compile(r"\w[\w.+-]{0,127}")

# Name -> (least, most), for the settings of all classes of this project. The upper bounds are far
# beyond what any machine can do; they keep a typo from filling the memory.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, MAX_SEED),
    "batch_size": (1, 2**20),
    "global_batch_size": (1, 2**24),
    "max_device_batch_size": (1, 2**20),
    "reference_batch_size": (1, 2**24),
    "num_workers": (0, 1024),
    "image_size": (1, 16384),
    "num_channels": (1, 4),
    "num_samples": (2, 10**8),
    "num_replace_samples": (1, 10**7),
    "num_shown": (0, 10**5),
    "num_timing_rounds": (0, 10**5),
    "num_draws": (0, 10**8),
    "num_timesteps": (1, 10**6),
    "num_intervals": (1, 10**6),
    "removed": (1e-9, 1 - 1e-9),
    "threshold": (0, 1 - 1e-9),
    "num_noised": (1, 10**4),
    "mask_ratio_min": (0, 1 - 1e-9),
    "subset_size": (2, 10**7),
    "num_features": (1, 2**13),
    "num_spatial": (1, 2**13),
    "num_subsets": (1, 10**6),
    "num_rows": (4, 2**14),
    "healing_steps": (0, 10**6),
    "healing_batch_size": (1, 2**20),
    "healing_lr": (None, 100),
    "block_size": (1, 10**9),
    "max_block_mib": (1, 2**20),
    "k": (1, 10**4),
    "num_images": (1, 10**15),
    "max_pixels": (1, 2**40),
    "shard_size": (1, 2**24),
    "save_every": (1, 2**24),
    "every_n_steps": (1, 10**12),
    "checkpoint_every_n_steps": (1, 10**12),
    "max_nonfinite": (1, 10**12),
    "num_warmup_steps": (0, 10**12),
    "anneal_steps": (1, 10**12),
    "label_dropout": (0, 1),
    "final_ratio": (0, 1),
    "decay": (0, 1 - 1e-12),
    "average_decay": (0, 1 - 1e-12),
    "weight_kd": (0, 10**6),
    "weight_data": (0, 10**6),
    "weight_feature": (0, 10**6),
    "weight_interval": (0, 10**6),
    "interval_share": (0, 1),
    # The classes also check that these are > 0.
    "tau_start": (None, 10**6),
    "tau_end": (None, 10**6),
    "scaling": (None, 10**6),
    "init": (-100, 100),
    "logits_lr": (None, 100),
    "logits_clip": (None, 10**6),
    "multiplier_lr": (None, 10**3),
    "num_sigma": (None, 10**6),
    "group_size": (2, 10**9),
    "scaling_factor": (1e-6, 10**6),
    "guidance_scale": (0, 1000),
    "guidance_channels": (1, 2**12),
    "num_sampling_steps": (1, 10**6),
    "num_iterations": (1, 10**6),
    "eta": (0, 1),
    "atol": (0, 1),
    "rtol": (0, 1),
    "last_step_size": (0, 1),
    "diffusion_norm": (0, 10**6),
    "temperature": (0, 1000),
    "sigma": (1e-12, 1e12),
    "scale": (1e-12, 1e12),
    "input_size": (1, 2**12),
    "patch_size": (1, 2**12),
    "in_channels": (1, 2**12),
    "hidden_size": (1, 2**14),
    "depth": (1, 1000),
    "encoder_depth": (1, 1000),
    "decoder_depth": (1, 1000),
    "num_heads": (1, 2**10),
    "mlp_ratio": (1e-3, 100),
    "num_classes": (1, 10**6),
    "activation_checkpointing": (0, 1),
}
# Target -> name -> (least, most), for classes of other packages.
FOREIGN_BOUNDS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "peft.tuners.lora.config.LoraConfig": {
        "r": (1, 2**14),
        "lora_alpha": (1, 2**20),
        "lora_dropout": (0, 1 - 1e-9),
    },
    "lightning.pytorch.trainer.trainer.Trainer": {
        "devices": (-1, 4096),
        "num_nodes": (1, 10**5),
        "max_steps": (-1, 10**12),
        "max_epochs": (-1, 10**12),
        "accumulate_grad_batches": (1, 2**20),
        "log_every_n_steps": (0, 10**12),
        "gradient_clip_val": (0, 10**9),
    },
    **{
        f"diffusers.schedulers.scheduling_{name}": {"solver_order": (1, 3)}
        for name in (
            "dpmsolver_multistep.DPMSolverMultistepScheduler",
            "unipc_multistep.UniPCMultistepScheduler",
        )
    },
    **{
        f"torch.optim.{name}": {"lr": (0, 100), "weight_decay": (0, 100)}
        for name in (
            "adamw.AdamW",
            "adam.Adam",
            "sgd.SGD",
            "rmsprop.RMSprop",
            "adagrad.Adagrad",
            "nadam.NAdam",
            "radam.RAdam",
        )
    },
}
CHOICES: dict[str, Any] = {"weights": Literal["ema", "raw"]}
# Settings that are an object with _target_, or null.
OBJECTS = {("tinyfusion_pl.objectives.gaussian_diffusion.GaussianDiffusion", "scheduler")}
LOADERS = "tinyfusion_pl.models."  # whose `weights` may also name an entry of a file
BLANK = ("prefix",)  # strings that may be empty
UNTYPED = ("pattern",)  # YAML reads an unquoted 1:2 as a number, which the class explains


@dataclass(frozen=True)
class Plain:
    """A mapping without ``_target_``: name -> the `Kind` of a setting, or a nested `Plain`."""

    settings: dict[str, Any]


def _bounds(pair: tuple[float | None, float | None] | None) -> dict[str, Any]:
    return {} if pair is None else {"least": pair[0], "most": pair[1]}


_OF_TRAINER = FOREIGN_BOUNDS["lightning.pytorch.trainer.trainer.Trainer"]
IMAGES = Kind(str | Built, blank=False)
TRAINER = Kind(Built)
DEVICES = Kind(int | str | list[int], **_bounds(_OF_TRAINER["devices"]))
NUM_NODES = Kind(int, **_bounds(_OF_TRAINER["num_nodes"]))
DECAY = Kind(float, least=0, most=1 - 1e-12)
PATH = Kind(str, blank=False)
BUILT = (  # groups with a _target_
    "task",
    "model",
    "data",
    "objective",
    "pruning",
    "distill",
    "metrics",
    "learn_mask",
    "recover",
    "evaluate",
    "train",
    "extract",
    "candidates",
    "activations",
    "depth_curve",
)
MAIN = Plain(
    {
        "name": Kind(str),
        "seed": Kind(int, least=0, most=MAX_SEED),
        "recipe": Kind(str | None),
        "run_dir": Kind(str),
        "paths": Plain({"output_dir": PATH, "results": Kind(str | None, blank=False)}),
        "averaging": Plain({"decay": DECAY, "gates": DECAY}),
        "search": Plain(
            {
                "num_steps": Kind(int, least=1, most=10**6),
                "num_samples": Kind(int, least=2, most=10**8),
                "trial_steps": Kind(list[int]),
                "trials": Kind(dict[str, Any] | None),
            }
        ),
        "dry_run": Plain({"num_iterations": Kind(int, least=1, most=10**6)}),
        "adapter": Plain({"weight_update": Kind(Literal["lora", "full", "frozen"] | Built)}),
        "logger": Plain({"factory": Kind(Built | None)}),
        "runtime": Plain(
            {
                "accelerator": Kind(str, blank=False),
                "devices": DEVICES,
                "num_nodes": NUM_NODES,
                "precision": Kind(int | str),
            }
        ),
        "trainer": Plain({"strategy": Kind(str, blank=False)}),
        "measure": Plain(
            {"trainer": TRAINER, "files": Kind(Built), "samples": IMAGES, "reference": IMAGES}
        ),
        "reference": Plain(
            {"trainer": TRAINER, "files": Kind(Built), "images": IMAGES, "output": PATH}
        ),
        **{name: Kind(Built) for name in BUILT},
    }
)
NEW_MODEL = "tinyfusion_pl.tasks.train_denoiser"  # creates a model from model.name alone
# The settings of `model` that it does not use, or does not need before there are weights.
OF_NEW_MODEL = {"_target_", "name", "checkpoint", "weights", "variant", "prefix"}
IS_MAIN = {"model", "data", "objective", "pruning", "learn_mask", "recover", "evaluate", "train"}

# Key -> arguments that the stage passes itself, so that a setting would be ignored.
GIVEN = {
    "pruning": ("save_dir", "decisions_path", "source"),
    "learn_mask.module": ("denoiser", "objective"),
    "recover.module": ("student", "denoiser", "objective", "teacher", "decision"),
    "train.module": ("denoiser", "objective"),
    "task": ("run_dir",),
}


def get_kind(name: str, hint: Any, *, target: str) -> Kind:
    """The kind of the argument `name` of `target`, given by its full name."""
    if name in UNTYPED:
        return Kind(Any)
    if not target.startswith("tinyfusion_pl."):
        return Kind(hint, **_bounds(FOREIGN_BOUNDS.get(target, {}).get(name)))
    if (target, name) in OBJECTS:
        return Kind(Built | None)
    return Kind(
        hint if target.startswith(LOADERS) else CHOICES.get(name, hint),
        **_bounds(BOUNDS.get(name)),
        blank=name in BLANK,
    )


def check_name(key: str, value: str) -> None:
    """Raise a ValueError unless `value` is a valid name of one folder."""
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{key} is {value!r}, which is not a valid folder name. Give up to 128 letters, "
            "digits, '_', '.', '+' and '-', starting with a letter, a digit or '_'; run_dir=PATH "
            "sets where the run is written."
        )


def check_run_dir(key: str, value: str) -> None:
    """Raise a ValueError for an empty path, which would be the current folder."""
    if not value.strip():
        raise ValueError(f"{key} is empty. Give the path of a folder for this run, or omit it.")
