import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tinyfusion_pl import DistillationCallback
from tinyfusion_pl.distill import HiddenStates, feature_loss
from tinyfusion_pl.pruning import Decision, GroupDecision, StackDecision

PAIRS = {"blocks": [(0, 1), (1, 3)]}


class Net(nn.Module):
    def __init__(self, depth, checkpointed=None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))
        self.checkpointed, self.num_calls = checkpointed, 0

    def forward(self, x, *, scale=1.0):
        self.num_calls += torch._C._current_graph_task_id() == -1
        for block in self.blocks:
            x = x + (
                block(x)
                if self.checkpointed is None
                else checkpoint(block, x, use_reentrant=self.checkpointed)
            )
        return {"sample": x * scale}


class Module(LightningModule):
    def __init__(self, net, calls=1, manual=False, whole=False):
        super().__init__()
        self.transformer, self.calls, self.automatic_optimization = net, calls, not manual
        self.whole, self.seen, self.grads = whole, [], []

    def training_step(self, batch, batch_idx):
        callback = self.trainer.callbacks[0]
        self.seen.append(callback._loss.feature_weight(*callback._progress(self.trainer)))
        with torch.no_grad():
            self.transformer(batch)
        outs = [
            checkpoint(
                lambda b: self.transformer(b, scale=2.0)["sample"], batch, use_reentrant=False
            )
            if self.whole
            else self.transformer(batch + i, scale=2.0)["sample"]
            for i in range(self.calls)
        ]
        loss = sum(out.square().mean() for out in outs)
        if self.automatic_optimization:
            return {"loss": loss, "other": 1}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.keep()
        optimizer.step()

    def keep(self):
        self.grads.append([p.grad.clone() for p in self.transformer.parameters()])

    def on_before_optimizer_step(self, optimizer):
        if self.automatic_optimization:
            self.keep()

    def validation_step(self, batch, batch_idx):
        self.transformer(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.transformer.parameters(), lr=0.1)


def data(n=4):
    return DataLoader(
        torch.randn(n * 2, 3, 4, generator=torch.Generator().manual_seed(0)), batch_size=2
    )


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return Net(2), Net(4)


def fit(module, callback, *, steps=4, ckpt=None, path=None, more=(), loader=None, **kwargs):
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *more],
        **kwargs,
    )
    trainer.fit(module, loader or data(), ckpt_path=ckpt)
    if path:
        trainer.save_checkpoint(path)
    return trainer


def expected_grads(student, teacher, batches, calls=1, feature_weight=1e-2):
    student, total = copy.deepcopy(student), 0
    for batch in batches:
        data_loss, kd, feature = 0, 0, 0
        for i in range(calls):
            sides = []
            for net in (student, teacher):
                x, states = batch + i, []
                for block in net.blocks:
                    states.append(block(x))
                    x = x + states[-1]
                sides.append((2 * x, states))
            (ours, mine), (theirs, its) = sides
            data_loss = data_loss + ours.square().mean()
            kd = kd + (ours - theirs.detach()).square().mean() / calls
            feature = (
                feature
                + sum(feature_loss(mine[s], its[t].detach()).mean() for s, t in PAIRS["blocks"])
                / 2
                / calls
            )
        total = total + (0.1 * data_loss + 0.9 * kd + feature_weight * feature) / len(batches)
    return torch.autograd.grad(total, list(student.parameters()))


