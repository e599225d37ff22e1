"""The shipped digit classifier is the file of its record, as good as it says, and made by its recipe."""

import subprocess
import sys

import pytest
import torch

from tinyfusion_pl.artifacts import read_json, sha256
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import DigitsClassifier, load_digits_classifier
from tinyfusion_pl.metrics.classifier import HELD_OUT, SPLIT_SEED, digits_split, held_out_accuracy
from tinyfusion_pl.metrics.digits import ASSETS


def test_shipped_classifier_names_97_percent_of_the_held_out_digits():
    record = read_json(ASSETS / "record.json")
    assert (record["split"]["held_out"], record["split"]["seed"]) == (HELD_OUT, SPLIT_SEED)
    accuracy = held_out_accuracy(load_digits_classifier())
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(
        record["held_out_accuracy"], abs=1.5 / 360
    )  # another machine may round one over


def test_shipped_file_is_the_one_of_its_record():
    assert sha256(ASSETS / "model.safetensors") == read_json(ASSETS / "record.json")["sha256"]
    assert (ASSETS / "model.safetensors").stat().st_size < 300_000


def test_split_parts_every_digit_and_sees_the_data_modules_images():
    (train, train_labels), (test, test_labels) = digits_split()
    assert (len(train), len(test)) == (1437, 360)
    images, labels = DigitsDataModule().reference_images()

    def rows(images, labels):
        return sorted(
            [*image, label]
            for image, label in zip(images.flatten(1).tolist(), labels.tolist(), strict=True)
        )

    assert rows(torch.cat([train, test]), torch.cat([train_labels, test_labels])) == rows(
        images, labels
    )
    assert (
        torch.bincount(test_labels).min() >= 34
    )  # stratified: 174 to 183 of each digit, a fifth of them


def test_classifier_gives_features_and_logits_and_takes_no_gradient():
    classifier = load_digits_classifier()
    features, logits, spatial = classifier(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert spatial.shape == (3, classifier.num_spatial)
    assert features.shape == (3, classifier.num_features) and logits.shape == (3, 10)
    assert not logits.requires_grad and not classifier.training


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    images, _ = DigitsDataModule().reference_images()
    classifier = load_digits_classifier()
    torch.testing.assert_close(classifier(images[:7]).logits[3:], classifier(images[3:7]).logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            "expects grayscale images .* got color images",
        ),
        (torch.zeros(2, 1, 8, 8), "uint8 tensors with values in 0..255, got torch.float32"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r"\(N, C, H, W\), got \(2, 8, 8\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "8x8, got 32x32"),
    ],
)
def test_other_images_are_refused_with_a_reason(images, message):
    with pytest.raises(ValueError, match=message):
        DigitsClassifier()(images)


@pytest.mark.slow
def test_recipe_run_from_its_seed_makes_a_classifier_as_good(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "tinyfusion_pl.metrics.classifier",
        tmp_path,
    ]
    subprocess.run(command, check=True)
    record, shipped = read_json(tmp_path / "record.json"), read_json(ASSETS / "record.json")
    assert record["held_out_accuracy"] >= 0.97
    assert record.keys() == shipped.keys() and record["seed"] == shipped["seed"]
    assert record["sha256"] == sha256(tmp_path / "model.safetensors")
