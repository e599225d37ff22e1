"""The autoencoder between images and latents: diffusers' AutoencoderKL from a folder, the Hugging Face hub or a CompVis checkpoint.

Published: DiT, SiT, U-ViT and U-DiT work on Stable Diffusion's VAE (8 times smaller, 4 channels,
scaled by 0.18215; Rombach et al.,
arXiv 2112.10752), MAR on a KL-16 of its own (16 times smaller, 16 channels, scaled by 0.2325; Li et
al., arXiv 2406.11838).
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data.vae_files import read_vae_folder, vae_folder
from tinyfusion_pl.data.vae_keys import as_diffusers, without_prefix
from tinyfusion_pl.models import load_checkpoint
from tinyfusion_pl.models.fitting import check_values, fit_weights

RANDOM = "random"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd": {
        "block_out_channels": (128, 256, 512, 512),
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "mar": {
        "block_out_channels": (128, 128, 256, 256, 512),
        "latent_channels": 16,
        "scaling_factor": 0.2325,
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    },
}


class VAE:
    """Images to latents and back, in batches.

    Args:
        model: A diffusers ``AutoencoderKL``, put into evaluation mode.
        source: Where its weights are from, for records and messages.
        scaling_factor: Of latents; None: that of the model's configuration.
        batch_size: Images that go through it at once, >= 1.
        precision: ``"float32"`` or ``"bfloat16"``, of weights and computation.
        slicing: Work on one image of a batch at a time: less memory.
        tiling: Work on overlapping tiles of large images: less memory, slightly other results.
    """

    def __init__(
        self,
        model: Any,
        *,
        source: str,
        scaling_factor: float | None = None,
        batch_size: int = 32,
        precision: str = "float32",
        slicing: bool = False,
        tiling: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"The VAE's precision is {precision!r}; give one of {', '.join(map(repr, PRECISIONS))}."
            )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"The VAE's batch_size is {batch_size!r}; give a count >= 1.")
        if getattr(model.config, "shift_factor", None):
            raise ValueError(
                f"The VAE of {source} shifts its latents (shift_factor {model.config.shift_factor}); those of the denoisers "
                "here are scaled only. Give Stable Diffusion's VAE (DiT, SiT, U-ViT, U-DiT) or MAR's."
            )
        if any(
            getattr(model.config, name, None) is not None
            for name in ("latents_mean", "latents_std")
        ):
            raise ValueError(
                f"The VAE of {source} normalises its latents channel by channel (latents_mean, latents_std); those of the "
                "denoisers here are scaled only. Give Stable Diffusion's VAE (DiT, SiT, U-ViT, U-DiT) or MAR's."
            )
        factor = model.config.scaling_factor if scaling_factor is None else scaling_factor
        if type(factor) not in (int, float) or not 0 < factor < math.inf:
            of = f" in the config of {source}" if scaling_factor is None else ""
            raise ValueError(
                f"The VAE's scaling_factor is {factor!r:.80}{of}; give a number > 0 (Stable Diffusion 0.18215, MAR 0.2325)."
            )
        self.scaling_factor = float(factor)
        self.source, self.batch_size = source, batch_size
        self.num_channels = int(model.config.latent_channels)
        self.downsampling = 2 ** (len(model.config.block_out_channels) - 1)
        self._encoder = encoder_fingerprint(model)  # of the weights as they are in the file
        if (
            model.dtype != PRECISIONS[precision]
        ):  # without need diffusers' `to` says things about nothing
            model.to(PRECISIONS[precision])
        self.model = model.eval().requires_grad_(False)
        (model.enable_slicing if slicing else model.disable_slicing)()
        (model.enable_tiling if tiling else model.disable_tiling)()

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square images. ValueError for a size that is no multiple of `downsampling`."""
        if image_size < 1 or image_size % self.downsampling:
            raise ValueError(
                f"image_size is {image_size}; the VAE of {self.source} takes multiples of {self.downsampling}."
            )
        return self.num_channels, image_size // self.downsampling, image_size // self.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) to the posterior's mean and log-variance, (N, 2C, h, w) float32, not scaled."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"The VAE takes uint8 images (N, 3, H, W); these are {images.dtype} {tuple(images.shape)}."
            )
        self.model.to(images.device)
        moments = []
        for part in images.split(self.batch_size):
            x = part.to(self.model.dtype) / 127.5 - 1  # (n, 3, H, W) in [-1, 1]
            moments.append(self.model.encode(x).latent_dist.parameters.float())  # (n, 2C, h, w)
        return torch.cat(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to uint8 images (N, 3, H, W) on their device.

        Raises:
            ValueError: for latents of another channel count, or that are not finite.
        """
        if latents.ndim != 4 or latents.shape[1] != self.num_channels:
            raise ValueError(
                f"The VAE of {self.source} decodes latents (N, {self.num_channels}, h, w); these are {tuple(latents.shape)}. "
                "Give the VAE that the denoiser's latents are from."
            )
        if not torch.isfinite(latents).all():
            raise ValueError(
                "The latents hold values that are not finite: the model that made them has diverged."
            )
        self.model.to(latents.device)
        images = []
        for part in latents.split(self.batch_size):
            x = self.model.decode(
                (part.float() / self.scaling_factor).to(self.model.dtype)
            ).sample  # (n, 3, H, W) in [-1, 1]
            images.append((x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8))
        return torch.cat(images)

    def record(self) -> dict[str, Any]:
        """What latents must share to be of this VAE, and where it is from: plain data."""
        return {
            "source": self.source,
            "num_channels": self.num_channels,
            "downsampling": self.downsampling,
            "scaling_factor": self.scaling_factor,
            "encoder": self._encoder,
        }


def load_vae(
    source: str | Path | None,
    *,
    architecture: str = "sd",
    variant: str | None = None,
    **options: Any,
) -> VAE:
    """A `VAE`.

    Args:
        source: A folder as diffusers writes it, or of a pipeline that has ``vae/``; a checkpoint
            file in CompVis's layout (MAR's ``kl16.ckpt``) or of diffusers' names, those of its
            attention layers older or newer; the name of a hub repository
            (``stabilityai/sd-vae-ft-ema``); or ``"random"``.
        architecture: ``"sd"`` or ``"mar"``: what a file, or ``"random"``, is built as. A folder or
            repository says it itself.
        variant: Of a folder or repository, ``"fp16"`` for
            ``diffusion_pytorch_model.fp16.safetensors``; None: the plain file or, in a folder that
            has none, its only variant.
        options: See `VAE`.

    Raises:
        ValueError: for an unknown architecture, or weights that do not fit it.
        ArtifactError: when it cannot be had; says what to put where.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"vae.architecture is {architecture!r}; give one of {', '.join(map(repr, ARCHITECTURES))}."
        )
    if source is None:
        raise ValueError(
            "The VAE has no weights: vae.source is not set. Give the path of MAR's kl16.ckpt (its repository LTH14/mar says "
            "where it is), or of a folder or checkpoint of another VAE; 'random' is a randomly initialised one, for dry runs."
        )
    path = Path(source)
    if variant is not None and (str(source) == RANDOM or path.is_file()):
        raise ValueError(
            f"vae.variant is {variant!r}, which is of a folder or a hub repository; vae.source={source} is none. Give "
            "vae.variant=null."
        )
    if str(source) == RANDOM:
        rank_zero_warn(
            f"The VAE is randomly initialised (architecture {architecture!r}): its latents and its images mean nothing."
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same one each time: what it encoded is its own
            model = _new(architecture)
    elif path.is_dir():
        model = read_vae_folder(vae_folder(path), variant=variant)
    elif path.suffix in SUFFIXES:
        state = load_checkpoint(path, weights="raw")
        model = fit_weights(
            _new(architecture), as_diffusers(without_prefix(state, path)), path, fresh=True
        )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.exists():
        model = _from_hub(str(source), variant)
    else:
        raise ArtifactError(
            f"There is no VAE at {source}. Give a folder with config.json and diffusion_pytorch_model.safetensors, a "
            f"checkpoint ({', '.join(SUFFIXES)}), a hub repository as OWNER/NAME, or 'random'."
        )
    return VAE(model, source=str(source), **options)


def encoder_fingerprint(model: Any) -> str:
    """16 hexadecimal digits over the encoder's weights, rounded to float16: the same for a half precision copy, and for VAEs that differ in
    the decoder alone, as sd-vae-ft-ema and sd-vae-ft-mse do.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(
                name.encode() + tensor.detach().cpu().half().contiguous().numpy().tobytes()
            )
    return digest.hexdigest()[:16]


def _new(architecture: str) -> Any:
    from diffusers import AutoencoderKL  # seconds to import, and only needed here

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        sample_size=256,
        **ARCHITECTURES[architecture],
    )


def _from_hub(name: str, variant: str | None) -> Any:
    from diffusers import AutoencoderKL

    remedy = (
        f"Where there is no network, download config.json and diffusion_pytorch_model.safetensors from https://huggingface.co/{name} "
        "into a folder and give vae.source=FOLDER."
    )
    try:
        model, found = AutoencoderKL.from_pretrained(
            name,
            variant=variant,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds: hub, network, safetensors, shapes
        raise ArtifactError(
            f"The VAE {name} cannot be loaded ({_first_line(error)}). {remedy}"
        ) from error
    if lacking := [
        *found["missing_keys"],
        *found["mismatched_keys"],
    ]:  # which diffusers leaves at random values
        raise ArtifactError(
            f"The VAE {name} lacks {len(lacking)} weights, {', '.join(map(str, lacking[:3]))} among them. {remedy}"
        )
    check_values(model.state_dict(), name)
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
