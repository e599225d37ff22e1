"""``pruning=NAME`` on the command line: every criterion ends in the same record, recovery, evaluation and report."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from integration.test_families import FAMILIES, SMALL
from tinyfusion_pl.cli import main

DEBUG = [
    "+debug=default",
    "data.batch_size=8",
    "pruning.num_samples=16",
    "evaluate.num_timing_rounds=1",
]
GLOBAL = ["pruning=global", "pruning.criterion.num_steps=3", "pruning.criterion.num_samples=4", "pruning.candidates=3",
          "pruning.num_drawn=20", "pruning.trial_steps=[1,1]", "pruning.trials={batch_size: 4, num_scored: 8}",
          "pruning.num_samples=8"]  # fmt: skip


def run(capfd, *arguments):
    code = main(list(map(str, arguments)))
    return code, capfd.readouterr()


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A whole run by a learned global choice, 4 of 12."""
    folder = tmp_path_factory.mktemp("chosen")
    assert main([*DEBUG, *GLOBAL, "pruning.keep=4", f"run_dir={folder}"]) == 0
    return folder


def test_a_criterion_ends_in_the_same_record_and_report(chosen):
    record = json.loads((chosen / "shallow" / "record.json").read_text())
    stack = record["stacks"]["blocks"]
    assert (
        len(stack["kept_blocks"]) == 4
        and stack["pattern"] == "4:12"
        and "trials" in stack["criterion"]
    )
    assert len(stack["scores"]) == 12 and sum(stack["block_probabilities"]) == pytest.approx(4)
    metrics = json.loads((chosen / "metrics.json").read_text())
    assert metrics["recovered"]["depth"] == 4
    page = (chosen / "report.html").read_text()
    assert "Chosen by <strong>global" in page and "runs of a block" in page and "ShortGPT" in page
    assert (chosen / "figures" / "scores.png").exists() and (
        chosen / "figures" / "decisions.png"
    ).exists()
    assert len((chosen / "learn_mask" / "decisions.jsonl").read_text().splitlines()) == 3


def test_the_same_command_does_nothing_twice_and_remakes_what_is_lost(chosen, tmp_path, capfd):
    folder = shutil.copytree(chosen, tmp_path / "run")
    before = (folder / "shallow" / "model.safetensors").read_bytes()
    command = [*DEBUG, *GLOBAL, "pruning.keep=4", f"run_dir={folder}"]
    code, said = run(capfd, *command)
    assert code == 0 and "learn_mask: already finished" in said.out
    shutil.rmtree(folder / "shallow")
    code, said = run(capfd, *command)
    assert code == 0 and "missing from" in said.out
    assert (folder / "shallow" / "model.safetensors").read_bytes() == before


def test_recovery_starts_from_any_shallow_model(chosen, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    shutil.copytree(chosen / "shallow", tmp_path / "run" / "shallow")
    code, said = run(capfd, *DEBUG, "pruning=first", "task=recover", f"run_dir={tmp_path / 'run'}")
    assert code == 0, said.err
    assert (tmp_path / "run" / "recovered" / "model.safetensors").exists()


def test_depth_and_width_end_in_one_record_and_report(tmp_path, capfd):
    words = [
        "+debug=default",
        "data.batch_size=8",
        "evaluate.num_timing_rounds=1",
        "pruning=ch",
        "distill=output",
        "pruning.num_samples=16",
        "pruning.num_intervals=4",
        "pruning.depth.num_samples=16",
    ]
    code, said = run(capfd, *words, f"run_dir={tmp_path}")
    assert code == 0, said.err
    records = [
        json.loads((tmp_path / name / "record.json").read_text())
        for name in ("shallow", "recovered")
    ]
    for record in records:
        stack = record["stacks"]["blocks"]
        assert (
            len(stack["kept_blocks"]) == 9 and stack["criterion"] == "shortgpt, then diff_pruning"
        )
        assert (
            record["width"] == records[0]["width"]
            and record["width"]["hidden_size"] == record["model"]["kwargs"]["hidden_size"] < 64
        )
        assert record["num_params"] == pytest.approx(927_752 * (1 - record["width"]["removed"]))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        metrics["recovered"]["width"] == records[0]["width"]["hidden_size"]
        and metrics["teacher"]["width"] == 64
    )
    assert set(metrics["speedup"]) == {"measured"}  # no ideal one by depth alone
    page = (tmp_path / "report.html").read_text()
    assert (
        "9 of 12" in page and "of 64</strong> channels" in page and "12 → 9 blocks, 64 → " in page
    )


