"""The main job, ended by a signal at any step: the same command finishes it as if nothing had happened."""

import json
import random
import signal

import pytest

from integration.killing import outcome, run
from tasks.toy_fit import same
from tinyfusion_pl.preemption import EXIT_CODE

NUM_STEPS = 7
# Real model, data and stages; only fewer and smaller steps. A checkpoint every 3 steps: SIGKILL
# loses some.
SETTINGS = [
    "pruning=learned", "+debug=default", "data.batch_size=4", "evaluate.batch_size=5", "evaluate.sampling.num_sampling_steps=2",
    "evaluate.shared.reuse=false", "recover.shared.reuse=false",
    *(f"{stage}.fit.{setting}" for stage in ("learn_mask", "recover") for setting in (
        f"trainer.max_steps={NUM_STEPS}", "trainer.log_every_n_steps=2", "checkpoint_every_n_steps=3")),
]  # fmt: skip
STAGES = "task.stages=[learn_mask,recover,evaluate]"
NUM_COUNTED = 2 * NUM_STEPS + 3 * 4  # steps of both fits, batches of three models
KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)


def command(folder, *more):
    return [f"run_dir={folder}", *SETTINGS, *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(command(folder, STAGES))[::2] == (0, NUM_COUNTED)
    return folder


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed == 0 else pytest.mark.slow) for seed in range(7)]
)
def test_a_run_ended_at_random_steps_resumes_exactly(uninterrupted, tmp_path, seed):
    """Three times each: fits save where the step ends, before or after its gradients; SIGKILL loses up to three steps."""
    draws, folder, left = random.Random(seed), tmp_path / "run", NUM_COUNTED
    for kind in draws.sample(KINDS, len(KINDS)):
        kill, after = draws.randint(1, left // 2), draws.random() < 0.5
        code, said, _ = run(command(folder, STAGES), kill=kill, signum=kind, after=after)
        if kind == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert (
                code == EXIT_CODE
                and f"Stopped by {kind.name}. Rerun the same command to resume." in said
                and "Traceback" not in said
            )
        left -= kill - (3 if kind == signal.SIGKILL else 1)  # a batch of samples is not waited for
    code, _, num_steps = run(command(folder, STAGES))
    assert code == 0 and num_steps <= left
    found, whole = outcome(folder), outcome(uninterrupted)
    assert [key for key in whole if not same(found[key], whole[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("kill", [3, NUM_STEPS + 4, 2 * NUM_STEPS + 6, NUM_COUNTED + 1])
def test_ctrl_c_in_each_stage_says_how_to_resume(uninterrupted, tmp_path, kill):
    code, said, _ = run(command(folder := tmp_path / "run"), kill=kill, signum=signal.SIGINT)
    assert code == 130 and "Rerun the same command to resume" in said and "Traceback" not in said
    assert not (folder / "report.html").exists()
    assert run(command(folder))[0] == 0
    found, whole = outcome(folder), outcome(uninterrupted)
    assert [key for key in whole if not same(found[key], whole[key])] == []
    assert all(
        role in (folder / "report.html").read_text() for role in ("teacher", "pruned", "recovered")
    )


def test_a_finished_run_is_not_run_again(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    code, said, num_steps = run(command(uninterrupted, STAGES))
    assert (code, num_steps) == (0, 0) and said.count("already finished") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_run_folder_holds_what_it_should(uninterrupted):
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    for role, depth in {"teacher": 12, "pruned": 6, "recovered": 6}.items():
        assert metrics[role]["depth"] == depth
        assert {"num_params", "fid", "inception_score", "accuracy", "images_per_second"} < metrics[
            role
        ].keys()
    assert metrics["seconds"].keys() == {"learn_mask", "recover", "evaluate"}
    assert metrics["protocol"]["seed"] == 0 and metrics["protocol"]["num_samples"] == 20
    for name in (
        "config.yaml",
        "shallow/model.safetensors",
        "recovered/model.safetensors",
        "samples.safetensors",
    ):
        assert (uninterrupted / name).stat().st_size > 0
