"""Sizes and published checkpoints of SiT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinyfusion_pl.models.dit.checkpoints import LABEL_TABLE, SIGNS, predicts_variance, read_sizes
from tinyfusion_pl.models.dit.family import (
    IMAGES_OF_7M_STEPS,
    make_published_names,
    make_sizes,
    warn_of_frequency_shift,
)
from tinyfusion_pl.models.family import Family, Published
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.sit.model import SiT


def warn_of_dit_weights(state: Mapping[str, Tensor], name: str, where: str | Path) -> None:
    """Warn about weights of a DiT that are loaded as a SiT."""
    if predicts_variance(state):
        warn(
            f"{where} is loaded as {name}, but looks like a DiT checkpoint: the half of its final "
            "layer that SiT does not use is not zero. If it is a DiT, samples will be wrong: give "
            "name=dit_xl_2 (model=dit_xl_2)."
        )


SIZES = make_sizes("sit", "s", "b", "l", "xl")

FAMILY = Family(
    name="SiT",
    model=SiT,
    sizes=SIZES,
    published_names=make_published_names("SiT", SIZES),
    signs=SIGNS,
    label_tables=(LABEL_TABLE,),
    read_sizes=read_sizes,
    check_weights=warn_of_dit_weights,
    published={
        "SiT-XL-2-256x256.pt": Published(
            model="sit_xl_2",
            num_training_images=IMAGES_OF_7M_STEPS,
            other_names=("SiT-XL-2-256.pt",),  # on the server
            url="https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1",
        )
    },
    check_export=warn_of_frequency_shift,
)
