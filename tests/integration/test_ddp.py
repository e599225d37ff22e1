"""Two real processes (gloo), started once for all fits: what must differ by rank and what must not, and that two processes of b samples
learn what one of 2b does, whether the weights are whole (``ddp``, which wants a gradient for every
parameter) or shared out (``fsdp2``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration.same_noise import CASES, RESUMED, SHARDED, on_one_process
from tinyfusion_pl.models import load_checkpoint

SCRIPT = Path(__file__).with_name("on_two_processes.py")
EXACT = {"rtol": 1e-8, "atol": 1e-8}  # in float64


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ranks_of(runs, case):
    return [torch.load(runs / case / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["masks", "t", "noise", "x_t", "y"])
def test_what_is_drawn_differs_by_rank(runs, name):
    first, second = (rank[name] for rank in ranks_of(runs, "full"))
    assert len(first) == len(second) >= 3
    assert not same(first, second)


def test_logits_weights_and_decision_are_alike_on_all_ranks(runs):
    first, second = ranks_of(runs, "full")
    assert all(same(a, b) for a, b in zip(first["logits"], second["logits"], strict=True))
    assert not same(first["logits"][0], first["logits"][-1])
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert same(a.values(), b.values())
    assert first["kept_blocks"] == second["kept_blocks"]
    assert same(first["shallow"].values(), second["shallow"].values())


def test_files_are_written_once(runs):
    steps = [
        json.loads(line)["step"]
        for line in (runs / "full" / "decisions.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in (runs / "full" / "shallow").iterdir()) == [
        "model.safetensors",
        "record.json",
    ]


def test_blocks_that_all_samples_drop_do_not_stop_plain_ddp(runs):
    first, second = ranks_of(runs, "saturated")
    assert all(
        mask.unique(dim=0).shape[0] == 1 for mask in first["masks"]
    )  # saturated: every sample has the same mask
    dropped = [i for i in range(4) if i not in first["kept_blocks"]["blocks"]]
    for key in first["weights"][0]:
        if any(key.startswith(f"blocks.{i}.") for i in dropped):
            assert torch.equal(
                first["weights"][0][key], first["weights"][-1][key]
            )  # zero gradients, no weight decay: unmoved
    assert any(
        not torch.equal(first["weights"][0][k], first["weights"][-1][k])
        for k in first["weights"][0]
    )
    assert all(
        same(a.values(), b.values())
        for a, b in zip(first["weights"], second["weights"], strict=True)
    )


def test_lora_runs_and_the_original_weights_come_back(runs):
    first, second = ranks_of(runs, "lora")
    assert same(first["shallow"].values(), second["shallow"].values())
    assert not any("lora" in key for key in first["shallow"])


def test_a_nan_on_one_rank_skips_the_step_on_both(runs):
    first, second = ranks_of(runs, "nan")
    assert first["num_skipped"] == second["num_skipped"] == 1
    assert all(torch.isfinite(v).all() for v in first["weights"][-1].values())
    assert same(first["logits"][-1], second["logits"][-1]) and all(
        torch.isfinite(x).all() for x in first["logits"][-1]
    )


def test_recovery_draws_by_rank_and_keeps_the_teacher_out(runs):
    first, second = ranks_of(runs, "recovery")
    assert not same(first["noise"], second["noise"])
    assert all(
        same(a.values(), b.values())
        for a, b in zip(first["weights"], second["weights"], strict=True)
    )
    assert not first["teacher_in_state_dict"]


def test_passes_of_a_step_share_masks_by_size(runs):
    for rank in ranks_of(runs, "direct"):
        assert "error" not in rank and len(rank["equal"]) == 3 and all(rank["equal"])


def test_two_streams_draw_by_rank_and_learn_alike(runs):
    first, second = ranks_of(runs, "two_streams")
    assert len(first["masks"]) == 3 and not same(first["masks"], second["masks"])
    assert same(first["logits"], second["logits"]) and not torch.equal(
        first["logits"][0], first["logits"][-1]
    )


def test_reentrant_checkpointing_is_refused_with_the_remedy(runs):
    for rank in ranks_of(runs, "reentrant"):
        assert (
            "Reentrant activation checkpointing" in rank["error"]
            and "use_reentrant=False" in rank["error"]
        )


# -- two processes of b samples, and one of 2b with the same draws

SOME = ("search-gaussian-lora", "search-gaussian-opposite", "search-interpolant-full", "search-mar-frozen", "search-uvit-full",
        "recovery-gaussian-interval", "recovery-interpolant-masked", "recovery-mar-masked")  # fmt: skip


def fast_first(cases):
    return [case if case in SOME else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", fast_first(CASES))
def test_ddp_has_the_gradients_of_one_process_of_twice_the_batch(runs, case, tmp_path):
    first, second = ranks = ranks_of(runs, case)
    for name in first["steps"][0].keys() & {
        "t",
        "noise",
        "order",
    }:  # labels: test_what_is_drawn_differs_by_rank
        assert not torch.equal(first["steps"][0][name], second["steps"][0][name])
    whole, averages = on_one_process(case, tmp_path, ranks)
    for step, gradients, after in zip(first["steps"], whole.gradients, whole.after, strict=True):
        torch.testing.assert_close(step["gradients"], gradients, **EXACT)
        torch.testing.assert_close(step["after"], after, **EXACT)
    torch.testing.assert_close(first["averages"], averages, **EXACT)
    assert first["kept"] == second["kept"]
    assert any(
        gradient.abs().max() > 1e-3
        for step in whole.gradients
        for name, gradient in step.items()
        if learned(case, name)
    )


def learned(case, name):
    """The logits where masks are learned; where all samples of a process agree for certain, they have no gradient."""
    return "logits" in name or case.startswith("recovery") or case.endswith("opposite")


@pytest.mark.parametrize("case", fast_first(SHARDED))
def test_fsdp2_learns_what_one_process_of_twice_the_batch_does(runs, case, tmp_path):
    first, second = ranks = ranks_of(runs, f"fsdp2-{case}")
    whole, averages = on_one_process(case, tmp_path, ranks, double=False)
    for step, after in zip(first["steps"], whole.after, strict=True):
        torch.testing.assert_close(step["after"], after, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first["averages"], averages, rtol=1e-6, atol=1e-6)
    assert first["kept"] == second["kept"]
    for shallow, other in zip(first["shallow"], second["shallow"], strict=True):
        assert same(shallow.values(), other.values()) and not any(
            "FSDP" in str(type(x)) for x in shallow.values()
        )


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_fsdp2_is_whole_and_resumes_bit_by_bit(runs, case):
    for rank in ranks_of(runs, f"fsdp2-{case}"):
        assert len(rank["resumed"]["steps"]) == 1
        torch.testing.assert_close(
            rank["resumed"]["steps"][0]["after"], rank["steps"][1]["after"], rtol=0, atol=0
        )
        torch.testing.assert_close(rank["resumed"]["averages"], rank["averages"], rtol=0, atol=0)
    saved = load_checkpoint(
        runs / f"fsdp2-{case}" / "step1.ckpt",
        weights="raw" if case.startswith("recovery") else "ema",
    )
    after = {
        name.removeprefix("denoiser."): p
        for name, p in rank["steps"][0]["after"].items()
        if name.startswith("denoiser.")
    }
    torch.testing.assert_close({name: saved[name] for name in after}, after, rtol=0, atol=0)
