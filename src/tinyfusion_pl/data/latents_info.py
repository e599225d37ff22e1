"""The description of a folder of latents, ``latents.json``."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError

FINISHED, UNFINISHED = "latents.json", "extraction.json"
LABELLED_BY = ("order", "imagenet", "file", "class_to_idx")  # see `label_classes`
CONTENTS = {"moments": 2, "sample": 1}  # content -> stored channels per channel of a latent
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """The content of ``latents.json``.

    Args:
        content: ``"moments"`` (mean and log-variance) or ``"sample"``.
        dtype: ``"float32"`` or ``"float16"``.
        latent_shape: (C, h, w) as a denoiser sees it.
        num_samples: Samples in all shards, including `skipped`.
        shard_size: Samples per shard, except the last.
        image_size: Height and width of the images.
        vae: `VAE.record`: source, num_channels, downsampling, scaling_factor, encoder.
        images: Source of the images.
        listing: Digest of their names and labels; see `LabelledImages.listing`.
        seed: Seed of the noise of stored samples.
        classes: Names of the classes.
        class_names: Their descriptions, if known.
        indices: Label of each class; None: 0, 1, ...
        labelled_by: Source of the labels; see `label_classes`.
        skipped: Name -> number of the samples whose images were broken or removed.
    """

    content: str
    dtype: str
    latent_shape: tuple[int, int, int]
    num_samples: int
    shard_size: int
    image_size: int
    vae: dict[str, Any]
    images: str
    listing: str
    seed: int
    classes: list[str] = field(repr=False)
    class_names: list[str] | None = field(default=None, repr=False)
    indices: list[int] | None = field(default=None, repr=False)
    labelled_by: str = "order"
    skipped: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def labels_per_class(self) -> list[int]:
        """Label of each of `classes`."""
        return list(range(len(self.classes))) if self.indices is None else self.indices

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.num_samples / self.shard_size)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape (C', h, w) of a stored sample."""
        channels, height, width = self.latent_shape
        return channels * CONTENTS[self.content], height, width

    def samples(self, shard: int) -> range:
        """Return the numbers of the samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples))

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON."""
        return {**asdict(self), "latent_shape": list(self.latent_shape)}

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> LatentsInfo:
        """Check and convert the content of `path`; `ArtifactError` if it is invalid."""
        try:
            info = cls(**{**content, "latent_shape": tuple(content["latent_shape"])})
            _check_types(info)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} does not describe latents ({error}). Extract them again."
            ) from error
        return info

    def fingerprint(self) -> str:
        """Return a digest (16 hex digits) of `identity`, which each shard records."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """Return what determines the values, independent of where images and VAE are."""
        content = self.as_dict()
        content["vae"] = {key: value for key, value in self.vae.items() if key != "source"}
        if self.indices is None:
            del content["indices"]  # keeps the fingerprints of older extractions
        return {
            key: value
            for key, value in content.items()
            if key not in ("images", "labelled_by", "skipped")
        }


def _check_types(info: LatentsInfo) -> None:
    """Raise ValueError, TypeError, KeyError or AttributeError for an invalid description."""
    numbers = {name: getattr(info, name) for name in ("num_samples", "shard_size", "image_size")}
    for name, value in {
        **numbers,
        **{f"latent_shape[{i}]": side for i, side in enumerate(info.latent_shape)},
    }.items():
        if type(value) is not int or not 1 <= value < 2**40:
            raise ValueError(f"{name} is {value!r:.80}")
    if info.content not in CONTENTS or info.dtype not in DTYPES or len(info.latent_shape) != 3:
        raise ValueError(
            f"content is {info.content!r:.80}, dtype {info.dtype!r:.80}, latent_shape "
            f"{info.latent_shape!r:.80}"
        )
    factor = info.vae["scaling_factor"]
    if (
        isinstance(factor, bool)
        or not isinstance(factor, (int, float))
        or not 0 < factor < math.inf
    ):
        raise ValueError(f"vae.scaling_factor is {factor!r:.80}")
    for name in ("source", "encoder"):
        if not isinstance(info.vae[name], str):
            raise ValueError(f"vae.{name} is {info.vae[name]!r:.80}")
    if (
        info.labelled_by not in LABELLED_BY
        or not isinstance(info.images, str)
        or not isinstance(info.listing, str)
    ):
        raise ValueError(
            f"labelled_by is {info.labelled_by!r:.80}, images {info.images!r:.80}, listing "
            f"{info.listing!r:.80}"
        )
    if (
        not isinstance(info.classes, list)
        or not info.classes
        or not all(isinstance(name, str) for name in info.classes)
    ):
        raise ValueError("classes is no list of names")
    if info.indices is not None and (
        len(info.indices) != len(info.classes) or not all(type(i) is int for i in info.indices)
    ):
        raise ValueError("indices is no list of the classes' labels")
    if not all(
        type(number) is int and 0 <= number < info.num_samples for number in info.skipped.values()
    ):
        raise ValueError("skipped holds numbers that are no sample's")
