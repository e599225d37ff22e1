"""Mask learning by the output of the original weights, whatever is updated beside the gates."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.test_depth_pruning import trainer
from callbacks.toy_module import InInit
from modules.test_recovery import denoiser, loader
from tinyfusion_pl import DepthPruningCallback, MaskLearning
from tinyfusion_pl.objectives import GaussianDiffusion


def module():
    torch.manual_seed(3)
    return MaskLearning(
        denoiser(), objective=GaussianDiffusion(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02)
    )


class Compare(Callback):
    """The loss of each batch's masks against that by hand, with the weights as they are then."""

    def __init__(self, original):
        self.original, self.compared, self.moved = original, 0, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.depth_gates.redraw()  # the logits have stepped
        (x, y), objective = batch, GaussianDiffusion()
        torch.manual_seed(7)
        found = pl_module.losses(x, y)
        torch.manual_seed(7)
        draw = objective.draw(x)
        with torch.no_grad():
            output = pl_module.denoiser(draw.x_t, draw.t, y)
            expected = objective.distillation_losses(
                output, self.original(draw.x_t, draw.t, y), draw
            )["loss_kd"]
        torch.testing.assert_close(found["loss"], expected)
        torch.testing.assert_close(found["loss_kd"], expected)
        self.compared += 1
        teacher = pl_module._teacher.model.state_dict()
        assert all(
            torch.equal(value, teacher[name]) for name, value in self.original.state_dict().items()
        )
        own = {
            name.replace(".base_layer", ""): p for name, p in pl_module.denoiser.named_parameters()
        }
        self.moved = max(
            [
                float((p - teacher[n]).abs().max())
                for n, p in own.items()
                if n in teacher and p.requires_grad
            ],
            default=0.0,
        )


@pytest.mark.parametrize("update", ["full", "lora"])
def test_the_teacher_has_the_original_weights_while_others_train(update, tmp_path):
    learning = module()
    original = copy.deepcopy(learning.denoiser).eval()
    compare = Compare(original)
    pruning = DepthPruningCallback("1:2", weight_update=update, search_loss="teacher")
    fit = trainer(tmp_path, pruning, compare, max_steps=3)
    fit.fit(learning, loader())
    assert compare.compared == 3 and "train/loss_kd" in fit.callback_metrics
    assert (compare.moved > 1e-6) == (update == "full")
    assert not [name for name in learning.state_dict() if "teacher" in name]
    assert pruning.record()["configuration"]["search_loss"] == "teacher"


def test_a_resumed_search_has_the_original_weights_too(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer.should_stop = trainer.global_step == 2

    original = copy.deepcopy(module().denoiser).eval()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2)
    options = dict(weight_update="full", search_loss="teacher", anneal_steps=4)
    interrupted = trainer(
        tmp_path,
        DepthPruningCallback("1:2", **options),
        Stop(),
        saving,
        max_steps=4,
        enable_checkpointing=True,
    )
    interrupted.fit(module(), loader())
    compare = Compare(original)
    trainer(tmp_path, DepthPruningCallback("1:2", **options), compare, max_steps=4).fit(
        module(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert compare.compared == 2 and compare.moved > 1e-6


def test_the_data_teach_again_where_the_next_callback_says_so(tmp_path):
    learning = module()
    first = DepthPruningCallback("1:2", search_loss="teacher", weight_update="frozen")
    trainer(tmp_path / "a", first, max_steps=1).fit(learning, loader())
    first.detach(learning)
    trainer(tmp_path / "b", DepthPruningCallback("1:2", weight_update="frozen"), max_steps=1).fit(
        learning, loader()
    )
    assert learning._teacher is None


def test_a_module_whose_loss_is_its_own_is_refused(tmp_path):
    callback = DepthPruningCallback("1:2", search_loss="teacher")
    for refuse in (
        lambda: callback.check(InInit()),
        lambda: trainer(tmp_path, callback).fit(InInit()),
    ):
        with pytest.raises(
            ValueError, match="InInit computes its own loss. Use tinyfusion_pl.MaskLearning"
        ):
            refuse()
    with pytest.raises(ValueError, match="search_loss is 'dense'"):
        DepthPruningCallback("1:2", search_loss="dense")
