"""Feature networks of one's choice: any module, or a timm model by name."""

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
    """A module as a feature network: uint8 images (N, C, H, W) are resized, scaled to [0, 1], normalised and given to it.

    Args:
        module: Gives features (N, D), or features and logits, or `Features`.
        num_features: D.
        num_classes: Width of the logits, where it gives them.
        num_spatial: Width of the spatial features, where it gives them.
        image_size: Height and width it takes; None: images stay as large as they are.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialias.
        mean, std: Of each channel, in [0, 1] (default: ImageNet's).
        name: Goes into references and results.
    """

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
        self.num_features, self.num_classes, self.num_spatial = (
            num_features,
            num_classes,
            num_spatial,
        )
        self.image_size, self.interpolation = image_size, interpolation
        self.name = name or type(module).__name__
        self.preprocessing = {"image_size": image_size, "interpolation": interpolation}
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Features:
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
        return (
            output
            if isinstance(output, Features)
            else Features(*output)
            if isinstance(output, (tuple, list))
            else Features(output)
        )

    def call(self, x: Tensor) -> Any:
        """What the module says of normalised images (N, C, H', W')."""
        return self.module(x)


class TimmFeatures(ModuleFeatures):
    """A timm model: its features before the head, and the head's output as logits.

    FD-DINOv2 (Stein et al. 2306.04675) is a `FrechetDistance` over ``vit_large_patch14_dinov2.lvd142m`` at image size 224 with
    ``global_pool="token"``; CMMD a `GaussianMMD` of the ``logits`` (the projected embedding) of
    ``vit_large_patch14_clip_quickgelu_336.openai`` (the variant without ``quickgelu`` has another activation than CLIP was trained with).

    Args:
        model_name: A name that timm knows.
        pretrained: Load timm's weights, downloaded once.
        checkpoint_path: A file of weights in place of them.
        image_size: Default: the model's own.
        kwargs: For ``timm.create_model``.

    Raises:
        ValueError: for a name that timm does not know.
        ArtifactError: when the weights cannot be had.
    """

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
                f"timm knows no model {model_name!r}. timm.list_models('*dino*') lists names."
            )
        if image_size is not None and "vit" in model_name:
            kwargs["img_size"] = image_size  # position embeddings are made for it
        try:
            model = timm.create_model(
                model_name, pretrained=pretrained and checkpoint_path is None, **kwargs
            )
            if checkpoint_path is not None:
                timm.models.load_checkpoint(model, str(checkpoint_path))
        except Exception as error:  # hub and file errors are of many types
            where = checkpoint_path or "timm's hub"
            raise ArtifactError(
                f"The weights of {model_name} cannot be had from {where} ({_first_line(error)}). Download them elsewhere "
                "and give the file as checkpoint_path."
            ) from error
        config = resolve_model_data_config(model)
        super().__init__(
            model.eval(),
            num_features=model.num_features,
            num_classes=model.num_classes or None,
            image_size=image_size or config["input_size"][-1],
            interpolation=config["interpolation"]
            if config["interpolation"] == "bicubic"
            else "bilinear",
            mean=config["mean"],
            std=config["std"],
            name=model_name,
        )
        self.preprocessing |= {
            name: str(value) for name, value in sorted(kwargs.items())
        }  # a pooling has no weights, and decides

    def call(self, x: Tensor) -> Features:
        maps = self.module.forward_features(x)
        return Features(
            self.module.forward_head(maps, pre_logits=True),
            self.module.forward_head(maps) if self.num_classes else None,
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
