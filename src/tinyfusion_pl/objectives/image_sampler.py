"""Images of numbered samples: the same number gives the same image, whatever the batch, the devices or their number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PUBLISHED_CHANNELS = 3  # guided by the published scripts, whatever the latents: a model of fewer has all of them guided
LABELS = ("balanced", "random")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample_noise(indices: Sequence[int] | Tensor, shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normal noise (N, *shape) that depends on the sample's index and the seed alone, not on batches or devices."""
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=_generator(index, seed))
            for index in torch.as_tensor(indices).tolist()
        ]
    )


def balanced_labels(num_samples: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ... (num_samples,): as equal in number as they can be."""
    return torch.arange(num_samples) % num_classes


def random_labels(num_samples: int, num_classes: int, *, seed: int) -> Tensor:
    """Labels (num_samples,) drawn uniformly; sample i has the same one however many there are."""
    return torch.randint(num_classes, (num_samples,), generator=_generator(0, seed))


def get_labels(
    kind: str,
    num_samples: int,
    num_classes: int,
    *,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """Labels (num_samples,), ``"balanced"`` or ``"random"``, of the `classes` given; None: of all `num_classes` that the model knows."""
    if kind not in LABELS:
        raise ValueError(f"labels is {kind!r}; give one of {', '.join(map(repr, LABELS))}.")
    if classes is not None and (not classes or min(classes) < 0 or max(classes) >= num_classes):
        given = f"{min(classes)} to {max(classes)}" if classes else "none at all"
        raise ValueError(
            f"The data's classes are {given}, but the model knows the classes 0 to {num_classes - 1}. Give a model of these "
            "classes, or data of its classes."
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
    """Samples images from a denoiser.

    Args:
        denoiser: Called in evaluation mode, and left in the mode it was in.
        objective: Has ``sample``.
        latent_shape: (C, H, W) of what the denoiser works on.
        decode: Latents (N, C, H, W) -> uint8 images (N, C', H', W').
        sampling: Arguments of ``objective.sample``: num_sampling_steps, sampler, guidance_scale, guidance_channels, ...
        seed: Of the noise.
        precision: The denoiser's: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` by autocast. The process around it stays in float32.
        compile: Run the denoiser, and those of its methods that the objective calls, through ``torch.compile``.
    """

    denoiser: nn.Module
    objective: Any
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
        """Raise the ValueError that sampling with these options would raise."""
        if self.sampling.get("guidance_scale", 1) != 1 and not getattr(
            self.denoiser, "has_null_label", True
        ):
            raise ValueError(
                f"guidance_scale is {self.sampling['guidance_scale']}, but the denoiser has no null label "
                "(class_dropout_prob=0): it cannot be guided. Set guidance_scale to 1."
            )
        self.objective.check_sampling(**self.sampling)
        channels, num = self.sampling.get("guidance_channels"), self.latent_shape[0]
        if channels is not None and channels > max(num, PUBLISHED_CHANNELS):
            raise ValueError(
                f"guidance_channels is {channels}, but the latents have {num} channels. Give {num} or fewer, or null for all."
            )
        if 0 <= (scale := self.sampling.get("guidance_scale", 1)) < 1:
            warnings.warn(
                f"guidance_scale is {scale}, which samples "
                f"{'without labels' if scale == 0 else 'with less than the labels say'}: "
                f"1 is no guidance here. If it is meant as U-ViT counts, give {scale + 1:g}.",
                stacklevel=2,
            )

    @torch.no_grad()
    def __call__(
        self, indices: Tensor, labels: Tensor, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """uint8 images (N, C, H, W) of samples `indices` (N,) with `labels` (N,), made on `device`."""
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
                f"{len(numbers)} of {len(latents)} samples hold values that are not finite (numbers {numbers[:8]}): the model "
                "has diverged, or its precision is too low for it."
            )
        return self.decode(latents)


class _Denoise:
    """A denoiser in its own precision, seen by the process around it in the precision of what goes in.

    That holds for calling it and for its methods, where an objective calls parts of it.
    """

    def __init__(self, denoiser: nn.Module, *, dtype: torch.dtype | None, compile: bool) -> None:
        self.denoiser, self.dtype, self.compile = denoiser, dtype, compile
        self.parts: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, *args: Tensor) -> Tensor:
        return self._part("forward", self.denoiser)(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of copying and pickling, which ask before there is a denoiser
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
    """A function of tensors under autocast, whose output has the dtype of its first argument."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype | None) -> None:
        self.function, self.dtype = function, dtype

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        with (
            nullcontext() if self.dtype is None else torch.autocast(x.device.type, dtype=self.dtype)
        ):
            return self.function(x, *args).to(x.dtype)


def _generator(index: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
