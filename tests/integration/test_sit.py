"""SiT through the project's own training modules and command line: masks are learned, the shallow model recovers and is sampled."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl import DepthPruningCallback, MaskLearning, Recovery, cli, create_model
from tinyfusion_pl.artifacts import read_json
from tinyfusion_pl.models import SiT, load_decision, load_shallow
from tinyfusion_pl.objectives import Interpolants

TINY = {
    "input_size": 8,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}


def sit():
    torch.manual_seed(0)
    model = create_model("sit_s_2", **TINY)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


class Logits(Callback):
    """The gates' logits before the first step and after the last."""

    def on_train_start(self, trainer, pl_module):
        self.before = {
            name: p.detach().clone() for name, p in pl_module.depth_gates.named_parameters()
        }

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after = {
            name: p.detach().clone() for name, p in pl_module.depth_gates.named_parameters()
        }


def fit(module, folder, *callbacks):
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    return trainer


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_masks_are_learned_and_the_shallow_sit_recovers_from_its_teacher(prediction, tmp_path):
    objective, teacher = Interpolants(prediction=prediction), sit()
    logits = Logits()
    fit(MaskLearning(sit(), objective=objective), tmp_path, DepthPruningCallback("1:2"), logits)
    assert len(logits.before) == 2 and not any(
        torch.equal(logits.before[name], logits.after[name]) for name in logits.before
    )
    shallow, decision = load_shallow(tmp_path / "shallow"), load_decision(tmp_path / "shallow")
    assert type(shallow) is SiT and len(shallow.blocks) == 2
    for new, old in enumerate(decision.kept_blocks["blocks"]):
        assert torch.equal(shallow.blocks[new].attn.qkv.weight, teacher.blocks[old].attn.qkv.weight)

    before = shallow.blocks[0].attn.qkv.weight.clone()
    trainer = fit(
        Recovery(shallow, teacher=teacher, decision=decision, objective=objective), tmp_path
    )
    logged = trainer.callback_metrics
    assert all(
        logged[f"train/{name}"].isfinite() and logged[f"train/{name}"] > 0
        for name in ("loss_data", "loss_kd")
    )
    assert not torch.equal(shallow.blocks[0].attn.qkv.weight, before)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs the command line on the digits with a tiny SiT in a checkpoint; returns its metrics, if it went well."""
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": sit().state_dict()}, "tiny.pt")
    model = [
        "model=sit_xl_2",
        "model.name=sit_s_2",
        "model.checkpoint=tiny.pt",
        *(f"+model.{key}={value}" for key, value in TINY.items()),
    ]

    def run(*arguments, code=0):
        assert (
            cli.main(
                [
                    *model,
                    "objective=sit",
                    "run_dir=run",
                    "data.batch_size=32",
                    *arguments,
                    "+debug=default",
                ]
            )
            == code
        )
        return code or read_json(tmp_path / "run" / "metrics.json")

    return run


def test_the_whole_job_runs_on_a_sit_by_config(quick):
    results = quick("sampler@evaluate.sampling=sit_sde", "recover.fit.callbacks.ema.decay=0.5")
    assert {"teacher", "pruned", "recovered"} <= results.keys()
    assert results["protocol"]["sampler"] == "euler_maruyama" and results["recovered"]["depth"] == 2


def test_a_sampler_of_another_objective_is_told_before_anything_runs(quick, capfd):
    quick(code=1)
    said = capfd.readouterr().err
    assert "sampler is 'ddim'; give one of 'euler'" in said and "Traceback" not in said


def test_the_ode_samples_by_config(quick):
    assert quick("task=evaluate", "sampler@evaluate.sampling=sit_ode")["protocol"]["rtol"] == 1e-3


@pytest.mark.parametrize("sampler", ["dpm_solver", "unipc"])
def test_a_scheduler_of_diffusers_samples_the_shipped_teacher_by_config(sampler, tmp_path):
    assert (
        cli.main(
            [
                f"sampler@evaluate.sampling={sampler}",
                "task=evaluate",
                f"run_dir={tmp_path / 'run'}",
                "+debug=default",
            ]
        )
        == 0
    )
    protocol = read_json(tmp_path / "run" / "metrics.json")["protocol"]
    assert protocol["sampler"] == "diffusers" and protocol["scheduler"]["name"].endswith(
        "MultistepScheduler"
    )
