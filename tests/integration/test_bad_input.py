"""What people get wrong, through the real command line: one clear sentence, exit code 1, nothing trained, nothing written, nothing lost."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tinyfusion_pl import cli, create_model
from tinyfusion_pl.data import DigitsDataModule


@pytest.fixture
def tell(tmp_path, monkeypatch, capfd):
    """Run a command line that must fail before anything is written; returns what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, run_dir="out"):
        before = sorted(tmp_path.rglob("*"))
        assert (
            cli.main(
                [
                    f"run_dir={run_dir}",
                    "data.batch_size=8",
                    "pruning=learned",
                    "+debug=default",
                    *arguments,
                ]
            )
            == 1
        )
        out, errors = capfd.readouterr()
        assert "Traceback" not in errors
        assert errors.startswith("error: ") and "learn_mask:" not in out  # no stage began
        assert sorted(tmp_path.rglob("*")) == before
        return errors

    return run


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ('"1:5"', ["does not divide the depth 12", "'1:2'", "'3:6'"]),
        ('"5:4"', ["keeps 5 of 4", "1 <= N <= M"]),
        ('"0:4"', ["keeps 0 of 4"]),
        ('"one of two"', ["N:M"]),
        ('"10:20"', ["184756 candidates", "5:10+5:10"]),
        ("62", ["62", "quotes"]),
        ("434", ["434", "quotes"]),
        ("{blocks: 62}", ["62", "quotes"]),
        ('{other: "1:2"}', ["other", "blocks"]),
    ],
)
def test_a_wrong_pattern(tell, pattern, expected):
    said = tell(f"pruning.pattern={pattern}")
    assert all(words in said for words in expected), said


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("pruning.tau_start=0", "tau_start=0"),
        ("pruning.tau_end=-1", "tau_end=-1"),
        ("pruning.scaling=0", "scaling=0"),
        ("pruning.logits_lr=0", "logits_lr=0"),
        ("pruning.tau_start=hot", "pruning.tau_start is 'hot'; give a number"),
        ("pruning.scaling=null", "pruning.scaling is null; give a number"),
        ("pruning.tau_end=inf", "pruning.tau_end is inf; give a finite number"),
        ("pruning.average_decay=1", "average_decay"),
        ("pruning.init=x", "pruning.init is 'x'; give a number"),
        ("pruning.anneal_steps=0", "anneal_steps"),
        ("pruning.delta_w=keep", "'discard'"),
        ("pruning.max_nonfinite=0", "pruning.max_nonfinite is 0"),
        ("pruning.stacks=nowhere", "'denoiser.blocks'"),
        ("adapter.weight_update=half", "'lora', 'full', 'frozen'"),
        ("distill.num_sigma=-2", "num_sigma"),
        ("distill.feature_mask=round", "'reference', 'joint'"),
        ("recover.weights=best", "'ema' or 'raw'"),
        ("~recover.fit.callbacks.ema", "recover.weights=raw"),
        ("recover.fit.callbacks.ema.decay=1", "decay"),
        ("recover.module.label_dropout=2", "label_dropout"),
        ("objective.num_timesteps=0", "num_timesteps"),
        ("evaluate.num_samples=1", "num_samples"),
        ("evaluate.sampling.sampler=euler", "'ddim'"),
        ("evaluate.sampling.num_sampling_steps=0", "num_sampling_steps"),
        ("evaluate.sampling.num_sampling_steps=1001", "num_sampling_steps"),
        ("data.batch_size=0", "batch_size"),
        ("learn_mask.fit.trainer.max_steps=0", "max_steps"),
        ("recover.fit.trainer.max_steps=-1", "max_steps"),
        ("model.name=dit_xxl_2", "dit_xl_2"),
        ("stages=[learn]", "stages"),
        ("task.stages=[learn]", "learn_mask"),
        ("recover.module.optimizer.lr=-1", "recover.module.optimizer.lr is -1"),
        ("recover.module.scheduler.final_ratio=3", "final_ratio"),
        ("learn_mask.fit.trainer.precision=64-half", "precision"),
        ("evaluate.sampling.steps=5", "steps"),
    ],
)
def test_a_wrong_setting(tell, setting, expected):
    said = tell(setting)
    assert expected in said, said


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            ["model.name=sit_s_2"],
            [
                "sit_s_2 predicts 1 channels for 1-channel latents",
                "needs 2 channels",
                "sit for SiT",
            ],
        ),
        (
            ["model.name=dit_s_2", "objective=sit", "sampler@evaluate.sampling=sit_sde"],
            ["dit_s_2 predicts 2 channels", "interpolant needs 1"],
        ),
        (
            ["model.name=dit_s_2", "objective=mar", "sampler@evaluate.sampling=mar"],
            ["dit_s_2 is not a MAR", "gaussian_diffusion for DiT"],
        ),
        (["model.name=uvit_s_2"], ["uvit_s_2 predicts 1 channels", "noise for U-ViT"]),
        (
            ["model.name=mar_base", "+model.encoder_depth=2", "+model.decoder_depth=2"],
            ["mar_base predicts masked tokens", "mar for MAR"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*randomly initiali")
def test_an_objective_of_another_family(tell, settings, expected, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    said = tell(
        "model.checkpoint=random",
        "+model.in_channels=1",
        "+model.input_size=8",
        "+model.hidden_size=32",
        "+model.num_heads=2",
        "+model.num_classes=10",
        *settings,
    )
    assert all(words in said for words in expected), said


def test_more_processes_than_training_samples(tell):
    assert "There are 1800 processes, but only 1797 training samples" in tell(
        "runtime.accelerator=cpu", "runtime.devices=1800"
    )


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("+experiment=dit_d15", "dit_d14"),
        ("adapter=dora", "lora"),
        ("task=prune", "pipeline"),
        ("+experimnt=dit_d14", "+experiment"),
    ],
)
def test_an_unknown_experiment_group_or_task_lists_what_there_is(tell, choice, expected):
    said = tell(choice)
    assert expected in said, said


def test_the_published_recipe_names_all_that_is_missing_and_how_to_get_it(tell):
    said = tell("+experiment=dit_d14")
    for words in (
        "put it at",
        "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
        "data.root=FOLDER",
        "imagenet256_features",
    ):
        assert words in said, said


# -- checkpoints
@pytest.fixture
def state():
    return create_model("dit_digits").state_dict()


def test_a_missing_checkpoint(tell, tmp_path):
    said = tell(f"model.checkpoint={tmp_path / 'none.safetensors'}")
    assert "none.safetensors" in said and "There is no checkpoint" in said


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_truncated_checkpoint(tell, tmp_path, state, kind):
    file = tmp_path / f"cut.{kind}"
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-1000])
    said = tell(f"model.checkpoint={file}")
    assert file.name in said and "truncated" in said


