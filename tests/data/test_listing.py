"""One listing for class folders and flat folders: the order, linked folders, and what is ignored."""

import os

import numpy as np
import pytest
from PIL import Image

from tinyfusion_pl.data import open_images
from tinyfusion_pl.data.image_batches import UnlabelledImageFolder
from tinyfusion_pl.data.listing import find_class_folders, find_images


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(path, "png")
    return folder


def labels(folder, **settings):
    images = open_images(folder, image_size=4, **settings)
    return {images.name(i): int(images.labels[i]) for i in range(len(images))}, images


def test_hidden_files_and_folders_are_ignored_and_said(tmp_path):
    fill(
        tmp_path,
        "b/1.png",
        "c/2.png",
        ".ipynb_checkpoints/0.png",
        "__MACOSX/b/1.png",
        "b/._1.png",
        "c/.hidden/3.png",
        "@eaDir/4.png",
    )
    (tmp_path / "Thumbs.db").write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints" / "empty").mkdir()
    found, images = labels(tmp_path)
    assert found == {"b/1.png": 0, "c/2.png": 1} and images.classes == ["b", "c"]
    assert any(
        "6 hidden files or folders" in said and ".ipynb_checkpoints" in said for said in images.said
    )
    flat = UnlabelledImageFolder(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in flat.paths] == list(found)
    assert any("6 hidden files or folders" in said for said in flat.said)


def test_a_hidden_root_counts(tmp_path):
    assert labels(fill(tmp_path / ".cache", "b/1.png"))[0] == {"b/1.png": 0}


def test_folders_named_by_number_are_sorted_by_number(tmp_path):
    fill(tmp_path, *(f"{i}/x.png" for i in range(12)))
    found, images = labels(tmp_path)
    assert found == {f"{i}/x.png": i for i in range(12)}
    assert any("torchvision's ImageFolder sorts them as text" in said for said in images.said)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ("1", "2", "10"),
            "are numbers, but not 0 to 2: 1 has the label 0, 10 has 2.*class_to_idx=FILE",
        ),
        (
            ("class_2", "class_10", "class_1"),
            "text order of their names, as in torchvision: class_10 comes before class_2.*class_to_idx=FILE",
        ),
    ],
)
def test_an_order_that_may_be_another_is_said(tmp_path, names, said):
    import re

    found, images = labels(fill(tmp_path, *(f"{name}/x.png" for name in names)))
    assert any(re.search(said, sentence) for sentence in images.said)
    order = [name for name, _ in sorted(found.items(), key=lambda pair: pair[1])]
    assert order == [f"{name}/x.png" for name in (sorted(names) if "class_1" in names else names)]


def test_an_order_without_another_reading_says_nothing(tmp_path):
    assert labels(fill(tmp_path, "000/a.png", "001/b.png", "002/c.png"))[1].said == []


def test_linked_folders_are_followed_by_all_readers(tmp_path):
    fill(tmp_path / "elsewhere", "c/1.png", "c/deep/2.png")
    fill(tmp_path / "images", "b/0.png")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    expected = {"b/0.png": 0, "c/1.png": 1, "c/deep/2.png": 1}
    assert labels(tmp_path / "images")[0] == expected
    assert {
        str(path.relative_to(tmp_path / "images"))
        for path in UnlabelledImageFolder(tmp_path / "images").paths
    } == set(expected)


def test_links_in_a_loop_end_and_are_said(tmp_path):
    fill(tmp_path, "b/1.png")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b" / "self")
    found, images = labels(tmp_path)
    assert found == {"b/1.png": 0} and any(
        "1 links to a folder that contains them (b/up)" in said for said in images.said
    )
    assert len(UnlabelledImageFolder(tmp_path)) == 1


def test_endings_are_the_same_for_all_readers_in_any_case(tmp_path):
    endings = (
        "png",
        "PNG",
        "jpg",
        "JPEG",
        "jfif",
        "gif",
        "Gif",
        "bmp",
        "webp",
        "tif",
        "TIFF",
        "ppm",
        "pgm",
        "avif",
        "jp2",
        "tga",
    )
    fill(tmp_path, *(f"b/{i}.{ending}" for i, ending in enumerate(endings)))
    for name in ("b/notes.txt", "b/noending", "b/labels.json"):
        (tmp_path / name).write_text("")
    found, images = labels(tmp_path)
    assert len(found) == len(UnlabelledImageFolder(tmp_path)) == len(endings)
    assert all(images[i][0].shape == (3, 4, 4) for i in range(len(images)))
    assert any(
        "3 files without an image suffix" in said and "1 .txt" in said for said in images.said
    )


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    fill(tmp_path, "b/x.png/1.png", "y.jpg/2.png")
    assert labels(tmp_path)[0] == {"b/x.png/1.png": 0, "y.jpg/2.png": 1}
    assert len(UnlabelledImageFolder(tmp_path)) == 2


def test_images_beside_class_folders_are_said(tmp_path):
    found, images = labels(fill(tmp_path, "b/1.png", "stray.png"))
    assert found == {"b/1.png": 0} and any(
        "1 images outside of class folders (stray.png)" in said for said in images.said
    )


def test_class_folders_without_images_are_named(tmp_path):
    fill(tmp_path, "b/1.png", "d/2.png")
    (tmp_path / "c").mkdir()
    with pytest.raises(
        ValueError, match=r"1 of the 3 class folders of .* hold no images \(c\).*class_to_idx=order"
    ):
        labels(tmp_path)
    found, images = labels(tmp_path, class_to_idx="order")
    assert found == {"b/1.png": 0, "d/2.png": 2} and any(
        "without images: c" in said for said in images.said
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "it has no class folders"),
        (("c/notes.txt",), "class folders hold no images"),
        (("1.png",), "1 images outside of class folders"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path, names, said):
    fill(tmp_path, *names)
    with pytest.raises(ValueError, match=said):
        labels(tmp_path)


def test_splits_instead_of_classes_are_said(tmp_path):
    _, images = labels(fill(tmp_path, "train/n1/1.png", "val/n1/2.png"))
    assert any("give " + str(tmp_path / "train") in said for said in images.said)


def test_class_folders_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path, "n2/b.png", "n2/a/z.png", "n2/a1.png", "n1/10.png", "n1/9.png", "n1/B.png")
    (tmp_path / "n2" / "linked").symlink_to(tmp_path / "n1")
    expected = [
        (os.path.relpath(path, tmp_path), label) for path, label in ImageFolder(tmp_path).samples
    ]
    assert list(labels(tmp_path)[0].items()) == expected


def test_odd_names_are_listed_and_printed(tmp_path):
    names = ["b/²3.png", "b/a\x1b[31m.png", "b/new\nline.png", "b/ü.png"]
    fill(tmp_path, *names)
    (tmp_path / os.fsdecode(b"b/\xff.png")).write_bytes(b"")
    assert len(find_images(tmp_path)[0]) == len(find_class_folders(tmp_path)[0]["b"]) == 5
    images = open_images(tmp_path, image_size=4)
    assert len(images.listing()) == 16 and all(images.place(i).isprintable() for i in range(5))
    with pytest.raises(ValueError, match=r"udcff.png is not a readable image"):
        np.stack([images[i][0] for i in range(5)])
