"""Images that are there already: folders, npz files and reference files give the same numbers; what is broken is named."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from tinyfusion_pl.artifacts import ArtifactError, read_json, sha256
from tinyfusion_pl.cli import main
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import (
    GenerationMetrics,
    PrecisionRecall,
    Reference,
    load_digits_classifier,
    read_reference,
)
from tinyfusion_pl.report import compare
from tinyfusion_pl.tasks import ImageFiles, make_reference, measure

TRAINER = partial(
    Trainer,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same images as folders of PNG and as npz: 60 real ones, 40 others."""
    folder = tmp_path_factory.mktemp("images")
    images = DigitsDataModule().reference_images()[0]
    for name, part in (("real", images[:60]), ("made", images[60:100])):
        (folder / name / "deep").mkdir(parents=True)
        for i, image in enumerate(part):
            to_pil_image(image).save(folder / name / ("deep" if i % 2 else ".") / f"{i}.png")
        np.savez(folder / f"{name}.npz", arr_0=part.permute(0, 2, 3, 1).numpy())
    return folder


def metrics():
    return GenerationMetrics(load_digits_classifier())


def measured(samples, reference, folder, **files):
    return measure(
        run_dir=folder,
        samples=str(samples),
        reference=str(reference),
        metrics=metrics(),
        trainer=TRAINER,
        files=ImageFiles(**{"num_channels": 1, "batch_size": 7, **files}),
    )


def test_folders_npz_and_reference_files_give_the_same_numbers(files, tmp_path):
    expected = metrics()
    images = DigitsDataModule().reference_images()[0]
    expected.update_reference(images[:60])
    expected.update(images[60:100])
    expected = expected.compute()
    make_reference(
        run_dir=tmp_path,
        images=str(files / "real"),
        output=str(tmp_path / "ref.npz"),
        metrics=metrics(),
        trainer=TRAINER,
        files=ImageFiles(num_channels=1),
    )
    for samples in ("made", "made.npz"):
        for reference in (files / "real", files / "real.npz", tmp_path / "ref.npz"):
            # Features are computed in float32, and here in batches of another size.
            assert measured(files / samples, reference, tmp_path) == pytest.approx(
                expected, rel=2e-6
            )
    results = read_json(tmp_path / "measure.json")
    assert (
        results["samples"]["fid"] == pytest.approx(expected["fid"])
        and results["protocol"]["num_samples"] == 40
    )
    assert results["protocol"]["num_reference"] == 60 and results["protocol"][
        "reference_sha256"
    ] == sha256(tmp_path / "ref.npz")


def test_results_over_one_reference_can_be_compared_and_others_are_refused(files, tmp_path):
    other = GenerationMetrics(load_digits_classifier(), metrics={"pr": PrecisionRecall(64, k=5)})
    for name, samples, reference in (
        ("a", "made", "real"),
        ("b", "real", "real"),
        ("c", "made", "made"),
    ):
        measured(
            files / samples, files / reference, tmp_path / name, batch_size=7 if name == "a" else 60
        )
    measure(
        run_dir=tmp_path / "d",
        samples=str(files / "made"),
        reference=str(files / "real"),
        metrics=other,
        trainer=TRAINER,
        files=ImageFiles(num_channels=1),
    )
    assert "DIFFERS in num_samples. " in compare(
        tmp_path / "a", tmp_path / "b"
    )  # the folder's checksum is that of its images alone
    assert "Protocol: equal." in compare(tmp_path / "a", tmp_path / "a")
    assert "DIFFERS in num_reference, reference_sha256. " in compare(tmp_path / "a", tmp_path / "c")
    assert re.search(
        r"DIFFERS in .*metrics.pr.k, .*The values are NOT comparable",
        compare(tmp_path / "a", tmp_path / "d"),
    )


class Digits(torch.utils.data.Dataset):
    """The first real images, with labels, as PIL images or as `kind` makes of them."""

    def __init__(self, kind=to_pil_image, num=60):
        self.images, self.kind = DigitsDataModule().reference_images()[0][:num], kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.kind(self.images[index]), index


