"""Kept batches, marks and results carry checksums: what was damaged or is of something else is not used, and that is said."""

import pytest
import torch

from tinyfusion_pl.artifacts import ArtifactError, save_tensors
from tinyfusion_pl.checksums import (
    Damaged,
    load_sealed_tensors,
    read_sealed,
    save_sealed_tensors,
    write_sealed,
)
from tinyfusion_pl.metrics import Features
from tinyfusion_pl.tasks import RunFolder
from tinyfusion_pl.tasks.kept import KeptBatches

ORIGIN = {"weights": "a" * 64, "reference": "b" * 64}


def batches(folder, *, num=3, **settings):
    kept = KeptBatches(folder, made_from=ORIGIN, **settings)
    for i in range(num):
        features = Features(torch.randn(4, 8), torch.randn(4, 10), None)
        kept.write(
            torch.arange(4) + 4 * i,
            torch.arange(4),
            features,
            torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        )
    return kept


def damaged(content, generator):
    """`content` with a bit flipped, a span of zeros, or an end missing."""
    at, kind = (int(torch.randint(high, (), generator=generator)) for high in (len(content), 3))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
    changed = content[:at] if kind == 1 else content[:at] + bytes(40) + content[at + 40 :]
    return content[: len(content) // 2] if changed == content else changed


def test_a_damaged_batch_is_made_again_and_the_others_are_kept(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    kept = batches(tmp_path / "kept")
    path = tmp_path / "kept" / "00000004.safetensors"
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damaged(whole, generator))
        kept.check()
        said = capsys.readouterr().out
        assert "1 finished batch in" in said and "to be sampled again" in said and "damaged" in said
        assert kept.indices().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    path.write_bytes(whole)
    kept.check()
    assert capsys.readouterr().out == "" and len(kept.indices()) == 12


@pytest.mark.parametrize("part", ORIGIN)
def test_batches_of_something_else_are_made_again(tmp_path, capsys, part):
    batches(tmp_path)
    other = KeptBatches(tmp_path, made_from=ORIGIN | {part: "c" * 64})
    other.check()
    said = capsys.readouterr().out
    assert (
        f"discarding 3 finished batches in {tmp_path}, to be sampled again" in said
        and f"{part} {ORIGIN[part][:12]}... then, cccccccccccc... now" in said
    )
    assert len(other.indices()) == 0


def test_batches_without_checksum_or_images_are_made_again(tmp_path, capsys):
    batches(tmp_path, num=1)
    save_tensors(tmp_path / "00000004.safetensors", {"indices": torch.arange(4)})
    KeptBatches(tmp_path, images=True, made_from=ORIGIN).check()
    said = capsys.readouterr().out
    assert (
        "damaged" in said and "were not saved" in said and not list(tmp_path.glob("*.safetensors"))
    )


def test_any_damage_to_a_mark_is_reported(tmp_path):
    """With what to do, whether the file is still JSON or not."""
    folder, generator = RunFolder(tmp_path), torch.Generator().manual_seed(0)
    content = {
        "seconds": 1.5,
        "kept_blocks": {"blocks": [0, 2]},
        "made_from": ORIGIN,
        "files": {"shallow/record.json": "d" * 64},
    }
    folder.finish("learn_mask", content)
    path = tmp_path / "stages" / "learn_mask.json"
    whole = path.read_bytes()
    texts = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"sha256": 5}',
        b"[" * 100_000,
        whole.replace(b"1.5", b"1.25"),
    ]
    for bad in [*texts, *(damaged(whole, generator) for _ in range(200))]:
        path.write_bytes(bad)
        try:
            assert folder.result("learn_mask") == content  # a change of white space is none
        except Damaged as error:
            assert str(path) in str(error) and "Delete it" in str(error)
            continue
        assert bad.split() == whole.split()


def test_a_mark_of_another_configuration_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.configuration = "01234567"
    folder.finish("recover", {"seconds": 1.0})
    folder.configuration = "89abcdef"
    with pytest.raises(
        ArtifactError,
        match="another configuration .hash 01234567; the hash of this one is 89abcdef",
    ):
        folder.result("recover")


def test_sealed_files_are_read_back_as_they_were_written(tmp_path):
    write_sealed(tmp_path / "a.json", {"b": (1, 2.5), 3: None})
    assert read_sealed(tmp_path / "a.json") == {"b": [1, 2.5], "3": None}
    tensors = {"x": torch.randn(3, dtype=torch.bfloat16), "y": torch.arange(2)}
    save_sealed_tensors(tmp_path / "a.safetensors", tensors, made_from=ORIGIN)
    found, made_from = load_sealed_tensors(tmp_path / "a.safetensors")
    assert made_from == ORIGIN and all(
        torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )
