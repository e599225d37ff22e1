"""Training on extracted latents: what a draw is, that it survives interruptions and workers, and what is refused before training."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latents_toys import CLASSES, NUM_IMAGES, autoencoder, extract, pack, vae_in, write_images
from tinyfusion_pl import create_model
from tinyfusion_pl.artifacts import ArtifactError, read_json, write_json
from tinyfusion_pl.data import VAE, ImageNetLatents, LatentShards
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.sampler import StreamSampler
from tinyfusion_pl.data.shards import get_generator, normal, posterior_sample, shard_metadata


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, a VAE, and their latents as moments and as samples."""
    folder = tmp_path_factory.mktemp("latents")
    write_images(folder / "images")
    for content in ("moments", "sample"):
        extract(folder, folder / "images", folder / content, content=content)
    return folder


@pytest.fixture
def root(made, tmp_path):
    """A copy of the moments that a test may break."""
    return shutil.copytree(made / "moments", tmp_path / "moments")


def data(root, **settings):
    return ImageNetLatents(root, **{"batch_size": 4, "num_workers": 0, **settings})


def stream(root, num_batches, **settings):
    """x and y of the first batches, without a Trainer: one pass each."""
    module, batches = data(root, **settings), []
    first = 0
    while len(batches) < num_batches:
        module._restored = {"num_batches": len(batches), "num_draws": first}
        for batch in module.train_dataloader():
            batches.append(batch)
        first = len(batches) * module.batch_size
    return batches[:num_batches]


def drawn(seed, draw):
    """The chance of being mirrored and the noise of a draw."""
    generator = get_generator(seed, draw)
    return generator.random(), normal(generator, (4, 4, 4))


def stored(root, index):
    """Both views of a sample, read with safetensors itself."""
    shard, row = divmod(index, 4)
    return load_file(root / f"shard-{shard:05d}.safetensors")["latents"][row]


def test_a_draw_is_a_scaled_sample_of_a_view_that_seed_and_draw_decide(made):
    seen, mirrored = 0, 0
    for x, y in stream(made / "moments", 10, seed=3):
        sampler = StreamSampler(NUM_IMAGES, num_draws=1, seed=3)
        for one, label in zip(x, y):
            index = sampler.draw(seen)
            chance, noise = drawn(3, seen)
            mean, logvar = stored(made / "moments", index)[int(chance < 0.5)].chunk(2)
            expected = (
                mean + torch.exp(logvar.clamp(-30, 20) / 2) * torch.from_numpy(noise)
            ) * 0.18215
            assert (
                torch.allclose(one, expected, atol=1e-6)
                and label == LatentShards(made / "moments").labels[index]
            )
            assert one.dtype == torch.float32 and label.dtype == torch.int64
            seen, mirrored = seen + 1, mirrored + (chance < 0.5)
    assert 10 < mirrored < 30


def test_the_same_sample_is_drawn_anew_each_epoch_and_another_seed_draws_others(made):
    draws = {}
    for i, (x, _) in enumerate(stream(made / "moments", 5, seed=0)):
        for j, one in enumerate(x):
            draws.setdefault(StreamSampler(NUM_IMAGES, num_draws=1).draw(4 * i + j), []).append(one)
    assert (
        all(len(each) == 2 and not torch.equal(*each) for each in draws.values())
        and len(draws) == NUM_IMAGES
    )
    noise = [drawn(seed, draw)[1].flatten().tolist() for seed in range(2) for draw in range(2)]
    assert len({tuple(each) for each in noise}) == 4


def test_a_kept_sample_is_read_as_it_is(made):
    x, _ = stream(made / "sample", 1)[0]
    for draw, one in enumerate(x):
        index, chance = StreamSampler(NUM_IMAGES, num_draws=1).draw(draw), drawn(0, draw)[0]
        assert torch.allclose(one, stored(made / "sample", index)[int(chance < 0.5)] * 0.18215)


