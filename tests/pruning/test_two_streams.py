"""Masks are a function of the batch, proved on a two-stream block as diffusers writes it: text as long as the image, returned first."""

import copy

import pytest
import torch
from torch import nn

from callbacks.test_lifecycle import fit
from callbacks.toy_module import Base
from pruning.toys import TwoStreamBlock, TwoStreamToy
from tinyfusion_pl.callbacks import DepthPruningCallback
from tinyfusion_pl.pruning import DepthGates, remove_gates, verify
from tinyfusion_pl.pruning.pruner import DepthPruner


def batch(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, generator=g), torch.randn(n, 6, generator=g)


def gated(mode="plain", **kwargs):
    torch.manual_seed(0)
    model = TwoStreamToy(mode=mode, dropout=kwargs.pop("dropout", 0.0))
    return model, DepthGates(model, "1:2", init=0.0, **kwargs)


def masks_of(gates, n):
    """By torch's own arithmetic, from the hard choice that was drawn."""
    with torch.no_grad():
        hard = torch.stack([gates.masks.column(gates.stacks[0], i, n) for i in range(4)], 1)
    soft, drawn = [], gates.masks._drawn["transformer_blocks", n].noise
    for logits, distribution, noise in zip(gates.logits(), gates.stacks[0].distributions, drawn):
        soft.append(
            ((distribution.scaling * logits + noise) / gates.tau).softmax(-1)
            @ distribution.candidates
        )
    soft = torch.cat(soft, 1)
    return hard + soft - soft.detach()


def by_hand(model, masks, x, temb):
    image, text, rotary = (
        model.inp(x),
        model.inp(x.flip(1)),
        torch.linspace(0.5, 1.5, x.shape[1])[:, None],
    )
    for i, block in enumerate(model.transformer_blocks):
        m = masks[:, i].view(-1, 1, 1)
        new_text, new_image = block(image, text, temb, rotary)
        text, image = m * new_text + (1 - m) * text, m * new_image + (1 - m) * image
    return model.head(image + 0.5 * text.mean(1, keepdim=True))


def gradients(model, gates, loss):
    named = [*model.parameters(), *gates.logits()]
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(named, torch.autograd.grad(loss, named, allow_unused=True))
    ]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mode", ["plain", "checkpoint"])
@pytest.mark.parametrize("n", [2, 3, 5])  # 3: as many samples as tokens
def test_every_gradient_is_that_of_the_formula_on_both_streams(mode, gather, n):
    model, gates = gated(mode, gather=gather)
    x, temb = batch(n)
    loss = model(x, temb).square().mean()
    ours, masks = gradients(model, gates, loss), masks_of(gates, n)
    assert all(plan.streams.names == ["encoder_hidden_states", "hidden_states"] for gated in gates.gated_forwards
               for plan in gated.plans.values())  # fmt: skip
    remove_gates(model)
    expected = by_hand(model, masks, x, temb).square().mean()
    torch.testing.assert_close(loss, expected)
    assert_close(ours, gradients(model, gates, expected))


@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint-reentrant"])
def test_checkpointed_blocks_with_dropout_have_the_gradients_of_plain_ones(mode):
    results = []
    for each in ("plain", mode):
        model, gates = gated(each, dropout=0.5)
        x, temb = batch()
        x.requires_grad_()
        generator = torch.Generator().manual_seed(3)
        gates.fix_noise(
            {
                "transformer_blocks": [
                    d.noise(5, generator=generator) for d in gates.stacks[0].distributions
                ]
            }
        )
        model(*batch(seed=9))  # the first call learns the block's batch axes
        torch.manual_seed(1)
        model(x, temb).square().mean().backward()
        results.append([p.grad for p in (*model.parameters(), *gates.logits(), x)])
    assert_close(*results)


def test_other_batch_sizes_in_a_step_neither_change_masks_nor_the_random_state():
    model, gates = gated()
    x, temb = batch()
    first = model(x, temb)
    averaged = copy.deepcopy(nn.ModuleDict({"model": model, "gates": gates}))["model"]
    state = torch.get_rng_state()
    with torch.no_grad():
        averaged(*batch(7))  # an EMA copy
        model(*batch(2))
    model(torch.cat([x, x]), torch.cat([temb, temb]))  # guidance: with and without conditioning
    model.eval()
    model(*batch(3))  # validation
    model.train()
    assert torch.equal(model(x, temb), first) and torch.equal(torch.get_rng_state(), state)
    gates.redraw()
    assert not torch.equal(model(x, temb), first)


class PassesOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = TwoStreamBlock()

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


class Renames(PassesOn):
    def forward(self, image, encoder_hidden_states, temb, image_rotary_emb):
        return self.block(
            image, encoder_hidden_states, temb=temb, image_rotary_emb=image_rotary_emb
        )


@pytest.mark.parametrize(("wrapper", "names"), [
    (PassesOn, ["encoder_hidden_states", "args[0]"]), (Renames, ["encoder_hidden_states", "image"]),
])  # fmt: skip
def test_a_block_that_returns_what_another_returns_is_read_as_that_one(wrapper, names):
    torch.manual_seed(0)
    model = TwoStreamToy()
    model.transformer_blocks = nn.ModuleList(wrapper() for _ in range(4))
    gates = DepthGates(model, "1:2")
    verify(model, gates, batch(), {})
    assert all(
        plan.streams.names == names
        for gated in gates.gated_forwards
        for plan in gated.plans.values()
    )


def test_streams_that_cannot_be_told_are_refused_with_the_stack_and_arguments_to_name():
    class Unnamed(TwoStreamBlock):
        def forward(self, hidden_states, encoder_hidden_states, temb=None, image_rotary_emb=None):
            both = super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
            return both

    model = TwoStreamToy()
    model.transformer_blocks = nn.ModuleList(Unnamed() for _ in range(4))
    remedy = r"streams=\{'transformer_blocks': \['hidden_states', 'encoder_hidden_states'\]\}"
    with pytest.raises(
        ValueError, match=f"transformer_blocks.0: cannot tell which outputs .* {remedy}"
    ):
        verify(model, DepthGates(model, "1:2"), batch(), {})


def test_one_block_run_several_times_is_refused():
    model = TwoStreamToy()
    model.transformer_blocks = nn.ModuleList([model.transformer_blocks[0]] * 4)
    with pytest.raises(ValueError, match="'transformer_blocks' runs one block several times"):
        DepthPruner("1:2").start(model)


class Step(Base):
    """Runs the model twice on the batch, and once on a part of it in between."""

    def __init__(self, *, manual=False, mode="plain"):
        super().__init__(optimizers_kind="plain")
        self.model, self.automatic_optimization, self.outputs, self.masks = (
            TwoStreamToy(mode=mode),
            not manual,
            [],
            [],
        )

    def training_step(self, batch, batch_idx):
        x, temb = batch[0].unsqueeze(1).repeat(1, 3, 2), batch[0].repeat(1, 2)
        first = self.model(x, temb)
        with torch.no_grad():
            self.model(x[:3], temb[:3])
        second = self.model(x, temb)
        self.outputs.append(bool(torch.equal(first, second)))
        gates = self.depth_gates
        self.masks.append(
            torch.stack(
                [gates.masks.column(gates.stacks[0], i, len(x)).detach() for i in range(4)], 1
            )
        )
        loss = (first + second).square().mean()
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.model(batch[0].unsqueeze(1).repeat(1, 3, 2), batch[0].repeat(1, 2))

    def val_dataloader(self):
        return self.train_dataloader()


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "checkpoint-reentrant"])
@pytest.mark.parametrize("manual", [False, True])
def test_a_training_step_keeps_its_masks_and_the_next_draws_new_ones(manual, mode, tmp_path):
    module = Step(manual=manual, mode=mode)
    callback = DepthPruningCallback("1:2", weight_update="full", init=0.0)
    fit(module, callback, folder=tmp_path, max_steps=4, val_check_interval=2, limit_val_batches=1,
        accumulate_grad_batches=1 if manual else 2)  # fmt: skip
    assert module.outputs and all(module.outputs)
    assert all(not torch.equal(a, b) for a, b in zip(module.masks, module.masks[1:]))
    assert (
        any(p.abs().max() > 0 for p in callback.gates.logits())
        and len(callback.shallow_model.transformer_blocks) == 2
    )


def test_it_is_verified_and_compiled_it_is_the_same(tmp_path):
    model, gates = gated()
    verify(model, gates, batch(), {})
    y = model(*batch())
    blocks = list(model.transformer_blocks)
    for block in blocks:
        block.compile(backend="eager")
    gates.see_through(model)
    torch.testing.assert_close(model(*batch()), y)
