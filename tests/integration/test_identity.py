"""Results belong to what they were made from, and finished stages are looked at: through the real command line."""

import json
import shutil

import numpy as np
import pytest
import torch

from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import load_tensors, read_json, sha256
from tinyfusion_pl.checksums import read_sealed, write_sealed
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.models import load_denoiser
from tinyfusion_pl.tasks.kept import KeptBatches

SMALL = ["pruning=learned", "+debug=default", "data.batch_size=8", "evaluate.batch_size=5", "learn_mask.fit.checkpoint_every_n_steps=2",
         "recover.fit.checkpoint_every_n_steps=2"]  # fmt: skip


def state(scale=1.0):
    model = load_denoiser("dit_digits", checkpoint="shipped")
    return {name: value * scale for name, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capfd, tmp_path):
    """Run a command line in folder ``out``; returns its exit code and all that it said, without a traceback."""

    def command(*arguments, run_dir="out"):
        capfd.readouterr()
        code = cli.main([f"run_dir={run_dir}", *SMALL, *arguments])
        said = "".join(capfd.readouterr()).replace(f"{tmp_path}/", "")
        assert "Traceback" not in said
        return code, said

    return command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert cli.main([f"run_dir={folder}", *SMALL]) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "out")


def mine(folder):
    """What was measured of the model `mine`, without its speed."""
    return {
        key: value
        for key, value in read_json(folder / "metrics.json")["mine"].items()
        if key != "images_per_second"
    }


# -- weights that were replaced
EVALUATE = ["task=evaluate", "+evaluate.models.mine=last.pt"]


def test_an_overwritten_model_is_measured_anew(run, tmp_path):
    torch.save({"ema": state()}, "last.pt")
    assert run(*EVALUATE)[0] == 0
    first = mine(tmp_path / "out")
    torch.save({"ema": state(0.5)}, "last.pt")
    code, said = run(*EVALUATE)
    assert code == 0 and "measuring mine again: its origin has changed (weights" in said
    assert run(*EVALUATE, run_dir="fresh")[0] == 0
    assert mine(tmp_path / "out") == mine(tmp_path / "fresh") != first
    assert "already finished" in run(*EVALUATE)[1]


