"""Training from other weights, with blocks in another order."""

import pytest
import torch

from tinyfusion_pl.cli import main
from tinyfusion_pl.models import load_pretrained
from tinyfusion_pl.tasks.train import reorder_blocks

ORDER = [6, 0, 9, 1, 7, 4, 2, 10, 3, 8, 5, 11]
ARGS = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])


def test_blocks_change_places_and_nothing_else():
    model, moved = load_pretrained("shipped"), load_pretrained("shipped")
    reorder_blocks(moved, ORDER)
    model.blocks = torch.nn.ModuleList(model.blocks[i] for i in ORDER)
    assert torch.equal(model(*ARGS), moved(*ARGS))


@pytest.mark.parametrize("order", [[0, 1], [0] * 12, [*range(1, 13)]])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match=r"each of 0..11 once"):
        reorder_blocks(load_pretrained("shipped"), order)


def test_a_recipe_starts_from_the_shipped_weights(tmp_path):
    settings = [
        "train.fit.trainer.max_steps=1",
        "train.module.scheduler.num_warmup_steps=0",
        "train.module.optimizer.lr=1e-12",
        "evaluate.num_samples=4",
        "evaluate.batch_size=4",
        "evaluate.num_shown=0",
        "evaluate.sampling.num_sampling_steps=1",
    ]
    assert main(["+experiment=digits_permuted", *settings, f"run_dir={tmp_path / 'run'}"]) == 0
    trained, expected = load_pretrained(tmp_path / "run" / "trained"), load_pretrained("shipped")
    reorder_blocks(expected, ORDER)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(trained.parameters(), expected.parameters())
    )


def test_an_order_without_weights_is_refused_before_training(tmp_path, capsys):
    assert (
        main(["+experiment=digits_deep", "train.block_order=[1,0]", f"run_dir={tmp_path / 'run'}"])
        == 1
    )
    assert "train.start_from" in capsys.readouterr().err and not (tmp_path / "run").exists()
