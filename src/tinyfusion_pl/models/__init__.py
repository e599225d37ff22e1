"""Denoisers by name, and their weights on disk."""

from tinyfusion_pl.models.checkpoints import load_checkpoint, load_weights
from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.dit import DiT
from tinyfusion_pl.models.export import export_model
from tinyfusion_pl.models.family import Family
from tinyfusion_pl.models.mar import MAR, MaskedTokens
from tinyfusion_pl.models.pretrained import load_denoiser, load_pretrained
from tinyfusion_pl.models.registry import (
    create_model,
    discover_families,
    list_models,
    register_family,
    register_model,
)
from tinyfusion_pl.models.shallow import library_versions, load_decision, load_shallow, save_shallow
from tinyfusion_pl.models.sit import SiT
from tinyfusion_pl.models.udit import UDiT, merged
from tinyfusion_pl.models.uvit import UViT

__all__ = [
    "MAR",
    "Denoiser",
    "DiT",
    "Family",
    "MaskedTokens",
    "SiT",
    "UDiT",
    "UViT",
    "create_model",
    "export_model",
    "library_versions",
    "list_models",
    "load_checkpoint",
    "load_decision",
    "load_denoiser",
    "load_pretrained",
    "load_shallow",
    "load_weights",
    "merged",
    "register_family",
    "register_model",
    "save_shallow",
]

discover_families(__path__)
