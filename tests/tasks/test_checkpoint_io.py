"""Checkpoints carry a checksum: whatever changes in the file is noticed."""

import os
import warnings
import zipfile

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.tasks.checkpoint_io import WholeCheckpointIO

CONTENT = {
    "state_dict": {"weight": torch.arange(600.0)},
    "step": 3,
    "random_states": [torch.arange(90, dtype=torch.uint8)],
}


@pytest.fixture
def checkpoint(tmp_path):
    WholeCheckpointIO().save_checkpoint(CONTENT, path := tmp_path / "last.ckpt")
    return path


def test_a_sealed_checkpoint_is_read_by_torch_and_zip_tools(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contents = [
            WholeCheckpointIO().load_checkpoint(checkpoint, weights_only=True),
            torch.load(checkpoint, weights_only=True),
            torch.load(checkpoint, weights_only=True, mmap=True),
        ]
    for content in contents:
        assert (
            torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
            and content["step"] == 3
        )
    assert zipfile.ZipFile(checkpoint).testzip() is None
    assert os.listdir(checkpoint.parent) == ["last.ckpt"]


def test_any_flipped_bit_in_a_checkpoint_is_reported(checkpoint):
    good = checkpoint.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(good), (300,), generator=generator).tolist() + list(
        range(len(good) - 200, len(good))
    )
    for i, place in enumerate(places):
        bad = bytearray(good)
        bad[place] ^= 1 << (i % 8)
        checkpoint.write_bytes(bad)
        with pytest.raises(
            ArtifactError, match=r"last\.ckpt(:? it is truncated| is damaged).*Delete it"
        ):
            WholeCheckpointIO().load_checkpoint(checkpoint, weights_only=True)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.7, 0.9, 0.98])
def test_zeroed_spans_and_missing_ends_are_reported(checkpoint, start):
    good = checkpoint.read_bytes()
    start = int(start * len(good))
    for bad in (
        good[:start] + bytes(200) + good[start + 200 :],
        good[:start],
        good[:start] + bytes(len(good) - start),
        good + b"\0",
        good[:-1],
    ):
        checkpoint.write_bytes(bad)
        with pytest.raises(
            ArtifactError, match=r"last\.ckpt(:? it is truncated| is damaged).*Delete it"
        ):
            WholeCheckpointIO().load_checkpoint(checkpoint, weights_only=True)


def test_a_checkpoint_without_a_checksum_loads_with_a_warning(tmp_path):
    TorchCheckpointIO().save_checkpoint(CONTENT, path := tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt has no checksum"):
        assert WholeCheckpointIO().load_checkpoint(path, weights_only=True)["step"] == 3


def test_a_pipe_in_its_place_is_never_opened(checkpoint):
    checkpoint.unlink()
    os.mkfifo(checkpoint)
    with pytest.raises(ArtifactError, match=r"Could not read .*last\.ckpt"):
        WholeCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
