"""Data modules of latents and labels whose order is resumable, and the VAE of the latents."""

from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.digits import DigitsDataModule
from tinyfusion_pl.data.images import open_images
from tinyfusion_pl.data.latents import ImageNetLatents
from tinyfusion_pl.data.pixels import PixelImages
from tinyfusion_pl.data.sampler import StreamLoader, StreamSampler
from tinyfusion_pl.data.shards import LatentShards
from tinyfusion_pl.data.vae import VAE, load_vae

__all__ = [
    "VAE",
    "DigitsDataModule",
    "GenerationDataModule",
    "ImageNetLatents",
    "LatentShards",
    "PixelImages",
    "StreamLoader",
    "StreamSampler",
    "load_vae",
    "open_images",
]
