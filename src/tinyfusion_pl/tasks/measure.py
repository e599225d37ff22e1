"""Metrics of existing images, and reference files made from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.utils.data import Dataset

from tinyfusion_pl.arrays import read_npz
from tinyfusion_pl.artifacts import ArtifactError, sha256, write_json
from tinyfusion_pl.data import GenerationDataModule, open_images
from tinyfusion_pl.data.image_batches import REMEDY as SKIP
from tinyfusion_pl.data.image_batches import (
    ImageArray,
    ImageBatches,
    ImageDataset,
    UnlabelledImageFolder,
    UnlabelledPackedImages,
)
from tinyfusion_pl.data.reading import MAX_PIXELS
from tinyfusion_pl.locks import sole_writer
from tinyfusion_pl.metrics import GenerationMetrics, Reference, read_reference
from tinyfusion_pl.tasks.folder import say
from tinyfusion_pl.tasks.trainer_checks import check_sampling_trainer

Source = str | Path | Dataset | GenerationDataModule  # of images


@dataclass(kw_only=True)
class ImageFiles:
    """Options for reading images from a folder, an npz file or a dataset.

    Args:
        image_size: Side of the center crop of image files and PIL images, in pixels, see
            `ImageReader`; None: no crop.
        num_channels: Channels of image files and PIL images, 1 or 3.
        skip_broken: Whether to skip images that cannot be read, and count them.
        max_pixels: Maximum width times height of an image.
        batch_size: Images per batch of the feature network.
        num_workers: Worker processes that read a folder.
    """

    image_size: int | None = None
    num_channels: int = 3
    skip_broken: bool = False
    max_pixels: int = MAX_PIXELS
    batch_size: int = 64
    num_workers: int = 0

    def batches(self, source: Source) -> ImageBatches:
        """Batches of the images in `source`.

        Args:
            source: Folder, npz file with ``arr_0`` or image files, dataset, or data module, whose
                reference images are read.

        Raises:
            ValueError: if it has no images.
            ArtifactError: if it cannot be read.
        """
        reading: dict[str, Any] = {
            "image_size": self.image_size,
            "num_channels": self.num_channels,
            "max_pixels": self.max_pixels,
            "skip_broken": self.skip_broken,
        }
        if isinstance(source, GenerationDataModule):
            dataset: Any = ImageArray(source.reference_images()[0])
        elif not isinstance(source, (str, Path)):
            dataset = ImageDataset(source, **reading)
        elif Path(source).suffix == ".npz":
            if holds_image_files(source):
                dataset = UnlabelledPackedImages(
                    open_images(source, **reading, class_to_idx="order", remedy=SKIP)
                )
            elif (images := read_reference(source).images) is not None:
                dataset = ImageArray(images)
            else:
                raise ArtifactError(
                    f"{source} contains no images (arr_0), so it cannot be measured; it may serve "
                    "as a reference."
                )
        else:
            dataset = UnlabelledImageFolder(source, **reading)
        return ImageBatches(dataset, batch_size=self.batch_size, num_workers=self.num_workers)


def measure(
    *,
    run_dir: str | Path,
    samples: Source,
    reference: Source,
    metrics: GenerationMetrics,
    files: ImageFiles,
    trainer: Callable[..., Trainer],
    begin: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Compute metrics of existing images against reference images.

    Writes ``measure.json`` (results, inputs, protocol) to `run_dir` and prints the results.

    Args:
        run_dir: The run folder.
        samples: Images: a folder, an npz file, a dataset or a data module.
        reference: The same, or a reference file.
        metrics: The metrics.
        files: How to read the images.
        trainer: Factory of a Trainer, whose device is used.
        begin: Called once all checks have passed, before anything is measured or written.

    Raises:
        ValueError: for images that do not fit the feature network.
        ArtifactError: for files that cannot be read.
    """
    device = _device("measure", trainer)
    found = files.batches(samples)
    is_file = (
        isinstance(reference, (str, Path))
        and Path(reference).suffix == ".npz"
        and not holds_image_files(reference)
    )
    held = read_reference(reference) if is_file else None
    others = files.batches(reference) if held is None else None
    if held is not None:
        metrics.check_reference(held)
    metrics.check(
        num_samples=len(found.dataset),
        num_reference=held.num_images if held else len(others.dataset),
    )
    metrics.to(device)
    if begin is not None:
        begin()
    say(
        f"measure: measuring {len(found.dataset):,} images of {_name(samples)} against "
        f"{_name(reference)}; metrics will be saved to {Path(run_dir) / 'measure.json'}"
    )
    if held is not None:
        metrics.set_reference(held, batch_size=files.batch_size)
        num_reference, digest = held.num_images, sha256(reference)
    else:
        num_reference, digest = _run(
            "reference", others, lambda _, images: metrics.update_reference(images)
        )
    num, samples_digest = _run(
        "samples", found, lambda numbers, images: metrics.update(images, indices=numbers)
    )
    metrics.check(num_samples=num, num_reference=num_reference)  # broken images are not among them
    results = metrics.compute()
    written = {
        "name": _name(samples),
        "reference": _name(reference),
        "num_skipped": found.num_skipped,
        "samples_sha256": samples_digest,
        "samples": results,
        "protocol": metrics.protocol(
            num_samples=metrics.num_samples, num_reference=num_reference, reference_sha256=digest
        ),
    }
    write_json(Path(run_dir) / "measure.json", written)
    for name, number in results.items():
        say(f"{name:>16}  {number:.6g}")
    return results


