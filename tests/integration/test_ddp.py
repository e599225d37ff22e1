"""Two real processes (gloo, ``strategy="ddp"``, which wants a gradient for every parameter): what must differ by rank and what must not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_on_two_processes.py")


def train(case, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, str(SCRIPT), case, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return folder, train("full", folder)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["masks", "t", "noise", "x_t", "y"])
def test_what_is_drawn_differs_by_rank(full, name):
    first, second = (rank[name] for rank in full[1])
    assert len(first) == len(second) >= 3
    assert not same(first, second)


def test_logits_weights_and_decision_are_alike_on_all_ranks(full):
    first, second = full[1]
    assert all(same(a, b) for a, b in zip(first["logits"], second["logits"], strict=True))
    assert not same(first["logits"][0], first["logits"][-1])
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert same(a.values(), b.values())
    assert first["kept_blocks"] == second["kept_blocks"]
    assert same(first["shallow"].values(), second["shallow"].values())


def test_files_are_written_once(full):
    folder, _ = full
    steps = [json.loads(line)["step"] for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in (folder / "shallow").iterdir()) == ["model.safetensors", "record.json"]


def test_blocks_that_all_samples_drop_do_not_stop_plain_ddp(tmp_path):
    first, second = train("saturated", tmp_path)
    assert all(mask.unique(dim=0).shape[0] == 1 for mask in first["masks"])  # saturated: every sample has the same mask
    dropped = [i for i in range(4) if i not in first["kept_blocks"]["blocks"]]
    for key in first["weights"][0]:
        if any(key.startswith(f"blocks.{i}.") for i in dropped):
            assert torch.equal(first["weights"][0][key], first["weights"][-1][key])  # zero gradients, no weight decay: unmoved
    assert any(not torch.equal(first["weights"][0][k], first["weights"][-1][k]) for k in first["weights"][0])
    assert all(same(a.values(), b.values()) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_lora_runs_and_the_original_weights_come_back(tmp_path):
    first, second = train("lora", tmp_path)
    assert same(first["shallow"].values(), second["shallow"].values())
    assert not any("lora" in key for key in first["shallow"])


@pytest.mark.slow
def test_a_nan_on_one_rank_skips_the_step_on_both(tmp_path):
    first, second = train("nan", tmp_path)
    assert first["num_skipped"] == second["num_skipped"] == 1
    assert all(torch.isfinite(v).all() for v in first["weights"][-1].values())
    assert same(first["logits"][-1], second["logits"][-1]) and all(torch.isfinite(x).all() for x in first["logits"][-1])


@pytest.mark.slow
def test_recovery_draws_by_rank_and_keeps_the_teacher_out(tmp_path):
    first, second = train("recovery", tmp_path)
    assert not same(first["noise"], second["noise"])
    assert all(same(a.values(), b.values()) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert not first["teacher_in_state_dict"]


@pytest.mark.slow
def test_passes_of_a_step_share_masks_by_size(tmp_path):
    for rank in train("direct", tmp_path):
        assert "error" not in rank and len(rank["equal"]) == 3 and all(rank["equal"])


def test_two_streams_draw_by_rank_and_learn_alike(tmp_path):
    first, second = train("two_streams", tmp_path)
    assert len(first["masks"]) == 3 and not same(first["masks"], second["masks"])
    assert same(first["logits"], second["logits"]) and not torch.equal(first["logits"][0], first["logits"][-1])


@pytest.mark.slow
def test_reentrant_checkpointing_is_refused_with_the_remedy(tmp_path):
    for rank in train("reentrant", tmp_path):
        assert "Reentrant activation checkpointing" in rank["error"] and "use_reentrant=False" in rank["error"]
