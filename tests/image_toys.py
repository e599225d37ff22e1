"""Image files of every mode, and broken ones."""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

GRAY = np.linspace(0, 254, 256).round().astype(np.uint8).reshape(16, 16)  # mean 127.0


def saved(image, kind="png", **options):
    """The bytes of a PIL image's file."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def gray16():
    """The 16-bit image of `GRAY`."""
    return Image.fromarray(GRAY.astype(np.uint16) * 257)


def png_of_size(width, height):
    """A PNG file of a few hundred bytes whose header states that size."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def broken_images(folder):
    """Write one broken image of each kind into `folder`; returns their paths."""
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    files = {
        "empty.png": b"",
        "text.jpg": b"no image at all",
        "zeros.bmp": bytes(300),
        "cut.png": saved(whole)[:200],
        "cut.jpg": saved(whole, "jpeg")[:300],
        "cut.gif": saved(whole, "gif")[:100],
        "cut.tif": saved(whole, "tiff")[:60],
        "cut.webp": saved(whole, "webp")[:60],
        "header.png": saved(whole)[:20],
        "bomb.png": png_of_size(20_000, 20_000),
        "large.png": png_of_size(13_000, 13_000),
        "none.png": png_of_size(0, 7),
        "huge.png": png_of_size(2**31 - 1, 2**31 - 1),
        "huge.ppm": b"P6 99999999999 99999999999 255\n" + bytes(9),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "float.tif": saved(Image.fromarray(GRAY.astype(np.float32)), "tiff"),
        "integers.tif": saved(Image.fromarray(GRAY.astype(np.int32)), "tiff"),
        "container.png": saved(Image.fromarray(GRAY.astype(np.uint16))),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    return sorted(path for path in folder.iterdir())
