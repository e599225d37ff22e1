"""Measuring pictures that are already there, and making reference files of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.progress import track

from tinyfusion_pl.artifacts import ArtifactError, sha256, write_json
from tinyfusion_pl.data.pictures import PictureArray, PictureBatches, PictureFolder
from tinyfusion_pl.metrics import GenerationMetrics, PrecisionRecall, Reference, read_reference
from tinyfusion_pl.tasks.folder import say


@dataclass(kw_only=True)
class PictureFiles:
    """How pictures are read from a folder or an npz file.

    Args:
        image_size, num_channels, skip_broken: Of folders, see `PictureFolder`.
        batch_size: Pictures that go through the feature network at once.
        num_workers: Processes that read a folder.
    """

    image_size: int | None = None
    num_channels: int = 3
    skip_broken: bool = False
    batch_size: int = 64
    num_workers: int = 0

    def batches(self, path: str | Path) -> PictureBatches:
        """The pictures of a folder, or of the ``arr_0`` of an npz file.

        Raises:
            ValueError, ArtifactError: when there are none.
        """
        if Path(path).suffix == ".npz":
            if (pictures := read_reference(path).pictures) is None:
                raise ArtifactError(f"{path} holds no pictures (arr_0), so nothing can be measured of it; as a reference it may do.")
            dataset: Any = PictureArray(pictures)
        else:
            dataset = PictureFolder(path, image_size=self.image_size, num_channels=self.num_channels, skip_broken=self.skip_broken)
        return PictureBatches(dataset, batch_size=self.batch_size, num_workers=self.num_workers)


def measure(*, run_dir: str | Path, samples: str, reference: str, metrics: GenerationMetrics, files: PictureFiles,
            trainer: Callable[..., Trainer]) -> dict[str, Any]:
    """Measure pictures that are already there: `samples` (a folder or an npz) against `reference` (the same, or a reference file).

    Writes ``measure.json`` (results, counts, protocol) into `run_dir` and prints the numbers.

    Raises:
        ValueError, ArtifactError: for files that cannot be read or do not fit the feature network, before anything is measured.
    """
    found = files.batches(samples)
    held = read_reference(reference) if Path(reference).suffix == ".npz" else None
    others = files.batches(reference) if held is None else None
    if held is not None:
        metrics.check_reference(held)
    metrics.check(num_samples=len(found.dataset), num_reference=held.num_pictures if held else len(others.dataset))
    metrics.to(trainer().strategy.root_device)
    say(f"measure: {len(found.dataset)} pictures of {samples} against {reference}; numbers go to {Path(run_dir) / 'measure.json'}")
    if held is not None:
        metrics.set_reference(held, batch_size=files.batch_size)
        num_reference = held.num_pictures
    else:
        num_reference = _run("reference", others, lambda _, pictures: metrics.update_reference(pictures))
    _run("samples", found, lambda numbers, pictures: metrics.update(pictures, indices=numbers))
    results = metrics.compute()
    protocol = {"samples": str(samples), "num_samples": metrics.num_samples, "num_skipped": found.num_skipped, "reference": str(reference),
                "num_reference": num_reference, "feature_network": metrics.fingerprint(), "metrics": metrics.settings()}
    for name in ("samples", "reference"):
        if Path(protocol[name]).is_file():
            protocol[f"{name}_sha256"] = sha256(protocol[name])
    write_json(Path(run_dir) / "measure.json", {**results, "protocol": protocol})
    for name, number in results.items():
        say(f"{name:>16}  {number:.6g}")
    return results


def make_reference(*, run_dir: str | Path, pictures: str, output: str, metrics: GenerationMetrics, files: PictureFiles,
                   trainer: Callable[..., Trainer]) -> Path:
    """Write a reference file of `pictures` (a folder, or an npz) once: statistics for the distances, features for precision and recall.

    Raises:
        ValueError: when `output` exists or is no ``.npz``; nothing is written over.
    """
    path = Path(output)
    if path.suffix != ".npz" or path.exists():
        raise ValueError(f"reference.output is {output}; give a new file that ends with .npz.")
    found = files.batches(pictures)
    metrics.check(num_samples=len(found.dataset), num_reference=len(found.dataset))
    metrics.to(trainer().strategy.root_device)
    say(f"reference: {len(found.dataset)} pictures of {pictures}; the file is {path}")
    rows: list[torch.Tensor] = []
    keep = any(isinstance(metric, PrecisionRecall) for metric in metrics.collection.values())

    def take(_: torch.Tensor, batch: torch.Tensor) -> None:
        features = metrics.features(batch)
        metrics.update_reference_features(features)
        if keep:
            rows.append(features.features.cpu())

    num = _run("reference", found, take)
    reference = Reference(path=path, statistics=metrics.statistics(), network=metrics.fingerprint(), num_pictures=num)
    replace(reference, features=torch.cat(rows) if rows else None).write()
    say(f"Done. {path}: {num} pictures{f', {found.num_skipped} broken ones skipped' if found.num_skipped else ''}")
    return path


def _run(what: str, batches: PictureBatches, use: Callable[[torch.Tensor, torch.Tensor], None]) -> int:
    num = 0
    for numbers, pictures in track(batches, description=what, total=len(batches)):
        use(numbers, pictures)
        num += len(numbers)
    return num
