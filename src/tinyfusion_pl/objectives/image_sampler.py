"""Sampling of numbered images: a number gives the same image on any batch size and devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyfusion_pl.protocols import Objective

# The published scripts guide 3 channels, whatever the latents; with fewer, all are guided.
PUBLISHED_CHANNELS = 3
LABELS = ("balanced", "random")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample_noise(indices: Sequence[int] | Tensor, shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normal noise (N, *shape) that depends only on the sample's index and the seed."""
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=_generator(index, seed))
            for index in torch.as_tensor(indices).tolist()
        ]
    )


def balanced_labels(num_samples: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ... (num_samples,), as balanced as possible."""
    return torch.arange(num_samples) % num_classes


def random_labels(num_samples: int, num_classes: int, *, seed: int) -> Tensor:
    """Labels (num_samples,) drawn uniformly; that of sample i does not depend on `num_samples`."""
    return torch.randint(num_classes, (num_samples,), generator=_generator(0, seed))


def get_labels(
    kind: str,
    num_samples: int,
    num_classes: int,
    *,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """Labels (num_samples,), ``"balanced"`` or ``"random"``.

    They come from `classes`; None: from all `num_classes` of the model.
    """
    if kind not in LABELS:
        raise ValueError(f"labels is {kind!r}; give one of {', '.join(map(repr, LABELS))}.")
    if classes is not None and (not classes or min(classes) < 0 or max(classes) >= num_classes):
        given = f"{min(classes)} to {max(classes)}" if classes else "empty"
        raise ValueError(
            f"The data's classes are {given}, but the model has classes 0 to {num_classes - 1}. "
            "Give a model of these classes, or data of its classes."
        )
    num = num_classes if classes is None else len(classes)
    labels = (
        balanced_labels(num_samples, num)
        if kind == "balanced"
        else random_labels(num_samples, num, seed=seed + 2)
    )
    return labels if classes is None else torch.tensor(classes)[labels]


@dataclass(kw_only=True)
class ImageSampler:
    """Samples images with a denoiser.

    Args:
        denoiser: Runs in evaluation mode; its mode is restored afterwards.
        objective: Makes latents with its ``sample``.
        latent_shape: (C, H, W) of the denoiser's input.
        decode: Latents (N, C, H, W) -> uint8 images (N, C', H', W').
        sampling: Arguments of ``objective.sample``: num_sampling_steps, sampler, guidance_scale,
            ...
        seed: Seed of the noise.
        precision: Precision of the denoiser: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` by
            autocast. The sampler itself stays in float32.
        compile: Compile the denoiser, and the methods that the objective calls, with
            ``torch.compile``.
    """

    denoiser: nn.Module
    objective: Objective
    latent_shape: Sequence[int]
    decode: Callable[[Tensor], Tensor]
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    precision: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}; give one of {', '.join(map(repr, PRECISIONS))}."
            )
        self._denoise = _Denoise(
            self.denoiser, dtype=PRECISIONS[self.precision], compile=self.compile
        )

    def check(self) -> None:
        """Raise ValueError for sampling options that do not fit the objective or the denoiser."""
        if self.sampling.get("guidance_scale", 1) != 1 and not getattr(
            self.denoiser, "has_null_label", True
        ):
            raise ValueError(
                f"guidance_scale is {self.sampling['guidance_scale']}, but the denoiser has no "
                "null label (class_dropout_prob=0), so guidance is not possible. Set "
                "guidance_scale=1."
            )
        self.objective.check_sampling(**self.sampling)
        channels, num = self.sampling.get("guidance_channels"), self.latent_shape[0]
        if channels is not None and channels > max(num, PUBLISHED_CHANNELS):
            raise ValueError(
                f"guidance_channels is {channels}, but the latents have {num} channels. Give "
                f"{num} or fewer, or null for all."
            )
        if 0 <= (scale := self.sampling.get("guidance_scale", 1)) < 1:
            warnings.warn(
                f"guidance_scale is {scale}, which samples "
                f"{'without labels' if scale == 0 else 'with weakened labels'}: 1 disables "
                f"guidance. For U-ViT's cfg.sample.scale={scale}, set "
                f"guidance_scale={scale + 1:g}.",
                stacklevel=2,
            )

    @torch.no_grad()
    def __call__(
        self, indices: Tensor, labels: Tensor, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Sample uint8 images (N, C, H, W) number `indices` (N,) with `labels` (N,) on `device`."""
        z = sample_noise(indices, self.latent_shape, seed=self.seed)
        options = dict(self.sampling)
        if num_noises := self.objective.num_noises(**options):
            options["noise"] = (
                sample_noise(indices, (num_noises, *self.latent_shape), seed=self.seed + 1)
                .transpose(0, 1)
                .to(device)
            )
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            latents = self.objective.sample(
                self._denoise, z.to(device), labels.to(device), **options
            )
        finally:
            self.denoiser.train(was_training)
        if (bad := ~torch.isfinite(latents).flatten(1).all(1)).any():
            numbers = torch.as_tensor(indices).to(bad.device)[bad].tolist()
            raise ValueError(
                f"{len(numbers)} of {len(latents)} samples contain NaN or infinity (numbers "
                f"{numbers[:8]}): the model has diverged, or its precision is too low."
            )
        return self.decode(latents)


class _Denoise:
    """A denoiser that runs in its own precision and returns the dtype of its input.

    Applies to calls and to methods, for objectives that call parts of a denoiser.
    """

    def __init__(self, denoiser: nn.Module, *, dtype: torch.dtype | None, compile: bool) -> None:
        self.denoiser, self.dtype, self.compile = denoiser, dtype, compile
        self.parts: dict[str, Callable[..., Tensor]] = {}

    @property
    def num_classes(self) -> int:
        """The null label of the denoiser."""
        return cast(int, self.denoiser.num_classes)

    def __call__(self, *args: Tensor) -> Tensor:
        return self._part("forward", self.denoiser)(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask before `denoiser` is set
            raise AttributeError(name)
        found = getattr(self.denoiser, name)
        return self._part(name, found) if callable(found) else found

    def _part(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name not in self.parts:
            self.parts[name] = _InPrecision(
                torch.compile(function) if self.compile else function, self.dtype
            )
        return self.parts[name]


class _InPrecision:
    """Runs a function under autocast and casts its output to the dtype of its first argument."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype | None) -> None:
        self.function, self.dtype = function, dtype

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        with (
            nullcontext() if self.dtype is None else torch.autocast(x.device.type, dtype=self.dtype)
        ):
            return self.function(x, *args).to(x.dtype)


def _generator(index: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