@pytest.mark.parametrize("name", ["sit-ode", "mar", "uvit", "udit"])
@pytest.mark.filterwarnings("ignore:.*randomly initiali")
def test_every_family_is_chosen_from(name, tmp_path, capfd):
    words, kept = FAMILIES[name]
    code, said = run(
        capfd, *SMALL, *words, *GLOBAL, "pruning.keep=0.5", "task=learn_mask", f"run_dir={tmp_path}"
    )
    assert code == 0, said.err
    stacks = json.loads((tmp_path / "shallow" / "record.json").read_text())["stacks"]
    assert set(stacks) == set(kept)
    units = {path: stack["units"] for path, stack in stacks.items()}
    assert (
        sum(len(g["kept"]) for s in stacks.values() for g in s["groups"])
        == sum(map(len, units.values())) // 2
    )


@pytest.mark.parametrize("arguments, message", [
    (["pruning=oracle", "pruning.keep=4"], "pruning.keep comes to 4 of 12.*keep=6"),
    (["pruning=shortgpt", "pruning.keep=12"], "pruning.keep is 12 of the 12 units.*1 to 11"),
    (["pruning=shortgpt", "pruning.keep=0"], "pruning.keep is 0"),
    (["pruning=shortgpt", "pruning.keep=half"], "pruning.keep"),
    (["pruning=shortgpt", 'pruning.pattern="1:2"'], "set the other one to null"),
    (["pruning=shortgpt", 'pruning.pattern="1:5"', "pruning.keep=null"], "does not divide"),
    (["pruning=global", "pruning.candidates=1"], "candidates is 1: give 2 or more"),
    (["pruning=global", "pruning.trial_steps=[0]"], r"steps is \[0\]"),
    (["pruning=global", "pruning.max_rows=4"], "max_rows is 4"),
    (["pruning=global", "pruning.criterion.num_subsets=1"], "num_subsets is 1"),
    (["pruning=min_loss", "pruning.criterion.measure=fid"], "measure is 'fid'.*'distance'"),
    (["pruning=index"], "pruning.criterion.kept has no value"),
    (["pruning=index", "pruning.criterion.kept=[0,1]"], "keeps 2 of the units"),
    (["pruning=diff_pruning"], "fewer channels.*distill=output"),
    (["pruning=ch", "distill=output", "pruning.removed=0.1"], "pruning.removed asks for.*Keep more blocks"),
    (["pruning=nothing"], "nothing"),
    (["pruning=shortgpt", "pruning.tau_start=3"], "pruning.tau_start"),
])  # fmt: skip
def test_a_mistake_is_told_before_anything_is_written(arguments, message, tmp_path, capfd):
    code, said = run(capfd, *DEBUG[:2], *arguments, f"run_dir={tmp_path / 'run'}")
    assert code == 1 and not (tmp_path / "run").exists()
    import re

    assert re.search(message, said.err.replace("\n", " ")), said.err
    assert "Traceback" not in said.err


TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv_backend=c10d",
    "--rdzv_endpoint=localhost:0",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [pytest.param([], id="devices=2"), pytest.param(TORCHRUN, id="torchrun")]
)
def test_the_first_of_two_processes_chooses_for_both(tmp_path, launcher):
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    setting = [*DEBUG, "pruning=shortgpt", "pruning.keep=4"]
    command = [sys.executable, *launcher, "-m", "tinyfusion_pl", *setting, f"run_dir={tmp_path / 'run'}", "runtime.devices=2",
               "task.stages=[learn_mask,recover]", "runtime.accelerator=cpu"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (
        done.stdout.count("learn_mask: shortgpt chooses") == 1
        and "MEMBER: 2/2" in done.stdout + done.stderr
    )
    alone = main([*setting, f"run_dir={tmp_path / 'alone'}", "task=learn_mask"])
    kept = [json.loads((tmp_path / name / "shallow" / "record.json").read_text())["stacks"]["blocks"]["kept_blocks"]
            for name in ("run", "alone")]  # fmt: skip
    assert alone == 0 and kept[0] == kept[1]
    assert (tmp_path / "run" / "recovered" / "model.safetensors").exists()