def test_kept_batches_of_a_replaced_model_are_not_used(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write, num = KeptBatches.write, 0

    def killed(self, *args):
        nonlocal num
        write(self, *args)
        num += 1
        if num == 3:
            raise Killed

    torch.save({"ema": state()}, "last.pt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(KeptBatches, "write", killed)
        run(*EVALUATE)
    torch.save({"ema": state(0.5)}, "last.pt")
    code, said = run(*EVALUATE)
    assert code == 0 and "3 finished batches" in said and "another origin (weights" in said
    assert run(*EVALUATE, run_dir="fresh")[0] == 0
    assert mine(tmp_path / "out") == mine(tmp_path / "fresh")


def test_a_teacher_replaced_after_mask_learning_is_refused(run, tmp_path):
    given = ["model.checkpoint=teacher.pt"]
    torch.save({"ema": state()}, "teacher.pt")
    assert run(*given, "task=learn_mask")[0] == 0
    torch.save({"ema": state(0.5)}, "teacher.pt")
    for task in ("recover", "evaluate"):
        code, said = run(*given, f"task={task}")
        assert code == 1 and "learn_mask in out has another origin" in said and "teacher" in said, (
            task
        )
    assert (
        not (tmp_path / "out" / "recover").exists()
        and not (tmp_path / "out" / "metrics.json").exists()
    )


@pytest.mark.slow
def test_a_teacher_replaced_during_mask_learning_is_refused(run, tmp_path):
    given = ["model.checkpoint=teacher.pt", "task=learn_mask"]
    torch.save({"ema": state()}, "teacher.pt")
    assert run(*given)[0] == 0
    (tmp_path / "out" / "stages" / "learn_mask.json").unlink()
    torch.save({"ema": state(0.5)}, "teacher.pt")
    code, said = run(*given)
    assert code == 1 and "last.ckpt: it has another origin (teacher" in said


# -- a shallow model of another run
def test_a_shallow_model_put_in_during_recovery_is_refused(run, out, tmp_path):
    assert run("seed=1", "task=learn_mask", run_dir="other")[0] == 0
    (out / "stages" / "recover.json").unlink()
    shutil.rmtree(out / "recovered")
    shutil.rmtree(out / "shallow")
    shutil.copytree(tmp_path / "other" / "shallow", out / "shallow")
    code, said = run("task=recover")
    assert (
        code == 1
        and f"{'out/shallow/model.safetensors'} (checksum" in said
        and not (out / "recovered").exists()
    )
    mark = (
        out / "stages" / "learn_mask.json"
    )  # whatever is done about the mark, the checkpoint knows where it started
    write_sealed(mark, {**read_sealed(mark), "files": {}})
    code, said = run("task=recover")
    assert code == 1 and "last.ckpt: it has another origin (shallow" in said


# -- what is there already is looked at
def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(bytes(content))


def truncate(path, place):
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def test_a_whole_run_is_verified_and_not_run_again(run, out):
    code, said = run()
    assert (
        code == 0
        and said.count("already finished") == 3
        and not {"damaged", "missing", "again"} & set(said.split())
    )


@pytest.mark.parametrize("task, name, damage", [
    ("pipeline", "shallow/model.safetensors", flip),
    pytest.param("learn_mask", "shallow/record.json", flip, marks=pytest.mark.slow),
    ("recover", "recovered/model.safetensors", truncate),
    pytest.param("evaluate", "recovered/record.json", flip, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_model_of_a_finished_stage_is_named(run, out, task, name, damage):
    damage(out / name, 0.6)
    code, said = run(f"task={task}")
    stage = "learn_mask" if name.startswith("shallow") else "recover"
    assert code == 1 and f"out/{name} (checksum" in said and f"rerun task={stage}" in said


def test_a_damaged_mark_of_a_training_is_named(run, out):
    flip(out / "stages" / "learn_mask.json", 0.5)
    code, said = run()
    assert code == 1 and "out/stages/learn_mask.json" in said and "Delete it" in said


@pytest.mark.parametrize(
    "name", [pytest.param("shallow", marks=pytest.mark.slow), "recovered/model.safetensors"]
)
def test_a_lost_model_is_made_again_from_the_last_checkpoint(run, out, name):
    stage = "learn_mask" if name == "shallow" else "recover"
    held = {path.relative_to(out): sha256(path) for path in out.rglob("*.safetensors")}
    shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    if name == "shallow":
        code, said = run("task=evaluate")
        assert (
            code == 0
            and "missing from out, although learn_mask was finished" in said
            and "no pruned model" in said
        )
    code, said = run("task.stages=[learn_mask,recover]")
    assert code == 0 and f"{stage}: {name}" in said and "missing from" in said
    assert {path: sha256(out / path) for path in held if path.parts[0] != "samples.safetensors"} == {
        path: checksum for path, checksum in held.items() if path.parts[0] != "samples.safetensors"}  # fmt: skip


def test_a_lost_model_without_a_checkpoint_is_an_error(run, out):
    shutil.rmtree(out / "shallow")
    shutil.rmtree(out / "learn_mask")
    code, said = run()
    assert code == 1 and "so is its last checkpoint" in said


@pytest.mark.parametrize(
    "damage", [flip, pytest.param(None, marks=pytest.mark.slow)], ids=["flipped", "lost"]
)
def test_metrics_that_are_damaged_or_lost_are_written_again(run, out, damage):
    whole = (out / "metrics.json").read_bytes()
    damage(out / "metrics.json", 0.5) if damage else (out / "metrics.json").unlink()
    code, said = run("task=evaluate")
    assert code == 0 and "metrics.json is" in said and "rewriting it from the results" in said
    assert (out / "metrics.json").read_bytes() == whole


@pytest.mark.parametrize("name", [
    "stages/evaluate_teacher.json",
    pytest.param("stages/evaluate.json", marks=pytest.mark.slow),
    pytest.param("samples.safetensors", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_result_is_made_again(run, out, name):
    before = read_json(out / "metrics.json")
    shown = {
        key: value.clone() for key, value in load_tensors(out / "samples.safetensors").items()
    }  # not the mapped file
    flip(out / name, 0.4)
    code, said = run("task=evaluate")
    assert code == 0 and f"out/{name}" in said and "measuring again" in said.lower()
    after = read_json(out / "metrics.json")
    for role in ("teacher", "pruned", "recovered"):
        assert {**after[role], "images_per_second": 0} == {**before[role], "images_per_second": 0}
    assert all(
        torch.equal(value, shown[key])
        for key, value in load_tensors(out / "samples.safetensors").items()
    )
    assert "already finished" in run("task=evaluate")[1]


def test_changed_logs_of_a_finished_stage_are_told(run, out):
    names = ("learn_mask/decisions.jsonl", "logs/learn_mask/metrics.csv")
    for name in names:
        flip(out / name, 0.5)
    said, told = run("task.stages=[learn_mask]")[1], run("task=report")[1]
    for name in names:
        assert f"out/{name} is changed or damaged since the stage finished" in said
        assert f"out/{name} is changed or damaged since learn_mask finished" in told


@pytest.mark.parametrize("stage", ["learn_mask", pytest.param("recover", marks=pytest.mark.slow)])
def test_a_stage_that_was_trained_otherwise_is_not_taken_for_finished(run, out, stage):
    """As from Python, where no configuration says it: the mark holds the steps and the seed."""
    mark = out / "stages" / f"{stage}.json"
    content = read_sealed(mark)
    assert content["num_steps"] == 4 and content["seed"] == 0
    write_sealed(mark, {**content, "num_steps": 2})
    code, said = run(f"task={stage}")
    assert (
        code == 1
        and f"{stage} in out was finished with other settings (num_steps 2 then, 4 now)" in said
    )


def test_training_samples_that_were_replaced_are_refused(run, out, monkeypatch):
    monkeypatch.setattr(DigitsDataModule, "samples_sha256", lambda self: "f" * 64)
    code, said = run("task=recover")
    assert (
        code == 1
        and "has another origin" in said
        and "samples" in said
        and "ffffffffffff... now" in said
    )


def test_a_replaced_reference_is_measured_against_anew(run, tmp_path):
    given = ["task=evaluate", "evaluate.reference=reference.npz"]
    images = DigitsDataModule().reference_images()[0].permute(0, 2, 3, 1).numpy()
    np.savez("reference.npz", arr_0=images[:40])
    assert run(*given)[0] == 0
    np.savez("reference.npz", arr_0=images[40:80])
    code, said = run(*given)
    assert code == 0 and "measuring teacher again: its origin has changed (reference" in said
    assert "already finished" in run(*given)[1]


def test_every_mark_states_the_configuration(out):
    marks = [json.loads(path.read_text()) for path in (out / "stages").iterdir()]
    assert len({mark["configuration"] for mark in marks}) == 1 and all(
        len(mark["sha256"]) == 64 for mark in marks
    )


@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.slow), 0.6])
def test_a_truncated_configuration_is_not_taken_for_another(run, out, size):
    truncate(out / "config.yaml", size)
    code, said = run()
    assert (
        code == 1
        and "out/config.yaml does not end with its own hash" in said
        and "truncated" in said
        and "delete it" in said
    )


def test_an_interrupted_run_is_not_taken_over_after_config_yaml_is_lost(run, out):
    """There is no mark yet; the checkpoint says what it is of, and the refused run leaves the folder as it was."""
    for path in (out / "stages", out / "shallow", out / "recovered"):
        shutil.rmtree(path)
    for path in (out / "config.yaml", out / "metrics.json"):
        path.unlink()
    before = {path: sha256(path) for path in out.rglob("*") if path.is_file()}
    code, said = run("seed=1", "task=learn_mask")
    assert code == 1 and "last.ckpt: it has another origin (configuration" in said
    assert {path: sha256(path) for path in out.rglob("*") if path.is_file()} == before
    assert run("task=learn_mask")[0] == 0


def test_another_configuration_does_not_take_over_after_config_yaml_is_lost(run, out):
    (out / "config.yaml").unlink()
    code, said = run("seed=1", "task=evaluate")
    assert (
        code == 1
        and "belongs to another configuration" in said
        and not (out / "config.yaml").exists()
    )
