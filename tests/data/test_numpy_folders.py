"""The published layout: latents scaled twice, constant, damaged or of another type are refused."""

import os

import numpy as np
import pytest

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data import ImageNetLatents


def write(folder, latents, labels=None):
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for i, each in enumerate(latents):
        np.save(folder / "imagenet256_features" / f"{i}.npy", each)
        np.save(
            folder / "imagenet256_labels" / f"{i}.npy",
            np.array([i]) if labels is None else labels[i],
        )
    return folder


def latents(num=40, *, std=1.0, dtype=np.float32):
    return [
        (np.random.default_rng(i).normal(size=(1, 4, 4, 4)) * std).astype(dtype) for i in range(num)
    ]


def data(root, **settings):
    return ImageNetLatents(root, **{"batch_size": 4, "num_workers": 0, **settings})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_latents_scaled_once_are_accepted(tmp_path, dtype):
    module = data(write(tmp_path, latents(dtype=dtype)))
    assert np.allclose(module.train_set()[3][0], latents(dtype=dtype)[3][0].astype(np.float32))


@pytest.mark.parametrize(
    ("scaling_factor", "std"), [(0.18215, 0.184), (0.2325, 0.2325), (0.18215, 0.033)]
)
def test_latents_scaled_twice_are_refused(tmp_path, scaling_factor, std):
    with pytest.raises(
        ValueError,
        match=rf"standard deviation of {std:.2f}.*multiplied by .* \({scaling_factor}\) twice",
    ):
        data(write(tmp_path, latents(std=std)), scaling_factor=scaling_factor)


def test_latents_that_were_not_scaled_are_refused(tmp_path):
    with pytest.raises(ValueError, match="standard deviation of 5.*not to be multiplied"):
        data(write(tmp_path, latents(std=5.5)))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0.npy holds only the value 0"), (1.0, "0.npy holds only the value 1")],
)
def test_constant_latents_are_refused(tmp_path, value, said):
    with pytest.raises(ArtifactError, match=said):
        data(write(tmp_path, [np.full((1, 4, 4, 4), value, np.float32)] * 40))


@pytest.mark.parametrize("place", [39, 5])
def test_a_file_of_zeros_among_others_is_refused(tmp_path, place):
    mixed = latents(200 if place == 5 else 40)
    mixed[place] = np.zeros_like(mixed[0])
    with pytest.raises(ArtifactError, match=f"features/{place}.npy holds only the value 0"):
        module = data(write(tmp_path, mixed))
        assert place not in module.train_set().checked()
        module.train_set()[place]


def test_some_latents_of_another_scale_are_reported(tmp_path):
    mixed = [each * 0.18 if i % 4 == 0 else each for i, each in enumerate(latents())]
    with pytest.warns(
        UserWarning,
        match=r"of the 32 latents .* another scale than the others \(0.npy: standard deviation 0.1",
    ):
        data(write(tmp_path, mixed))


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e30, "holds values up to 1e\\+30"),
        (np.nan, "not finite"),
        (-np.inf, "not finite"),
        (-2e4, "holds values up to 2e\\+04"),
    ],
)
def test_values_that_no_latent_has_are_refused(tmp_path, place, value, said):
    found = latents(200)
    found[place][0, 1, 2, 3] = value
    with pytest.raises(ArtifactError, match=f"features/{place}.npy .*{said}"):
        module = data(write(tmp_path, found))
        assert place not in module.train_set().checked()
        module.train_set()[place]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((1, 4, 4, 4), np.int32), "it is int32; latents are floats"),
        (np.zeros((1, 4, 4, 4), np.complex64), "it is complex64"),
        (np.array("text"), "it is <U4"),
    ],
)
def test_latents_of_another_type_are_named(tmp_path, content, said):
    with pytest.raises(ArtifactError, match=f"features/0.npy .* cannot be read: {said}"):
        data(write(tmp_path, [content, *latents()[1:]]))


@pytest.mark.parametrize(
    "label",
    [
        np.array([1.5]),
        np.array([True]),
        np.array(["1"]),
        np.arange(2),
        np.array([]),
        np.array([-1]),
        np.array([2**40]),
    ],
)
def test_labels_of_another_type_are_named(tmp_path, label):
    with pytest.raises(ArtifactError, match="labels"):
        data(write(tmp_path, latents(), labels=[label] * 40))


def test_pipes_and_impossible_headers_are_named(tmp_path):
    write(tmp_path, latents())
    path = tmp_path / "imagenet256_features" / "0.npy"
    path.write_bytes(path.read_bytes().replace(b"(1, 4, 4, 4)", b"(9**9, 4, 4)"))
    with pytest.raises(ArtifactError, match="0.npy .* cannot be read"):
        data(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"(9**9, 4, 4)", b"(99999999,4)"))
    with pytest.raises(ArtifactError, match="0.npy .* cannot be read: .*1599999984 bytes"):
        data(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="0.npy .* cannot be read: .* is a named pipe"):
        data(tmp_path)