def test_posterior_samples_are_those_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments, noise = torch.randn(1, 8, 4, 4) * 20, torch.randn(1, 4, 4, 4)
    expected = DiagonalGaussianDistribution(moments)
    ours = posterior_sample(moments[0].numpy(), noise[0].numpy())
    assert np.allclose(ours, (expected.mean + expected.std * noise)[0].numpy(), rtol=1e-5)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_the_same_batches(made, num_workers):
    for one, other in zip(
        stream(made / "moments", 5),
        stream(made / "moments", 5, num_workers=num_workers),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resumed_stream_goes_on_with_the_very_numbers(made):
    whole = stream(made / "moments", 6)
    resumed = data(made / "moments")
    resumed._restored = {"num_batches": 2, "num_draws": 8}
    for one, other in zip(resumed.train_dataloader(), whole[2:]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_open_files_do_not_travel_to_other_processes(made):
    shards = LatentShards(made / "moments")
    before = shards.read(9, 1)
    assert shards._files
    copy = pickle.loads(pickle.dumps(shards))
    assert copy._files == {} and np.array_equal(copy.read(9, 1), before)


def test_few_files_are_open_at_once(made, monkeypatch):
    monkeypatch.setattr("tinyfusion_pl.data.shards.MAX_OPEN", 2)
    shards = LatentShards(made / "moments")
    for index in (0, 4, 8, 1, 5, 9):
        assert np.array_equal(shards.read(index, 0), stored(made / "moments", index)[0].numpy())
    assert len(shards._files) == 2


def test_sizes_classes_and_labels_are_those_of_the_images(made):
    module = data(made / "moments")
    assert module.latent_shape == (4, 4, 4) and module.num_classes == 3
    assert module.shards.info.classes == list(CLASSES)
    assert (
        module.shards.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    )  # class folders, in their order


def test_half_precision_shards_are_read_as_float32(made, tmp_path):
    extract(made, made / "images", tmp_path / "half", dtype="float16")
    shards, whole = LatentShards(tmp_path / "half"), LatentShards(made / "moments")
    assert shards.read(3, 1).dtype == np.float32
    assert np.allclose(shards.read(3, 1), whole.read(3, 1), rtol=1e-3, atol=1e-3)


def test_decode_undoes_encode_through_the_vae_that_made_them(made):
    module = data(made / "moments", vae=vae_in(made))
    moments = torch.from_numpy(module.shards.read(5, 0))
    images = module.decode(moments[None, :4] * 0.18215)
    assert torch.equal(images, vae_in(made)().decode(moments[None, :4] * 0.18215))
    assert images.shape == (1, 3, 8, 8) and images.dtype == torch.uint8
    module.check_decode()


def test_the_old_argument_pictures_means_images(made):
    with pytest.warns(DeprecationWarning, match="use images="):
        assert data(made / "moments", pictures="folder").images == "folder"
    with pytest.raises(ValueError, match="Give images only"):
        data(made / "moments", pictures="folder", images="other")


@pytest.mark.parametrize("packed", [False, True])
def test_reference_images_are_center_crops_of_the_size_that_decode_gives(made, tmp_path, packed):
    images = pack(tmp_path / "images.npz") if packed else made / "images"
    images, labels = data(made / "moments", vae=vae_in(made), images=images).reference_images()
    assert images.shape == (NUM_IMAGES, 3, 8, 8) and images.dtype == torch.uint8
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 3 + [2] * 3


# -- the folders of the published extraction
def published(number):
    """A scaled latent (1, 4, 2, 2)."""
    return np.random.default_rng(number).normal(size=(1, 4, 2, 2)).astype(np.float32)


@pytest.fixture
def folders(tmp_path):
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i in range(12):
        np.save(tmp_path / "imagenet256_features" / f"{i}.npy", published(i))
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", np.array([i]))
    return tmp_path


def test_the_published_layout_is_read_by_number_and_not_scaled_again(folders):
    module = data(folders)
    assert module.latent_shape == (4, 2, 2) and module.num_classes == 1000
    x, y = next(iter(module.train_dataloader()))
    assert torch.equal(
        x, torch.cat([torch.from_numpy(published(label)) for label in y.tolist()])
    )  # (4, 4, 2, 2)


def test_the_published_layout_is_checked(folders, tmp_path):
    features = folders / "imagenet256_features"
    with pytest.raises(ValueError, match="labels 0 to 11, but the model has classes 0 to 9"):
        data(folders).check_fits(model(num_classes=10, input_size=2))
    np.save(
        features / "7.npy", np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    )
    with pytest.raises(
        ArtifactError, match=r"7.npy has shape \(4, 4, 4\), but the others have \(4, 2, 2\)"
    ):
        data(folders)
    (features / "7.npy").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match=r"7.npy or its label .* cannot be read"):
        data(folders)
    (features / "7.npy").unlink()
    with pytest.raises(
        ValueError, match="holds 11 latents and .* 12 labels; each N.npy must be in both"
    ):
        data(folders)
    for i in range(12):
        np.save(
            features / f"{i}.npy",
            np.random.default_rng(i).normal(0, 5.5, (1, 4, 2, 2)).astype(np.float32),
        )
    with pytest.raises(
        ValueError,
        match="standard deviation of 5.* not to be multiplied by the scaling factor",
    ):
        data(folders)


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (
            "labels",
            np.array([1000]),
            "labels/500.npy has the label 1000, but the model has classes 0 to 999",
        ),
        ("labels", np.array([-1]), "labels/500.npy has the label -1"),
        (
            "features",
            np.full((1, 4, 2, 2), np.nan, np.float32),
            "features/500.npy holds values that are not finite",
        ),
    ],
)
def test_a_published_file_that_was_not_looked_at_before_training_is_checked_when_it_is_read(
    folders, kind, content, said
):
    for i in range(12, 1200):
        np.save(folders / "imagenet256_features" / f"{i}.npy", published(i))
        np.save(folders / "imagenet256_labels" / f"{i}.npy", np.array([i % 1000]))
    np.save(folders / f"imagenet256_{kind}" / "500.npy", content)
    module = data(folders)
    module.check_fits(model(num_classes=1000, input_size=2))
    assert 500 not in module.train_set().checked()
    with pytest.raises(ArtifactError, match=said):
        for _ in module.train_dataloader():
            pass