def test_a_reference_file_is_made_of_a_dataset_or_a_data_module_as_of_files(files, tmp_path):
    def statistics(images, name):
        make_reference(
            run_dir=tmp_path,
            images=images,
            output=str(tmp_path / f"{name}.npz"),
            metrics=metrics(),
            trainer=TRAINER,
            files=ImageFiles(num_channels=1),
        )
        return read_reference(tmp_path / f"{name}.npz")

    expected = statistics(str(files / "real.npz"), "file")
    for name, dataset in (("pil", Digits()), ("tensors", Digits(lambda image: image))):
        found = statistics(dataset, name)
        assert torch.equal(found.features, expected.features) and found.num_images == 60
        assert torch.equal(found.statistics["features"][1], expected.statistics["features"][1])
    assert statistics(DigitsDataModule(), "module").num_images == 1797
    assert measured_of(Digits(), DigitsDataModule(), tmp_path)["precision"] == 1
    with pytest.raises(
        ValueError,
        match=r"Sample 0 of Digits is torch.float32 \(1, 8, 8\); expected PIL images or uint8",
    ):
        statistics(Digits(lambda image: image / 255), "floats")
    with pytest.raises(ValueError, match="The dataset Digits is empty"):
        statistics(Digits(num=0), "empty")


def measured_of(samples, reference, folder):
    return measure(
        run_dir=folder,
        samples=samples,
        reference=reference,
        metrics=metrics(),
        trainer=TRAINER,
        files=ImageFiles(num_channels=1),
    )


def test_the_command_line_makes_a_reference_of_a_data_module_and_measures_against_it(
    files, tmp_path
):
    quiet = [f"run_dir={tmp_path / 'run'}", "metrics=digits"]
    assert (
        main(
            [
                "task=reference",
                "reference.images=${data}",
                f"reference.output={tmp_path / 'ref.npz'}",
                *quiet,
            ]
        )
        == 0
    )
    dataset = f"{{_target_: {__name__}.Digits}}"
    made = [
        "task=measure",
        f"measure.reference={tmp_path / 'ref.npz'}",
        "measure.files.num_channels=1",
        "metrics=digits",
    ]
    assert main([*made, f"measure.samples={dataset}", f"run_dir={tmp_path / 'a'}"]) == 0
    assert main([*made, f"measure.samples={files / 'real.npz'}", f"run_dir={tmp_path / 'b'}"]) == 0
    of_dataset, of_npz = (read_json(tmp_path / name / "measure.json") for name in "ab")
    assert (
        of_dataset["samples"] == pytest.approx(of_npz["samples"])
        and of_dataset["samples_sha256"] == of_npz["samples_sha256"]
    )


def test_several_devices_are_refused(files, tmp_path):
    with pytest.raises(
        ValueError,
        match="measured by one process, but measure.trainer has 2. Give measure.trainer.devices=1",
    ):
        measure(
            run_dir=tmp_path,
            samples=str(files / "made"),
            reference=str(files / "real"),
            metrics=metrics(),
            trainer=partial(TRAINER, devices=2, strategy="ddp"),
            files=ImageFiles(num_channels=1),
        )


def test_the_progress_bar_says_images_per_second(files, tmp_path, capsys):
    measured(files / "made", files / "real", tmp_path)
    assert re.search(r"samples .*100% .*images/s", capsys.readouterr().out)


