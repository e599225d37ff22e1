"""One training step of distillation on models of other libraries, its losses held against a computation by hand."""

import copy
from collections.abc import Mapping

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from foreign.zoo import ZOO, sample_of
from tinyfusion_pl import DistillationCallback
from tinyfusion_pl.pruning import DepthGates, get_stack, remove_blocks, remove_gates

IN_CLASSES = ["sd35", "flux2", "auraflow", "dit", "pixart", "ltx", "lumina2", "zimage", "hunyuandit", "transformer2d", "unet2d", "swin",
              "convnext", "bert", "eva02", "uvit2d", "wan_vace"]  # fmt: skip
MAIN = ["flux", "sd3", "wan", "hunyuanvideo", "cogvideox", "sana", "qwen_image", "llama", "vit", "encoder_batch_first",
        "encoder_sequence_first"]  # fmt: skip


CONFIG = {"swin": {"drop_path_rate": 0.0}}


class Module(LightningModule):
    def __init__(self, model, call):
        super().__init__()
        self.transformer, self.call, self.grads = model, call, None

    def training_step(self, batch, batch_idx):
        args, kwargs = self.call
        return sample_of(self.transformer(*args, **kwargs)).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.grads = {
            name: p.grad.clone()
            for name, p in self.transformer.named_parameters()
            if p.grad is not None
        }

    def configure_optimizers(self):
        return torch.optim.SGD(self.transformer.parameters(), lr=0.1)


def models(name, **config):
    """Teacher, a student whose weights have moved since the cut, their decision, and a call."""
    teacher, make_inputs, stacks = ZOO[name].build(**config)
    torch.manual_seed(1)
    call = make_inputs(3)
    copied = copy.deepcopy(teacher)
    sizes = {path: len(get_stack(copied, path)) for path in stacks}
    gates = DepthGates(
        copied,
        {path: "1:2" if size % 2 == 0 else f"1:{size}" for path, size in sizes.items()},
        stacks=stacks,
    )
    decision = gates.decide()
    remove_gates(copied)
    student = remove_blocks(copied, decision.kept_blocks)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return teacher, student, decision, call


def fit_one_step(student, call, callback, steps=1):
    module = Module(student, call)
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=-1,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[callback])  # fmt: skip
    trainer.fit(module.train(), DataLoader(range(steps)))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def run(model, call, stacks):
    """The sample, and the streams that each block returned, batch first: every floating-point tensor with tokens in it."""
    states, handles = {}, []
    for path in stacks:
        for i, block in enumerate(get_stack(model, path)):

            def keep(module, args, output, place=(path, i)):
                items = [output] if isinstance(output, Tensor) else list(output)
                tensors = [each if isinstance(each, Tensor) else None for each in items]
                axis = (
                    1
                    if any(getattr(m, "batch_first", True) is False for m in module.modules())
                    else 0
                )
                states[place] = [
                    each if each is None else each.movedim(axis, 0) for each in tensors
                ]

            handles.append(block.register_forward_hook(keep))
    args, kwargs = call
    output = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    outputs = list(output.values()) if isinstance(output, Mapping) else [sample_of(output)]
    return [each for each in outputs if isinstance(each, Tensor)], states


def by_hand(student, teacher, decision, call, num_sigma=2.0):
    (ours, mine), (theirs, its) = (
        run(model, call, decision.stacks) for model in (student, teacher)
    )
    of_pairs = []
    for path, stack in decision.stacks.items():
        for s, t in stack.layer_pairs():
            of_streams = []
            for a, b in zip(mine[path, s], its[path, t], strict=True):
                if a is None or b is None:
                    continue
                of_samples = []
                for x, y in zip(a, b.detach(), strict=True):
                    x_in, y_in = (
                        ((z - z.mean()).abs() < num_sigma * z.std()).float()
                        for z in (x.detach(), y)
                    )
                    of_samples.append((x * x_in - y * y_in).square().mean())
                of_streams.append(sum(of_samples) / len(of_samples))
            of_pairs.append(sum(of_streams) / len(of_streams))
    kd = [(a - b.detach()).square().mean() for a, b in zip(ours, theirs, strict=True)]
    return sum(kd) / len(kd), sum(of_pairs) / len(of_pairs), ours[0].square().mean()


@pytest.mark.parametrize(
    "name", [*MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in IN_CLASSES)]
)
def test_a_step_has_the_losses_and_gradients_by_hand(name):
    teacher, student, decision, call = models(name, **CONFIG.get(name, {}))
    before = copy.deepcopy(student).train()
    callback = DistillationCallback(teacher, decision=decision, anneal_steps=9, weight_feature=0.5)
    module, logged = fit_one_step(student, call, callback)
    kd, feature, data = by_hand(before, teacher.eval(), decision, call)
    assert kd > 0 and feature > 0
    assert logged["train/loss_kd"] == pytest.approx(float(kd), rel=1e-4)
    assert logged["train/loss_feature"] == pytest.approx(float(feature), rel=1e-4)
    assert logged["train/loss_data"] == pytest.approx(float(data), rel=1e-4)
    (0.1 * data + 0.9 * kd + 0.5 * feature).backward()
    for parameter, p in before.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            module.grads.get(parameter, torch.zeros_like(p)), expected, rtol=1e-3, atol=1e-5
        )
