"""Writes shards of latents, resumably: finished parts are files, assembled into shards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfusion_pl.arrays import check_regular
from tinyfusion_pl.artifacts import (
    ArtifactError,
    load_tensors,
    read_json,
    save_tensors,
    tensors_sha256,
    write_json,
)
from tinyfusion_pl.data.images import LabelledImages
from tinyfusion_pl.data.inventory import GONE, Inventory
from tinyfusion_pl.data.latents_info import FINISHED, UNFINISHED, LatentsInfo
from tinyfusion_pl.data.listing import named
from tinyfusion_pl.data.shards import (
    DIGESTS,
    MAX_STORED,
    UNUSABLE,
    check_shard,
    get_generator,
    normal,
    posterior_sample,
    read_header,
    shard_metadata,
    shard_path,
)
from tinyfusion_pl.printable import printable


class ShardWriter:
    """Writes the share of one process in an extraction: every world_size-th missing shard.

    The content of a file depends neither on the number of processes nor on interruptions. All
    processes create their writer before any of them writes.

    Args:
        root: The folder; see `tinyfusion_pl.data.shards`.
        info: Description of the extraction.
        save_every: Images per part of a shard: the most that an interruption costs each process.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, root: Path, info: LatentsInfo, *, save_every: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.root, self.info, self.save_every = root, info, save_every
        self.parts = {
            shard: [
                part for part in self._parts(shard) if not _is_part(self._part_path(part), info)
            ]
            for shard in missing_shards(root, info)[rank::world_size]
        }
        self._batches: list[dict[str, Tensor]] = []  # of the current part

    def batches(self, batch_size: int) -> list[list[int]]:
        """Return the numbers of the samples to extract, in the batches that `add` expects."""
        return [
            list(part[i : i + batch_size])
            for parts in self.parts.values()
            for part in parts
            for i in range(0, len(part), batch_size)
        ]

    def start(self) -> None:
        """Assemble the shards whose parts all exist, after an interruption at that point."""
        for shard, parts in self.parts.items():
            if not parts:
                self._assemble(shard)

    def add(
        self, numbers: Tensor, moments: Tensor, labels: Tensor, *, digests: Tensor | None = None
    ) -> None:
        """Add one batch of `batches`, and write the part and the shard that it completes.

        Args:
            numbers: (n,).
            moments: (n, 2, 2C, h, w).
            labels: (n,), -1 if there is no image.
            digests: Checksums (n,) of the image files, if known.
        """
        moments = moments.float().cpu()  # (n, 2, 2C, h, w)
        moments[labels.cpu() < 0] = 0
        batch = {"latents": self._kept(numbers, moments), "labels": labels.cpu()}
        self._batches.append(batch if digests is None else {**batch, DIGESTS: digests.cpu()})
        shard = int(numbers[0]) // self.info.shard_size
        part = self.parts[shard][0]
        if int(numbers[-1]) != part[-1]:
            return
        tensors = _joined(self._batches)
        save_tensors(
            self._part_path(part),
            tensors,
            metadata={"part": f"{self.info.fingerprint()} {tensors_sha256(tensors)}"},
        )
        self._batches = []
        self.parts[shard].pop(0)
        if not self.parts[shard]:
            self._assemble(shard)

    def _kept(self, numbers: Tensor, moments: Tensor) -> Tensor:
        if not (highest := float(moments.abs().max())) <= MAX_STORED:  # detects NaN, too
            what = (
                f"values up to {highest:.3g}"
                if math.isfinite(highest)
                else "values that are not finite"
            )
            raise ValueError(
                f"The VAE returned {what} for images {int(numbers[0])} to {int(numbers[-1])}. Use "
                "extract.vae.precision=float32; if that does not help, its weights are damaged."
            )
        if self.info.content == "sample":
            samples = [
                [self._sample(number, view, each) for view, each in enumerate(views)]
                for number, views in zip(numbers.tolist(), moments)
            ]
            moments = torch.from_numpy(np.array(samples, dtype=np.float32))  # (n, 2, C, h, w)
        return moments.to(getattr(torch, self.info.dtype))

    def _sample(self, number: int, view: int, moments: Tensor) -> np.ndarray:
        generator = get_generator(self.info.seed, 2 * number + view)
        return posterior_sample(moments.numpy(), normal(generator, self.info.latent_shape))

    def _assemble(self, shard: int) -> None:
        paths = [self._part_path(part) for part in self._parts(shard)]
        save_tensors(
            shard_path(self.root, shard),
            _joined([load_tensors(path) for path in paths]),
            metadata=shard_metadata(self.info, shard),
        )
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # parts of other shards remain
            paths[0].parent.rmdir()

    def _parts(self, shard: int) -> Iterator[range]:
        samples = self.info.samples(shard)
        for i in range(0, len(samples), self.save_every):
            yield samples[i : i + self.save_every]

    def _part_path(self, part: range) -> Path:
        # The name has both ends, because parts differ with `save_every`.
        return self.root / "parts" / f"{part[0]:09d}-{part[-1]:09d}.safetensors"


