"""Labels of class folders: ImageNet's for its wnids, a mapping that is given, else their order; never silently another model's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latents_toys import extract, vae_in
from tinyfusion_pl import create_model
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data import ImageNetLatents, LatentShards, open_images
from tinyfusion_pl.data.classes import imagenet_wnids, label_classes, relabel
from tinyfusion_pl.objectives import get_labels

IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def fill(folder, names, num=1):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(
                np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            ).save(folder / name / f"{i}.png")
    return folder


def model(num_classes):
    return create_model(
        "dit_digits",
        depth=1,
        hidden_size=16,
        num_heads=2,
        in_channels=4,
        input_size=4,
        num_classes=num_classes,
    )


def data(root, **settings):
    return ImageNetLatents(root, batch_size=2, num_workers=0, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Imagenette's class folders, and their latents with ImageNet's labels and with labels by order."""
    folder = tmp_path_factory.mktemp("classes")
    fill(folder / "images", IMAGENETTE)
    fill(folder / "pets", ("cat", "dog"), num=2)
    extract(folder, folder / "images", folder / "latents")
    extract(folder, folder / "images", folder / "by_order", class_to_idx="order")
    extract(folder, folder / "pets", folder / "pets_latents")
    return folder


def test_all_wnids_of_imagenet_are_known():
    known = imagenet_wnids()
    assert (
        list(known.values()) == list(range(1000))
        and list(known) == sorted(known)
        and known["n15075141"] == 999
    )
    assert {wnid: known[wnid] for wnid in IMAGENETTE} == IMAGENETTE


def test_imagenets_wnids_get_imagenets_labels(made, capsys):
    images = open_images(made / "images", image_size=8)
    assert images.labels.tolist() == list(IMAGENETTE.values()) and images.labelled_by == "imagenet"
    shards = LatentShards(made / "latents")
    assert shards.labels.tolist() == list(IMAGENETTE.values())
    assert dict(zip(shards.info.classes, shards.info.indices)) == IMAGENETTE
    module = data(made / "latents")
    module.check_fits(model(1000))
    assert module.classes == list(IMAGENETTE.values()) and module.num_classes == 702
    assert sorted(y for _, y in [module.train_set()[draw, draw] for draw in range(10)]) == list(
        IMAGENETTE.values()
    )


def test_packed_wnids_get_imagenets_labels(made, tmp_path):
    content = next((made / "images").glob("*/*.png")).read_bytes()
    np.savez(
        tmp_path / "x.npz",
        blob=np.frombuffer(content * 3, np.uint8),
        offsets=np.arange(4) * len(content),
        labels=[2, 0, 1],
        wnids=np.array(list(IMAGENETTE)[:3]),
    )
    images = open_images(tmp_path / "x.npz", image_size=8)
    assert images.labels.tolist() == [482, 0, 217]
    assert open_images(tmp_path / "x.npz", image_size=8, class_to_idx="order").labels.tolist() == [
        2,
        0,
        1,
    ]


def test_a_model_of_ten_classes_is_told_of_the_order(made):
    with pytest.raises(
        ValueError,
        match="labels 0 to 701, but the model has classes 0 to 9.*data.class_to_idx=order",
    ):
        data(made / "latents").check_fits(model(10))
    module = data(made / "latents", class_to_idx="order")
    module.check_fits(model(10))
    assert module.classes == list(range(10)) and module.num_classes == 10


def test_wnids_labelled_by_order_are_refused_and_mended(made):
    old = data(made / "by_order")
    assert old.classes == list(range(10))
    old.check_fits(model(10))
    content = json.loads((made / "by_order" / "latents.json").read_text())
    content["labelled_by"] = "order"  # as extractions were before ImageNet's wnids were known
    (made / "by_order" / "latents.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match="wnids of ImageNet, but their labels are 0 to 9 instead of 0, 217, 482.*data.class_to_idx",
    ):
        data(made / "by_order").check_fits(model(1000))
    mended = data(made / "by_order", class_to_idx="imagenet")
    mended.check_fits(model(1000))
    assert mended.classes == list(IMAGENETTE.values())
    assert torch.stack([mended.train_set()[i, i][1] for i in range(10)]).tolist() == list(
        IMAGENETTE.values()
    )


def test_other_names_warn_for_a_model_of_more_classes(made):
    with pytest.warns(
        UserWarning,
        match="2 classes, labeled 0, 1 in the order of their names, but the model has 1000.*class_to_idx=FILE",
    ):
        data(made / "pets_latents").check_fits(model(1000))
    data(made / "pets_latents").check_fits(model(2))


