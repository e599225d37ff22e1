"""A task on images that is refused, also in the middle of its work, leaves nothing that a corrected command stumbles over."""

import pytest
from torchvision.transforms.v2.functional import to_pil_image

from latents_toys import vae_in, write_images
from tinyfusion_pl import cli
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.locks import LOCK


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = DigitsDataModule().reference_images()[0]
    for name, part in (("good", images[:8]), ("bad", images[8:16])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(part):
            to_pil_image(image).save(tmp_path / name / f"{i}.png")
    (tmp_path / "bad" / "5.png").write_bytes(b"no image")
    return tmp_path


MEASURE = ["task=measure", "metrics=digits", "measure.files.num_channels=1", "measure.files.batch_size=3", "measure.samples=good",
           "measure.reference=bad"]  # fmt: skip
REFERENCE = ["task=reference", "metrics=digits", "reference.files.num_channels=1", "reference.files.batch_size=3",
             "reference.images=bad", "reference.output=new/ref.npz"]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "wrong", "said", "right", "left"),
    [
        (
            MEASURE,
            [],
            "bad/5.png is not a readable",
            ["measure.files.skip_broken=true"],
            "run/measure.json",
        ),
        (
            MEASURE,
            ["measure.reference=nowhere"],
            "nowhere",
            ["measure.reference=good"],
            "run/measure.json",
        ),
        (
            MEASURE,
            ["measure.files.num_channels=3"],
            "grayscale",
            ["measure.reference=good"],
            "run/measure.json",
        ),
        (
            REFERENCE,
            [],
            "bad/5.png is not a readable",
            ["reference.files.skip_broken=true"],
            "new/ref.npz",
        ),
        (
            REFERENCE,
            ["reference.images=nowhere"],
            "nowhere",
            ["reference.images=good"],
            "new/ref.npz",
        ),
        (
            REFERENCE,
            ["reference.output=ref.txt"],
            ".npz",
            ["reference.images=good"],
            "new/ref.npz",
        ),
    ],
)
def test_a_refused_command_leaves_nothing_and_its_correction_runs(
    images, capfd, command, wrong, said, right, left
):
    before = sorted(images.rglob("*"))
    assert cli.main(["run_dir=run", *command, *wrong]) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and said in errors and "Traceback" not in errors
    assert sorted(images.rglob("*")) == before
    assert cli.main(["run_dir=run", *command, *right]) == 0, capfd.readouterr().err
    assert (images / left).exists() and not [
        path for path in images.rglob("*") if path.name.endswith(LOCK)
    ]


def test_a_refused_extraction_keeps_its_finished_part_and_no_configuration(images):
    write_images(images / "images")
    broken = sorted((images / "images").glob("*/*.png"))[-1]
    broken.write_bytes(b"no image")
    command = [
        "run_dir=run",
        "task=extract_latents",
        "extract.images=images",
        "extract.output=latents",
        "extract.image_size=8",
        f"extract.vae.source={vae_in(images).args[0]}",
        "extract.batch_size=2",
        "extract.save_every=2",
        "extract.num_workers=0",
        "extract.trainer.accelerator=cpu",
    ]
    assert cli.main(command) == 1
    assert not (images / "run").exists() and list((images / "latents").iterdir())
    assert cli.main([*command, "extract.skip_broken=true"]) == 0
    assert (images / "latents" / "latents.json").exists()
