"""The settings that belong to no class: their types; and bounds by name, for what a type alone does not say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tinyfusion_pl.cli.kinds import Built, Kind

MAX_SEED = 2**32 - 1  # NumPy's, which Lightning seeds too
NAME = re.compile(r"\w[\w.+-]{0,127}")

# name -> (least, most), wherever a class of this project has a setting of this name. The upper bounds are far beyond what any machine
# does, and keep a slip of the finger from filling memory.
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
    "num_shown": (0, 10**5),
    "num_timing_rounds": (1, 10**5),
    "num_timesteps": (1, 10**6),
    "num_noised": (1, 10**4),
    "num_features": (1, 2**13),
    "num_spatial": (1, 2**13),
    "num_subsets": (1, 10**6),
    "block_size": (1, 10**9),
    "max_block_mib": (1, 2**20),
    "k": (1, 10**4),
    "num_images": (1, 10**15),
    "max_pixels": (1, 2**40),
    "shard_size": (1, 2**24),
    "save_every": (1, 2**24),
    "every_n_steps": (1, None),
    "checkpoint_every_n_steps": (1, None),
    "max_nonfinite": (1, None),
    "num_warmup_steps": (0, None),
    "guidance_scale": (0, 1000),
    "guidance_channels": (1, 2**12),
    "num_sampling_steps": (1, 10**6),
    "num_iterations": (1, 10**6),
    "eta": (0, 1),
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
}
# target -> name -> (least, most) of others' classes
FOREIGN_BOUNDS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "peft.tuners.lora.config.LoraConfig": {"r": (1, 2**14), "lora_alpha": (1, 2**20), "lora_dropout": (0, 1 - 1e-9)},
    "lightning.pytorch.trainer.trainer.Trainer": {"devices": (-1, 4096), "num_nodes": (1, 10**5)},
}
CHOICES: dict[str, Any] = {"weights": Literal["ema", "raw"]}
LOADERS = "tinyfusion_pl.models."  # whose weights may also be an entry of a file
UNTYPED = ("pattern",)  # an unquoted 1:2 is a number to YAML: the class says what happened


@dataclass(frozen=True)
class Plain:
    """A mapping of settings that makes no object: name -> its kind, or a `Plain` inside."""

    settings: dict[str, Any]


PICTURES = str | Built
TRAINER = Kind(Built)
MAIN = Plain({
    "name": Kind(str), "seed": Kind(int, least=0, most=MAX_SEED), "recipe": Kind(str | None), "run_dir": Kind(str),
    "paths": Plain({"output_dir": Kind(str)}),
    "averaging": Plain({"decay": Kind(float, least=0, most=1 - 1e-12)}),
    "dry_run": Plain({"num_iterations": Kind(int, least=1, most=10**6)}),
    "adapter": Plain({"weight_update": Kind(Literal["lora", "full", "frozen"] | Built)}),
    "logger": Plain({"factory": Kind(Built | None)}),
    "measure": Plain({"trainer": TRAINER, "files": Kind(Built), "samples": Kind(PICTURES), "reference": Kind(PICTURES)}),
    "reference": Plain({"trainer": TRAINER, "files": Kind(Built), "pictures": Kind(PICTURES), "output": Kind(str)}),
    **{name: Kind(Built) for name in ("task", "model", "data", "objective", "pruning", "distill", "metrics", "learn_mask", "recover",
                                      "evaluate", "train", "extract")},
})  # fmt: skip
IS_MAIN = {"model", "data", "objective", "pruning", "learn_mask", "recover", "evaluate", "train"}

# What a stage gives to what it makes, so that a setting would go unread: key -> names
GIVEN = {
    "pruning": ("save_dir", "decisions_path", "source"),
    "learn_mask.module": ("denoiser", "objective"),
    "recover.module": ("student", "denoiser", "objective", "teacher", "decision"),
    "train.module": ("denoiser", "objective"),
    "task": ("run_dir",),
}


def kind_of(name: str, hint: Any, *, target: str) -> Kind:
    """The kind of the argument `name` of `target`, a full name."""
    if name in UNTYPED:
        return Kind(Any)
    if not target.startswith("tinyfusion_pl."):
        return Kind(hint, **_bounds(FOREIGN_BOUNDS.get(target, {}).get(name)))
    if target.startswith(LOADERS):
        return Kind(hint, **_bounds(BOUNDS.get(name)))
    return Kind(CHOICES.get(name, hint), **_bounds(BOUNDS.get(name)))


def _bounds(pair: tuple[float | None, float | None] | None) -> dict[str, Any]:
    return {} if pair is None else {"least": pair[0], "most": pair[1]}


def check_name(key: str, value: str) -> None:
    """`ValueError` for a name that is no name of one folder."""
    if not NAME.fullmatch(value):
        raise ValueError(f"{key} is {value!r}, which names a folder and files. Give letters, digits, '_', '.', '+' and '-', 128 at most, "
                         "the first of them no dot; run_dir=PATH says where a run goes.")


def check_run_dir(key: str, value: str) -> None:
    """`ValueError` for a path that would fill the present folder."""
    if not value.strip():
        raise ValueError(f"{key} is empty. Give the path of a folder for this run, or leave it out.")
