"""Extraction of latents: the numbers, and that neither interruptions nor processes change a byte of the files."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from image_toys import broken_images
from latents_toys import (
    CLASSES,
    NUM_IMAGES,
    TRAINER,
    autoencoder,
    extract,
    pack,
    vae_in,
    write_images,
)
from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.data import VAE, LatentShards
from tinyfusion_pl.data.image_batches import center_crop
from tinyfusion_pl.data.shards import get_generator, normal


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    write_images(folder / "images")
    extract(folder, folder / "images", folder / "whole")
    return folder


def files(folder):
    """Every file's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_shards_hold_the_moments_of_the_centre_crop_and_of_its_mirror_image(made):
    vae = vae_in(made)()
    shards = LatentShards(made / "whole")
    paths = sorted((made / "images").glob("*/*.png"), key=str)
    for i in (0, 5, 9):
        pixels = torch.from_numpy(
            np.array(center_crop(Image.open(paths[i]).convert("RGB"), 8))
        ).permute(2, 0, 1)[None]
        for view, image in enumerate((pixels, pixels.flip(-1))):
            assert np.allclose(shards.read(i, view), vae.encode(image)[0].numpy(), atol=1e-5)
        assert not np.allclose(
            shards.read(i, 1), shards.read(i, 0)[..., ::-1], atol=1e-2
        )  # latents cannot be flipped afterwards


def test_the_mirrored_view_is_the_extraction_of_mirrored_files(made, tmp_path):
    for path in (made / "images").glob("*/*.png"):
        (place := tmp_path / "mirrored" / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = center_crop(
            Image.open(path), 8
        )  # cropped first: an odd margin is rounded to one side
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(place / path.name)
    extract(made, tmp_path / "mirrored", tmp_path / "out")
    one, other = LatentShards(made / "whole"), LatentShards(tmp_path / "out")
    for i in range(NUM_IMAGES):
        assert np.allclose(one.read(i, 1), other.read(i, 0), atol=1e-5) and np.allclose(
            one.read(i, 0), other.read(i, 1), atol=1e-5
        )


def test_a_folder_says_what_it_holds_and_has_nothing_else(made):
    assert list(files(made / "whole")) == [
        "images.jsonl",
        "latents.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    held = read_json(made / "whole" / "latents.json")
    assert (
        held["content"] == "moments"
        and held["latent_shape"] == [4, 4, 4]
        and held["num_samples"] == NUM_IMAGES
    )
    assert (
        held["classes"] == list(CLASSES)
        and held["image_size"] == 8
        and held["vae"]["scaling_factor"] == 0.18215
    )
    tensors = load_file(made / "whole" / "shard-00002.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "latents": (2, 2, 8, 4, 4),
        "labels": (2,),
        "digests": (2,),
    }
    paths = sorted((made / "images").glob("*/*.png"), key=str)[8:]
    expected = [
        int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], "little", signed=True)
        for path in paths
    ]
    assert tensors["digests"].tolist() == expected


def test_a_kept_sample_is_of_the_posterior_with_noise_of_its_own(made, tmp_path):
    extract(made, made / "images", tmp_path / "out", content="sample", seed=5, batch_size=1)
    moments, samples = LatentShards(made / "whole"), LatentShards(tmp_path / "out")
    for i in (0, 7):
        for view in (0, 1):
            mean, logvar = np.split(moments.read(i, view), 2)
            expected = mean + np.exp(logvar / 2) * normal(get_generator(5, 2 * i + view), (4, 4, 4))
            assert np.allclose(samples.read(i, view), expected, atol=1e-4)


@pytest.mark.parametrize("names", [True, False])
def test_packed_image_files_give_the_same_latents_with_their_own_order_and_names(
    made, tmp_path, names
):
    extract(made, pack(tmp_path / "images.npz", names=names), tmp_path / "out")
    packed, folders = LatentShards(tmp_path / "out"), LatentShards(made / "whole")
    assert packed.labels.tolist() == [i % 3 for i in range(NUM_IMAGES)]
    assert packed.info.classes == (list(CLASSES) if names else ["0", "1", "2"])
    assert packed.info.class_names == (["tench", "shark", "hen"] if names else None)
    order = [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]  # class folder by class folder
    for i, number in enumerate(order):
        assert np.allclose(folders.read(i, 0), packed.read(number, 0), atol=1e-5)


# -- interruptions
class Interrupted(Exception):
    pass


