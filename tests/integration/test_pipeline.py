"""The main job through the command line: what one stage is given does not depend on the others, on one process or several."""

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import load_tensors
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import load_denoiser
from tinyfusion_pl.tasks import Fit, checkpoint_io

SMALL = ["run_dir=out", "pruning=learned", "+debug=default", "data.batch_size=8"]
ON_TWO = ["runtime.devices=2", "runtime.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_full_updates_train_the_weights_although_recovery_freezes_its_teacher(tmp_path):
    assert (
        cli.main(
            [*SMALL, "adapter=full", "pruning.delta_w=merge", "task.stages=[learn_mask,recover]"]
        )
        == 0
    )
    teacher = load_denoiser("dit_digits", checkpoint="shipped").state_dict()
    shallow = load_tensors(tmp_path / "out" / "shallow" / "model.safetensors")
    assert not torch.equal(shallow["x_embedder.proj.weight"], teacher["x_embedder.proj.weight"])
    assert torch.equal(shallow["pos_embed"], teacher["pos_embed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [["trainer=ddp"], ["trainer=fsdp2", "adapter=full"]], ids=["ddp", "fsdp2"]
)
def test_two_processes_run_every_stage(tmp_path, strategy):
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tinyfusion_pl", *SMALL, *ON_TWO, *strategy],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [metrics[role]["depth"] for role in ("teacher", "pruned", "recovered")] == [12, 6, 6]
    assert (tmp_path / "out" / "report.html").exists()


def test_stages_on_different_numbers_of_processes_are_refused_with_what_to_do(tmp_path, capfd):
    assert (
        cli.main(
            [*SMALL, "learn_mask.fit.trainer.devices=2", "learn_mask.fit.trainer.accelerator=cpu"]
        )
        == 1
    )
    said = capfd.readouterr().err
    assert "learn_mask 2, recover 1, evaluate 1" in said and "Set runtime.devices" in said
    assert "task=learn_mask, task=recover, task=evaluate" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one_and_the_run_goes_on_afterwards(
    tmp_path, monkeypatch, capfd
):
    steps = [*SMALL, "task=learn_mask", "learn_mask.fit.checkpoint_every_n_steps=2"]
    checkpoint, num = tmp_path / "out" / "learn_mask" / "checkpoints" / "last.ckpt", 0

    class Full:
        """A file on a disk that has room for 1000 bytes more."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:1000])
            raise OSError(28, "No space left on device")

    def opened(path, mode="r"):
        nonlocal num
        num += mode == "wb"
        return Full(open(path, mode)) if num == 2 and mode == "wb" else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "Path", type("Path", (type(checkpoint),), {"open": opened}))
        assert cli.main(steps) == 1
    said = capfd.readouterr().err
    assert (
        f"Cannot write {checkpoint}: No space left on device. Free some space" in said
        and "Traceback" not in said
    )
    assert (
        torch.load(checkpoint, weights_only=True)["global_step"] == 2
        and len(list(checkpoint.parent.iterdir())) == 1
    )
    assert cli.main(steps) == 0


def test_a_truncated_checkpoint_of_an_interrupted_stage_is_told_with_what_to_do(tmp_path, capfd):
    assert cli.main([*SMALL, "task=learn_mask"]) == 0
    checkpoint = tmp_path / "out" / "learn_mask" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    (tmp_path / "out" / "stages" / "learn_mask.json").unlink()
    assert cli.main([*SMALL, "task=learn_mask"]) == 1
    said = capfd.readouterr().err
    assert (
        "Could not read" in said
        and "last.ckpt" in said
        and "Delete it" in said
        and "Traceback" not in said
    )


@pytest.mark.filterwarnings("ignore:Step")
@pytest.mark.parametrize(
    "arguments, stage, left",
    [
        (["task=learn_mask"], "learn_mask", "shallow"),
        (["+experiment=digits_teacher"], "train", "trained"),
    ],
)
def test_a_short_fit_with_nothing_but_nan_losses_fails_and_fails_again(
    arguments, stage, left, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(
        DigitsDataModule,
        "train_set",
        lambda self: torch.utils.data.TensorDataset(
            torch.full((64, 1, 8, 8), float("nan")), torch.zeros(64, dtype=torch.long)
        ),
    )
    for _ in range(2):  # the second time from the checkpoint of the last step
        assert cli.main([*arguments, *SMALL, f"{stage}.fit.checkpoint_every_n_steps=4"]) == 1
        said = capfd.readouterr().err
        assert "All 4 optimizer steps had a non-finite loss" in said and "Traceback" not in said
        assert not (tmp_path / "out" / left).exists() and not (tmp_path / "out" / "stages").exists()


def test_a_finished_stage_leaves_no_model_of_its_own_in_memory(tmp_path, monkeypatch):
    modules, run = [], Fit.run

    def watched(self, stage, folder, module, data, **kwargs):
        gc.collect()
        alive.extend(ref() is not None for ref in modules)
        modules.append(weakref.ref(module))
        return run(self, stage, folder, module, data, **kwargs)

    alive: list[bool] = []
    monkeypatch.setattr(Fit, "run", watched)
    assert cli.main([*SMALL, "task.stages=[learn_mask,recover]"]) == 0
    assert alive == [False]