def missing_shards(root: Path, info: LatentsInfo) -> list[int]:
    """Return the numbers of the shards that are missing or incomplete."""
    missing = []
    for shard in range(info.num_shards):
        try:
            check_shard(root, info, shard)
        except UNUSABLE:
            missing.append(shard)
    return missing


def resume(
    root: Path, info: LatentsInfo, images: LabelledImages, *, num_images: int | None
) -> tuple[LatentsInfo, Inventory, list[str]]:
    """Return what to extract into `root`: the extraction begun there, its images, and messages.

    Images that were removed since then are skipped; the messages describe the differences.

    Args:
        root: The folder.
        info: The requested extraction.
        images: The current images.
        num_images: The requested number of images; None: all.

    Raises:
        ArtifactError: if images were added, or images with existing latents changed.
    """
    now = Inventory.of(images, num_samples=info.num_samples)
    before = Inventory.read(root)
    if before is None:
        return info, now, []
    then, stored = before
    of_images = ("listing", "num_samples", "classes", "class_names", "indices")
    if num_images not in (None, then.num_samples) or _without(
        then.identity(), of_images
    ) != _without(info.identity(), of_images):
        # Another extraction, which `is_finished` refuses unless its marks were deleted.
        return info, now, []
    found = stored.compared(images, now, all_images=num_images is None)
    if found.added or found.relabelled:
        what = "were added" if found.added else "have another label"
        names = named(found.added) if found.added else found.named(found.relabelled)
        raise ArtifactError(
            f"{root} holds the latents of {then.num_samples} images of {then.images}, and since "
            f"then {len(found.added or found.relabelled)} images {what} ({names}). Give another "
            "extract.output, or restore the images: only removed images can be skipped."
        )
    done = finished_samples(root, then) if found.changed else {}
    places = found.inventory.places
    if changed := [
        slot
        for slot in found.changed
        if slot in done and not _is_of(images, int(places[slot]), done[slot][1])
    ]:
        files = sorted({str(done[slot][0].relative_to(root)) for slot in changed})
        raise ArtifactError(
            f"{len(changed)} images of {info.images} differ from those whose latents are in {root} "
            f"({found.named(changed)}). Restore them, or delete {', '.join(files[:3])}"
            f"{' ...' if len(files) > 3 else ''} and {FINISHED} there and extract again: only what "
            "is missing is extracted."
        )
    gone = found.inventory.gone
    said = (
        [
            f"{len(gone)} of the {then.num_samples} images of this extraction were removed since "
            f"it began ({found.named(gone)}): they are skipped."
        ]
        if gone
        else []
    )
    kept = {name: getattr(then, name) for name in of_images}
    return replace(info, **kept), found.inventory, said


