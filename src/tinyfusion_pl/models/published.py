"""Published checkpoints by name: what they are, where they come from, where they are kept.

URLs are those that the projects themselves give. None of them publishes sizes or checksums beside the file, so none is stated here: what
the server says of the length is always checked, and a file that is not what its name says does not fit the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from tinyfusion_pl.models.download import NotOnServer, cache_folder, fetch

DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint.

    Args:
        model: Name of the model in the registry.
        url: Of the file; of a diffusers repository's files for a folder.
        kwargs: Arguments of the model that its name does not say.
        file: Its name in the cache, where the published one would not tell it from others.
        is_folder: A diffusers pipeline, of which the transformer is fetched.
        size, sha256: In bytes, and as 64 hexadecimal digits, where known.
        num_training_images: Images that it was trained on, repeated ones counted each time, where
            its authors say so; what recovery is compared with.
    """

    model: str
    url: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    is_folder: bool = False
    size: int | None = None
    sha256: str | None = None
    num_training_images: int | None = None


IMAGES_OF_7M_STEPS = (
    7_000_000 * 256
)  # DiT-XL/2 at 256 x 256 (arXiv 2212.09748) and SiT-XL/2 (arXiv 2401.08740)


def _dit(file: str, **kwargs: Any) -> Published:
    return Published(
        model="dit_xl_2",
        url=f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
        kwargs=kwargs,
        num_training_images=IMAGES_OF_7M_STEPS if "input_size" not in kwargs else 3_000_000 * 256,
    )


def _diffusers(repository: str) -> Published:
    return Published(
        model="dit_xl_2",
        url=f"https://huggingface.co/{repository}/resolve/main",
        file=repository.replace("/", "--"),
        is_folder=True,
    )


def _mar(size: str, place: str) -> Published:
    return Published(
        model=f"mar_{size}",
        url=f"https://www.dropbox.com/scl/fi/{place}&dl=1",
        file=f"mar_{size}.pth",
    )


PUBLISHED: dict[str, Published] = {
    "DiT-XL-2-256x256.pt": _dit("DiT-XL-2-256x256.pt"),
    "DiT-XL-2-512x512.pt": _dit("DiT-XL-2-512x512.pt", input_size=64),
    "TinyDiT-D14-MaskedKD-500K.pt": Published(
        model="dit_xl_2",
        kwargs={"depth": 14},
        url="https://github.com/VainF/TinyFusion/releases/download/v1.0.0/TinyDiT-D14-MaskedKD-500K.pt",
    ),
    "SiT-XL-2-256x256.pt": Published(
        model="sit_xl_2",
        num_training_images=IMAGES_OF_7M_STEPS,
        url="https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1",
    ),
    "mar_base.pth": _mar(
        "base", "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb"
    ),
    "mar_large.pth": _mar(
        "large", "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt"
    ),
    "mar_huge.pth": _mar(
        "huge", "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o"
    ),
    "facebook/DiT-XL-2-256": _diffusers("facebook/DiT-XL-2-256"),
    "facebook/DiT-XL-2-512": _diffusers("facebook/DiT-XL-2-512"),
}
# Under this name SiT's file is served.
RENAMED = {"SiT-XL-2-256.pt": "SiT-XL-2-256x256.pt"}


def published_as(path: str | Path) -> Published | None:
    """What is known of a checkpoint by its file name: a copy that keeps the published name is taken for what it says."""
    return PUBLISHED.get(RENAMED.get(name := PurePath(path).name, name))


def fetch_published(name: str) -> Path:
    """The file or folder of the published checkpoint `name`, in torch's cache folder, fetched when it is not there.

    Raises:
        ArtifactError: it is not there and cannot be fetched; names the URL and the place to put the file.
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
    except NotOnServer:
        fetch(f"{record.url}/transformer/{other}", path / "transformer" / other)
    return path
