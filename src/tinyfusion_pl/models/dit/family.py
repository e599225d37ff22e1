"""Sizes, published checkpoints and layouts of DiT."""

from __future__ import annotations

from typing import Any

from torch import nn

from tinyfusion_pl.models.dit.checkpoints import (
    LABEL_TABLE,
    SIGNS,
    dit_of_width,
    read_sizes,
    refuse_sit_weights,
)
from tinyfusion_pl.models.dit.diffusers import CLASSES, convert, dit_arguments
from tinyfusion_pl.models.dit.diffusers import SIGNS as DIFFUSERS_SIGNS
from tinyfusion_pl.models.dit.model import DiT
from tinyfusion_pl.models.dit.pipeline import write_diffusers
from tinyfusion_pl.models.family import DiffusersLayout, Family, Published
from tinyfusion_pl.models.notices import warn

# Size -> hidden_size, depth, num_heads (arXiv 2212.09748, table 1; H is facebookresearch/DiT's).
SIZES = {
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
    "h": (1280, 32, 16),
}
PATCH_SIZES = (2, 4, 8)
# DiT-XL/2 at 256 x 256 (arXiv 2212.09748) and SiT-XL/2 (arXiv 2401.08740).
IMAGES_OF_7M_STEPS = 7_000_000 * 256
IMAGES_OF_3M_STEPS = 3_000_000 * 256  # DiT-XL/2 at 512 x 512


def make_sizes(prefix: str, *sizes: str) -> dict[str, dict[str, Any]]:
    """Registered name -> arguments, for the `sizes` in every patch size."""
    return {
        f"{prefix}_{size}_{patch_size}": {
            "hidden_size": SIZES[size][0],
            "depth": SIZES[size][1],
            "num_heads": SIZES[size][2],
            "patch_size": patch_size,
        }
        for size in sizes
        for patch_size in PATCH_SIZES
    }


def make_published_names(title: str, names: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Registered name -> published name, e.g. ``"dit_xl_2"`` -> ``"DiT-XL/2"``."""
    return {
        name: f"{title}-{size.upper()}/{patch_size}"
        for name in names
        for _, size, patch_size in [name.split("_")]
    }


def _facebook(file: str, num_images: int, **kwargs: Any) -> Published:
    return Published(
        model="dit_xl_2",
        url=f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
        kwargs=kwargs,
        num_training_images=num_images,
    )


def _diffusers(repository: str) -> Published:
    return Published(
        model="dit_xl_2",
        url=f"https://huggingface.co/{repository}/resolve/main",
        file=repository.replace("/", "--"),
        is_folder=True,
    )


PUBLISHED = {
    "DiT-XL-2-256x256.pt": _facebook("DiT-XL-2-256x256.pt", IMAGES_OF_7M_STEPS),
    "DiT-XL-2-512x512.pt": _facebook("DiT-XL-2-512x512.pt", IMAGES_OF_3M_STEPS, input_size=64),
    "TinyDiT-D14-MaskedKD-500K.pt": Published(
        model="dit_xl_2",
        kwargs={"depth": 14},
        url="https://github.com/VainF/TinyFusion/releases/download/v1.0.0/TinyDiT-D14-MaskedKD-500K.pt",
    ),
    "facebook/DiT-XL-2-256": _diffusers("facebook/DiT-XL-2-256"),
    "facebook/DiT-XL-2-512": _diffusers("facebook/DiT-XL-2-512"),
}


def warn_of_frequency_shift(model: nn.Module, format: str) -> None:
    """Warn where the program that reads `format` embeds timesteps with another frequency shift."""
    theirs = {"published": (0, "the original DiT code"), "diffusers": (1, "diffusers")}
    if format not in theirs or not isinstance(model, DiT):
        return
    shift, program = theirs[format]
    if (ours := model.config["frequency_shift"]) != shift:
        warn(
            f"This model embeds timesteps with frequency_shift={ours}, {program} with {shift}: "
            "outputs there differ (docs/checkpoints.md, 'The shift gap')."
        )


PUBLISHED_SIZES = make_sizes("dit", *SIZES)

FAMILY = Family(
    name="DiT",
    model=DiT,
    sizes={
        **PUBLISHED_SIZES,
        "dit": {},  # for sizes without a name
        "dit_digits": {
            "input_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "hidden_size": 64,
            "depth": 12,
            "num_heads": 4,
            "num_classes": 10,
        },
        "dit_cifar10": {
            "input_size": 32,
            "patch_size": 2,
            "in_channels": 3,
            "hidden_size": 256,
            "depth": 28,
            "num_heads": 4,
            "num_classes": 10,
        },
        "dit_digits_deep": {
            "input_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "hidden_size": 48,
            "depth": 24,
            "num_heads": 4,
            "num_classes": 10,
        },
    },
    published_names=make_published_names("DiT", PUBLISHED_SIZES),
    signs=SIGNS,
    label_tables=(LABEL_TABLE,),
    read_sizes=read_sizes,
    check_weights=refuse_sit_weights,
    published=PUBLISHED,
    shipped={"dit_digits": "digits_teacher"},
    check_export=warn_of_frequency_shift,
    diffusers=DiffusersLayout(
        classes=CLASSES,
        signs=DIFFUSERS_SIGNS,
        read_arguments=dit_arguments,
        convert=convert,
        get_name=dit_of_width,
        write=write_diffusers,
    ),
)
