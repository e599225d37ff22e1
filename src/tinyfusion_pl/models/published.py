"""Published checkpoints by name, and their download into torch's cache folder.

URLs are those that the projects give. No project publishes sizes or checksums, so none are stated;
the length that the server states is always checked.
"""

from __future__ import annotations

from pathlib import Path, PurePath

from tinyfusion_pl.models.download import NotOnServerError, cache_folder, fetch
from tinyfusion_pl.models.family import Published
from tinyfusion_pl.models.registry import PUBLISHED

__all__ = [
    "DIFFUSERS_WEIGHTS",
    "PUBLISHED",
    "Published",
    "fetch_published",
    "find_published",
    "published_name",
]

DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def published_name(name: str) -> str:
    """The key of `PUBLISHED` for a file name that a checkpoint also has; other names unchanged."""
    return next(
        (key for key, record in PUBLISHED.items() if name in record.other_names),
        name,
    )


def find_published(path: str | Path) -> Published | None:
    """The published checkpoint that `path` is a copy of, by its file name."""
    return PUBLISHED.get(published_name(PurePath(path).name))


def fetch_published(name: str) -> Path:
    """File or folder of the published checkpoint `name` in torch's cache, downloaded if missing.

    Raises:
        ArtifactError: It is missing and the download failed; the message names the URL and where
            to put the file.
    """
    record = PUBLISHED[name]
    path = cache_folder() / (record.file or name)
    if not record.is_folder:
        return fetch(record.url, path, size=record.size, sha256=record.sha256)
    fetch(f"{record.url}/transformer/config.json", path / "transformer" / "config.json")
    if any((path / "transformer" / weights).exists() for weights in DIFFUSERS_WEIGHTS):
        return path
    preferred, other = DIFFUSERS_WEIGHTS
    try:
        fetch(f"{record.url}/transformer/{preferred}", path / "transformer" / preferred)
    except NotOnServerError:
        fetch(f"{record.url}/transformer/{other}", path / "transformer" / other)
    return path