def test_a_reference_file_has_the_published_keys_and_is_never_written_over(files, tmp_path):
    make = partial(
        make_reference,
        run_dir=tmp_path,
        images=str(files / "real.npz"),
        metrics=metrics(),
        trainer=TRAINER,
        files=ImageFiles(),
    )
    path = make(output=str(tmp_path / "ref.npz"))
    with np.load(path) as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features"} <= set(arrays.files)
        features = (
            load_digits_classifier()(read_reference(files / "real.npz").images)
            .features.double()
            .numpy()
        )
        np.testing.assert_allclose(arrays["mu"], features.mean(0), atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"], np.cov(features, rowvar=False), atol=1e-5)
    for output in (path, tmp_path / "ref.txt"):
        with pytest.raises(ValueError, match="give a new file that ends with .npz"):
            make(output=str(output))


def test_a_broken_image_is_named_or_skipped_and_counted(files, tmp_path):
    (tmp_path / "made").mkdir()
    for i, image in enumerate(read_reference(files / "made.npz").images):
        to_pil_image(image).save(tmp_path / "made" / f"{i}.png")
    (tmp_path / "made" / "7.png").write_bytes((tmp_path / "made" / "8.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="7.png is not a readable image.*skip_broken"):
        measured(tmp_path / "made", files / "real", tmp_path)
    measured(tmp_path / "made", files / "real", tmp_path, skip_broken=True)
    results = read_json(tmp_path / "measure.json")
    assert (results["protocol"]["num_samples"], results["num_skipped"]) == (39, 1)


def test_wrong_files_are_named_with_what_was_expected(files, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "keys.npz", other=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.full((5, 8, 8, 1), 0.5))
    broken = np.zeros((5, 8, 8, 1), dtype=np.float32)
    broken[3] = np.nan
    np.savez(tmp_path / "nan.npz", arr_0=broken)
    (tmp_path / "deep").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(
            tmp_path / "deep" / f"{i}.tiff"
        )
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((files / "made.npz").read_bytes()[:500])
    statistics = {"features": (torch.zeros(64), torch.eye(64))}
    Reference(path=tmp_path / "statistics.npz", statistics=statistics).write()
    for samples, said in (
        ("missing", "Folder .*missing not found"),
        ("empty", "holds no images"),
        ("keys.npz", "holds other. Expected arr_0"),
        ("float.npz", "arr_0 of .* is float64 .* between 0.5 and 0.5; expected images, uint8"),
        ("nan.npz", r"1 of 5 with values that are not finite \(positions \[3\]\)"),
        ("deep", r"0.tiff is not a readable image .*floats .* which may mean 0..1 or 0..255"),
        ("objects.npz", "not a whole npz file of plain arrays"),
        ("cut.npz", "not a whole npz file"),
        ("statistics.npz", r"contains no images \(arr_0\)"),
        ("missing.npz", "There is no file"),
    ):
        with pytest.raises((ValueError, ArtifactError), match=said):
            measured(tmp_path / samples, files / "real", tmp_path)
    assert not (tmp_path / "measure.json").exists()


def test_images_of_other_sizes_or_channels_are_refused(files, tmp_path):
    (tmp_path / "mixed").mkdir()
    for i in range(6):
        to_pil_image(torch.zeros(1, 8, 8 + 4 * (i == 3), dtype=torch.uint8)).save(
            tmp_path / "mixed" / f"{i}.png"
        )
    with pytest.raises(
        ValueError, match=r"different sizes \(\[\(8, 8\), \(8, 12\)\]\). Give image_size"
    ):
        measured(tmp_path / "mixed", files / "real", tmp_path)
    assert (
        measured(tmp_path / "mixed", files / "real", tmp_path, image_size=8)["precision"] == 0
    )  # cropped, they are black squares
    with pytest.raises(ValueError, match="expects grayscale images .* got color images"):
        measured(files / "made", files / "real", tmp_path, num_channels=3)
    with pytest.raises(ValueError, match="'precision_recall' needs 4 or more samples, got 3"):
        np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 1), dtype=np.uint8))
        measured(tmp_path / "few.npz", files / "real", tmp_path)


def test_numbers_in_names_count(tmp_path):
    from tinyfusion_pl.data.image_batches import UnlabelledImageFolder

    for i in (10, 9, 100, 1):
        to_pil_image(torch.zeros(3, 2, 2, dtype=torch.uint8)).save(tmp_path / f"{i}.png")
    assert [path.stem for path in UnlabelledImageFolder(tmp_path).paths] == ["1", "9", "10", "100"]


def test_centre_crop_is_that_of_the_adm_data_loader():
    from PIL import Image

    from tinyfusion_pl.data.image_batches import center_crop

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 45, 3), dtype=np.uint8))
    halved = image.resize((22, 35), resample=Image.Resampling.BOX)
    scaled = halved.resize((20, round(35 * 20 / 22)), resample=Image.Resampling.BICUBIC)
    top = (scaled.height - 20) // 2
    assert np.array_equal(np.array(center_crop(image, 20)), np.array(scaled)[top : top + 20])


# -- what images there may be
def grey_images(folder, num=6):
    folder.mkdir(parents=True)
    for i in range(num):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


