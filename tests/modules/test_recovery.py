"""The training modules in a real Trainer: teacher, averaged weights, feature weight, gates."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl import DepthPruningCallback, MaskLearning, Recovery, create_model
from tinyfusion_pl.callbacks import EMAWithWarmup
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.models import load_checkpoint
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives import GaussianDiffusion, ImageSampler

PAIRS = {"blocks": [[0, 1], [1, 3]]}


def denoiser(depth=4):
    model = create_model(
        "dit_digits", depth=depth, hidden_size=16, num_heads=2, input_size=4, num_classes=5
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def loader():
    g = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(32, 1, 4, 4, generator=g), torch.zeros(32, dtype=torch.long)),
        batch_size=4,
    )


def fit(module, *callbacks, max_steps=4, folder=None, **kwargs):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(module, loader())
    return trainer


class Weights(Callback):
    """The raw weights before the first and after each step, and what each step logged."""

    def __init__(self):
        self.raw, self.logged = [], []

    def on_train_start(self, trainer, pl_module):
        self.raw.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw.append(copy.deepcopy(pl_module.state_dict()))
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def recovery(**kwargs):
    settings = {
        "teacher": denoiser(),
        "distillation": Distillation(pairs=PAIRS),
        "objective": GaussianDiffusion(),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }
    return Recovery(denoiser(2), **{**settings, **kwargs})


def test_the_teacher_is_frozen_and_not_saved_trained_or_copied(tmp_path):
    module = recovery()
    before = copy.deepcopy(module.teacher.state_dict())
    trainer = fit(module, folder=tmp_path)
    assert all(
        torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items()
    )
    assert not module.teacher.training and not any(
        p.requires_grad for p in module.teacher.parameters()
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"denoiser.{name}" for name in module.denoiser.state_dict()}
    assert copy.deepcopy(module).teacher is module.teacher
    mine = {id(p) for p in module.teacher.parameters()}
    assert not mine & {
        id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]
    }


def test_fine_tuning_needs_no_teacher(tmp_path):
    module = recovery(
        teacher=None, distillation=Distillation(weight_kd=0.0, weight_data=1.0, weight_feature=0.0)
    )
    watch = Weights()
    fit(module, watch, folder=tmp_path)
    assert any(not torch.equal(watch.raw[0][k], watch.raw[-1][k]) for k in watch.raw[0])
    with pytest.raises(ValueError, match="needs a teacher"):
        recovery(teacher=None)


def test_the_feature_weight_falls_to_zero_by_step(tmp_path):
    watch = Weights()
    fit(recovery(), watch, max_steps=5, folder=tmp_path)
    for logged, weight in zip(watch.logged, [1e-2, 0.75e-2, 0.5e-2, 0.25e-2, 0.0], strict=True):
        expected = 0.1 * logged["train/loss_data"] + 0.9 * logged["train/loss_kd"]
        if weight:
            expected += weight * logged["train/loss_feature"]
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_follow_the_warm_up_and_are_saved(
    tmp_path,
):
    module, watch = (
        Denoising(
            denoiser(),
            objective=GaussianDiffusion(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ),
        Weights(),
    )

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(module, watch, Save(), EMAWithWarmup(decay=0.3), max_steps=6, folder=tmp_path)
    raw, averaged = (
        load_checkpoint(tmp_path / "last.ckpt", weights=kind) for kind in ("raw", "ema")
    )
    name = "blocks.1.mlp.fc1.weight"
    steps = [state[f"denoiser.{name}"] for state in watch.raw]
    assert torch.equal(raw[name], steps[-1])
    # The first update copies, the n-th after it has decay min(0.3, (1 + n) / (10 + n)).
    expected = steps[1].double()
    for n, weights in enumerate(steps[2:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights.double()
    torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged[name], raw[name])
    assert torch.equal(
        module.denoiser.state_dict()[name], averaged[name]
    )  # Lightning leaves the averaged ones in the module


def test_weights_can_be_frozen_while_the_gates_learn(tmp_path):
    model = denoiser()
    before = copy.deepcopy(model.state_dict())
    pruning = DepthPruningCallback("1:2", weight_update="frozen", save_dir=tmp_path / "shallow")
    trainer = fit(MaskLearning(model, objective=GaussianDiffusion()), pruning, folder=tmp_path)
    assert trainer.global_step == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any((logits != 0.02).any() for logits in pruning.gates.logits())
    assert len(pruning.shallow_model.blocks) == 2


def test_mask_learning_without_the_callback_says_what_to_add(tmp_path):
    with pytest.raises(ValueError, match="Add DepthPruningCallback"):
        fit(MaskLearning(denoiser(), objective=GaussianDiffusion()), folder=tmp_path)


def test_label_dropout_inserts_the_null_label_at_its_rate():
    module = Denoising(denoiser(), objective=GaussianDiffusion(), label_dropout=0.25)
    dropped = (module.drop_labels(torch.zeros(20_000, dtype=torch.long)) == 5).float().mean()
    assert abs(dropped - 0.25) < 0.015
    module.label_dropout = 0.0
    assert (module.drop_labels(torch.zeros(100, dtype=torch.long)) == 0).all()


def test_a_denoiser_in_evaluation_mode_learns_its_mask(tmp_path):
    module = MaskLearning(denoiser().eval(), objective=GaussianDiffusion())
    fit(module, DepthPruningCallback("1:2", weight_update="full"), folder=tmp_path)
    assert module.denoiser.training
    assert all((p != 0.02).any() for p in module.depth_gates.logits())


def test_a_denoiser_in_bfloat16_learns(tmp_path):
    module = MaskLearning(denoiser(), objective=GaussianDiffusion())
    before = module.denoiser.final_layer.linear.weight.detach().bfloat16()
    fit(
        module,
        DepthPruningCallback("1:2", weight_update="full"),
        folder=tmp_path,
        precision="bf16-true",
    )
    after = module.denoiser.final_layer.linear.weight
    assert (
        after.dtype == torch.bfloat16 and after.isfinite().all() and not torch.equal(after, before)
    )


@pytest.mark.parametrize(
    "pairs",
    [{"blocks": [[0, 99]]}, {"blocks": [[2, 3]]}, {"blocks": [[-1, 0]]}, {"layers": [[0, 0]]}],
)
def test_pairs_outside_the_stacks_are_refused_at_once(pairs):
    with pytest.raises(ValueError, match="does not fit|There is nothing at 'layers'"):
        recovery(distillation=Distillation(pairs=pairs))


def test_dropping_labels_needs_a_null_label():
    plain = create_model(
        "dit_digits", depth=2, hidden_size=16, num_heads=2, input_size=4, class_dropout_prob=0.0
    )
    with pytest.raises(
        ValueError, match="label_dropout is 0.1, but the denoiser has no null label"
    ):
        MaskLearning(plain, objective=GaussianDiffusion())
    MaskLearning(plain, objective=GaussianDiffusion(), label_dropout=0.0)
    sampler = ImageSampler(
        denoiser=plain,
        objective=GaussianDiffusion(),
        latent_shape=(1, 4, 4),
        decode=lambda x: x,
        sampling={"num_sampling_steps": 2, "guidance_scale": 1.5},
    )
    with pytest.raises(
        ValueError, match="guidance_scale is 1.5, but the denoiser has no null label"
    ):
        sampler.check()