def test_a_checkpoint_of_another_shape_names_it(tell, tmp_path, state):
    save_file({**state, "pos_embed": torch.zeros(1, 9, 64)}, tmp_path / "other.safetensors")
    assert "pos_embed (1, 9, 64) instead of (1, 16, 64)" in tell(
        f"model.checkpoint={tmp_path / 'other.safetensors'}"
    )


def test_missing_and_extra_keys_are_named(tell, tmp_path, state):
    value = state.pop("final_layer.linear.bias")
    save_file({**state, "final_layer.linear.offset": value}, tmp_path / "keys.safetensors")
    said = tell(f"model.checkpoint={tmp_path / 'keys.safetensors'}")
    assert (
        "1 missing: final_layer.linear.bias" in said
        and "1 unexpected: final_layer.linear.offset" in said
    )


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "save",
    [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))],
    ids=["torch", "pickle"],
)
def test_code_in_a_checkpoint_is_not_executed(tell, tmp_path, state, save):
    save({**state, "extra": Code()}, tmp_path / "code.pt")
    said = tell(f"model.checkpoint={tmp_path / 'code.pt'}")
    assert "refused" in said or "cannot be read" in said
    assert not (tmp_path / "executed").exists()


# -- folders and disks
def test_a_run_folder_of_another_configuration(tell, tmp_path, capfd):
    (tmp_path / "used").mkdir()
    assert cli.main(["run_dir=used", "data.batch_size=8", "+debug=default", "task=report"]) == 0
    capfd.readouterr()
    said = tell("seed=1", run_dir="used")
    assert "another configuration" in said and "seed is 0 there and 1 here" in said


def test_a_run_folder_that_is_a_file(tell, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in tell(run_dir="taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_recovery_without_mask_learning_says_what_comes_first(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run_dir=out", "task=recover"]) == 1
    assert "task=learn_mask" in capfd.readouterr().err


SMALL = [
    "pruning=learned",
    "data.batch_size=8",
    "learn_mask.fit.trainer.max_steps=3",
    "learn_mask.fit.logger=null",
    "task=learn_mask",
    "run_dir=out",
]


@pytest.mark.filterwarnings("ignore:Step")
def test_nan_losses_stop_the_run_with_a_reason_and_no_shallow_model(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        DigitsDataModule,
        "train_set",
        lambda self: torch.utils.data.TensorDataset(
            torch.full((64, 1, 8, 8), float("nan")), torch.zeros(64, dtype=torch.long)
        ),
    )
    assert cli.main([*SMALL, "pruning.max_nonfinite=2"]) == 1
    said = capfd.readouterr().err
    assert "2 optimizer steps in a row" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "shallow").exists()


def test_a_disk_that_fills_up_while_saving_leaves_no_half_file_and_the_run_goes_on_afterwards(
    tmp_path, monkeypatch, capfd
):
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as full:

        def no_space(tensors, path, *args, **kwargs):
            with open(path, "wb") as file:
                file.write(b"half of it")
            raise OSError(28, "No space left on device", str(path))

        for module in (
            safetensors.torch,
            __import__("tinyfusion_pl.artifacts", fromlist=["artifacts"]),
        ):
            if hasattr(module, "save_file"):
                full.setattr(module, "save_file", no_space)
        assert cli.main(SMALL) == 1
    said = capfd.readouterr().err
    assert "No space left on device" in said and "Free" in said and "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*.safetensors*")) and not list(
        (tmp_path / "out").rglob("record.json")
    )
    assert cli.main(SMALL) == 0
    assert (tmp_path / "out" / "shallow" / "model.safetensors").exists()
