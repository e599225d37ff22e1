"""The digits are scikit-learn's, and go to latents and back without loss."""

import pytest
import torch
from sklearn.datasets import load_digits

from tinyfusion_pl.data import DigitsDataModule


def test_latents_are_the_digits_scaled_to_plus_minus_one():
    images, labels = load_digits(return_X_y=True)
    x, y = DigitsDataModule().train_set().tensors
    assert torch.equal((x + 1) * 8, torch.tensor(images).float().view(-1, 1, 8, 8))
    assert torch.equal(y, torch.tensor(labels)) and y.dtype == torch.int64
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32)


def test_class_describes_its_data():
    x, y = DigitsDataModule().train_set()[0]
    assert x.shape == DigitsDataModule.latent_shape
    assert set(DigitsDataModule().train_set().tensors[1].tolist()) == set(
        range(DigitsDataModule.num_classes)
    )


def test_reference_images_are_all_digits_in_256_levels():
    real, labels = load_digits(return_X_y=True)
    images, y = DigitsDataModule().reference_images()
    expected = torch.tensor(real).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    assert images.dtype == torch.uint8 and torch.equal(images, expected)
    assert torch.equal(y, torch.tensor(labels))


def test_decode_clamps_and_rounds_to_the_nearest_level():
    latents = (
        torch.tensor([-9.0, -1.0, -0.999, -0.99, 0.0, 0.9, 1.0, 1.5])
        .view(-1, 1, 1, 1)
        .expand(-1, 1, 8, 8)
    )
    assert DigitsDataModule().decode(latents)[:, 0, 0, 0].tolist() == [
        0,
        0,
        0,
        1,
        128,
        242,
        255,
        255,
    ]


def test_decode_of_half_precision_latents_is_that_of_their_values():
    latents = torch.linspace(-1, 1, 128).view(2, 1, 8, 8).bfloat16()
    assert torch.equal(
        DigitsDataModule().decode(latents), DigitsDataModule().decode(latents.float())
    )


def test_decode_refuses_other_shapes_and_values_that_are_not_finite():
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(2, 4, 8, 8\)"):
        DigitsDataModule().decode(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        DigitsDataModule().decode(torch.full((1, 1, 8, 8), float("nan")))


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 1.5}, {"seed": -1}, {"num_workers": "2"}]
)
def test_wrong_arguments_are_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}. Give an integer"):
        DigitsDataModule(**wrong)


def test_a_subclass_with_the_old_reference_pictures_still_works():
    with pytest.warns(DeprecationWarning, match="Old defines reference_pictures.*reference_images"):

        class Old(DigitsDataModule):
            def reference_pictures(self):
                images, labels = super().reference_pictures()
                return images[:3], labels[:3]

    with pytest.warns(DeprecationWarning, match="call reference_images"):
        images, labels = Old().reference_images()
    expected = DigitsDataModule().reference_images()
    assert torch.equal(images, expected[0][:3]) and torch.equal(labels, expected[1][:3])
    assert Old().reference_classes(num_classes=10) == sorted(set(labels.tolist()))


def test_reference_pictures_is_a_deprecated_name():
    with pytest.warns(DeprecationWarning, match="call reference_images"):
        images, _ = DigitsDataModule().reference_pictures()
    assert torch.equal(images, DigitsDataModule().reference_images()[0])
