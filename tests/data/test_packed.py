"""npz files of image files: what of them cannot be is named."""

import io

import numpy as np
import pytest
from PIL import Image

from image_toys import saved
from latents_toys import pack
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data import open_images

BIG = 2**62


def change(name, make):
    return lambda arrays: arrays.update({name: make(arrays[name])})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            change("labels", lambda x: x.astype(float)),
            "'labels' of .* is float64 .*; expected integers of one dimension",
        ),
        (
            change("labels", lambda x: x.astype(str)),
            "'labels' of .* is <U.*; expected integers",
        ),
        (change("labels", lambda x: x > 0), "'labels' of .* is bool"),
        (
            change("labels", lambda x: x[None]),
            r"'labels' of .* \(1, 10\); expected integers of one dimension",
        ),
        (change("labels", lambda x: x[0]), r"'labels' of .* \(\); expected"),
        (change("labels", lambda x: x[:0]), "is inconsistent: 11 offsets .* for 0 labels"),
        (change("labels", lambda x: x[:9]), "is inconsistent: 11 offsets .* for 9 labels"),
        (change("labels", lambda x: x - 1), "has labels -1 to 1"),
        (
            change("labels", lambda x: x.astype(np.uint64) + np.uint64(2**63)),
            "'labels' of .* has values up to",
        ),
        (change("offsets", lambda x: x / 1.0), "'offsets' of .* is float64"),
        (change("offsets", lambda x: x[:, None]), r"'offsets' of .* \(11, 1\)"),
        (change("offsets", lambda x: x[::-1]), "is inconsistent"),
        (
            change("offsets", lambda x: x + (np.arange(11) == 0)),
            "its offsets must begin with 0 and never decrease",
        ),
        (
            change("offsets", lambda x: np.where(np.arange(11) == 5, BIG, x)),
            "its offsets must begin with 0 and never decrease",
        ),
        (
            change("offsets", lambda x: np.where(np.arange(11) == 5, -BIG, x)),
            "its offsets must begin with 0 and never decrease",
        ),
        (change("offsets", lambda x: x[:0]), "is inconsistent: 0 offsets"),
        (change("blob", lambda x: x.astype(np.int32)), "'blob' of .* is int32"),
        (change("blob", lambda x: x[None]), "'blob' of .* expected the bytes of all image files"),
        (change("blob", lambda x: x[:-1]), "is inconsistent"),
        (change("wnids", lambda x: np.arange(3)), "'wnids or classes' of .* is int64"),
        (
            change("wnids", lambda x: x[0]),
            "'wnids or classes' of .*; expected one string per class",
        ),
        (change("wnids", lambda x: x[[0, 0, 1]]), "names a class twice"),
        (change("wnids", lambda x: x[:2]), "labels 0 to 2 and names 2 classes"),
        (change("names", lambda x: x[:2]), "has 2 names for 3 classes"),
        (change("names", lambda x: np.arange(3.0)), "'names' of .* is float64"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, changed, said):
    with np.load(pack(tmp_path / "x.npz")) as found:
        arrays = dict(found)
    changed(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ArtifactError, match=said) as error:
        open_images(tmp_path / "x.npz", image_size=8)
    assert "x.npz" in str(error.value) and "\n" not in str(error.value)


def test_labels_without_names_may_be_any_numbers(tmp_path):
    content = saved(Image.new("RGB", (4, 4)))
    np.savez(
        tmp_path / "x.npz",
        blob=np.frombuffer(content * 2, np.uint8),
        offsets=np.arange(3) * len(content),
        labels=[BIG, 5],
    )
    images = open_images(tmp_path / "x.npz", image_size=4)
    assert images.labels.tolist() == [BIG, 5] and images.classes == ["5", str(BIG)]


def test_a_broken_image_in_a_packed_file_is_named_or_skipped(tmp_path):
    content = saved(Image.new("RGB", (4, 4), "red"))
    blob = content + content[:40] + content
    np.savez(
        tmp_path / "x.npz",
        blob=np.frombuffer(blob, np.uint8),
        offsets=np.cumsum([0, len(content), 40, 0, len(content)]),
        labels=[0, 1, 2, 3],
    )
    images = open_images(tmp_path / "x.npz", image_size=4)
    for number in (1, 2):
        with pytest.raises(ValueError, match=f"image {number} of .*x.npz is not a readable image"):
            images[number]
    skipping = open_images(tmp_path / "x.npz", image_size=4, skip_broken=True)
    assert [skipping[i][0] is None for i in range(4)] == [False, True, True, False]
    assert images[3][0][:, 0, 0].tolist() == [255, 0, 0]


def test_corrupt_files_are_always_one_sentence(tmp_path):
    pack(tmp_path / "x.npz")
    content, generator = (
        np.frombuffer((tmp_path / "x.npz").read_bytes(), np.uint8),
        np.random.default_rng(0),
    )
    for i in range(150):
        broken = content.copy()
        broken[generator.integers(0, len(broken), 5)] = generator.integers(0, 256, 5)
        (tmp_path / "x.npz").write_bytes(
            broken[: generator.integers(0, len(broken)) if i % 4 == 0 else None].tobytes()
        )
        try:
            images = open_images(tmp_path / "x.npz", image_size=4, skip_broken=True)
            found = [images[i][0] for i in range(len(images))]
        except ArtifactError as error:
            assert "x.npz" in str(error) and "\n" not in str(error)
        else:
            assert all(pixels is None or pixels.shape == (3, 4, 4) for pixels in found)


def test_a_pipe_or_an_archive_of_something_else_is_named(tmp_path):
    import os
    import zipfile

    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ArtifactError, match="pipe.npz is a named pipe"):
        open_images(tmp_path / "pipe.npz", image_size=4)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in ("blob", "offsets", "labels"):
            archive.writestr(name, io.BytesIO(b"no array").read())
    with pytest.raises(
        ArtifactError,
        match="x.npz is not a whole npz file of plain arrays .*'blob': it is not an array",
    ):
        open_images(tmp_path / "x.npz", image_size=4)
