"""The main job, interrupted from outside in each of its stages: the same command then finishes it as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tinyfusion_pl.artifacts import load_tensors

NUM_STEPS = 12
# Real model, data and stages; only fewer and smaller steps, each of them with a checkpoint, so that no signal comes too late.
SETTINGS = [
    "pruning=learned", "data.batch_size=8",
    "evaluate.num_samples=40", "evaluate.batch_size=4", "evaluate.num_shown=10", "evaluate.num_timing_rounds=1",
    *(f"{stage}.fit.{setting}" for stage in ("learn_mask", "recover")
      for setting in (f"trainer.max_steps={NUM_STEPS}", "checkpoint_every_n_steps=1")),
]
# In each stage, a file that appears in the middle of its work.
MARKS = {
    "learn_mask": "learn_mask/checkpoints/last.ckpt",
    "recover": "recover/checkpoints/last.ckpt",
    "evaluate": "stages/evaluate_teacher.json",
    "report": "stages/evaluate.json",
}


def command(folder):
    return [sys.executable, "-m", "tinyfusion_pl", f"run_dir={folder}", *SETTINGS]


def run(folder):
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interrupt(folder, *, stage, kind):
    """Start the job and send it `kind` when `stage` is half-way; returns exit code and stderr."""
    mark = folder / MARKS[stage]
    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background processes may have it ignored
    )
    deadline = time.monotonic() + 200
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{stage} was over before the signal was sent"
        time.sleep(0.01)
    os.killpg(process.pid, kind)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def outcome(folder):
    """All that a run computes and that does not depend on time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    numbers = {role: {k: v for k, v in metrics[role].items() if k != "images_per_second"} for role in ("teacher", "pruned", "recovered")}
    steps = [json.loads(line)["step"] for line in (folder / "learn_mask" / "decisions.jsonl").read_text().splitlines()]
    record = json.loads((folder / "shallow" / "record.json").read_text())
    return {"numbers": numbers, "decided": record["stacks"], "last_step": steps[-1]}


def weights(folder):
    return {name: {k: v.tolist() for k, v in load_tensors(folder / name / "model.safetensors").items()}
            for name in ("shallow", "recovered")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


CASES = [
    pytest.param("learn_mask", "SIGINT", marks=pytest.mark.slow),
    pytest.param("learn_mask", "SIGKILL", marks=pytest.mark.slow),
    pytest.param("recover", "SIGINT", marks=pytest.mark.slow),
    pytest.param("recover", "SIGKILL"),
    pytest.param("evaluate", "SIGINT", marks=pytest.mark.slow),
    pytest.param("evaluate", "SIGKILL", marks=pytest.mark.slow),
    pytest.param("report", "SIGKILL", marks=pytest.mark.slow),
    pytest.param("report", "SIGINT", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("stage, kind", CASES)
def test_the_same_command_finishes_an_interrupted_run_as_if_it_never_was(uninterrupted, tmp_path, stage, kind):
    folder = tmp_path / "run"
    code, errors = interrupt(folder, stage=stage, kind=getattr(signal, kind))
    if kind == "SIGINT":
        assert code == 130 and "The same command goes on" in errors and "Traceback" not in errors
    else:
        assert code == -signal.SIGKILL
    assert not (folder / "report.html").exists()
    run(folder)
    assert outcome(folder) == outcome(uninterrupted)
    assert weights(folder) == weights(uninterrupted)
    page = (folder / "report.html").read_text()
    assert all(role in page for role in ("teacher", "pruned", "recovered"))


def test_a_finished_run_is_not_run_again(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".html"
              and "figures" not in path.parts}
    assert "done before" in run(uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_run_folder_holds_what_it_should(uninterrupted):
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    for role, depth in {"teacher": 12, "pruned": 6, "recovered": 6}.items():
        assert metrics[role]["depth"] == depth
        assert {"num_params", "fid", "inception_score", "accuracy", "images_per_second"} < metrics[role].keys()
    assert metrics["seconds"].keys() == {"learn_mask", "recover", "evaluate"}
    assert metrics["protocol"]["seed"] == 0 and metrics["protocol"]["num_samples"] == 40
    for name in ("config.yaml", "report.html", "shallow/model.safetensors", "recovered/model.safetensors", "samples.safetensors"):
        assert (uninterrupted / name).stat().st_size > 0
