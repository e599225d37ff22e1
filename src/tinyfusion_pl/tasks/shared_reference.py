"""Features of the real images that samples are held against, computed once for all runs of a sweep."""

from __future__ import annotations

from pathlib import Path

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import (
    Origin,
    content_sha256,
    differences,
    load_sealed_tensors,
    save_sealed_tensors,
)
from tinyfusion_pl.metrics import GenerationMetrics, Reference
from tinyfusion_pl.tasks.folder import say


def set_shared_reference(
    metrics: GenerationMetrics,
    reference: Reference,
    folder: Path | None,
    made_from: Origin,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
) -> None:
    """`GenerationMetrics.set_reference`, whose features of images are kept in `folder` and taken from there.

    Args:
        metrics: They get the reference.
        reference: Images, or a file's statistics, which are not kept: they are in a file already.
        folder: Where results of runs are shared; None: nowhere.
        made_from: Has the checksum of the reference.
        rank, world_size: This process's number, and how many there are; each has its share of the images.
        batch_size: Images at once.
    """
    share = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
    in_a_file = reference.statistics or reference.features is not None
    if folder is None or in_a_file or "reference" not in made_from:
        metrics.set_reference(reference, **share)
        return
    origin = {
        "reference": made_from["reference"],
        "metrics": content_sha256(
            [metrics.fingerprint(), metrics.settings(), str(metrics.device), share]
        ),
    }
    file = folder / f"reference_{content_sha256(origin)[:16]}.safetensors"
    try:
        state, found = load_sealed_tensors(file) if file.exists() else ({}, {})
    except ArtifactError as error:
        say(f"{error} The features of the reference images are computed again")
        state, found = {}, {}
    if state and not differences(found, origin):
        metrics.load_reference_state(state)
        say(f"evaluate: features of the {reference.num_images} reference images from {file}")
        return
    metrics.set_reference(reference, **share)
    save_sealed_tensors(file, metrics.reference_state(), made_from=origin)