def test_a_mapping_file_gives_the_labels(made, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"dog": 207, "cat": 281, "hen": 8}))
    images = open_images(made / "pets", image_size=8, class_to_idx=tmp_path / "map.json")
    assert images.labels.tolist() == [281, 281, 207, 207]
    module = data(made / "pets_latents", class_to_idx=tmp_path / "map.json")
    module.check_fits(model(1000))
    assert module.classes == [207, 281]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"cat": 1}', r"has no label for 1 of the 2 classes of .* \(dog\)"),
        ("[1, 2]", "is not a mapping. Give a JSON object"),
        ("{}", "is not a mapping"),
        ('{"cat": "1", "dog": 2}', "maps 'cat' to '1'; labels are integers"),
        ('{"cat": 1.0, "dog": 2}', "maps 'cat' to"),
        ('{"cat": true, "dog": 2}', "maps 'cat' to"),
        ('{"cat": -1, "dog": 2}', "maps 'cat' to"),
        ('{"cat": 1e99, "dog": 2}', "maps 'cat' to"),
        ('{"cat": 99999999999, "dog": 2}', "maps 'cat' to"),
        ("cut", "is not a JSON file"),
    ],
)
def test_a_bad_mapping_is_named(made, tmp_path, content, said):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises((ValueError, ArtifactError), match=said):
        open_images(made / "pets", image_size=8, class_to_idx=tmp_path / "map.json")


def test_a_missing_mapping_and_names_that_are_no_wnids_are_named(made, tmp_path):
    with pytest.raises(ArtifactError, match="There is no file .*lost.json"):
        open_images(made / "pets", image_size=8, class_to_idx=tmp_path / "lost.json")
    with pytest.raises(
        ValueError,
        match=r"2 of the 2 classes of .* are not wnids of ImageNet's 1000 classes \(cat, dog\)",
    ):
        open_images(made / "pets", image_size=8, class_to_idx="imagenet")


@pytest.mark.parametrize("given", ["orders", "", 5, True])
def test_another_choice_of_labels_names_those_there_are(made, given):
    with pytest.raises(
        ValueError, match=f"class_to_idx is {given!r}; give 'imagenet', 'order', or a JSON file"
    ):
        open_images(made / "pets", image_size=8, class_to_idx=given)


@pytest.mark.parametrize(
    "names", [["n01440764_tench", "n02102040_springer"], ["N01440764", "N02102040"]]
)
def test_names_that_begin_with_wnids_are_said(names):
    labels, kind, (said,) = label_classes(names, class_to_idx=None, where="here")
    assert labels == [0, 1] and kind == "order" and "begin with wnids of ImageNet" in said


def test_some_wnids_and_some_other_names_are_refused():
    with pytest.raises(
        ValueError,
        match=r"1 of the 2 classes of here are wnids of ImageNet, but others are not \(cat\).*class_to_idx=order",
    ):
        label_classes(["cat", "n01440764"], class_to_idx=None, where="here")
    assert label_classes(["cat", "n01440764"], class_to_idx="order", where="here")[0] == [0, 1]


def test_classes_that_share_a_label_cannot_be_told_apart():
    assert relabel(np.array([1, 5, 1]), [1, 5], [7, 2], where="here").tolist() == [7, 2, 7]
    with pytest.raises(ArtifactError, match="has two classes with the label 1"):
        relabel(np.array([1]), [1, 1], [7, 2], where="here")
    with pytest.raises(ArtifactError, match="has the label 3, which is not one of its 2 classes"):
        relabel(np.array([3]), [0, 1], [7, 2], where="here")


# -- evaluation
def test_labels_are_sampled_of_the_classes_given():
    classes = list(IMAGENETTE.values())
    assert get_labels("balanced", 12, 1000, seed=0, classes=classes).tolist() == [*classes, 0, 217]
    assert set(get_labels("random", 500, 1000, seed=0, classes=classes).tolist()) == set(classes)
    for kind in ("balanced", "random"):
        assert torch.equal(
            get_labels(kind, 50, 10, seed=3), get_labels(kind, 50, 10, seed=3, classes=range(10))
        )
    with pytest.raises(ValueError, match="classes are 0 to 701, but the model has classes 0 to 9"):
        get_labels("balanced", 12, 10, seed=0, classes=classes)


def test_real_images_state_their_classes(made):
    module = data(made / "latents", vae=vae_in(made), images=made / "images")
    assert module.reference_classes(num_classes=1000) == list(IMAGENETTE.values())
    assert sorted(module.reference_images()[1].tolist()) == list(IMAGENETTE.values())
    with pytest.raises(
        ValueError,
        match="data.images=.*pets: it has 2 classes.*the model has 1000.*class_to_idx=FILE",
    ):
        data(made / "latents", vae=vae_in(made), images=made / "pets").reference_classes(
            num_classes=1000
        )


def published(folder, labels):
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for i, label in enumerate(labels):
        np.save(
            folder / "imagenet256_features" / f"{i}.npy",
            np.random.default_rng(i).normal(size=(1, 4, 4, 4)).astype(np.float32),
        )
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([label]))
    return folder


def test_published_latents_state_their_classes(tmp_path):
    assert data(published(tmp_path / "a", [5, 5, 701, 3] * 20)).classes == [3, 5, 701]
    module = data(published(tmp_path / "b", [i % 10 for i in range(80)]))
    with pytest.warns(
        UserWarning,
        match="has only the labels 0 to 9, but the model has 1000 classes. They may be the first",
    ):
        module.check_fits(model(1000))
    module.check_fits(model(10))
    with pytest.raises(
        ValueError, match="data.class_to_idx is order, but the labels in .* are numbers"
    ):
        data(tmp_path / "a", class_to_idx="order")