def test_a_file_of_the_published_layout_that_is_no_number_is_named(folders):
    for kind in ("features", "labels"):
        (folders / f"imagenet256_{kind}" / "mean.npy").write_bytes(b"")
    with pytest.raises(ArtifactError, match="mean.npy is not named N.npy with a number"):
        ImageNetLatents(folders)


def test_a_published_latent_that_goes_missing_in_training_is_named(folders):
    batches = iter(data(folders).train_dataloader())
    next(batches)
    for path in (folders / "imagenet256_features").iterdir():
        path.unlink()
    with pytest.raises(
        ArtifactError, match=r"imagenet256_features/\d+.npy or its label .* cannot be read"
    ):
        next(batches)


# -- what is refused before training
def model(**overrides):
    settings = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "in_channels": 4,
        "input_size": 4,
        "num_classes": 3,
    }
    return create_model("dit_digits", **{**settings, **overrides})


def test_a_model_that_fits_is_accepted(made):
    data(made / "moments").check_fits(model())


def test_labels_by_order_warn_for_a_model_of_more_classes(made):
    with pytest.warns(
        UserWarning,
        match="3 classes, labeled 0 to 2 in the order of their names, but the model has 1000.*class_to_idx",
    ):
        data(made / "moments").check_fits(model(num_classes=1000))
    data(made / "moments", class_to_idx="order").check_fits(
        model(num_classes=1000)
    )  # the user knows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"input_size": 8},
            r"are \(C, H, W\) = \(4, 4, 4\), but the model expects \(4, 8, 8\)",
        ),
        ({"in_channels": 16}, r"\(4, 4, 4\), but the model expects \(16, 4, 4\)"),
        (
            {"num_classes": 2},
            r"labels 0 to 2, but the model has classes 0 to 1\. Give a model with num_classes > 2",
        ),
    ],
)
def test_latents_that_do_not_fit_the_model_are_refused(made, settings, said):
    with pytest.raises(ValueError, match=said):
        data(made / "moments").check_fits(model(**settings))


def test_latents_of_another_scale_are_refused(made):
    with pytest.raises(
        ValueError,
        match=r"scaled by 0.18215, but the model was trained with data.scaling_factor=0.2325.*data=imagenet_latents_mar",
    ):
        data(made / "moments", scaling_factor=0.2325)


def test_a_vae_that_does_not_match_is_refused(made):
    flat = {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    for vae, said in (
        (
            VAE(autoencoder(seed=4), source="other"),
            "did not encode the latents .* encoder differs",
        ),
        (
            VAE(autoencoder(latent_channels=16), source="other"),
            "have 16 channels, but those in .* have 4",
        ),
        (
            VAE(autoencoder(), source="other", scaling_factor=0.5),
            "VAE other are scaled by 0.5, but the model was trained with",
        ),
        (VAE(autoencoder(**flat), source="other"), "size 4 to 4 pixels, but .* from 8 pixels"),
    ):
        with pytest.raises(ValueError, match=said):
            data(made / "moments", vae=lambda vae=vae: vae).check_decode()


def test_a_missing_vae_or_reference_says_what_to_give(made):
    with pytest.raises(ValueError, match=r"data.vae is not set. Give vae@data.vae=sd"):
        data(made / "moments").decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="Give evaluate.reference=FILE.npz .* or data.images=PATH"):
        data(made / "moments", vae=vae_in(made)).reference_images()
    with pytest.raises(ValueError, match=r"are \(N, 4, 4, 4\), got \(1, 4, 8, 8\)"):
        data(made / "moments", vae=vae_in(made)).decode(torch.zeros(1, 4, 8, 8))


