"""Data sets as LightningDataModules of latents and labels, in an order that survives an interruption."""

from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.digits import DigitsDataModule
from tinyfusion_pl.data.latents import ImageNetLatents
from tinyfusion_pl.data.sampler import StreamLoader, StreamSampler

__all__ = ["DigitsDataModule", "GenerationDataModule", "ImageNetLatents", "StreamLoader", "StreamSampler"]
