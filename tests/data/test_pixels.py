"""Images in pixels: the same numbers as PIL reads, mirrored by draw, refused where they do not fit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tinyfusion_pl.data import PixelImages


def packed(path, labels, *, size=6):
    """An npz file of random PNG files with these labels; returns their pixels (N, 3, size, size)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        files.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(
        path,
        blob=np.frombuffer(b"".join(files), np.uint8),
        offsets=offsets,
        labels=np.array(labels),
    )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def data_of(tmp_path, labels=(0, 1, 2, 1), **settings):
    pixels = packed(tmp_path / "images.npz", labels)
    settings = {"file": "images.npz", "image_size": 6, "num_classes": 3, "batch_size": 2} | settings
    return PixelImages(str(tmp_path), **settings), pixels


def test_pixels_become_latents_and_back(tmp_path):
    data, pixels = data_of(tmp_path, mirror=False)
    x, y = zip(*[data.train_set()[i] for i in range(4)])
    assert torch.equal(torch.stack(y), torch.tensor([0, 1, 2, 1]))
    assert torch.allclose(torch.stack(x), pixels.float() / 127.5 - 1)
    assert torch.equal(data.decode(torch.stack(x)), pixels)
    assert torch.equal(data.reference_images()[0], pixels)


def test_half_of_the_draws_are_mirrored(tmp_path):
    data, pixels = data_of(tmp_path)
    expected = pixels[1].float() / 127.5 - 1
    dataset, mirrored = data.train_set(), 0
    for draw in range(200):
        x, _ = dataset[draw, 1]
        assert torch.equal(x, dataset[draw, 1][0])  # a resumed run sees the same
        mirrored += torch.equal(x, expected.flip(-1))
        assert torch.equal(x, expected) or torch.equal(x, expected.flip(-1))
    assert 70 < mirrored < 130


def test_classes_are_those_of_the_images(tmp_path):
    assert data_of(tmp_path)[0].classes is None
    assert data_of(tmp_path, labels=(0, 2, 2, 0))[0].classes == [0, 2]


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ((0, 1, 2, 5), {}, "label"),
        ((0, 1, 2, 1), {"image_size": 0}, "image_size is 0"),
        ((0, 1, 2, 1), {"file": "other.npz"}, "No images found at"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, labels, **settings)[0].train_set()


def test_more_images_than_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyfusion_pl.data.pixels.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="Extract latents"):
        data_of(tmp_path)[0].train_set()
