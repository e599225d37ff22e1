"""Compare evaluation with well-known tools: time, peak memory, and result.

features           InceptionFeatures alone and with every metric updated, compared with
torch-fidelity's extraction loop: 256x256 images in
                   batches of 32, the same random weights (nothing is downloaded), the same two
                   outputs.
frechet            The distance at D = 2048, against scipy's sqrtm (pytorch-fid, clean-fid, ADM
evaluator) and torchmetrics' eigvals; once
                   with regular covariances (10,000 images) and once with singular ones (a tenth of
                   them).
precision_recall   10,000 x 10,000 x 2048 in float32, against three whole distance matrices, written
plainly here, and torch-fidelity's.

Each measurement is a process of its own, in turn with the others, so that peaks are apart and the
ratios hold for one state of the machine. Peak memory is what the measured call added to the
resident set (Linux).

    python benchmarks/evaluation.py [--only features|frechet|precision_recall] [--rounds 1]
        [--threads 2]
    python benchmarks/evaluation.py --num-images 8 --image-size 64 --num-points 500
        --dim 64    # whether it runs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gated_blocks import resident
from torch import Tensor

from tinyfusion_pl.metrics import GenerationMetrics, InceptionFeatures
from tinyfusion_pl.metrics.functional import frechet_distance, precision_recall

BATCH_SIZE = 32
SIZES = {
    "num_images": 128,
    "image_size": 256,
    "num_points": 10_000,
    "dim": 2048,
}  # of features: num_points, dim
Call = Callable[[], list[float]]


def features(kind: str) -> Call:
    """Extraction of the same images; gives sums of features and logits."""
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"  # the published layout, random values
        torch.save(InceptionFeatures("random").network.state_dict(), path)
        network = InceptionFeatures(path)
        theirs = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=str(path),
        )
    images = torch.randint(
        0, 256, (SIZES["num_images"], 3, *[SIZES["image_size"]] * 2), dtype=torch.uint8
    )
    metrics = GenerationMetrics(network)

    def loop() -> list[float]:
        found = get_featuresdict_from_dataset(
            Images(images), theirs, BATCH_SIZE, cuda=False, save_cpu_ram=True, verbose=False
        )
        return [found[name].double().sum().item() for name in ("2048", "logits_unbiased")]

    def alone() -> list[float]:
        found = [metrics.features(batch) for batch in images.split(BATCH_SIZE)]
        return [
            sum(getattr(batch, name).double().sum().item() for batch in found)
            for name in ("features", "logits")
        ]

    def update() -> list[float]:
        for batch in images.split(BATCH_SIZE):
            metrics.update(batch)
        return [metrics.collection["fid"].samples_sum.sum().item()]

    return {
        "ours, features alone": alone,
        "ours, all metrics updated": update,
        "torch-fidelity's loop": loop,
    }[kind]


class Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def made_up(num: int, *, seed: int) -> Tensor:
    """Features (num, dim) with a spectrum that falls like that of real ones: 64 directions, a
    rectifier, little noise.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, SIZES["dim"], generator=generator) / torch.arange(
        1, 65
    ).sqrt().unsqueeze(1)
    generator.manual_seed(seed)
    x = (1 + 0.02 * seed) * torch.randn(num, 64, generator=generator) @ directions
    return (x / 4).relu() + 0.02 * torch.randn(num, SIZES["dim"], generator=generator)