def test_missing_latents_say_how_to_get_them(tmp_path):
    with pytest.raises(
        ValueError, match="data.root is not set.*task=extract_latents.*imagenet256_features"
    ):
        data(None)
    with pytest.raises(
        ValueError,
        match="imagenet256_features and .*imagenet256_labels not found.*task=extract_latents",
    ):
        data(tmp_path)
    with pytest.raises(
        ArtifactError, match="holds no latents.json: create such a folder with task=extract_latents"
    ):
        LatentShards(tmp_path)


def test_an_unfinished_extraction_is_refused(root):
    (root / "latents.json").rename(root / "extraction.json")
    with pytest.raises(
        ArtifactError, match="unfinished extraction: rerun the same task=extract_latents command"
    ):
        data(root)


def broken(root, change):
    path = root / "shard-00001.safetensors"
    change(path)
    with pytest.raises(ArtifactError) as error:
        data(root)
    assert (
        "1 of 3 shards cannot be used" in str(error.value)
        and str(path) in str(error.value)
        and "extract again" in str(error.value)
    )
    return str(error.value)


def resave(change):
    def apply(path):
        tensors, metadata = load_file(path), shard_metadata(LatentShards(path.parent).info, 1)
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "it is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "bytes instead of"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:20]),
            "it is truncated, or not a safetensors file",
        ),
        (lambda path: path.write_bytes(b""), "it is truncated, or not a safetensors file"),
        (
            lambda path: path.write_bytes((20).to_bytes(8, "little") + b"\xff" * 100),
            "it is not a safetensors file",
        ),
        (
            lambda path: shutil.copy(path.parent / "shard-00000.safetensors", path),
            "another shard of this one",
        ),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "another extraction"),
        (
            resave(lambda tensors: tensors.update(latents=tensors["latents"][:, :1].clone())),
            r"\[4, 1, 8, 4, 4\]",
        ),
        (
            resave(lambda tensors: tensors.update(latents=tensors["latents"].half())),
            "F16 instead of float32",
        ),
        (resave(lambda tensors: tensors.pop("labels")), "it has no 'labels'"),
    ],
)
def test_a_broken_shard_is_named_before_training(root, change, said):
    import re

    assert re.search(said, broken(root, change))


def test_a_broken_description_is_named(root):
    content = read_json(root / "latents.json")
    write_json(
        root / "latents.json", {key: value for key, value in content.items() if key != "dtype"}
    )
    with pytest.raises(ArtifactError, match="latents.json does not describe latents .*'dtype'"):
        data(root)
    (root / "latents.json").write_text(json.dumps(content)[:-20])
    with pytest.raises(ArtifactError, match="latents.json is not a JSON file"):
        data(root)


# -- what goes wrong during training
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_goes_missing_in_training_names_itself(root, num_workers):
    module = data(root, num_workers=num_workers)
    batches = iter(module.train_dataloader())
    for path in root.glob("shard-*"):
        path.unlink()
    # a worker opens files when it starts on its first batch; those that it has open it goes on
    # reading
    if num_workers:
        batches = iter(module.train_dataloader())
    with pytest.raises(
        ArtifactError,
        match=r"Sample \d+ cannot be read: shard .*moments/shard-0000\d.safetensors: No such file",
    ):
        next(batches)


def test_a_shard_that_is_cut_in_training_names_itself_and_ends_no_process(root):
    shards = LatentShards(root)
    shards.read(2, 0)  # it is open by now
    with open(root / "shard-00000.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(
        ArtifactError,
        match="Sample 3 .*shard-00000.safetensors was truncated since training began",
    ):
        shards.read(3, 1)


def test_values_that_are_not_finite_name_their_shard(root):
    shards = LatentShards(root)
    with open(root / "shard-00000.safetensors", "r+b") as file:
        file.seek(shards.offsets[0])
        file.write(np.array(np.nan, "<f4").tobytes())
    with pytest.raises(
        ArtifactError,
        match="Sample 0 in shard .*shard-00000.safetensors holds values that are not finite",
    ):
        shards.read(0, 0)


