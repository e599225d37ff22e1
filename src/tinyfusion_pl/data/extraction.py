"""Writing shards of latents so that an interruption costs little: finished parts are files, a shard is made of all of its parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_json, save_tensors, write_json
from tinyfusion_pl.data.shards import (
    FINISHED,
    UNFINISHED,
    LatentsInfo,
    check_shard,
    generator_of,
    normal,
    posterior_sample,
    read_header,
    shard_metadata,
    shard_path,
)


class ShardWriter:
    """The share of process `rank` of `world_size` in an extraction: every world_size-th of the shards that are not there yet.

    What is in a file depends neither on the number of processes nor on interruptions. All processes are made before any of them writes.

    Args:
        root: The folder; see `tinyfusion_pl.data.shards`.
        info: What is extracted.
        save_every: Images between two savings, within a shard: the most that an interruption costs each process.
    """

    def __init__(self, root: Path, info: LatentsInfo, *, save_every: int, rank: int = 0, world_size: int = 1) -> None:
        self.root, self.info, self.save_every = root, info, save_every
        self.parts = {shard: [part for part in self._parts(shard) if not self._is_there(part)]
                      for shard in missing_shards(root, info)[rank::world_size]}
        self._latents: list[Tensor] = []
        self._labels: list[Tensor] = []

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of the samples to extract, in the order and the batches in which `add` wants them."""
        return [list(part[i : i + batch_size]) for parts in self.parts.values() for part in parts for i in range(0, len(part), batch_size)]

    def start(self) -> None:
        """Make the shards whose parts are all there: the extraction was interrupted just then."""
        for shard, parts in self.parts.items():
            if not parts:
                self._assemble(shard)

    def add(self, numbers: Tensor, moments: Tensor, labels: Tensor) -> None:
        """Take one batch of `batches`: numbers (n,), moments (n, 2, 2C, h, w), labels (n,); write what is complete."""
        self._latents.append(self._kept(numbers, moments))
        self._labels.append(labels.cpu())
        shard = int(numbers[0]) // self.info.shard_size
        part = self.parts[shard][0]
        if int(numbers[-1]) != part[-1]:
            return
        save_tensors(self._part_path(part), {"latents": torch.cat(self._latents), "labels": torch.cat(self._labels)},
                     metadata={"part": self.info.fingerprint()})
        self._latents, self._labels = [], []
        self.parts[shard].pop(0)
        if not self.parts[shard]:
            self._assemble(shard)

    def _kept(self, numbers: Tensor, moments: Tensor) -> Tensor:
        moments = moments.float().cpu()  # (n, 2, 2C, h, w)
        if not torch.isfinite(moments).all():
            raise ValueError(f"The VAE gives values that are not finite for images {int(numbers[0])} to {int(numbers[-1])}. With "
                             "extract.vae.precision=float32 it should not; otherwise its weights are damaged.")
        if self.info.content == "sample":
            samples = [[self._sample(number, view, each) for view, each in enumerate(views)]
                       for number, views in zip(numbers.tolist(), moments)]
            moments = torch.from_numpy(np.array(samples, dtype=np.float32))  # (n, 2, C, h, w)
        return moments.to(getattr(torch, self.info.dtype))

    def _sample(self, number: int, view: int, moments: Tensor) -> np.ndarray:
        generator = generator_of(self.info.seed, 2 * number + view)
        return posterior_sample(moments.numpy(), normal(generator, self.info.latent_shape))

    def _assemble(self, shard: int) -> None:
        paths = [self._part_path(part) for part in self._parts(shard)]
        parts = [load_tensors(path) for path in paths]
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("latents", "labels")}
        save_tensors(shard_path(self.root, shard), whole, metadata=shard_metadata(self.info, shard))
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # where other shards' parts are still there
            paths[0].parent.rmdir()

    def _parts(self, shard: int) -> Iterator[range]:
        samples = self.info.samples(shard)
        for i in range(0, len(samples), self.save_every):
            yield samples[i : i + self.save_every]

    def _is_there(self, part: range) -> bool:
        """Whether a part is there, and of this extraction."""
        try:
            return read_header(self._part_path(part))[0].get("__metadata__") == {"part": self.info.fingerprint()}
        except (OSError, ValueError):
            return False

    def _part_path(self, part: range) -> Path:
        # Both ends are in the name: with another save_every a part is another one.
        return self.root / "parts" / f"{part[0]:09d}-{part[-1]:09d}.safetensors"


def missing_shards(root: Path, info: LatentsInfo) -> list[int]:
    """Numbers of the shards that are not there, or not whole."""
    missing = []
    for shard in range(info.num_shards):
        try:
            check_shard(root, info, shard)
        except (OSError, ValueError, KeyError, TypeError):
            missing.append(shard)
    return missing


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
    there, here = LatentsInfo.from_dict(read_json(held), held).identity(), info.identity()
    if differing := [key for key in here if there[key] != here[key]]:
        said = "; ".join(f"{key} is {_brief(there[key])} there and {_brief(here[key])} here" for key in differing)
        raise ArtifactError(f"{root} holds another extraction ({said}). Give another extract.output, or the settings of that one.")
    return held.name == FINISHED


def begin(root: Path, info: LatentsInfo) -> None:
    """Mark `root` as the place of this extraction."""
    if not (root / UNFINISHED).exists():
        write_json(root / UNFINISHED, info.as_dict())


def finish(root: Path, info: LatentsInfo) -> None:
    """Mark `root` finished; all shards are there. Parts that another `save_every` left go."""
    shutil.rmtree(root / "parts", ignore_errors=True)
    write_json(root / FINISHED, info.as_dict())
    (root / UNFINISHED).unlink(missing_ok=True)


def _brief(value: object) -> str:
    return f"{len(value)} names" if isinstance(value, list) and len(value) > 8 else str(value)