def make_reference(
    *,
    run_dir: str | Path,
    images: Source,
    output: str,
    metrics: GenerationMetrics,
    files: ImageFiles,
    trainer: Callable[..., Trainer],
    begin: Callable[[], None] | None = None,
) -> Path:
    """Write a reference file: statistics for distances, features for precision and recall.

    Args:
        run_dir: The run folder.
        images: Images: a folder, an npz file, a dataset or a data module.
        output: The file, which must not exist yet.
        metrics: The metrics that the reference is for.
        files: How to read the images.
        trainer: Factory of a Trainer, whose device is used.
        begin: Called once all checks have passed, before anything is computed or written.

    Returns:
        The path of the file.

    Raises:
        ValueError: if `output` exists or does not end in ``.npz``.
        ArtifactError: if another process is writing it.
    """
    path = Path(output)
    if path.suffix != ".npz":
        raise ValueError(f"reference.output is {output}; give a new file that ends with .npz.")
    with sole_writer(path, setting="reference.output", is_folder=False):
        if path.exists():
            raise ValueError(f"reference.output is {output}; give a new file that ends with .npz.")
        return _make_reference(
            path, images=images, metrics=metrics, files=files, trainer=trainer, begin=begin
        )


def _make_reference(
    path: Path,
    *,
    images: Source,
    metrics: GenerationMetrics,
    files: ImageFiles,
    trainer: Callable[..., Trainer],
    begin: Callable[[], None] | None,
) -> Path:
    device = _device("reference", trainer)
    found = files.batches(images)
    metrics.check(num_samples=len(found.dataset), num_reference=len(found.dataset))
    metrics.to(device)
    if begin is not None:
        begin()
    say(f"reference: reading {len(found.dataset):,} images of {_name(images)}; writing {path}")
    rows: list[torch.Tensor] = []
    keep = metrics.needs_reference_features

    def take(_: torch.Tensor, batch: torch.Tensor) -> None:
        features = metrics.features(batch)
        metrics.update_reference_features(features)
        if keep:
            rows.append(features.features.cpu())

    num, _ = _run("reference", found, take)
    metrics.check(num_samples=num, num_reference=num)
    reference = Reference(
        path=path, statistics=metrics.statistics(), network=metrics.fingerprint(), num_images=num
    )
    replace(reference, features=torch.cat(rows) if rows else None).write()
    skipped = f", {found.num_skipped} broken images skipped" if found.num_skipped else ""
    say(f"Done. {path}: {num} images{skipped}")
    return path


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _device(task: str, trainer: Callable[..., Trainer]) -> torch.device:
    made = check_sampling_trainer(f"{task}.trainer", trainer)
    if made.world_size > 1:
        raise ValueError(
            f"Existing images are measured by one process, but {task}.trainer has "
            f"{made.world_size}. Give {task}.trainer.devices=1, and {task}.files.num_workers to "
            "read a folder faster."
        )
    return made.strategy.root_device


def holds_image_files(path: str | Path) -> bool:
    """Whether an npz file contains image files, see `PackedImages`."""
    return "blob" in read_npz(path, only=())[1]


def _run(
    what: str, batches: ImageBatches, use: Callable[[torch.Tensor, torch.Tensor], None]
) -> tuple[int, str]:
    """Pass all images to `use`; returns their number, and a SHA-256 of their pixels."""
    num, digest = 0, hashlib.sha256()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _ImagesPerSecond(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(what, total=len(batches.numbers))
        for numbers, images in batches:
            use(numbers, images)
            for image in images:
                digest.update(
                    str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()
                )
            num += len(numbers)
            progress.update(bar, completed=int(numbers[-1]) + 1)
    for sentence in batches.sentences():
        say(f"{what}: {sentence}")
    return num, digest.hexdigest()


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Any) -> Text:
        speed = (
            task.finished_speed or task.speed or task.completed / max(task.elapsed or 0, 1e-3)
        )  # a single batch has no speed of its own
        return Text(f"{speed:.1f} images/s")
