"""`DepthPruner` and `verify` without Lightning."""

import threading
import types

import pytest
import torch
from torch import nn

from pruning.toys import Block, Toy
from tinyfusion_pl.pruning import DepthGates, remove_gates, verify
from tinyfusion_pl.pruning.gate_optimizer import GateOptimizer
from tinyfusion_pl.pruning.pruner import DepthPruner


class Staged(nn.Module):
    """Its stack lies in a part that is no whole model."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 6), Toy(4), nn.Linear(6, 2)

    def forward(self, x, c):
        return self.head(self.body(self.stem(x), c))


def train(pruner, model, *, steps=3):
    gates, updates = pruner.start(model), GateOptimizer()
    updates.start(gates)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or model.parameters(), lr=0.1
    )
    for step in range(steps):
        updates.anneal(step, steps)
        gates.redraw()
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6), torch.randn(8, 6)).square().mean().backward()
        updates.set_aside()
        optimizer.step()
        updates.step()
    return gates


@pytest.mark.parametrize("weight_update", ["lora", "full", "frozen"])
def test_the_shallow_model_is_of_the_whole_model_with_its_original_weights(weight_update):
    torch.manual_seed(0)
    model = Staged()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruner = DepthPruner("1:2", weight_update=weight_update)
    gates = train(pruner, model)
    shallow = pruner.freeze(model)
    kept = gates.decide().kept_blocks["body.blocks"]
    assert type(shallow) is Staged and len(shallow.body.blocks) == 2 and len(model.body.blocks) == 4
    for new, old in enumerate(kept):
        assert torch.equal(
            shallow.body.blocks[new].lin.weight, before[f"body.blocks.{old}.lin.weight"]
        )
    pruner.stop(model)
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


def test_a_module_that_keeps_its_last_activations_can_be_frozen():
    torch.manual_seed(0)
    model, pruner = Toy(4), DepthPruner("1:2", weight_update="full")
    for module in (*model.blocks, model.head):
        module.register_forward_hook(lambda m, args, out: m.__dict__.update(last={"out": [out]}))
    train(pruner, model)
    assert not model.head.last["out"][0].is_leaf
    assert len(pruner.freeze(model).blocks) == 2


def test_a_model_that_cannot_be_copied_is_told_before_any_training():
    model = Toy(4)
    model.guard = threading.Lock()
    with pytest.raises(
        ValueError, match="Toy cannot be copied .*lock.* the shallow model is a copy of it"
    ):
        DepthPruner("1:2").start(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_batch_statistics_keep_the_plain_formula_after_verification():
    """Verification runs the blocks in evaluation mode, where nothing couples their samples."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.BatchNorm1d(3), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.lin(self.norm(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Normed() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, x = Model(), torch.randn(8, 3, 6)
    gates = DepthGates(model, "1:2")
    verify(model, gates, (x,), {})
    assert all(block.norm.num_batches_tracked == 0 for block in model.blocks)
    masks = torch.stack([gates.masks.column(gates.stacks[0], i, 8) for i in range(4)]).detach()
    got, expected = model(x), x
    remove_gates(model)
    for block, mask in zip(model.blocks, masks):
        m = mask.view(-1, 1, 1)
        expected = m * block(expected) + (1 - m) * expected
    torch.testing.assert_close(got, expected)
    assert all(block.norm.num_batches_tracked == 2 for block in model.blocks)
    assert "4 by the plain formula (blocks.0: batch normalization" in gates.describe_batches()


class InTurn(nn.Module):
    """Blocks of two lists run in turn, as spatial and temporal ones of video models do."""

    def __init__(self):
        super().__init__()
        self.spatial, self.temporal = (nn.ModuleList(Block() for _ in range(4)) for _ in range(2))

    def forward(self, x, c):
        for spatial, temporal in zip(self.spatial, self.temporal):
            x = temporal(spatial(x, c), -c)
        return x


def test_stacks_that_run_in_turn_are_refused_each_by_itself_and_accepted_joined():
    torch.manual_seed(0)
    model, call = InTurn(), (torch.randn(3, 3, 6), torch.randn(3, 6))
    gates = DepthGates(model, "1:2")
    assert [g.path for g in gates.stacks] == ["spatial", "temporal"]
    with pytest.raises(
        ValueError,
        match=r"'spatial' and 'temporal' cannot .* another order.*stacks='spatial\+temporal', units=\[\[0, 4\]",
    ):
        verify(model, gates, call, {})
    remove_gates(model)
    verify(
        model,
        DepthGates(model, "1:2", stacks="spatial+temporal", units=[[i, i + 4] for i in range(4)]),
        call,
        {},
    )


def test_a_last_block_that_is_called_unlike_the_others_is_found():
    class Model(Toy):
        def forward(self, x, c):
            for i, block in enumerate(self.blocks):
                x = block(x, c if i < len(self.blocks) - 1 else torch.ones_like(c))
            return x

    torch.manual_seed(0)
    model = Model()
    with pytest.raises(
        ValueError, match="block 3 dropped by gates .* the argument 'c' of block blocks.2 depends"
    ):
        verify(model, DepthGates(model, "1:2"), (torch.randn(3, 3, 6), torch.randn(3, 6)), {})


class Rows(nn.Module):
    """Runs its blocks on another batch than it is given: samples packed into one, or each frame as a sample."""

    def __init__(self, *, mix):
        super().__init__()
        self.mix, self.blocks = (
            mix,
            nn.ModuleList(nn.ModuleList([nn.Linear(6, 6)]) for _ in range(4)),
        )
        for block in self.blocks:
            block.forward = types.MethodType(Rows.run, block)

    @staticmethod
    def run(block, x, whole):
        return x + block[0](x).tanh() + (x.mean(0, keepdim=True) if whole else 0)

    def forward(self, x):
        n, rows = len(x), x.flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, self.mix)
        return rows.view(n, -1, 6)


def test_packed_samples_are_refused_and_rows_that_are_no_samples_are_reported():
    torch.manual_seed(0)
    call = (torch.randn(3, 5, 6),)
    with pytest.raises(
        ValueError,
        match=r"'blocks' see 15 rows that mix, which are no samples of the call .*padded batch",
    ):
        verify(model := Rows(mix=True), DepthGates(model, "1:2", stacks="blocks"), call, {})
    model = Rows(mix=False)
    gates = DepthGates(model, "1:2", stacks="blocks")
    verify(model, gates, call, {})
    assert (
        "4 blocks gathered (a mask for each of the 15 rows that they see"
        in gates.describe_batches()
    )
