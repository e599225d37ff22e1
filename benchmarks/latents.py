"""Compare reading speed of our shards with one file per image, the published layout.

Both hold random latents of ImageNet's size at 256 pixels and are read in the same order through the
same `ImageNetLatents` loader (batches of 128, the same number of workers), alternately in one run,
so that their ratio does not depend on the machine's load. Our shards hold mean and log-variance of
both views (64 KiB an image), each draw takes a sample of its own; or one sample of each view (32
KiB). The other layout holds one sample (16 KiB) and one label, a file each. "cold" empties the page
cache of these files first (Linux). docs/latents.md has the numbers.

    python benchmarks/latents.py [--num-images 16384] [--workers 0 2] [--rounds 3]
        [--folder FOLDER] [--others]

`--others` also reads plain samples, neither drawn nor mirrored, from memory-mapped npy and, where
they are installed, from webdataset, litdata and HF datasets; with a warm cache only, since mapped
pages stay where they are when it is emptied."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tinyfusion_pl.data import ImageNetLatents
from tinyfusion_pl.data.extraction import ShardWriter, begin, finish
from tinyfusion_pl.data.sampler import StreamSampler
from tinyfusion_pl.data.shards import LatentsInfo

SHAPE, BATCH_SIZE, SHARD_SIZE = (4, 32, 32), 128, 4096
Loader = Callable[[int], Iterable]


def write_ours(folder: Path, num_images: int, content: str) -> Loader:
    vae = {
        "source": "none",
        "num_channels": 4,
        "downsampling": 8,
        "scaling_factor": 0.18215,
        "encoder": "none",
    }
    info = LatentsInfo(
        content=content,
        dtype="float32",
        latent_shape=SHAPE,
        num_samples=num_images,
        shard_size=SHARD_SIZE,
        image_size=256,
        vae=vae,
        images="none",
        listing="none",
        seed=0,
        classes=[str(i) for i in range(1000)],
    )
    begin(folder, info)
    writer = ShardWriter(folder, info, save_every=SHARD_SIZE)
    for numbers in writer.batches(512):
        writer.add(
            torch.tensor(numbers),
            torch.randn(len(numbers), 2, 8, 32, 32),
            torch.tensor(numbers) % 1000,
        )
    finish(folder, info)
    return lambda workers: ImageNetLatents(
        folder, batch_size=BATCH_SIZE, num_workers=workers
    ).train_dataloader()


def write_one_file_an_image(folder: Path, num_images: int) -> Loader:
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(num_images):
        np.save(
            folder / "imagenet256_features" / f"{i}.npy",
            np.random.default_rng(i).standard_normal((1, *SHAPE), dtype=np.float32),
        )
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i % 1000]))
    return lambda workers: ImageNetLatents(
        folder, batch_size=BATCH_SIZE, num_workers=workers
    ).train_dataloader()


def write_mapped(folder: Path, num_images: int) -> Loader:
    folder.mkdir(parents=True)
    array = np.lib.format.open_memmap(
        folder / "latents.npy", mode="w+", dtype=np.float32, shape=(num_images, *SHAPE)
    )
    for i in range(num_images):
        array[i] = np.random.default_rng(i).standard_normal(SHAPE, dtype=np.float32)
    array.flush()
    del array

    class Mapped(Dataset):
        def __init__(self) -> None:
            self.array = None

        def __len__(self) -> int:
            return num_images

        def __getitem__(self, index: int):
            if self.array is None:
                self.array = np.load(folder / "latents.npy", mmap_mode="r")
            return torch.from_numpy(np.array(self.array[index])), torch.tensor(index % 1000)

    return lambda workers: DataLoader(
        Mapped(),
        batch_size=BATCH_SIZE,
        sampler=StreamSampler(num_images, num_draws=num_images),
        num_workers=workers,
    )


def write_webdataset(folder: Path, num_images: int) -> Loader:
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD_SIZE, verbose=0) as sink:
        for i in range(num_images):
            np.save(
                buffer := io.BytesIO(),
                np.random.default_rng(i).standard_normal(SHAPE, dtype=np.float32),
            )
            sink.write({"__key__": f"{i:08d}", "npy": buffer.getvalue(), "cls": str(i % 1000)})
    urls = sorted(map(str, folder.glob("*.tar")))

    def load(
        workers: int,
    ) -> Iterable:  # sequential shards and a shuffle buffer: it has no random access
        found = (
            webdataset.WebDataset(urls, shardshuffle=100, empty_check=False)
            .shuffle(1000)
            .decode()
            .to_tuple("npy", "cls")
        )
        return DataLoader(found.batched(BATCH_SIZE), batch_size=None, num_workers=workers)

    return load


def write_litdata(folder: Path, num_images: int) -> Loader:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for i in range(num_images):
        cache[i] = {
            "x": torch.from_numpy(
                np.random.default_rng(i).standard_normal(SHAPE, dtype=np.float32)
            ),
            "y": i % 1000,
        }
    cache.done()
    cache.merge()
    return lambda workers: StreamingDataLoader(
        StreamingDataset(str(folder), shuffle=True), batch_size=BATCH_SIZE, num_workers=workers
    )


def write_hf_datasets(folder: Path, num_images: int) -> Loader:
    from datasets import Array3D, Features, Value, load_from_disk
    from datasets import Dataset as HFDataset

    def rows():
        for i in range(num_images):
            yield {
                "x": np.random.default_rng(i).standard_normal(SHAPE, dtype=np.float32),
                "y": i % 1000,
            }

    features = Features({"x": Array3D(SHAPE, "float32"), "y": Value("int64")})
    HFDataset.from_generator(rows, features=features, cache_dir=str(folder / "cache")).save_to_disk(
        str(folder / "set")
    )
    return lambda workers: DataLoader(
        load_from_disk(str(folder / "set")).with_format("torch"),
        batch_size=BATCH_SIZE,
        num_workers=workers,
        sampler=StreamSampler(num_images, num_draws=num_images),
    )


OTHERS = {"webdataset": write_webdataset, "litdata": write_litdata, "datasets": write_hf_datasets}


def empty_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def items_per_second(load: Loader, workers: int) -> float:
    """Over one pass, workers' start left out: it counts from the first batch on."""
    num, start = 0, None
    for batch in load(workers):
        if start is None:
            start = time.perf_counter()
        else:
            num += len(batch["y"] if isinstance(batch, dict) else batch[1])
    return num / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=16384)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="output folder; default: a temporary folder")
    parser.add_argument("--others", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        root, loads = Path(place), {}
        for content in ("moments", "sample"):
            loads[f"ours, {content}"] = write_ours(
                root / f"ours, {content}", args.num_images, content
            )
        loads["one file an image"] = write_one_file_an_image(
            root / "one file an image", args.num_images
        )
        if args.others:
            loads["memory-mapped npy"] = write_mapped(root / "memory-mapped npy", args.num_images)
            for name, write in OTHERS.items():
                if importlib.util.find_spec(name) is not None:
                    loads[name] = write(root / name, args.num_images)
        for workers in args.workers:
            for cache in ("warm", "cold"):
                ours = {
                    name: load
                    for name, load in loads.items()
                    if cache == "warm" or name.startswith(("ours", "one file"))
                }
                speeds: dict[str, list[float]] = {name: [] for name in ours}
                for _ in range(args.rounds):
                    for name, load in ours.items():
                        if cache == "cold":
                            empty_cache(root / name)
                        speeds[name].append(items_per_second(load, workers))
                base = statistics.median(speeds["one file an image"])
                for name, each in speeds.items():
                    speed = statistics.median(each)
                    print(
                        f"{workers} workers, {cache}: {name:18s} {speed:8.0f} items/s, "
                        f"{speed / base:.2f}x one file an image",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
