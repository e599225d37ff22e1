"""Small images, a small VAE (2 times smaller, 4 channels) and latents extracted with it, for the tests of all three."""

import io
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Trainer
from PIL import Image

from tinyfusion_pl.data import load_vae
from tinyfusion_pl.tasks import Extract, extract_latents

NUM_IMAGES, CLASSES = 10, ("n01", "n02", "n10")
TRAINER = partial(
    Trainer,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    use_distributed_sampler=False,
)


def autoencoder(*, seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    model = AutoencoderKL(**{**settings, **overrides})
    # means of the scale of Stable Diffusion's, so that scaled ones have a standard deviation of
    # about 1
    with torch.no_grad():
        for parameter in model.quant_conv.parameters():
            parameter[: model.config.latent_channels] *= 6
    return model


def image(number, size=(20, 17)):
    """A smooth colour image (width, height) that is not its own mirror image."""
    values = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def write_images(folder):
    """`NUM_IMAGES` PNG images in class folders, labels 0, 1, 2, 0, ... by number."""
    for i in range(NUM_IMAGES):
        place = folder / CLASSES[i % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        image(i).save(place / f"{i}.png")
    return folder


def pack(path, *, names=True):
    """The same images as an npz of image files."""
    files = []
    for i in range(NUM_IMAGES):
        image(i).save(buffer := io.BytesIO(), "png")
        files.append(buffer.getvalue())
    arrays = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(NUM_IMAGES, dtype=np.int16) % len(CLASSES),
    }
    if names:
        arrays |= {"wnids": np.array(CLASSES), "names": np.array(["tench", "shark", "hen"])}
    np.savez(path, **arrays)
    return path


def extract(folder, images, output, **settings):
    settings = {
        "image_size": 8,
        "shard_size": 4,
        "save_every": 2,
        "batch_size": 2,
        "trainer": TRAINER,
        "vae": vae_in(folder),
        **settings,
    }
    return extract_latents(
        run_dir=folder, extract=Extract(images=str(images), output=str(output), **settings)
    )


def vae_in(folder, **overrides):
    """What loads the small VAE in ``folder/vae``, written there when it is not."""
    if not (folder / "vae").exists():
        autoencoder(**overrides).save_pretrained(folder / "vae")
    return partial(load_vae, folder, batch_size=4)