@pytest.mark.parametrize(
    "kwargs, net_kwargs, calls, accumulate",
    [
        ({}, {}, 1, 1),
        ({}, {}, 2, 1),
        ({"manual": True}, {}, 2, 1),
        ({}, {}, 1, 2),
        ({}, {"checkpointed": False}, 1, 1),
        ({"whole": True}, {}, 1, 1),
    ],
    ids=[
        "plain",
        "two-calls",
        "manual",
        "accumulated",
        "blocks-checkpointed",
        "model-checkpointed",
    ],
)
def test_gradients_are_those_of_the_loss_by_hand(nets, kwargs, net_kwargs, calls, accumulate):
    student, teacher = nets
    student.checkpointed = net_kwargs.get("checkpointed")
    before = copy.deepcopy(student)
    module = Module(student, calls=calls, **kwargs)
    fit(module, DistillationCallback(teacher, pairs=PAIRS), accumulate_grad_batches=accumulate)
    expected = expected_grads(before, teacher, list(data())[:accumulate], calls)
    for ours, theirs in zip(module.grads[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (
        teacher.num_calls == 4 * calls * accumulate
    )  # neither for calls without a graph nor for recomputations


def test_nothing_is_left_behind(nets):
    module = Module(nets[0])
    trainer = fit(module, DistillationCallback(nets[1], pairs=PAIRS), limit_val_batches=0)
    assert "training_step" not in module.__dict__ and not module.transformer._forward_hooks
    assert {"train/loss_kd", "train/loss_data"} <= trainer.logged_metrics.keys()
    assert set(module.state_dict()) == {f"transformer.{name}" for name in nets[0].state_dict()}


def test_resuming_is_bit_equal_and_the_weight_goes_on(nets, tmp_path):
    student, teacher = nets
    whole, half, rest = (Module(copy.deepcopy(student)) for _ in range(3))
    make = lambda: DistillationCallback(teacher, pairs=PAIRS, anneal_steps=8)  # noqa: E731
    fit(whole, make(), loader=data(1), steps=8)
    fit(half, make(), loader=data(1), steps=4, path=tmp_path / "c.ckpt")
    fit(rest, make(), loader=data(1), steps=8, ckpt=tmp_path / "c.ckpt")
    assert half.seen + rest.seen == whole.seen and whole.seen[-1] == 0
    for ours, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weight_averaging_beside_it_copies_no_teacher(nets):
    student, teacher = nets
    module, average = Module(student), EMAWeightAveraging(decay=0.5)
    fit(module, DistillationCallback(teacher, pairs=PAIRS), more=[average])
    assert teacher.num_calls == 4 and not module.transformer._forward_hooks


def test_a_bf16_teacher_that_is_offloaded(nets):
    student, teacher = nets
    module = Module(student)
    fit(module, DistillationCallback(teacher.bfloat16(), pairs=PAIRS, offload=True))
    assert len(module.grads) == 4 and all(
        g.isfinite().all() for grads in module.grads for g in grads
    )


class LabelEmbedding(nn.Module):
    dropout_prob = 0.1


@pytest.mark.parametrize(
    "case, message",
    [
        ("path", "no submodule 'unet'. It has: transformer"),
        ("pairs", r"\[0, 9\] of 'blocks' does not fit"),
        ("same", "shares parameters"),
        ("uncalled", "did not call 'other'"),
        ("shape", "student returns floating-point tensors"),
        ("reentrant", "use_reentrant=False"),
        ("label", "dropout_prob=0.1"),
    ],
)
def test_mistakes_are_reported(nets, case, message):
    student, teacher = nets
    module, kwargs = Module(student), {"pairs": PAIRS}
    if case == "path":
        kwargs["module"] = "unet"
    elif case == "pairs":
        kwargs["pairs"] = {"blocks": [(0, 9)]}
    elif case == "same":
        teacher, kwargs["pairs"] = student, {"blocks": [(0, 0)]}
    elif case == "uncalled":
        module.other, kwargs["module"] = Net(2), "other"
    elif case == "shape":
        teacher.register_forward_hook(lambda m, a, out: out["sample"][:1])
    elif case == "reentrant":
        student.checkpointed = True
    else:
        student.embed = LabelEmbedding()
    with pytest.raises(ValueError, match=message):
        fit(module, DistillationCallback(teacher, **kwargs))
    assert "training_step" not in module.__dict__


def test_both_streams_of_flux_are_collected():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
    )
    with torch.no_grad(), HiddenStates(model, "transformer_blocks", [0]) as hidden:
        model(
            hidden_states=torch.randn(2, 6, 4),
            encoder_hidden_states=torch.randn(2, 5, 12),
            pooled_projections=torch.randn(2, 10),
            timestep=torch.rand(2),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
        )
    assert [state.shape for state in hidden[0]] == [(2, 5, 16), (2, 6, 16)]


def test_a_compiled_module_gives_the_same_gradients(nets):
    student, teacher = nets
    before, module = copy.deepcopy(student), Module(student)
    module.transformer = torch.compile(student, backend="eager")
    fit(module, DistillationCallback(teacher, pairs=PAIRS), steps=2)
    for ours, theirs in zip(
        module.grads[0], expected_grads(before, teacher, list(data())[:1]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


HALF = Decision({"blocks": StackDecision("2:4", 4, [0, 2], [], [GroupDecision(0, 2, 4, [0, 2])])})


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


class ResidualNet(Net):
    def __init__(self, depth):
        super().__init__(0)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))

    def forward(self, x, *, scale=1.0):
        for block in self.blocks:
            x = block(x)
        return {"sample": x * scale}


def interval_by_hand(student, teacher, x):
    """Blocks 0 and 2 stand for 0, 1 and 2, 3."""
    errors = []
    for i in (0, 1):
        target = teacher.blocks[2 * i + 1](teacher.blocks[2 * i](x)).detach()
        errors.append(
            (student.blocks[i](x) - target).square().mean((1, 2)) / target.square().mean((1, 2))
        )
        x = target
    return torch.stack(errors).mean()


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("share", [0.5, None], ids=["first", "beside"])
def test_intervals_come_first_or_beside_the_other_terms(share, manual):
    torch.manual_seed(0)
    student, teacher = ResidualNet(2), ResidualNet(4)
    before, batch = copy.deepcopy(student), next(iter(data()))
    module = Module(student, manual=manual)
    callback = DistillationCallback(
        teacher, decision=HALF, weight_feature=0.0, weight_interval=2.0, interval_share=share
    )
    trainer = fit(module, callback, steps=2)
    ours, theirs = before(batch, scale=2.0)["sample"], teacher(batch, scale=2.0)["sample"]
    expected = 2 * interval_by_hand(before, teacher, batch)
    if share is None:
        expected = (
            expected + 0.1 * ours.square().mean() + 0.9 * (ours - theirs.detach()).square().mean()
        )
    for mine, by_hand in zip(
        module.grads[0], torch.autograd.grad(expected, list(before.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, by_hand)
    assert "train/loss_kd" in trainer.logged_metrics and not any(
        block._forward_pre_hooks for block in teacher.blocks
    )


def test_intervals_need_a_decision_an_end_and_blocks_in_a_row(nets):
    with pytest.raises(ValueError, match="needs the decision"):
        DistillationCallback(nets[1], pairs=PAIRS, weight_interval=1.0)
    settings = {"decision": HALF, "weight_feature": 0.0, "weight_interval": 1.0}
    with pytest.raises(ValueError, match="no end"):
        fit(
            Module(nets[0]), DistillationCallback(nets[1], **settings, interval_share=0.5), steps=-1
        )
    with pytest.raises(
        ValueError, match="What block 1 of the teacher's 'blocks' returns is not what block 2 takes"
    ):
        fit(Module(nets[0]), DistillationCallback(nets[1], **settings))