class Fragile(VAE):
    """Stops at batch `at`."""

    def __init__(self, *args, at, **kwargs):
        super().__init__(*args, **kwargs)
        self.at = at

    def encode(self, images):
        self.at -= 1
        if self.at < 0:
            raise Interrupted
        return super().encode(images)


def fragile(made, *, at):
    return partial(Fragile, autoencoder(), source=str(vae_in(made).args[0]), batch_size=4, at=at)


@pytest.mark.parametrize("at", range(5))
def test_an_interrupted_extraction_goes_on_and_ends_with_the_same_bytes(made, tmp_path, at):
    with pytest.raises(Interrupted):
        extract(made, made / "images", tmp_path / "out", vae=fragile(made, at=at))
    there = [name for name in files(tmp_path / "out") if name.startswith("shard")]
    assert there == [
        f"shard-0000{i}.safetensors" for i in range(at // 2)
    ]  # two batches a shard, and no half shard
    for name in there:
        assert files(made / "whole")[name] == files(tmp_path / "out")[name]
    with pytest.raises(ArtifactError, match="unfinished extraction"):
        LatentShards(tmp_path / "out")
    counting = fragile(made, at=5 - at)()  # one batch more than what is left would raise
    extract(made, made / "images", tmp_path / "out", vae=lambda: counting)
    assert counting.at == 0
    assert files(tmp_path / "out") == files(made / "whole")


def test_parts_that_are_all_there_become_a_shard(made, tmp_path, monkeypatch):
    from tinyfusion_pl.data.extraction import ShardWriter

    with monkeypatch.context() as patched:
        patched.setattr(
            ShardWriter, "_assemble", lambda self, shard: (_ for _ in ()).throw(Interrupted)
        )
        with pytest.raises(Interrupted):
            extract(made, made / "images", tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2 and not list(
        (tmp_path / "out").glob("shard*")
    )
    extract(made, made / "images", tmp_path / "out")
    assert files(tmp_path / "out") == files(made / "whole")


def test_parts_of_other_settings_are_not_taken(made, tmp_path):
    for settings in ({"content": "sample"}, {"save_every": 3}):
        with pytest.raises(Interrupted):
            extract(made, made / "images", tmp_path / "out", vae=fragile(made, at=1), **settings)
        if settings == {"content": "sample"}:
            (tmp_path / "out" / "extraction.json").unlink()
            assert len(list((tmp_path / "out" / "parts").iterdir())) == 1
    extract(made, made / "images", tmp_path / "out")
    assert files(tmp_path / "out") == files(made / "whole")


def test_a_finished_extraction_is_not_done_again_and_a_lost_shard_alone_is(made, tmp_path, capsys):
    extract(made, made / "images", tmp_path / "out")
    capsys.readouterr()
    extract(made, made / "images", tmp_path / "out", vae=fragile(made, at=0))
    assert "already finished" in capsys.readouterr().out
    for name in ("latents.json", "shard-00001.safetensors"):
        (tmp_path / "out" / name).unlink()
    extract(made, made / "images", tmp_path / "out")
    assert "1 of 3 shards remaining" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(made / "whole")


# -- processes
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv_backend=c10d",
    "--rdzv_endpoint=localhost:0",
]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="devices=2"),
        pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_the_files_that_one_writes(made, tmp_path, launcher):
    command = [sys.executable, *launcher, "-m", "tinyfusion_pl"]
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    done = subprocess.run(
        [*command, *overrides(made, tmp_path / "out"), "runtime.devices=2"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("Done.") == 1
    assert files(tmp_path / "out") == files(made / "whole")


def overrides(made, output):
    return [
        "task=extract_latents",
        f"extract.images={made / 'images'}",
        f"extract.output={output}",
        f"extract.vae.source={made}",
        "extract.vae.batch_size=4",
        "extract.image_size=8",
        "extract.shard_size=4",
        "extract.save_every=2",
        "extract.batch_size=2",
        "extract.num_workers=1",
        "runtime.accelerator=cpu",
    ]


def test_more_processes_than_images_or_shards_are_refused(made, tmp_path):
    two, twelve = (partial(TRAINER, strategy="ddp", devices=devices) for devices in (2, 12))
    with pytest.raises(
        ValueError, match="There are 12 processes, but only 10 images. Give fewer devices"
    ):
        extract(made, made / "images", tmp_path / "out", trainer=twelve)
    with pytest.raises(
        ValueError,
        match="There are 2 processes, but only 1 shards of 64 .* Give extract.shard_size=5 or less",
    ):
        extract(made, made / "images", tmp_path / "out", trainer=two, shard_size=64)
    assert not (tmp_path / "out").exists()


# -- the command line, and what people get wrong
def test_the_command_extracts_and_training_data_read_it(made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(overrides(made, tmp_path / "out")) == 0
    out = capfd.readouterr().out
    assert "10 images" in out and "images/s" in out and "Done." in out
    assert files(tmp_path / "out") == files(made / "whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["extract.image_size=9"], "image_size is 9"),
        (["extract.content=mean"], "'moments' or 'sample'"),
        (["extract.dtype=bfloat16"], "'float32' or 'float16'"),
        (["extract.shard_size=0"], "extract.shard_size is 0"),
        (["extract.num_images=11"], "num_images is 11; "),
        (["extract.max_pixels=0"], "extract.max_pixels is 0"),
        (
            ["extract.class_to_idx=imagenet"],
            "are not wnids of ImageNet's 1000 classes (n01, n02, n10)",
        ),
        (["extract.class_to_idx=nowhere.json"], "There is no file nowhere.json"),
        (["extract.images=nowhere"], "nowhere is not a folder of class folders"),
        (["extract.images=nowhere.npz"], "There is no file nowhere.npz"),
        (["extract.vae.source=nowhere"], "There is no VAE at nowhere"),
        (["extract.vae.precision=float16"], "'float32', 'bfloat16'"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_written(
    made, tmp_path, monkeypatch, capfd, settings, said
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*overrides(made, "out"), *settings]) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and said in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_another_extraction_is_left_as_it_is(made):
    before = files(made / "whole")
    for settings, said in (
        ({"content": "sample"}, "content is moments there and sample here"),
        ({"image_size": 12}, "image_size is 8 there"),
        ({"num_images": 9}, "num_samples is 10"),
        ({"vae": partial(VAE, autoencoder(seed=9), source="other")}, "vae is "),
    ):
        with pytest.raises(ArtifactError, match=f"holds another extraction .*{said}"):
            extract(made, made / "images", made / "whole", **settings)
    assert files(made / "whole") == before
    with pytest.raises(ArtifactError, match="which is a file"):
        extract(made, made / "images", made / "images" / "n01" / "0.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(made, tmp_path, num_workers):
    images = write_images(tmp_path / "images")
    (images / "n02" / "4.png").write_bytes((images / "n02" / "4.png").read_bytes()[:60])
    with pytest.raises(
        ValueError, match="n02/4.png is not a readable image .* Replace or remove it"
    ):
        extract(made, images, tmp_path / "out", num_workers=num_workers)


def test_a_broken_image_that_a_worker_finds_is_told_in_one_sentence(
    made, tmp_path, monkeypatch, capfd
):
    images = write_images(tmp_path / "images")
    (images / "n01" / "3.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*overrides(made, "out"), f"extract.images={images}"]) == 1
    (told,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert (
        "n01/3.png is not a readable image" in told
        and "Replace or remove it" in told
        and "worker" not in told
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("offsets"), "has no offsets; an npz file of images holds blob"),
        (
            lambda arrays: arrays.update(offsets=arrays["offsets"][:-1]),
            "is inconsistent: 10 offsets",
        ),
        (
            lambda arrays: arrays.update(labels=arrays["labels"] + 1),
            "labels 1 to 3 and names 3 classes",
        ),
        (
            lambda arrays: arrays.update(blob=np.array([{}], dtype=object)),
            "not a whole npz file of plain arrays",
        ),
    ],
)
def test_a_broken_npz_is_named(made, tmp_path, change, said):
    with np.load(pack(tmp_path / "images.npz")) as found:
        arrays = dict(found)
    change(arrays)
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ArtifactError, match=said):
        extract(made, tmp_path / "images.npz", tmp_path / "out")


def test_moments_that_are_not_finite_stop_the_extraction(made, tmp_path):
    model = autoencoder()
    torch.nn.init.constant_(model.quant_conv.bias, float("inf"))
    with pytest.raises(ValueError, match="values that are not finite for images 0 to 1"):
        extract(made, made / "images", tmp_path / "out", vae=partial(VAE, model, source="other"))
    torch.nn.init.constant_(model.quant_conv.bias, 1e30)
    with pytest.raises(ValueError, match=r"values up to 1e\+30 for images 0 to 1"):
        extract(made, made / "images", tmp_path / "out", vae=partial(VAE, model, source="other"))


# -- broken images, and images that are removed, added or changed
def break_image(images):
    """Cut one image file; its sample is number 8 of 10 (class folder by class folder)."""
    path = images / "n10" / "5.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.fixture
def stopped(made, tmp_path):
    """An extraction that a broken image stopped after two whole shards."""
    images = write_images(tmp_path / "images")
    path = break_image(images)
    with pytest.raises(
        ValueError,
        match="n10/5.png is not a readable image .*rerun the same command; or .* skip_broken=true",
    ):
        extract(made, images, tmp_path / "out")
    assert (tmp_path / "out" / "shard-00001.safetensors").exists()
    return images, tmp_path / "out", path


def other_samples(root, made):
    """Whether all samples of `root` but the broken one are those of the whole extraction."""
    shards, whole = LatentShards(root), LatentShards(made / "whole")
    kept = [i for i in range(NUM_IMAGES) if i != 8]
    assert len(shards) == 9 and shards.labels.tolist() == whole.labels[kept].tolist()
    return all(
        np.array_equal(shards.read(i, view), whole.read(number, view))
        for i, number in enumerate(kept)
        for view in (0, 1)
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_skipped_counted_and_named(made, tmp_path, capsys, num_workers):
    images = write_images(tmp_path / "images")
    break_image(images)
    extract(made, images, tmp_path / "out", skip_broken=True, num_workers=num_workers)
    out = capsys.readouterr().out
    assert (
        "skipped 1 images (n10/5.png); latents.json lists all of them" in out and "5.png: " in out
    )
    assert read_json(tmp_path / "out" / "latents.json")["skipped"] == {"n10/5.png": 8}
    assert other_samples(tmp_path / "out", made)


def test_removing_a_broken_image_resumes(made, stopped, capsys):
    images, out, path = stopped
    before = files(out)
    path.unlink()
    counting = fragile(made, at=1)()  # one batch is left: nothing that is finished is done again
    extract(made, images, out, vae=lambda: counting)
    assert counting.at == 0
    assert (
        "1 of the 10 images of this extraction were removed since it began (n10/5.png)"
        in capsys.readouterr().out
    )
    assert all(
        files(out)[name] == content for name, content in before.items() if name.startswith("shard")
    )
    assert other_samples(out, made) and read_json(out / "latents.json")["skipped"] == {
        "n10/5.png": 8
    }
    extract(made, images, out)
    assert "already finished" in capsys.readouterr().out


def test_skip_broken_and_replacing_resume_too(made, stopped, tmp_path):
    images, out, path = stopped
    extract(made, images, shutil.copytree(out, tmp_path / "skipped"), skip_broken=True)
    assert other_samples(tmp_path / "skipped", made)
    shutil.copy(made / "images" / "n10" / "5.png", path)
    extract(made, images, out)
    assert files(out) == files(made / "whole") | {
        name: files(out)[name] for name in ("latents.json", "images.jsonl")
    }  # other paths


def test_added_and_changed_images_are_told_by_name(made, stopped):
    images, out, path = stopped
    path.unlink()
    Image.new("RGB", (9, 9)).save(images / "n01" / "zz.png")
    with pytest.raises(
        ArtifactError,
        match=r"since then 1 images were added \(n01/zz.png\). Give another extract.output",
    ):
        extract(made, images, out)
    (images / "n01" / "zz.png").unlink()
    Image.new("RGB", (9, 9)).save(images / "n01" / "0.png")
    with pytest.raises(
        ArtifactError,
        match=r"1 images .* differ from those whose latents .* \(n01/0.png\).*delete shard-00000",
    ):
        extract(made, images, out)
    (out / "shard-00000.safetensors").unlink()
    extract(made, images, out)
    assert len(LatentShards(out)) == 9


def test_an_image_replaced_by_one_of_its_size_is_told(made, stopped):
    images, out, path = stopped
    path.unlink()
    place = images / "n01" / "0.png"
    content = place.read_bytes()
    place.write_bytes(content[:-1] + b"x")
    with pytest.raises(
        ArtifactError,
        match=r"1 images .* differ from those whose latents .* \(n01/0.png\).*delete shard-00000",
    ):
        extract(made, images, out)
    place.write_bytes(content)
    extract(made, images, out)
    assert other_samples(out, made)


def test_copies_of_the_images_are_the_same_images(made, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    extract(made, images, tmp_path / "out")
    for path in images.glob("*/*"):
        os.utime(path, (1, 1))
    for _ in range(2):
        capsys.readouterr()
        extract(made, images, tmp_path / "out", vae=fragile(made, at=0))
        assert "already finished" in capsys.readouterr().out
    assert "1000000000" in (tmp_path / "out" / "images.jsonl").read_text()


def test_an_image_replaced_in_an_npz_file_is_told(made, tmp_path):
    with np.load(pack(tmp_path / "images.npz")) as found:
        arrays = dict(found)
    extract(made, tmp_path / "images.npz", tmp_path / "out")
    arrays["blob"] = arrays["blob"].copy()
    arrays["blob"][arrays["offsets"][4] - 20] ^= 1
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(
        ArtifactError, match=r"1 images .* differ from those whose latents are in .* \(3\)"
    ):
        extract(made, tmp_path / "images.npz", tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-9], lambda content: content[:-9] + bytes(9), lambda content: b""],
)
def test_a_damaged_part_is_made_again(made, tmp_path, damage):
    with pytest.raises(Interrupted):
        extract(made, made / "images", tmp_path / "out", vae=fragile(made, at=1))
    (part,) = (tmp_path / "out" / "parts").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    extract(made, made / "images", tmp_path / "out")
    assert files(tmp_path / "out") == files(made / "whole")


def test_a_renamed_class_folder_is_told(made, stopped):
    images, out, _ = stopped
    (images / "n02").rename(images / "n11")
    with pytest.raises(ArtifactError, match="since then 3 images were added"):
        extract(made, images, out)


def test_images_removed_after_the_end_are_left_out(made, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    extract(made, images, tmp_path / "out")
    shards = {
        name: content
        for name, content in files(tmp_path / "out").items()
        if name.startswith("shard")
    }
    (images / "n10" / "5.png").unlink()
    capsys.readouterr()
    extract(made, images, tmp_path / "out", vae=fragile(made, at=0))
    out = capsys.readouterr().out
    assert "already finished" in out and "skipped 1 images (n10/5.png)" in out
    assert (
        other_samples(tmp_path / "out", made) and shards.items() <= files(tmp_path / "out").items()
    )


def test_a_removed_image_of_the_first_few_resumes(made, tmp_path):
    images = write_images(tmp_path / "images")
    path = images / "n01" / "6.png"
    content = path.read_bytes()
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="6.png is not a readable image"):
        extract(made, images, tmp_path / "out", num_images=6)
    path.unlink()
    extract(made, images, tmp_path / "out", num_images=6)
    assert LatentShards(tmp_path / "out").info.skipped == {"n01/6.png": 2} and content
    assert LatentShards(tmp_path / "out").labels.tolist() == [0, 0, 0, 1, 1]


def test_all_images_broken_is_an_error(made, tmp_path):
    images = write_images(tmp_path / "images")
    for path in images.glob("*/*"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="None of the 10 images of .* could be read"):
        extract(made, images, tmp_path / "out", skip_broken=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_kind_of_broken_image_is_skipped(made, tmp_path, num_workers):
    images = write_images(tmp_path / "images")
    broken = broken_images(images / "n02")
    extract(made, images, tmp_path / "out", skip_broken=True, num_workers=num_workers)
    shards = LatentShards(tmp_path / "out")
    assert set(shards.info.skipped) == {
        f"n02/{path.name}" for path in broken if not path.stem.isdecimal()
    }
    assert len(shards) == NUM_IMAGES and shards.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3


def test_what_is_ignored_and_noted_is_said(made, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (images / ".ipynb_checkpoints").mkdir()
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(images / "n01" / "0.png")
    extract(made, images, tmp_path / "out")
    out = capsys.readouterr().out
    assert (
        "1 hidden files or folders (.ipynb_checkpoints)" in out
        and "1 images have transparent pixels: transparency is ignored" in out
    )
    assert "3 classes, labels in the order of the class folders (n01: 0, n02: 1, n10: 2)" in out


@pytest.mark.parametrize("content", [b"", b"[1]\n[2]\n", b"{}\n", b"\xff\xfe", b"null"])
def test_a_damaged_list_of_images_is_named(made, stopped, content):
    images, out, path = stopped
    path.unlink()
    (out / "images.jsonl").write_bytes(content)
    with pytest.raises(ArtifactError, match="images.jsonl (is damaged|does not describe latents)"):
        extract(made, images, out)
