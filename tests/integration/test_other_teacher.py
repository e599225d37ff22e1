"""``recover.teacher``: recovery by another teacher than the model that was pruned."""

import pytest

from tinyfusion_pl.artifacts import load_tensors, save_tensors
from tinyfusion_pl.cli import main
from tinyfusion_pl.models import load_pretrained

COMMAND = ["+debug=default", "data.batch_size=8", "pruning=index", "pruning.keep=2", "pruning.criterion.kept=[0,1]", "distill=output",
           "task.stages=[learn_mask,recover]", "recover.module.optimizer.lr=0.01", "recover.weights=raw"]  # fmt: skip


@pytest.fixture
def teachers(tmp_path):
    """A copy of the shipped teacher, and one whose predictions are zero."""
    state = load_pretrained("shipped").state_dict()
    save_tensors(tmp_path / "same.safetensors", state)
    save_tensors(
        tmp_path / "other.safetensors",
        {k: v * (not k.startswith("final_layer.linear")) for k, v in state.items()},
    )
    return tmp_path


def recovered(folder, *arguments):
    assert main([*COMMAND, *arguments, f"run_dir={folder}"]) == 0
    return load_tensors(folder / "recovered" / "model.safetensors")


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_student_learns_from_the_teacher_named(teachers):
    own = recovered(teachers / "own")
    same = recovered(teachers / "same", f"recover.teacher={teachers / 'same.safetensors'}")
    other = recovered(teachers / "other", f"recover.teacher={teachers / 'other.safetensors'}")
    assert largest_difference(own, same) == 0 < largest_difference(own, other)


def test_hidden_states_of_unpaired_blocks_are_refused(teachers, capsys):
    command = [word for word in COMMAND if not word.startswith("distill")]
    assert (
        main(
            [
                *command,
                f"recover.teacher={teachers / 'same.safetensors'}",
                f"run_dir={teachers / 'run'}",
            ]
        )
        == 1
    )
    assert "distill=output" in capsys.readouterr().err and not (teachers / "run").exists()


def test_a_teacher_that_changed_is_not_built_on(teachers, capsys):
    path = teachers / "same.safetensors"
    recovered(teachers / "run", f"recover.teacher={path}")
    path.write_bytes((teachers / "other.safetensors").read_bytes())
    assert main([*COMMAND, f"recover.teacher={path}", f"run_dir={teachers / 'run'}"]) == 1
    assert "other teacher" in capsys.readouterr().err
