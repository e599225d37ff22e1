"""The image of each sample of an extraction, to resume after removals and detect changes.

``images.jsonl`` in the folder of latents holds the extraction it belongs to, then one line per
sample: ``[label, size of the file, modification time, name]``. Size and time are compared first;
where they differ, the checksum of the file with that in the shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.arrays import check_regular
from tinyfusion_pl.artifacts import ArtifactError, write_text
from tinyfusion_pl.data.images import LabelledImages, as_batch_item
from tinyfusion_pl.data.latents_info import LatentsInfo
from tinyfusion_pl.data.listing import named

INVENTORY = "images.jsonl"
GONE = -1


@dataclass(kw_only=True)
class Inventory:
    """The images of the samples of an extraction.

    Args:
        labels: (N,) int64.
        stamps: Size and time of each image file; see `LabelledImages.stamps`.
        names: Names of the images.
        places: (N,) index of each among the current images; `GONE` for a removed image.
    """

    labels: np.ndarray
    stamps: list[tuple[int, int]]
    names: list[str]
    places: np.ndarray

    @classmethod
    def of(cls, images: LabelledImages, *, num_samples: int) -> Inventory:
        """Build the inventory of the first `num_samples` images."""
        return cls(
            labels=images.labels[:num_samples],
            stamps=images.stamps(num_samples),
            names=[images.name(i) for i in range(num_samples)],
            places=np.arange(num_samples),
        )

    @property
    def gone(self) -> list[int]:
        """Return the numbers of the samples whose images were removed."""
        return np.flatnonzero(self.places == GONE).tolist()

    def write(self, root: Path, info: LatentsInfo) -> None:
        """Write ``images.jsonl`` to `root`, unless it is up to date."""
        lines = [json.dumps(info.as_dict())]
        lines += [
            json.dumps([label, *stamp, name])
            for label, stamp, name in zip(self.labels.tolist(), self.stamps, self.names)
        ]
        text, path = "\n".join(lines) + "\n", root / INVENTORY
        # Compare first: the folder may be read-only.
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text)

    @classmethod
    def read(cls, root: Path) -> tuple[LatentsInfo, Inventory] | None:
        """Read the extraction in `root` and its images; None if there is no inventory.

        Raises:
            ArtifactError: if the file is damaged.
        """
        path = root / INVENTORY
        if not path.exists():
            return None
        check_regular(path)
        try:
            head, *lines = (
                json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
            )
            info = LatentsInfo.from_dict(head, path)
            labels, stamps, names = zip(
                *(
                    (int(label), (int(size), int(time)), str(name))
                    for label, size, time, name in lines
                )
            )
            if len(labels) != info.num_samples:
                raise ValueError(f"{len(labels)} lines for {info.num_samples} samples")
            return info, cls(
                labels=np.array(labels, dtype=np.int64),
                stamps=list(stamps),
                names=list(names),
                places=np.arange(len(labels)),
            )
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}). Delete it to restart the extraction into {root}."
            ) from error

    def compared(self, images: LabelledImages, now: Inventory, *, all_images: bool) -> Comparison:
        """Compare these images with the current ones.

        Args:
            images: The current images.
            now: Inventory of the first of them.
            all_images: Count every image outside this inventory as added, wherever it is.
        """
        current = [images.name(i) for i in range(len(images))]
        place_of = {name: place for place, name in enumerate(current)}
        places = np.array([place_of.get(name, GONE) for name in self.names])
        known = set(self.names)
        last = len(current) if all_images else int(places.max()) + 1
        there = np.flatnonzero(places != GONE).tolist()
        stamps = (
            now.stamps if len(now.stamps) > places.max() else images.stamps(int(places.max()) + 1)
        )
        return Comparison(
            inventory=replace(
                self,
                places=places,
                stamps=[
                    stamp if place == GONE else stamps[place]
                    for stamp, place in zip(self.stamps, places.tolist())
                ],
            ),
            added=[name for name in current[:last] if name not in known],
            relabelled=[slot for slot in there if images.labels[places[slot]] != self.labels[slot]],
            changed=[slot for slot in there if stamps[places[slot]] != self.stamps[slot]],
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between the images of an extraction and the current ones.

    Args:
        inventory: The images of the extraction, with their current places.
        added: Names of new images.
        relabelled: Numbers of the samples whose label changed.
        changed: Numbers of the samples whose file has another size or time.
    """

    inventory: Inventory
    added: list[str]
    relabelled: list[int]
    changed: list[int]

    def named(self, slots: list[int]) -> str:
        """Return the names of the images of samples, for messages."""
        return named([self.inventory.names[slot] for slot in slots])


class Slots(Dataset):
    """Samples as (number, image, label, notes, reason for no image, checksum of the file).

    A sample without an image is black with label -1.
    """

    def __init__(self, images: LabelledImages, places: np.ndarray) -> None:
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, Tensor, int, int, str, int]:
        if self.places[number] == GONE:
            size = self.images.reader.image_size
            assert size is not None  # an extraction crops its images
            return number, torch.zeros(3, size, size, dtype=torch.uint8), -1, 0, "", 0
        place = int(self.places[number])
        return number, *as_batch_item(self.images, place), self.images.digest(place)
