"""Features of the reference images, computed once for all runs of a sweep."""

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
    """Call `GenerationMetrics.set_reference`, with features cached in `folder`.

    Args:
        metrics: Metrics that get the reference.
        reference: Images, which are cached; or the statistics of a file, which are not.
        folder: Folder of shared results; None: no cache.
        made_from: Origin with the checksum of the reference.
        rank: Rank of this process, which computes its share of the images.
        world_size: Number of processes.
        batch_size: Images per batch.
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
        say(f"{error} Computing the features of the reference images again")
        state, found = {}, {}
    if state and not differences(found, origin):
        metrics.load_reference_state(state)
        say(f"evaluate: reusing features of {reference.num_images:,} reference images from {file}")
        return
    metrics.set_reference(reference, **share)
    save_sealed_tensors(file, metrics.reference_state(), made_from=origin)
