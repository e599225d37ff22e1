"""Extraction of VAE latents from images, once: shards that `ImageNetLatents` reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.artifacts import read_json, write_json
from tinyfusion_pl.data import VAE, open_images
from tinyfusion_pl.data.extraction import (
    ShardWriter,
    finish,
    is_finished,
    left_out,
    missing_shards,
    resume,
)
from tinyfusion_pl.data.extraction import begin as begin_extraction
from tinyfusion_pl.data.inventory import INVENTORY, Inventory, Slots
from tinyfusion_pl.data.latents_info import CONTENTS, DTYPES, FINISHED, LatentsInfo
from tinyfusion_pl.data.listing import named
from tinyfusion_pl.data.reading import MAX_PIXELS, Note, describe_notes
from tinyfusion_pl.data.shards import LatentShards
from tinyfusion_pl.locks import sole_writer
from tinyfusion_pl.modules import Extraction
from tinyfusion_pl.printable import printable
from tinyfusion_pl.tasks.folder import say
from tinyfusion_pl.tasks.interruption import interruptible
from tinyfusion_pl.tasks.trainer_checks import check_sampling_trainer

NUM_REASONS = 5


@dataclass(kw_only=True)
class Extract:
    """Settings of an extraction.

    Args:
        images: Folder of class folders with images (ImageNet's ``train/``), or an npz file of image
            files (`PackedImages`).
        output: Folder for the latents: a new one, or that of this extraction, which then resumes.
        vae: Factory of the `VAE`.
        trainer: Factory of a Trainer, whose devices share the shards.
        image_size: Side of the ADM center crop, in pixels.
        content: ``"moments"`` saves mean and log-variance, so that each training draw samples anew;
            ``"sample"`` saves one sample, at half the size.
        dtype: ``"float32"``, or ``"float16"`` at half the size, with a relative error up to 5e-4.
        shard_size: Images per shard.
        save_every: Images of a process between saves: the most that an interruption loses.
        batch_size: Images to read at once; the VAE has its own batch size.
        num_workers: Worker processes that read image files.
        num_images: Extract only the first images; None: all.
        seed: Seed of the noise of saved samples.
        class_to_idx: Labels of the class folders: ``"imagenet"``, ``"order"`` or a JSON file, see
            `label_classes`; None: ImageNet's labels if the names are its wnids, otherwise their
            order.
        skip_broken: Skip images that cannot be read instead of raising an error; ``latents.json``
            lists them.
        max_pixels: Maximum width times height of an image.
    """

    images: str
    output: str
    vae: Callable[[], VAE]
    trainer: Callable[..., Trainer]
    image_size: int = 256
    content: str = "moments"
    dtype: str = "float32"
    shard_size: int = 4096
    save_every: int = 512
    batch_size: int = 32
    num_workers: int = 0
    num_images: int | None = None
    seed: int = 0
    class_to_idx: str | None = None
    skip_broken: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name, least in {
            "shard_size": 1,
            "save_every": 1,
            "batch_size": 1,
            "num_workers": 0,
            "image_size": 1,
            "seed": 0,
            "max_pixels": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"extract.{name} is {getattr(self, name)}; give an integer >= {least}."
                )
        for name, choices in (("content", tuple(CONTENTS)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"extract.{name} is {getattr(self, name)!r}; give "
                    f"{' or '.join(map(repr, choices))}."
                )


def extract_latents(
    *, run_dir: str | Path, extract: Extract, begin: Callable[[], None] | None = None
) -> Path:
    """Extract the latents of ``extract.images`` and their mirror images to ``extract.output``.

    Resumes after finished shards, and finished parts of others. The files do not depend on the
    number of processes. `begin` is called once all checks have passed, before anything is written.

    Returns:
        The folder of the latents.

    Raises:
        ValueError: for more processes than shards, or an output folder of something else.
        ArtifactError: for images that cannot be read, or an output that another process is writing.
    """
    # Processes that the first one launches share the folder that it locks.
    with (
        sole_writer(extract.output, setting="extract.output")
        if rank_zero_only.rank == 0
        else nullcontext()
    ):
        return _extract_latents(Path(extract.output), extract, begin=begin)


def _extract_latents(root: Path, extract: Extract, *, begin: Callable[[], None] | None) -> Path:
    images = open_images(
        extract.images,
        image_size=extract.image_size,
        class_to_idx=extract.class_to_idx,
        skip_broken=extract.skip_broken,
        max_pixels=extract.max_pixels,
    )
    num_samples = len(images) if extract.num_images is None else extract.num_images
    if not 1 <= num_samples <= len(images):
        raise ValueError(
            f"extract.num_images is {num_samples}; {extract.images} has {len(images)} images."
        )
    trainer = check_sampling_trainer("extract.trainer", extract.trainer)
    vae = extract.vae()
    info = LatentsInfo(
        content=extract.content,
        dtype=extract.dtype,
        latent_shape=vae.latent_shape(extract.image_size),
        num_samples=num_samples,
        shard_size=extract.shard_size,
        image_size=extract.image_size,
        vae=vae.record(),
        images=str(extract.images),
        listing=images.listing(),
        seed=extract.seed,
        classes=[printable(name) for name in images.classes],
        class_names=images.class_names,
        indices=None if images.indices == list(range(len(images.classes))) else images.indices,
        labelled_by=images.labelled_by,
    )
    info, inventory, said = resume(root, info, images, num_images=extract.num_images)
    _check_processes(trainer.world_size, info.num_samples, extract.shard_size)
    for sentence in [*images.said, *said]:
        say(f"extract: {sentence}")
    finished = is_finished(root, info)
    if begin is not None:
        begin()
    if finished:
        if trainer.is_global_zero:
            if (root / INVENTORY).exists():
                inventory.write(root, info)  # images that were copied have other times
            _leave_out_what_is_gone(root, info, inventory)
        say(
            f"extract: already finished; the latents of {info.num_samples} images are in {root} "
            "(checked headers and sizes of the files, not the values)"
        )
        return root
    say(
        f"extract: encoding {info.num_samples} images of {extract.images} and their mirror images "
        f"with the VAE {vae.source}: {info.content} of {info.latent_shape}, "
        f"{len(missing_shards(root, info))} of {info.num_shards} shards remaining; they will be "
        f"saved to {root}"
    )
    say(f"extract: {_describe_labels(info)}")
    if trainer.is_global_zero:
        begin_extraction(root, info, inventory)
    writer = partial(ShardWriter, root, info, save_every=extract.save_every)
    module = Extraction(
        vae,
        images=Slots(images, inventory.places),
        writer=writer,
        batch_size=extract.batch_size,
        num_workers=extract.num_workers,
    )
    start = time.monotonic()
    with interruptible(trainer):
        trainer.test(module, verbose=False)
    seconds = time.monotonic() - start
    trainer.strategy.barrier("all shards are written")
    notes = trainer.strategy.reduce(
        module.notes.to(trainer.strategy.root_device), reduce_op="sum"
    ).tolist()
    for sentence in describe_notes(Counter(dict(zip(Note, notes)))):
        say(f"extract: {sentence}")
    if trainer.is_global_zero:
        skipped = finish(root, info, inventory)
        LatentShards(root)  # reads every header
        _say_skipped(skipped, module.broken)
    say(
        f"Done. {root}: {info.num_samples} images in {info.num_shards} shards; this process "
        f"encoded {module.num_done} in {seconds:.1f} s, {module.num_done / seconds:.2f} images/s."
    )
    return root


def _leave_out_what_is_gone(root: Path, info: LatentsInfo, inventory: Inventory) -> None:
    """Update ``latents.json`` if images were removed or restored since the extraction finished."""
    held = LatentsInfo.from_dict(read_json(root / FINISHED), root / FINISHED)
    if held.skipped or inventory.gone:
        skipped = left_out(root, info, inventory)
        if skipped != held.skipped:
            if len(skipped) == info.num_samples:
                raise ValueError(f"All images whose latents are in {root} were removed. Delete it.")
            write_json(root / FINISHED, replace(held, skipped=skipped).as_dict())
        _say_skipped(skipped, [])


def _say_skipped(skipped: dict[str, int], reasons: list[str]) -> None:
    if skipped:
        why = (
            f": {'; '.join(reasons[:NUM_REASONS])}{'; ...' if len(reasons) > NUM_REASONS else ''}"
            if reasons
            else ""
        )
        say(
            f"extract: skipped {len(skipped)} images ({named(list(skipped))}); {FINISHED} lists "
            f"all of them{why}"
        )


def _describe_labels(info: LatentsInfo) -> str:
    labels = info.labels_per_class
    pairs = ", ".join(
        f"{name}: {label}" for name, label in list(zip(info.classes, labels))[:NUM_REASONS]
    )
    how = {
        "imagenet": "ImageNet's",
        "order": "in the order of the class folders",
        "file": "from the file",
        "class_to_idx": "as given",
    }
    more = ", ..." if len(labels) > NUM_REASONS else ""
    return f"{len(labels)} classes, labels {how[info.labelled_by]} ({pairs}{more})"


def _check_processes(num_processes: int, num_samples: int, shard_size: int) -> None:
    num_shards = -(-num_samples // shard_size)
    if num_processes > num_samples:
        raise ValueError(
            f"There are {num_processes} processes, but only {num_samples} images. Give fewer "
            "devices."
        )
    if num_processes > num_shards:
        raise ValueError(
            f"There are {num_processes} processes, but only {num_shards} shards of {shard_size} "
            f"images. Give extract.shard_size={num_samples // num_processes} or less, or fewer "
            "devices."
        )