def frechet(kind: str, share: int = 1) -> Call:
    """Of statistics that are there."""
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    sides = [made_up(SIZES["num_points"] // share, seed=seed).double() for seed in (1, 2)]
    (mu_a, a), (mu_b, b) = ((x.mean(0), x.T.cov()) for x in sides)

    def by_sqrtm() -> list[float]:  # the published formula
        root = sqrtm((a @ b).numpy())
        return [
            ((mu_a - mu_b).square().sum() + a.trace() + b.trace()).item() - 2 * root.trace().real
        ]

    return {
        "ours": lambda: [frechet_distance(mu_a, a, mu_b, b).item()],
        "scipy's sqrtm": by_sqrtm,
        "torchmetrics' eigvals": lambda: [_compute_fid(mu_a, a, mu_b, b).item()],
    }[kind]


def frechet_singular(kind: str) -> Call:
    """The same of fewer images than dimensions."""
    return frechet(kind, share=10)


def neighbours(kind: str) -> Call:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    reference, samples = (made_up(SIZES["num_points"], seed=seed) for seed in (1, 4))

    def matrices() -> list[
        float
    ]:  # all squared distances at once: norms, a product, the (k + 1)-th smallest of each row
        def squared(x: Tensor, y: Tensor) -> Tensor:
            return (x.square().sum(1, keepdim=True) - 2 * x @ y.T + y.square().sum(1)).clamp_min(0)

        radii_r, radii_s = (squared(x, x).kthvalue(4, dim=1).values for x in (reference, samples))
        between = squared(samples, reference)
        return [
            (between <= radii_r).any(1).double().mean().item(),
            (between <= radii_s.unsqueeze(1)).any(0).double().mean().item(),
        ]

    return {
        "ours": lambda: [x.item() for x in precision_recall(reference, samples)],
        "whole matrices": matrices,
        "torch-fidelity": lambda: list(calculate_precision_recall_full(samples, reference)),
    }[kind]


CASES: dict[str, list[tuple[str, Callable[[str], Call], list[str]]]] = {
    "features": [
        (
            "features of {num_images} images, {image_size}x{image_size}",
            features,
            ["ours, features alone", "ours, all metrics updated", "torch-fidelity's loop"],
        )
    ],
    "frechet": [
        (
            "Fréchet distance, D = {dim}",
            frechet,
            ["ours", "scipy's sqrtm", "torchmetrics' eigvals"],
        ),
        (
            "Fréchet distance, D = {dim}, singular",
            frechet_singular,
            ["ours", "scipy's sqrtm", "torchmetrics' eigvals"],
        ),
    ],
    "precision_recall": [
        (
            "precision, recall, {num_points} x {num_points} x {dim}",
            neighbours,
            ["ours", "whole matrices", "torch-fidelity"],
        )
    ],
}


def measure(case: Callable[[str], Call], kind: str) -> dict[str, object]:
    """Seconds, bytes beyond what was held before, and the result, of one call in this process."""
    call = case(kind)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far (Linux)
    before, start = resident("VmRSS"), time.perf_counter()
    result = call()
    return {
        "seconds": time.perf_counter() - start,
        "peak": resident("VmHWM") - before,
        "result": result,
    }


def in_child(args: argparse.Namespace, *names: str) -> dict:
    threads = {
        name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }  # scipy's library of its own too
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    command = [sys.executable, __file__, *sizes, "--measure", *names]
    child = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, group: str, row: int) -> None:
    title, _, kinds = CASES[group][row]
    found: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            found[kind].append(in_child(args, group, str(row), kind))
    seconds = {
        kind: statistics.median(run["seconds"] for run in runs) for kind, runs in found.items()
    }
    print(f"\n{title.format(**SIZES):42s} {'seconds':>9s} {'/ ours':>7s} {'peak MiB':>9s}  result")
    for kind, runs in found.items():
        result = "  ".join(f"{x:.9g}" for x in runs[0]["result"])
        peak = max(run["peak"] for run in runs) / 2**20
        print(
            f"  {kind:40s} {seconds[kind]:9.2f} {seconds[kind] / seconds[kinds[0]]:7.2f} "
            f"{peak:9.0f}  {result}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES)
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="rounds per measurement; the median time is shown",
    )
    parser.add_argument("--threads", type=int, default=2)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("GROUP", "ROW", "KIND"),
        help="print one measurement as JSON, then exit",
    )
    args = parser.parse_args()
    SIZES.update({name: getattr(args, name) for name in SIZES})
    if args.measure:
        group, row, kind = args.measure
        print(json.dumps(measure(CASES[group][int(row)][1], kind)))
        return
    for group in [args.only] if args.only else CASES:
        for row in range(len(CASES[group])):
            compare(args, group, row)


if __name__ == "__main__":
    main()
