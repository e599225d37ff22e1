"""Writing shards of latents so that an interruption costs little: finished parts are files, a shard is made of all of its parts."""

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
    """The share of process `rank` of `world_size` in an extraction: every world_size-th of the shards that are not there yet.

    What is in a file depends neither on the number of processes nor on interruptions. All processes are made before any of them writes.

    Args:
        root: The folder; see `tinyfusion_pl.data.shards`.
        info: What is extracted.
        save_every: Images between two savings, within a shard: the most that an interruption costs each process.
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
        self._batches: list[dict[str, Tensor]] = []  # of the part that is being made

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of the samples to extract, in the order and the batches in which `add` wants them."""
        return [
            list(part[i : i + batch_size])
            for parts in self.parts.values()
            for part in parts
            for i in range(0, len(part), batch_size)
        ]

    def start(self) -> None:
        """Make the shards whose parts are all there: the extraction was interrupted just then."""
        for shard, parts in self.parts.items():
            if not parts:
                self._assemble(shard)

    def add(
        self, numbers: Tensor, moments: Tensor, labels: Tensor, *, digests: Tensor | None = None
    ) -> None:
        """Take one batch of `batches`: numbers (n,), moments (n, 2, 2C, h, w), labels (n,), -1 where there is no image, and checksums of
        the image files (n,), where there are any; write what is complete.
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
        if not (highest := float(moments.abs().max())) <= MAX_STORED:  # so that NaN is found, too
            what = (
                f"values up to {highest:.3g}"
                if math.isfinite(highest)
                else "values that are not finite"
            )
            raise ValueError(
                f"The VAE gives {what} for images {int(numbers[0])} to {int(numbers[-1])}. With "
                "extract.vae.precision=float32 it should not; otherwise its weights are damaged."
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
        with suppress(OSError):  # where other shards' parts are still there
            paths[0].parent.rmdir()

    def _parts(self, shard: int) -> Iterator[range]:
        samples = self.info.samples(shard)
        for i in range(0, len(samples), self.save_every):
            yield samples[i : i + self.save_every]

    def _part_path(self, part: range) -> Path:
        # Both ends are in the name: with another save_every a part is another one.
        return self.root / "parts" / f"{part[0]:09d}-{part[-1]:09d}.safetensors"


def missing_shards(root: Path, info: LatentsInfo) -> list[int]:
    """Numbers of the shards that are not there, or not whole."""
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
    """What to extract into `root`: `info` and the images of its samples, as they were when the extraction there began.

    Images that were removed since then are left out. Returns also sentences on what differs.

    Raises:
        ArtifactError: when images were added, or others changed whose latents are there.
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
        return (
            info,
            now,
            [],
        )  # another extraction, which `is_finished` refuses unless its marks were deleted
    found = stored.compared(images, now, all_images=num_images is None)
    if found.added or found.relabelled:
        what = "were added" if found.added else "have another label"
        names = named(found.added) if found.added else found.named(found.relabelled)
        raise ArtifactError(
            f"{root} holds the latents of {then.num_samples} images of {then.images}, and since then "
            f"{len(found.added or found.relabelled)} images {what} ({names}). Give another extract.output, or put the "
            "images back as they were: removed ones alone are left out."
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
            f"{len(changed)} images of {info.images} are others than those whose latents are in {root} "
            f"({found.named(changed)}). Put them back, or delete {', '.join(files[:3])}{' ...' if len(files) > 3 else ''} "
            f"and {FINISHED} there and extract again: only what is missing is made."
        )
    gone = found.inventory.gone
    said = (
        [
            f"{len(gone)} of the {then.num_samples} images that this extraction began with were removed since "
            f"({found.named(gone)}): they are left out."
        ]
        if gone
        else []
    )
    kept = {name: getattr(then, name) for name in of_images}
    return replace(info, **kept), found.inventory, said


def finished_samples(root: Path, info: LatentsInfo) -> dict[int, tuple[Path, int | None]]:
    """Number -> file of the samples whose latents are there, those of whole shards, and of parts of others; and the checksum of the image
    file that they were made of, where it is known.
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
    """Whether an image is the one of that checksum."""
    return digest is not None and images.digest(place) == digest


def is_finished(root: Path, info: LatentsInfo) -> bool:
    """Whether `root` holds all of this extraction.

    Raises:
        ArtifactError: when it holds another one.
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
            f"{root} holds another extraction ({said}). Give another extract.output, or the settings of that one."
        )
    return held.name == FINISHED


def begin(root: Path, info: LatentsInfo, inventory: Inventory | None = None) -> None:
    """Mark `root` as the place of this extraction, of the images in `inventory`."""
    if inventory is not None:
        inventory.write(root, info)
    if not (root / UNFINISHED).exists():
        write_json(root / UNFINISHED, info.as_dict())


def finish(root: Path, info: LatentsInfo, inventory: Inventory | None = None) -> dict[str, int]:
    """Mark `root` finished; all shards are there. Parts that another `save_every` left go.

    Returns:
        Name -> number of the samples that are left out: their images were broken, or removed.

    Raises:
        ValueError: when that is all of them.
    """
    skipped = {} if inventory is None else left_out(root, info, inventory)
    if len(skipped) == info.num_samples:
        raise ValueError(
            f"None of the {info.num_samples} images of {info.images} could be read ({named(list(skipped))}). Nothing is left "
            "to train on."
        )
    shutil.rmtree(root / "parts", ignore_errors=True)
    write_json(root / FINISHED, replace(info, skipped=skipped).as_dict())
    (root / UNFINISHED).unlink(missing_ok=True)
    return skipped


def left_out(root: Path, info: LatentsInfo, inventory: Inventory) -> dict[str, int]:
    """Name -> number of the samples without an image: the labels in the shards say which were broken."""
    labels = np.concatenate([check_shard(root, info, shard)[1] for shard in range(info.num_shards)])
    return {
        printable(inventory.names[slot]): slot
        for slot in np.flatnonzero((labels < 0) | (inventory.places == GONE)).tolist()
    }


def _is_part(path: Path, info: LatentsInfo) -> bool:
    """Whether a part is there, whole, and of this extraction."""
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
