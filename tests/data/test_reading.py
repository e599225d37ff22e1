"""One reader for image files: each mode has one rule, what is broken or ambiguous is named, memory and pixels are bounded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from image_toys import GRAY, broken_images, gray16, png_of_size, saved
from latents_toys import vae_in
from tinyfusion_pl.data import ImageNetLatents, open_images
from tinyfusion_pl.data.image_batches import ImageDataset, UnlabelledImageFolder
from tinyfusion_pl.data.reading import MAX_PIXELS, BrokenImageError, ImageReader, Note
from tinyfusion_pl.tasks import ImageFiles

COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def read(content, **settings):
    return ImageReader(**settings).read(io.BytesIO(content))


def as_array(pixels):
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "jpeg2000"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_16_bits_are_scaled_to_8(kind, num_channels):
    pixels, notes = read(saved(gray16(), kind), num_channels=num_channels)
    assert (
        np.array_equal(as_array(pixels), np.repeat(GRAY[..., None], num_channels, 2)) and not notes
    )
    assert pixels.float().mean() == 127


def test_16_bits_of_either_byte_order_are_scaled():
    for mode in ("I;16", "I;16B", "I;16L"):
        order = ">" if mode == "I;16B" else "<"
        image = Image.frombytes(
            mode, (16, 16), (GRAY.astype(np.uint16) * 257).astype(f"{order}u2").tobytes()
        )
        assert np.array_equal(ImageReader(num_channels=1).convert(image)[0][0].numpy(), GRAY)


def test_12_bit_files_are_scaled_by_their_own_range():
    image = Image.fromarray(np.full((4, 4), 4095, dtype=np.uint16))
    image.tag_v2 = {258: (12,)}
    assert (ImageReader().convert(image)[0] == 255).all()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (
            Image.fromarray(GRAY.astype(np.float32) / 255),
            "floats between 0 and 0.99.*, which may mean 0..1 or 0..255",
        ),
        (
            Image.fromarray(GRAY.astype(np.int32)),
            "32-bit integers between 0 and 254, which may mean 0..65535 or 0..255",
        ),
        (
            Image.fromarray(GRAY.astype(np.uint16)),
            "16 bits, but no value above 254: 8-bit values in a 16-bit file, or an almost black image",
        ),
    ],
)
def test_numbers_that_mean_two_things_are_refused(image, said):
    with pytest.raises(BrokenImageError, match=said):
        read(saved(image, "tiff"))


def test_dark_16_bits_are_noted():
    image = Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16))
    pixels, notes = read(saved(image))
    assert (pixels == round(4000 / 257)).all() and notes == Note.DARK
    assert not read(saved(Image.fromarray(np.zeros((4, 4), dtype=np.uint16))))[
        1
    ]  # black either way


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "RGBX", "L", "1", "P"])
def test_8_bit_modes_are_what_PIL_makes_of_them(mode):
    image = Image.fromarray(COLORS).convert(mode)
    pixels, notes = ImageReader().convert(image)
    assert np.array_equal(as_array(pixels), np.array(image.convert("RGB"))) and not notes


def test_inverted_cmyk_of_jpeg_is_not_a_negative():
    cmyk = Image.fromarray(np.full((16, 16, 3), (200, 30, 30), dtype=np.uint8)).convert("CMYK")
    pixels, _ = read(saved(cmyk, "jpeg", quality=100))
    assert (pixels[:, 8, 8].int() - torch.tensor([200, 30, 30])).abs().max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_ignored_and_noted(mode):
    image = Image.fromarray(COLORS).convert("RGBA")
    if "L" in mode:
        image = image.convert("LA")
    colors = np.array(image.convert("RGB"))
    for alpha, note in ((255, Note(0)), (128, Note.TRANSPARENT)):
        image.putalpha(alpha)
        shown = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        if mode == "PA":
            shown.putalpha(alpha)
            colors = np.array(shown.convert("RGB"))
        pixels, notes = ImageReader().convert(shown)
        assert notes == note
        assert np.abs(as_array(pixels).astype(int) - colors).max() <= (
            2 if mode in ("RGBa", "La") else 0
        )  # multiplied and divided


def test_palettes_and_color_keys_with_transparency_are_noted():
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16), "L").convert("P")
    for content in (saved(palette, transparency=3), saved(palette, transparency=bytes(range(256)))):
        pixels, notes = read(content)
        assert (
            np.array_equal(as_array(pixels)[..., 0].ravel(), np.arange(256))
            and notes == Note.TRANSPARENT
        )
    assert (
        read(saved(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)))[1]
        == Note.TRANSPARENT
    )


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_exif_orientation_is_not_applied_but_noted(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(COLORS[:8])
    pixels, notes = read(saved(image, kind, exif=exif))
    assert pixels.shape == (3, 8, 16) and notes == Note.ORIENTED


def test_the_first_frame_of_an_animation_is_taken_and_noted():
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    for kind in ("gif", "tiff", "webp", "png"):
        options = {"lossless": True} if kind == "webp" else {}
        pixels, notes = read(
            saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        )
        assert pixels[:, 0, 0].tolist() == [255, 0, 0] and notes == Note.ANIMATED, kind


# -- bounds
def test_pixels_are_bounded_before_decoding():
    with pytest.raises(
        BrokenImageError, match=f"169000000 pixels, more than max_pixels={MAX_PIXELS}"
    ):
        read(png_of_size(13_000, 13_000))
    with pytest.raises(BrokenImageError, match="400000000 pixels, more than max_pixels"):
        read(png_of_size(20_000, 20_000))
    content = saved(Image.new("1", (300, 300)))
    with pytest.raises(BrokenImageError, match="it has 90000 pixels, more than max_pixels=89999"):
        read(content, max_pixels=89_999)
    assert read(content, max_pixels=90_000)[0].shape == (3, 300, 300)


def test_the_bound_can_be_raised_above_that_of_PIL(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read(saved(Image.new("L", (50, 50))))[0].shape == (3, 50, 50)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_every_broken_image_is_one_sentence(tmp_path):
    paths = broken_images(tmp_path)
    assert len(paths) == 22
    for path in paths:
        with pytest.raises(BrokenImageError) as error:
            ImageReader().read(path)
        assert str(error.value) and "\n" not in str(error.value)
    for name, kind in (
        ("pipe.png", "a named pipe"),
        ("device.png", "a device"),
        ("empty.png", "the file is empty"),
    ):
        with pytest.raises(BrokenImageError, match=kind):
            ImageReader().read(tmp_path / name)


def test_corrupt_bytes_never_raise_anything_else():
    generator, image = np.random.default_rng(0), Image.fromarray(COLORS)
    kinds = {
        "png": {},
        "jpeg": {},
        "gif": {},
        "bmp": {},
        "tiff": {"compression": "tiff_lzw"},
        "webp": {},
        "ppm": {},
        "jpeg2000": {},
        "pcx": {},
        "sgi": {},
        "qoi": {},
    }
    for kind, options in kinds.items():
        content = np.frombuffer(saved(image, kind, **options), np.uint8)
        for i in range(40):
            broken = content.copy()
            places = generator.integers(0, min(len(broken), 64 if i % 2 else len(broken)), 4)
            broken[places] = generator.integers(0, 256, 4)
            try:
                pixels, _ = read(
                    broken[: generator.integers(1, len(broken)) if i % 3 else None].tobytes(),
                    max_pixels=100_000,
                )
            except BrokenImageError as error:
                assert str(error)
            else:
                assert pixels.dtype == torch.uint8 and pixels[0].numel() <= 100_000


def test_a_failing_disk_is_no_broken_image(tmp_path, monkeypatch):
    from tinyfusion_pl.artifacts import ArtifactError

    (tmp_path / "x.png").write_bytes(saved(gray16()))

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    folder = UnlabelledImageFolder(tmp_path, skip_broken=True)
    with pytest.raises(ArtifactError, match="x.png: Input/output error"):
        folder[0]


# -- every door
def doors(folder):
    """Name -> the one image of ``folder/images/n01`` through each way that images come in, (3, 16, 16)."""
    content = (folder / "images" / "n01" / "a.png").read_bytes()
    np.savez(
        folder / "packed.npz",
        blob=np.frombuffer(content, np.uint8),
        offsets=[0, len(content)],
        labels=[0],
    )
    made = ImageNetLatents.__new__(ImageNetLatents)
    made.images, made.class_to_idx, made.latent_shape, made._vae = (
        folder / "images",
        None,
        (4, 8, 8),
        vae_in(folder)(),
    )
    files = ImageFiles(image_size=16)
    return {
        "extraction": open_images(folder / "images", image_size=16)[0][0],
        "extraction of npz": open_images(folder / "packed.npz", image_size=16)[0][0],
        "data.images": made.reference_images()[0][0],
        "measure": next(iter(files.batches(folder / "images")))[1][0],
        "measure of npz": next(iter(files.batches(folder / "packed.npz")))[1][0],
        "dataset": ImageDataset([Image.open(folder / "images" / "n01" / "a.png")], image_size=16)[
            0
        ],
    }


@pytest.mark.parametrize(
    "image",
    [
        gray16(),
        Image.fromarray(COLORS).convert("CMYK"),
        Image.fromarray(COLORS).convert("P"),
        Image.fromarray(GRAY),
        Image.fromarray(COLORS),
    ],
    ids=["I;16", "CMYK", "P", "L", "RGB"],
)
def test_every_door_reads_the_same_pixels(tmp_path, image):
    (tmp_path / "images" / "n01").mkdir(parents=True)
    content = saved(image, "tiff" if image.mode == "CMYK" else "png")
    (tmp_path / "images" / "n01" / "a.png").write_bytes(content)
    found = doors(tmp_path)
    assert len(found) == 6 and all(
        torch.equal(pixels, found["measure"]) for pixels in found.values()
    )
    if image.mode == "I;16":
        assert found["measure"].float().mean() == 127
