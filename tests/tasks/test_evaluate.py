"""Evaluation: the same numbers however the work is cut into batches, attempts and processes; files that others read."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from tinyfusion_pl import create_model
from tinyfusion_pl.artifacts import ArtifactError, read_json, sha256, tensors_sha256
from tinyfusion_pl.callbacks import SamplingProgressBar
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import (
    FrechetDistance,
    GenerationMetrics,
    PrecisionRecall,
    Reference,
    load_digits_classifier,
    read_reference,
)
from tinyfusion_pl.models import export_model, save_shallow
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import remove_blocks
from tinyfusion_pl.tasks import Evaluate, Inputs, RunFolder
from tinyfusion_pl.tasks.kept import KeptBatches

SAMPLING = {"num_sampling_steps": 3, "sampler": "ddpm", "guidance_scale": 1.0}
SCRIPT = Path(__file__).with_name("evaluate_on_processes.py")


def denoiser(seed=0):
    torch.manual_seed(seed)
    model = create_model("dit_digits", depth=2, hidden_size=16, num_heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def inputs(model=None):
    return Inputs(
        name="x",
        seed=3,
        teacher=model or denoiser(),
        objective=GaussianDiffusion(),
        data=DigitsDataModule(),
    )


def evaluate(**kwargs):
    trainer = partial(
        Trainer,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    settings = {
        "num_samples": 23,
        "batch_size": 5,
        "num_shown": 4,
        "num_timing_rounds": 1,
        "sampling": SAMPLING,
    }
    return Evaluate(
        **{
            "trainer": trainer,
            "metrics": GenerationMetrics(load_digits_classifier()),
            **settings,
            **kwargs,
        }
    )


def run(folder, given=None, **kwargs):
    task, given = evaluate(**kwargs), given or inputs()
    task.check(given)
    task.run(RunFolder(folder), given)
    return read_json(folder / "metrics.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, write_npz=True, write_grid=True)


def quality(results, role="teacher"):
    return {
        name: results[role][name]
        for name in ("fid", "sfid", "inception_score", "precision", "recall", "accuracy")
    }


def images(folder, role="teacher"):
    with np.load(folder / f"samples_{role}.npz") as file:
        return file["arr_0"]


def test_all_five_metrics_and_the_protocol_are_in_the_results(whole):
    _, results = whole
    assert all(np.isfinite(value) for value in quality(results).values())
    protocol = results["protocol"]
    assert (
        protocol["num_samples"] == 23
        and protocol["labels"] == "balanced"
        and protocol["precision"] == "float32"
    )
    assert (
        protocol["feature_network"].startswith("DigitsClassifier-")
        and results["reference"] == "DigitsDataModule"
    )
    assert protocol["num_reference"] == 1797 and len(protocol["reference_sha256"]) == 64
    assert {name: protocol[name] for name in SAMPLING} == SAMPLING
    assert results["teacher"]["weights_sha256"] == tensors_sha256(denoiser().state_dict())
    assert protocol["metrics"]["precision_recall"] == {
        "metric": "PrecisionRecall",
        "of": "features",
        "k": 3,
        "precision": "float32",
    }


def test_the_npz_holds_every_sample_in_order_as_the_adm_evaluator_takes_it(whole):
    folder, _ = whole
    made = images(folder)
    assert made.shape == (23, 8, 8, 1) and made.dtype == np.uint8
    task = evaluate()
    each = task.sampler(inputs().teacher, inputs())(torch.tensor([17]), torch.tensor([7]))
    assert (
        np.abs(each[0].permute(1, 2, 0).numpy().astype(int) - made[17]).max() <= 1
    )  # alone or in a batch: up to rounding


def test_the_grid_is_a_image_of_the_shown_samples(whole):
    with Image.open(whole[0] / "samples_teacher.png") as grid:
        assert grid.size[0] > grid.size[1] and grid.size[1] == 64 + 4


def test_nothing_but_the_results_is_left(whole):
    assert not (whole[0] / "evaluate").exists()
    assert {path.name for path in whole[0].iterdir()} == {
        "metrics.json",
        "samples.safetensors",
        "samples_teacher.npz",
        "samples_teacher.png",
        "stages",
    }


def test_models_that_come_after_an_evaluation_are_measured_by_the_next(whole, tmp_path):
    folder, measured = RunFolder(tmp_path), quality(whole[1])
    assert run(tmp_path).keys() >= {"teacher"}
    for seed, (path, role) in enumerate(
        [(folder.shallow, "pruned"), (folder.recovered, "recovered")], start=1
    ):
        path.mkdir()  # a stage that is being written leaves no model yet
        assert role not in run(tmp_path)
        save_shallow(path, denoiser(seed), {"stacks": {}})
        results = run(tmp_path)
        assert results[role]["fid"] != results["teacher"]["fid"] and quality(results) == measured
    written = (tmp_path / "metrics.json").stat().st_mtime_ns
    run(tmp_path)
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == written


def test_an_evaluation_cut_between_batches_goes_on_to_the_identical_numbers(
    whole, tmp_path, monkeypatch
):
    class Cut(Exception):
        pass

    write, num = KeptBatches.write, 0

    def cut(self, *args):
        nonlocal num
        if num == 3:
            raise Cut
        num += 1
        write(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(KeptBatches, "write", cut)
        run(tmp_path, write_npz=True)
    assert KeptBatches(tmp_path / "evaluate" / "teacher").indices().tolist() == list(range(15))
    sampled, task = [], evaluate(write_npz=True)
    original = task.sampler

    def sampler(*args):
        made = original(*args)
        made.objective = Counting(made.objective, sampled)
        return made

    task.sampler = sampler
    task.check(inputs())
    task.run(RunFolder(tmp_path), inputs())
    assert sampled[:2] == [5, 3]  # two batches were left; what follows is timing
    assert quality(read_json(tmp_path / "metrics.json")) == quality(whole[1])
    assert np.array_equal(images(tmp_path), images(whole[0]))


class Counting:
    """An objective that notes how many samples it is asked for."""

    def __init__(self, objective, sampled):
        self.objective, self.sampled = objective, sampled

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def sample(self, denoiser, z, y, **options):
        self.sampled.append(len(z))
        return self.objective.sample(denoiser, z, y, **options)


def start(*arguments):
    """A real evaluation in processes of its own: number of processes, folder, batches after which it is killed."""
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_evaluation_goes_on_to_the_identical_numbers_and_images(tmp_path):
    assert start(1, tmp_path / "killed", 3).returncode == -signal.SIGKILL
    assert KeptBatches(tmp_path / "killed" / "evaluate" / "teacher").indices().tolist() == list(
        range(12)
    )
    assert not (tmp_path / "killed" / "metrics.json").exists()
    for folder in ("killed", "never"):
        run(tmp_path / folder, batch_size=4, write_npz=True)
    killed, never = (
        read_json(tmp_path / folder / "metrics.json") for folder in ("killed", "never")
    )
    assert quality(killed) == quality(never) and killed["protocol"] == never["protocol"]
    assert np.array_equal(images(tmp_path / "killed"), images(tmp_path / "never"))


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_that_share_the_work_unevenly_give_the_numbers_of_one(
    whole, num_processes, tmp_path
):
    done = start(num_processes, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # Batches of other sizes may round a pixel of 8-bit images the other way.
    assert np.abs(images(tmp_path).astype(int) - images(whole[0])).max() <= 1
    assert quality(read_json(tmp_path / "metrics.json")) == pytest.approx(
        quality(whole[1]), rel=2e-3, abs=0.05
    )


def test_models_by_path_are_measured_in_place_of_the_runs_own(whole, tmp_path):
    save_shallow(tmp_path / "shallow", denoiser(), {"stacks": {}})
    torch.save({"ema": denoiser(1).state_dict()}, tmp_path / "other.pt")
    results = run(
        tmp_path / "run",
        models={"mine": str(tmp_path / "shallow"), "other": str(tmp_path / "other.pt")},
        write_npz=True,
    )
    assert "teacher" not in results and quality(results, "mine") == quality(whole[1])
    assert not np.array_equal(images(tmp_path / "run", "other"), images(tmp_path / "run", "mine"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_exported_shallow_model_is_measured_beside_its_teacher(tmp_path, suffix):
    shallow = remove_blocks(denoiser(), {"blocks": [1]})
    path = export_model(shallow, tmp_path / f"shallow{suffix}")
    results = run(tmp_path / "run", models={"mine": str(path)})
    assert results["mine"]["depth"] == 1 and results["mine"]["weights_sha256"] == tensors_sha256(
        shallow.state_dict()
    )


def test_a_model_for_other_latents_is_refused_before_anything_is_sampled(tmp_path):
    save_shallow(
        tmp_path / "other", create_model("dit_digits", input_size=16, depth=1), {"stacks": {}}
    )
    with pytest.raises(
        ValueError, match=r"are \(C, H, W\) = \(1, 8, 8\), but the model expects \(1, 16, 16\)"
    ):
        evaluate(models={"mine": str(tmp_path / "other")}).check(inputs())


def test_a_reference_file_gives_the_numbers_of_its_images(whole, tmp_path):
    real = DigitsDataModule().reference_images()[0]
    Reference(path=tmp_path / "real.npz", images=real, num_images=len(real)).write()
    results = run(tmp_path / "run", reference=str(tmp_path / "real.npz"))
    assert quality(results) == pytest.approx(quality(whole[1]), rel=1e-6)
    assert (
        results["reference"] == str(tmp_path / "real.npz")
        and results["protocol"]["num_reference"] == 1797
    )
    assert results["protocol"]["reference_sha256"] == sha256(tmp_path / "real.npz")


def test_results_held_against_other_images_of_the_same_data_module_class_have_another_protocol(
    whole,
):
    class Fewer(DigitsDataModule):
        def reference_images(self):
            images, labels = super().reference_images()
            return images.flip(0), labels.flip(0)

    other = evaluate().protocol(replace(inputs(), data=Fewer()))
    assert [key for key in other if other[key] != whole[1]["protocol"][key]] == ["reference_sha256"]


def test_processes_that_would_keep_their_numbers_to_themselves_are_refused():
    trainer = partial(
        Trainer,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(
        ValueError,
        match="evaluate.trainer.strategy is 'ddp_spawn'.*do not return their metrics. Give strategy=ddp",
    ):
        evaluate(trainer=trainer).check(inputs())


@pytest.mark.parametrize(("batch_size", "num_batches"), [(5, 5), (23, 1)])
def test_the_progress_bar_says_images_per_second_and_time_left(
    batch_size, num_batches, tmp_path, capsys
):
    trainer = partial(
        Trainer,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[SamplingProgressBar()],
    )
    run(tmp_path, trainer=trainer, batch_size=batch_size)
    said = capsys.readouterr().out
    assert re.search(
        rf"Sampling .*{num_batches}/{num_batches} .*0:00:0\d • 0:00:00 [\d.e+]*[1-9][\d.e+]* images/s",
        said,
    ), said


def test_half_precision_samples_are_near_those_of_full_precision(whole, tmp_path):
    run(tmp_path, precision="bfloat16", write_npz=True)
    difference = np.abs(images(tmp_path).astype(int) - images(whole[0]))
    assert 0 < difference.max() and difference.mean() < 12


@pytest.mark.slow
def test_a_compiled_denoiser_makes_the_same_images(whole, tmp_path):
    run(tmp_path, compile=True, write_npz=True)
    assert np.abs(images(tmp_path).astype(int) - images(whole[0])).max() <= 2


def test_random_labels_are_those_of_the_seed_however_many_samples_there_are(tmp_path):
    few, many = (
        evaluate(labels="random", num_samples=n).get_labels(
            evaluate().sampler(denoiser(), inputs()), inputs()
        )
        for n in (10, 23)
    )
    assert torch.equal(few, many[:10]) and len(many.unique()) > 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"num_samples": 3, "num_shown": 1},
            "'precision_recall' needs 4 or more samples, got 3",
        ),
        ({"labels": "sorted"}, "labels is 'sorted'; give one of 'balanced', 'random'"),
        ({"precision": "int8"}, "precision is 'int8'; give one of 'float32'"),
        ({"models": {"a/b": "x"}}, "not a valid name"),
        ({"models": {"mine": "missing.pt"}}, "no checkpoint at missing.pt"),
        ({"reference": "missing.npz"}, "There is no file missing.npz"),
        ({"sampling": {"num_sampling_steps": 0}}, "num_sampling_steps"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_sampled(settings, said):
    with pytest.raises((ValueError, ArtifactError), match=said):
        evaluate(**settings).check(inputs())


def test_a_reference_of_another_network_or_with_too_little_is_refused_before_anything_is_sampled(
    tmp_path,
):
    mean, covariance = torch.zeros(5), torch.eye(5)
    Reference(path=tmp_path / "other.npz", statistics={"features": (mean, covariance)}).write()
    Reference(
        path=tmp_path / "named.npz",
        statistics={"features": (mean, covariance)},
        network="SomeNet-0123",
    ).write()
    fid = {"fid": FrechetDistance(64)}
    for name, metrics, said in (
        ("other", fid, r"shapes \(5,\).*64 values.*this feature network"),
        ("named", fid, "made with the feature network SomeNet-0123"),
        ("other", {"pr": PrecisionRecall(64)}, "but 'pr' needs images"),
    ):
        task = evaluate(
            metrics=GenerationMetrics(load_digits_classifier(), metrics=metrics),
            reference=str(tmp_path / f"{name}.npz"),
        )
        with pytest.raises(ValueError, match=said):
            task.check(inputs())


def test_samples_that_are_not_finite_are_counted_and_named(tmp_path):
    broken = denoiser()
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[1] = float("nan")  # every tenth sample
    with pytest.raises(
        ValueError, match=r"1 of 5 samples contain NaN or infinity \(numbers \[1\]\)"
    ):
        run(tmp_path, inputs(broken))


def test_reference_statistics_are_read_back_as_they_were(tmp_path):
    real = DigitsDataModule().reference_images()[0][:50]
    metrics = GenerationMetrics(load_digits_classifier())
    metrics.update_reference(real)
    Reference(
        path=tmp_path / "r.npz",
        statistics=metrics.statistics(),
        network=metrics.fingerprint(),
        num_images=50,
    ).write()
    found = read_reference(tmp_path / "r.npz")
    assert found.network == metrics.fingerprint() and found.num_images == 50
    for of, (mean, covariance) in metrics.statistics().items():
        assert torch.equal(found.statistics[of][0], mean) and torch.equal(
            found.statistics[of][1], covariance
        )