def test_every_kind_of_broken_image_is_named_or_skipped(files, tmp_path):
    from image_toys import broken_images

    folder = grey_images(tmp_path / "images")
    broken = {path.name for path in broken_images(folder)} - {f"{i}.png" for i in range(6)}
    with pytest.raises(ValueError, match="is not a readable image .*skip_broken=true"):
        measured(folder, files / "real", tmp_path)
    measured(folder, files / "real", tmp_path, skip_broken=True)
    results = read_json(tmp_path / "measure.json")
    assert (results["protocol"]["num_samples"], results["num_skipped"]) == (6, len(broken))


def test_only_broken_images_is_an_error(files, tmp_path):
    folder = grey_images(tmp_path / "images")
    for path in folder.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="None of the 6 images could be read"):
        measured(folder, files / "real", tmp_path, skip_broken=True)


def test_too_few_images_after_skipping_is_an_error(files, tmp_path):
    folder = grey_images(tmp_path / "images")
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="'precision_recall' needs 4 or more samples, got 2"):
        measured(folder, files / "real", tmp_path, skip_broken=True)


def test_what_was_ignored_noted_and_skipped_is_said(files, tmp_path, capsys):
    folder = grey_images(tmp_path / "images")
    Image.new("LA", (8, 8), (9, 9)).save(folder / "alpha.png")
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "broken.png").write_bytes(b"x")
    measured(folder, files / "real", tmp_path, skip_broken=True)
    out = capsys.readouterr().out
    assert (
        "1 hidden files or folders (.DS_Store)" in out
        and "1 images have transparent pixels: transparency is ignored" in out
    )
    assert (
        "1 broken images were skipped: " in out
        and "broken.png: its content is of no known image format" in out
    )


def test_npz_of_image_files_is_measured_as_the_folder(files, tmp_path):
    folder = grey_images(tmp_path / "images")
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    np.savez(
        tmp_path / "packed.npz",
        blob=np.frombuffer(b"".join(contents), np.uint8),
        offsets=np.cumsum([0, *map(len, contents)]),
        labels=[5] * 6,
    )
    results = [
        measured(samples, reference, tmp_path)
        for samples, reference in (
            (folder, files / "real"),
            (tmp_path / "packed.npz", files / "real"),
        )
    ]
    assert results[0] == results[1]
    measured(files / "made", tmp_path / "packed.npz", tmp_path)
    make_reference(
        run_dir=tmp_path,
        images=str(tmp_path / "packed.npz"),
        output=str(tmp_path / "ref.npz"),
        metrics=metrics(),
        trainer=TRAINER,
        files=ImageFiles(num_channels=1),
    )
    assert read_reference(tmp_path / "ref.npz").num_images == 6


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(64), "sigma": np.zeros(64)},
        {"mu": np.zeros(64), "sigma": np.zeros((64, 63))},
        {"mu": np.array("x"), "sigma": np.eye(2)},
        {"mu": np.zeros(64, complex), "sigma": np.eye(64)},
        {"features": np.zeros(64)},
        {"features": np.array([["a"]])},
        {"arr_0": np.array(1.0)},
        {"arr_0": np.array("x")},
        {"arr_0": np.zeros((0, 8, 8, 1), np.uint8)},
        {"arr_0": np.zeros((4, 0, 8, 1), np.uint8)},
        {"features": np.zeros((9, 64)), "num_images": np.zeros(3)},
        {"features": np.zeros((9, 64)), "network": np.zeros(3)},
    ],
)
def test_references_of_odd_types_are_named(tmp_path, arrays):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ArtifactError, match=".*odd.npz"):
        read_reference(tmp_path / "odd.npz")


def test_references_of_either_byte_order_are_read(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        mu=np.arange(3, dtype=">f8"),
        sigma=np.eye(3, dtype=">f4"),
        features=np.ones((2, 3), ">f2"),
    )
    found = read_reference(tmp_path / "x.npz")
    assert (
        found.statistics["features"][0].tolist() == [0, 1, 2]
        and found.features.dtype == torch.float32
    )


def test_a_pipe_is_never_opened(files, tmp_path):
    import os

    os.mkfifo(tmp_path / "x.npz")
    for samples, reference in (
        (tmp_path / "x.npz", files / "real"),
        (files / "made", tmp_path / "x.npz"),
    ):
        with pytest.raises(ArtifactError, match="x.npz is a named pipe, not a regular file"):
            measured(samples, reference, tmp_path)
