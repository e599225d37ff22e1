"""The one reader of image files: extraction, reference images and measurements see the same pixels of the same file.

Each mode of PIL has one rule (docs/evaluation.md has the table): what is not 8 bits is scaled to 8
bits where the file format says what
its numbers mean, and refused, with both readings, where it does not. Nothing is decoded before the
file's own size was held against a bound.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion_pl.arrays import check_regular
from tinyfusion_pl.artifacts import ArtifactError

# of PIL, and the endings of their files; formats that start other programs (EPS, WMF) are not among
# them
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
    "MPO": (".mpo",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c"),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
NO_MAGIC = (
    "TGA"  # takes almost any bytes for an image, so its files are known by their ending alone
)
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MODES = {1: "L", 3: "RGB"}
GRAY = ("1", "L", "LA", "La")
MAX_PIXELS = 89_478_485  # PIL's own bound, beyond which it warns: 256 MiB of RGB
BYTES_A_PIXEL = 8  # RGBA of 16 bits: no file of an image within the bound is larger
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF
OF_THIS_FILE = (
    None,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)


class BrokenImageError(ValueError):
    """An image that is broken or ambiguous; the message is the reason."""


BrokenImage = BrokenImageError  # old name


class Note(IntFlag):
    """What is worth saying of an image that was read."""

    TRANSPARENT = 1
    ORIENTED = 2
    ANIMATED = 4
    DARK = 8


SENTENCES = {
    Note.TRANSPARENT: "have transparent pixels: transparency is ignored and the stored colors are taken, as torchvision and the ADM data "
                      "loader do; paste them onto a background first if they should look as in a viewer",
    Note.ORIENTED: "have an EXIF orientation: it is not applied, as in torchvision and the ADM data loader; rotate the files first if "
                   "they should look as in a viewer",
    Note.ANIMATED: "have several frames: the first is taken",
    Note.DARK: "have 16 bits and no value above 4095: they are scaled by 255/65535 and very dark; if their numbers are of 10 or 12 bits, "
               "scale them to 16 bits first",
}  # fmt: skip


def describe_notes(counts: Counter[Note]) -> list[str]:
    """One sentence for each kind of note that was counted."""
    return [f"{counts[note]} images {said}." for note, said in SENTENCES.items() if counts[note]]


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Image files, and PIL images, to uint8 tensors (C, H, W).

    Args:
        image_size: Center crop to this size as the ADM data loader does; None: as they are.
        num_channels: 3, or 1 for gray.
        max_pixels: Width times height that a file may have; larger ones are refused before they are
            decoded.
    """

    image_size: int | None = None
    num_channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.num_channels not in MODES:
            raise ValueError(f"num_channels is {self.num_channels}; give 3, or 1 for grey images.")
        if self.max_pixels < 1:
            raise ValueError(
                f"max_pixels is {self.max_pixels}; give a count >= 1 (default {MAX_PIXELS})."
            )

    @property
    def max_bytes(self) -> int:
        """Of an image file: no image within the bound takes more."""
        return BYTES_A_PIXEL * self.max_pixels

    def read(self, file: Any) -> tuple[Tensor, Note]:
        """The pixels of an image file (a path, or an open file in memory), and what is worth saying of it.

        Raises:
            BrokenImageError: if it is broken, ambiguous, or larger than `max_pixels`.
            ArtifactError: when it may be whole, but the disk or the network it is on fails.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            if isinstance(file, (str, os.PathLike)):
                self._check_file(file)
            with self._bounded(), Image.open(file, formats=_formats(file)) as image:
                return self._convert(image)
        except BrokenImageError:
            raise
        except UnidentifiedImageError as error:
            raise BrokenImageError("its content is of no known image format") from error
        except OSError as error:
            if error.errno not in OF_THIS_FILE:
                raise ArtifactError(f"Cannot read {file}: {error.strerror}.") from error
            raise BrokenImageError(_said(error)) from error
        # for bytes that are no image PIL's decoders raise whatever they run into, MemoryError
        # included
        except Exception as error:
            raise BrokenImageError(
                self._too_large(error) if _is_bomb(error) else _said(error)
            ) from error

    def convert(self, image: Any) -> tuple[Tensor, Note]:
        """As `read`, of a PIL image; what PIL raises passes through."""
        with self._bounded():
            return self._convert(image)

    def _convert(self, image: Any) -> tuple[Tensor, Note]:
        if image.width * image.height > self.max_pixels:
            raise BrokenImageError(
                f"it has {image.width * image.height} pixels, more than max_pixels={self.max_pixels}"
            )
        image.load()
        notes = Note.ORIENTED if _orientation(image) not in (None, 1) else Note(0)
        pixels, more = _eight_bits(image)
        notes |= more
        if _is_animated(image):  # looked at last: it moves to another frame and back
            notes |= Note.ANIMATED
        pixels = pixels.convert(MODES[self.num_channels])
        if self.image_size is not None:
            pixels = center_crop(pixels, self.image_size)
        values = torch.from_numpy(np.array(pixels)).view(*pixels.size[::-1], -1)  # (H, W, C)
        return values.permute(2, 0, 1), notes

    def _check_file(self, path: str | os.PathLike) -> None:
        try:
            size = check_regular(path).st_size
        except ArtifactError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno not in OF_THIS_FILE:
                raise
            raise BrokenImageError(str(error).rstrip(".")) from error
        if not size:
            raise BrokenImageError("the file is empty")
        if size > self.max_bytes:
            raise BrokenImageError(
                f"{size} bytes are more than an image of max_pixels={self.max_pixels} takes"
            )

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """PIL holds every size that a file states, of frames and tiles too, against our bound."""
        from PIL import Image

        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, self.max_pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
        finally:
            Image.MAX_IMAGE_PIXELS = before

    def _too_large(self, error: Exception) -> str:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        return f"it has {f'{pixels[1]} pixels, ' if pixels else ''}more than max_pixels={self.max_pixels}"


def center_crop(image, size: int):
    """The middle square of a PIL image at `size`: halved by averaging while twice as large, then bicubic, as the ADM data loader does."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _eight_bits(image: Any) -> tuple[Any, Note]:
    """A PIL image of any mode as one of mode L or RGB."""
    from PIL import Image

    mode = image.mode
    if mode.startswith("I;16") or (
        mode == "I" and image.format in ("PNG", "PPM")
    ):  # older PIL opens 16-bit PNG as I; PPM as ever
        values = np.asarray(image)
        bits = 12 if _bits_per_sample(image) == 12 else 16
        highest, largest = int(values.max()), 2**bits - 1
        if 0 < highest <= 255:
            raise BrokenImageError(
                f"it has 16 bits, but no value above {highest}: 8-bit values in a 16-bit file, or an almost black image? "
                "Save it with 8 bits"
            )
        note = Note.DARK if bits == 16 and 0 < highest <= 4095 else Note(0)
        table = (np.arange(largest + 1) * 255 + largest // 2) // largest
        return Image.fromarray(table.astype(np.uint8)[values]), note
    if mode in ("I", "F"):
        low, high = (f"{each:g}" for each in (np.asarray(image).min(), np.asarray(image).max()))
        kind, other = ("32-bit integers", "0..65535") if mode == "I" else ("floats", "0..1")
        raise BrokenImageError(
            f"it is of mode {mode!r}: {kind} between {low} and {high}, which may mean {other} or 0..255. Save it with 8 or "
            "16 bits"
        )
    note = Note(0)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if mode == "La":  # colors multiplied by alpha; PIL converts them to LA only
            image = image.convert("LA")
        elif mode != "LA":
            image = image.convert("RGBA")
        alpha = (image if image.mode == "LA" else image).getchannel("A")
        note = Note.TRANSPARENT if alpha.getextrema()[0] < 255 else note
    return image.convert("L" if mode in GRAY else "RGB"), note


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF leaves the pixels as they are
        return None


def _is_animated(image: Any) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a broken second frame is not looked at
        return True


def _bits_per_sample(image: Any) -> int | None:
    bits: Any = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    return bits[0] if isinstance(bits, tuple) and bits else bits


def _formats(file: Any) -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    suffix = Path(file).suffix.lower() if isinstance(file, (str, os.PathLike)) else ""
    allowed = [name for name in FORMATS if name in Image.OPEN and name != NO_MAGIC]
    return (*allowed, NO_MAGIC) if suffix in FORMATS[NO_MAGIC] else tuple(allowed)


def _is_bomb(error: Exception) -> bool:
    from PIL import Image

    return isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))


def _said(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