def finished_samples(root: Path, info: LatentsInfo) -> dict[int, tuple[Path, int | None]]:
    """Return sample -> (file with its latents, checksum of its image file or None).

    Includes complete shards and the parts of others.
    """
    missing = set(missing_shards(root, info))
    files = [
        (shard_path(root, shard), info.samples(shard))
        for shard in range(info.num_shards)
        if shard not in missing
    ]
    for path in (root / "parts").glob("*-*.safetensors"):
        first, _, last = path.stem.partition("-")
        if first.isdecimal() and last.isdecimal() and _is_part(path, info):
            files.append((path, range(int(first), min(int(last) + 1, info.num_samples))))
    done: dict[int, tuple[Path, int | None]] = {}
    for path, numbers in files:
        known = DIGESTS in read_header(path)[0]
        digests = (
            load_tensors(path, only=[DIGESTS])[DIGESTS].tolist() if known else [None] * len(numbers)
        )
        done |= {number: (path, digest) for number, digest in zip(numbers, digests)}
    return done


def _is_of(images: LabelledImages, place: int, digest: int | None) -> bool:
    """Return whether an image has that checksum."""
    return digest is not None and images.digest(place) == digest


def is_finished(root: Path, info: LatentsInfo) -> bool:
    """Return whether `root` holds all of this extraction.

    Raises:
        ArtifactError: if it holds another one.
    """
    if root.exists() and not root.is_dir():
        raise ArtifactError(f"extract.output is {root}, which is a file. Give a folder.")
    held = next((root / name for name in (FINISHED, UNFINISHED) if (root / name).exists()), None)
    if held is None:
        return False
    check_regular(held)
    there, here = LatentsInfo.from_dict(read_json(held), held).identity(), info.identity()
    if differing := [key for key in here | there if there.get(key) != here.get(key)]:
        said = "; ".join(
            f"{key} is {_brief(there.get(key))} there and {_brief(here.get(key))} here"
            for key in differing
        )
        raise ArtifactError(
            f"{root} holds another extraction ({said}). Give another extract.output, or the "
            "settings of that one."
        )
    return held.name == FINISHED


def begin(root: Path, info: LatentsInfo, inventory: Inventory | None = None) -> None:
    """Mark `root` as the folder of this extraction of the images in `inventory`."""
    if inventory is not None:
        inventory.write(root, info)
    if not (root / UNFINISHED).exists():
        write_json(root / UNFINISHED, info.as_dict())


def finish(root: Path, info: LatentsInfo, inventory: Inventory | None = None) -> dict[str, int]:
    """Mark `root`, with all shards, as finished; remove remaining parts.

    Returns:
        Name -> number of the samples that were skipped: their images were broken or removed.

    Raises:
        ValueError: if all samples were skipped.
    """
    skipped = {} if inventory is None else left_out(root, info, inventory)
    if len(skipped) == info.num_samples:
        raise ValueError(
            f"None of the {info.num_samples} images of {info.images} could be read "
            f"({named(list(skipped))}): there is nothing to train on."
        )
    shutil.rmtree(root / "parts", ignore_errors=True)
    write_json(root / FINISHED, replace(info, skipped=skipped).as_dict())
    (root / UNFINISHED).unlink(missing_ok=True)
    return skipped


def left_out(root: Path, info: LatentsInfo, inventory: Inventory) -> dict[str, int]:
    """Return name -> number of the samples without an image, by places and labels in the shards."""
    labels = np.concatenate([check_shard(root, info, shard)[1] for shard in range(info.num_shards)])
    return {
        printable(inventory.names[slot]): slot
        for slot in np.flatnonzero((labels < 0) | (inventory.places == GONE)).tolist()
    }


def _is_part(path: Path, info: LatentsInfo) -> bool:
    """Return whether a part exists, is complete, and belongs to this extraction."""
    try:
        fingerprint, _, digest = read_header(path)[0]["__metadata__"]["part"].partition(" ")
        return fingerprint == info.fingerprint() and tensors_sha256(load_tensors(path)) == digest
    except (*UNUSABLE, ArtifactError):
        return False


def _joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _without(content: dict, keys: tuple[str, ...]) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


def _brief(value: object) -> str:
    return f"{len(value)} names" if isinstance(value, list) and len(value) > 8 else str(value)
