"""Custom feature networks: any module, or a timm model by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics.features import Features, check_images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModuleFeatures(nn.Module):
    """Wrap a module as a feature network.

    Images, uint8 (N, C, H, W), are resized, scaled to [0, 1], normalized and passed to the module.

    Args:
        module: Returns features (N, D), or features and logits, or `Features`.
        num_features: D.
        num_classes: Width of the logits, if it returns them.
        num_spatial: Width of the spatial features, if it returns them.
        image_size: Height and width that it expects; None: images are not resized.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialiasing.
        mean: Mean of each channel, in [0, 1] (default: that of ImageNet).
        std: Standard deviation of each channel, in [0, 1] (default: that of ImageNet).
        name: Name in references and results; default: that of the module's class.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        num_features: int,
        num_classes: int | None = None,
        num_spatial: int | None = None,
        image_size: int | None = None,
        interpolation: str = "bilinear",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {interpolation!r}; give 'bilinear' or 'bicubic'.")
        self.module = module
        self.num_features = num_features
        self.num_classes, self.num_spatial = num_classes, num_spatial
        self.image_size, self.interpolation = image_size, interpolation
        self.name = name or type(module).__name__
        self.preprocessing: dict[str, Any] = {
            "image_size": image_size,
            "interpolation": interpolation,
        }
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Features:
        """Return the `Features` of images, uint8 (N, C, H, W)."""
        check_images(images, num_channels=self.mean.shape[1])
        x = images.float() / 255
        if self.image_size is not None:
            x = resize(
                x,
                [self.image_size] * 2,
                interpolation=InterpolationMode(self.interpolation),
                antialias=True,
            )
        output = self.call((x - self.mean) / self.std)
        if isinstance(output, Features):
            return output
        return Features(*output) if isinstance(output, (tuple, list)) else Features(output)

    def call(self, x: Tensor) -> Any:
        """Run the module on normalized images (N, C, H', W')."""
        return self.module(x)


class TimmFeatures(ModuleFeatures):
    """A timm model: its features before the head, and the output of the head as logits.

    FD-DINOv2 (Stein et al. 2306.04675) is a `FrechetDistance` over
    ``vit_large_patch14_dinov2.lvd142m`` at image size 224 with ``global_pool="token"``. CMMD is a
    `GaussianMMD` of the ``logits`` (the projected embedding) of
    ``vit_large_patch14_clip_quickgelu_336.openai``; CLIP was trained with QuickGELU, so the
    variant without ``quickgelu`` has the wrong activation.

    Args:
        model_name: Name of a timm model.
        pretrained: Load the weights of timm, downloaded once.
        checkpoint_path: File of weights to load instead.
        image_size: Height and width of its input; default: that of the model.
        kwargs: Arguments of ``timm.create_model``.

    Raises:
        ValueError: for a name that is not in timm.
        ArtifactError: if the weights cannot be loaded.
    """

    module: nn.Module

    def __init__(
        self,
        model_name: str,
        *,
        pretrained: bool = True,
        checkpoint_path: str | os.PathLike | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        import timm
        from timm.data import resolve_model_data_config

        if not timm.is_model(model_name.split(".")[0]):
            raise ValueError(
                f"timm has no model {model_name!r}. timm.list_models('*dino*') lists names."
            )
        if image_size is not None and "vit" in model_name:
            kwargs["img_size"] = image_size  # size of the position embeddings
        try:
            model: Any = timm.create_model(
                model_name, pretrained=pretrained and checkpoint_path is None, **kwargs
            )
            if checkpoint_path is not None:
                timm.models.load_checkpoint(model, str(checkpoint_path))
        except Exception as error:  # hub and file errors have many types
            where = checkpoint_path or "timm's hub"
            raise ArtifactError(
                f"The weights of {model_name} could not be loaded from {where} "
                f"({_first_line(error)}). Download them separately and give the file as "
                "checkpoint_path."
            ) from error
        config = resolve_model_data_config(model)
        super().__init__(
            model.eval(),
            num_features=model.num_features,
            num_classes=model.num_classes or None,
            image_size=image_size or config["input_size"][-1],
            interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
            mean=config["mean"],
            std=config["std"],
            name=model_name,
        )
        # Options such as the pooling have no weights, but determine the features.
        self.preprocessing |= {name: str(value) for name, value in sorted(kwargs.items())}

    def call(self, x: Tensor) -> Features:
        """Return features and logits of normalized images (N, C, H', W')."""
        model: Any = self.module  # timm declares no type for these methods
        maps = model.forward_features(x)
        logits = model.forward_head(maps) if self.num_classes else None
        return Features(model.forward_head(maps, pre_logits=True), logits)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