def overwrite(root, value):
    """All latents of all shards."""
    for path in root.glob("shard-*"):
        shard = int(path.stem[-5:])
        tensors, metadata = load_file(path), shard_metadata(LatentShards(root).info, shard)
        tensors["latents"].fill_(value)
        save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "Sample 0 in shard .* holds the number 0 alone"),
        (0.5, "number 0.5 alone"),
        (1e30, r"holds values up to 1e\+30: the file is damaged"),
        (float("nan"), "holds values that are not finite"),
    ],
)
def test_shards_of_values_that_no_latent_has_are_refused(root, value, said):
    overwrite(root, value)
    with pytest.raises(ArtifactError, match=said):
        data(root)


@pytest.fixture
def rescaled(made, tmp_path, request):
    """Samples of standard deviation `request.param` once they are scaled."""
    root = shutil.copytree(made / "sample", tmp_path / "sample")
    for path in root.glob("shard-*"):
        tensors, metadata = (
            load_file(path),
            shard_metadata(LatentShards(root).info, int(path.stem[-5:])),
        )
        save_file(
            {**tensors, "latents": torch.randn(tensors["latents"].shape) * request.param / 0.18215},
            path,
            metadata=metadata,
        )
    return root


@pytest.mark.parametrize(
    ("rescaled", "said"),
    [
        (0.1, "standard deviation of 0.1.* instead of about 1: they were scaled before"),
        (5.5, "standard deviation of 5.*instead of about 1"),
    ],
    indirect=["rescaled"],
)
def test_shards_of_an_unusual_scale_are_reported(rescaled, said):
    with pytest.warns(UserWarning, match=said):
        data(rescaled)


@pytest.mark.parametrize("rescaled", [1e-6, 100], indirect=True)
def test_shards_of_an_impossible_scale_are_refused(rescaled):
    with pytest.raises(
        ArtifactError,
        match="instead of about 1: they are damaged|samples checked hold values up to",
    ):
        data(rescaled)


def test_values_of_1e30_in_training_name_their_shard(root):
    shards = LatentShards(root)
    with open(root / "shard-00000.safetensors", "r+b") as file:
        file.seek(shards.offsets[0])
        file.write(np.array(1e30, "<f4").tobytes())
    with pytest.raises(
        ArtifactError,
        match=r"Sample 0 in shard .*shard-00000.safetensors holds values up to 1e\+30",
    ):
        shards.read(0, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_samples", "10"),
        ("num_samples", 10.0),
        ("num_samples", -1),
        ("num_samples", 10**15),
        ("num_samples", None),
        ("shard_size", 0),
        ("latent_shape", [4, 4]),
        ("latent_shape", "444"),
        ("latent_shape", None),
        ("latent_shape", [4, 4, 0]),
        ("vae", None),
        ("vae", {}),
        ("vae", {"scaling_factor": "1", "source": "", "encoder": ""}),
        ("classes", None),
        ("classes", []),
        ("classes", [1, 2, 3]),
        ("classes", {"a": 1}),
        ("indices", [1]),
        ("indices", ["0", "1", "2"]),
        ("skipped", {"a": 99}),
        ("skipped", []),
        ("content", "mean"),
        ("content", []),
        ("dtype", {}),
        ("image_size", True),
        ("unknown", 1),
    ],
)
def test_a_description_of_odd_types_is_named(root, key, value):
    content = read_json(root / "latents.json")
    write_json(root / "latents.json", {**content, key: value})
    with pytest.raises(ArtifactError, match="latents.json does not describe latents"):
        data(root)


def test_a_description_of_endless_shards_ends(root):
    content = read_json(root / "latents.json")
    write_json(root / "latents.json", {**content, "num_samples": 2**39, "shard_size": 1})
    with pytest.raises(ArtifactError, match="1001 of 549755813888 shards cannot be used"):
        data(root)


def test_corrupt_headers_of_shards_are_one_sentence(root):
    path = root / "shard-00001.safetensors"
    content, generator = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    for _ in range(150):
        broken = content.copy()
        broken[generator.integers(0, 300, 3)] = generator.integers(0, 256, 3)
        path.write_bytes(broken.tobytes())
        try:
            data(root)
        except ArtifactError as error:
            assert str(path) in str(error) or "latents.json" in str(error)


def test_more_processes_than_samples_are_refused(made, monkeypatch):
    monkeypatch.setattr(GenerationDataModule, "_ranks", {"rank": 0, "num_replicas": 11})
    with pytest.raises(ValueError, match="There are 11 processes, but only 10 training samples"):
        data(made / "moments").train_dataloader()
    data(made / "moments").check_processes(10)
