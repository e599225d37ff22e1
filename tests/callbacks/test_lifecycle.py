"""DepthPruningCallback with models, weights, optimizers and callbacks in unusual order."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import nn

from callbacks.toy_module import Base, InInit, Manual, ResidualBlock, new_classifier
from tinyfusion_pl.callbacks import DepthPruningCallback, EMAWithWarmup


def fit(module, *callbacks, folder, ckpt_path=None, **kwargs):
    kwargs = {
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **kwargs,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


# -- evaluation mode, and blocks that do not run ----------------------------------------------
def test_blocks_in_evaluation_mode_are_refused_by_name(tmp_path):
    module = InInit()
    module.model.blocks[2].eval()
    with pytest.raises(
        ValueError, match=r"1 gated blocks are in evaluation mode \(blocks.2, .*Call train\(\)"
    ):
        fit(module, DepthPruningCallback("1:2"), folder=tmp_path)


def test_gates_that_never_get_a_gradient_leave_no_decision(tmp_path):
    module = InInit()
    module.unused = nn.ModuleList(ResidualBlock() for _ in range(2))
    callback = DepthPruningCallback("1:2", stacks="unused", weight_update="full")
    with pytest.raises(ValueError, match="never got a gradient: .* gated blocks \\(unused\\)"):
        fit(module, callback, folder=tmp_path)
    assert callback.shallow_model is None and not (tmp_path / "shallow").exists()


# -- the original weights ---------------------------------------------------------------------
class LoadsInSetup(InInit):
    def setup(self, stage):
        self.model.load_state_dict(
            {k: torch.full_like(v, 0.25) for k, v in self.model.state_dict().items()}
        )


@pytest.mark.parametrize("update", ["lora", "full"])
def test_discard_gives_back_weights_that_were_loaded_in_setup(update, tmp_path):
    callback = DepthPruningCallback("1:2", weight_update=update)
    fit(LoadsInSetup(optimizers_kind="plain"), callback, folder=tmp_path)
    assert all((value == 0.25).all() for value in callback.shallow_model.state_dict().values())


def test_discard_restores_the_weights_of_a_dense_checkpoint(tmp_path):
    dense = InInit(optimizers_kind="plain")
    saving = ModelCheckpoint(
        dirpath=tmp_path, filename="dense", save_last=False, every_n_train_steps=2
    )
    fit(dense, saving, folder=tmp_path, enable_checkpointing=True, max_steps=2)
    callback = DepthPruningCallback("1:2", weight_update="full")
    fit(
        InInit(optimizers_kind="plain"),
        callback,
        folder=tmp_path,
        ckpt_path=tmp_path / "dense.ckpt",
        max_steps=8,
    )
    assert torch.equal(callback.shallow_model.head.weight, dense.model.head.weight)
    assert not torch.equal(dense.model.head.weight, new_classifier().head.weight)


def test_discard_gives_back_biases_that_a_peft_config_trains(tmp_path):
    callback = DepthPruningCallback("1:2", weight_update=LoraConfig(r=2, bias="all"))
    module = InInit()
    fit(module, callback, folder=tmp_path)
    assert not torch.equal(module.model.head.bias, new_classifier().head.bias)  # it did train
    assert torch.equal(callback.shallow_model.head.bias, new_classifier().head.bias)


def test_a_peft_config_that_replaces_modules_is_refused():
    with pytest.raises(ValueError, match="modules_to_save, which puts copies"):
        DepthPruningCallback("1:2", weight_update=LoraConfig(modules_to_save=["head"]))


def test_the_record_takes_the_source_that_the_model_states(tmp_path):
    module = InInit()
    module.model.source = {"path": "dense.pt", "sha256": "ab"}
    fit(module, DepthPruningCallback("1:2"), folder=tmp_path)
    assert (
        json.loads((tmp_path / "shallow" / "record.json").read_text())["source"]
        == module.model.source
    )


# -- where the model comes late ---------------------------------------------------------------
def test_a_list_that_only_looks_like_the_blocks_is_refused(tmp_path):
    class Decoy(Base):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(ResidualBlock() for _ in range(2))

        def setup(self, stage):
            self.model = new_classifier()
            self.model.blocks = nn.ModuleList([Wide() for _ in range(4)])

    class Wide(ResidualBlock):
        pass

    with pytest.raises(ValueError, match="Gates were put on heads.*stacks='model.blocks'"):
        fit(Decoy(), DepthPruningCallback("1:2"), folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_named_before_training(tmp_path):
    (tmp_path / "taken").write_text("mine")
    callback = DepthPruningCallback("1:2", save_dir=tmp_path / "taken")
    module = InInit()
    with pytest.raises(ValueError, match="taken is a file"):
        fit(module, callback, folder=tmp_path)
    assert module.trainer.global_step == 0 and (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"stacks": []}, "stacks is empty"), ({"anneal_steps": "ten"}, "anneal_steps is ten")],
)
def test_settings_of_the_wrong_kind_are_refused_in_words(setting, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        fit(InInit(), DepthPruningCallback("1:2", **setting), folder=tmp_path)


# -- more than one fit ------------------------------------------------------------------------
def test_a_gated_module_refuses_another_callback_until_detached(tmp_path):
    module, first = InInit(), DepthPruningCallback("1:2")
    fit(module, first, folder=tmp_path)
    with pytest.raises(ValueError, match="gates of an earlier DepthPruningCallback.*detach"):
        fit(module, DepthPruningCallback("2:4"), folder=tmp_path)
    first.detach(module)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.model.state_dict().values(), new_classifier().state_dict().values())
    )
    second = DepthPruningCallback("2:4", weight_update="full")
    fit(module, second, folder=tmp_path)
    assert second.decision.stacks["blocks"].pattern == "2:4"


def test_the_next_fit_after_resuming_starts_a_new_optimizer(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2)
    fit(
        InInit(),
        DepthPruningCallback("1:2"),
        saving,
        folder=tmp_path,
        max_steps=2,
        enable_checkpointing=True,
    )
    callback, module = DepthPruningCallback("1:2"), InInit()
    fit(module, callback, folder=tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=6)
    assert {int(state["step"]) for state in callback.optimizer._optimizer.state.values()} == {6}
    fit(module, callback, folder=tmp_path, max_steps=3)
    assert {int(state["step"]) for state in callback.optimizer._optimizer.state.values()} == {3}


def test_averaged_adapters_and_logits_survive_an_interruption(tmp_path):
    def run(name, max_steps, ckpt_path=None):
        callback = DepthPruningCallback("1:2", delta_w="merge", logits_lr=0.1)
        saving = ModelCheckpoint(
            dirpath=tmp_path / name,
            filename="last",
            every_n_train_steps=4,
            enable_version_counter=False,
        )
        torch.manual_seed(5)
        fit(
            InInit(optimizers_kind="plain"),
            callback,
            EMAWithWarmup(decay=0.9),
            RestoresGenerator(),
            saving,
            folder=tmp_path / name,
            max_steps=max_steps,
            enable_checkpointing=True,
            ckpt_path=ckpt_path,
        )
        return callback.shallow_model.state_dict(), new_classifier()

    whole, original = run("whole", 8)
    run("cut", 4)
    resumed, _ = run("cut", 8, tmp_path / "cut" / "last.ckpt")
    assert not torch.equal(whole["head.weight"], original.head.weight)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


class RestoresGenerator(Callback):
    def state_dict(self):
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state):
        self.state = state["torch"]

    def on_train_start(self, trainer, pl_module):
        if hasattr(self, "state"):
            torch.set_rng_state(self.state)


# -- counting ---------------------------------------------------------------------------------
class Taus(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(pl_module.depth_gates.tau)


@pytest.mark.parametrize("length", [{"max_steps": -1, "max_epochs": 1}, {"max_steps": 16}])
def test_temperature_ends_at_the_last_batch_of_two_optimizers(length, tmp_path):
    taus = Taus()
    fit(
        Manual(), DepthPruningCallback("1:2", weight_update="full"), taus, folder=tmp_path, **length
    )
    assert len(taus.seen) == 8 and taus.seen[0] == 4.0
    assert taus.seen == sorted(taus.seen, reverse=True) and len(set(taus.seen)) == 8
    assert (
        0.1 <= taus.seen[-1] < 0.7
    )  # the last of eight steps; 16 optimizer steps end at a fifteenth before it


@pytest.mark.filterwarnings("ignore:Step .*not finite")
def test_one_optimizer_that_is_never_finite_stops_the_run(tmp_path):
    class SecondIsNaN(Manual):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer, factor in ((first, 1.0), (second, float("nan"))):
                optimizer.zero_grad()
                self.manual_backward(self.model(batch[0]).sum() * factor)
                optimizer.step()

    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        fit(
            SecondIsNaN(),
            DepthPruningCallback("1:2", weight_update="full", max_nonfinite=3),
            folder=tmp_path,
            max_steps=16,
        )


def test_the_last_decision_is_always_written_to_the_file(tmp_path):
    for every, steps in ((5, [1, 5, 7]), (0, [7])):
        file = tmp_path / str(every) / "decisions.jsonl"
        fit(
            InInit(),
            DepthPruningCallback("1:2", decisions_path=file),
            folder=tmp_path,
            max_steps=7,
            log_every_n_steps=every,
        )
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == steps


def test_a_trainer_that_only_validated_can_save(tmp_path):
    class Validates(InInit):
        def validation_step(self, batch, batch_idx):
            self.model(batch[0])

        val_dataloader = InInit.train_dataloader

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[DepthPruningCallback("1:2")],
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Validates(), verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").exists()


def test_logits_stay_in_float32_with_a_bfloat16_model(tmp_path):
    class HalfInput(InInit):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                (batch[0].to(self.model.head.weight.dtype), batch[1]), batch_idx
            )

    module, callback = (
        HalfInput(),
        DepthPruningCallback("1:2", weight_update="full", logits_lr=1e-4),
    )
    fit(module, callback, folder=tmp_path, precision="bf16-true")
    assert module.model.stem.weight.dtype == torch.bfloat16
    assert all(
        p.dtype == torch.float32 and (p != 0.02).any() and (p - 0.02).abs().max() < 1e-3
        for p in callback.gates.logits()
    )


# -- a first batch that shows nothing ---------------------------------------------------------
class Coupled(InInit):
    """Its output depends on the number of blocks; batches before `first` are not finite."""

    def __init__(self, first):
        super().__init__()
        self.first, head = first, self.model.head
        head.register_forward_pre_hook(lambda _, args: args[0] * len(self.model.blocks))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step(
            (x * float("nan") if batch_idx < self.first else x, y), batch_idx
        )


@pytest.mark.filterwarnings("ignore:Step")
@pytest.mark.parametrize(
    "first, error, message",
    [
        (1, ValueError, "cannot be pruned as it is called"),
        (9, FloatingPointError, "2 optimizer steps in a row"),
    ],
)
def test_the_first_call_with_finite_output_is_the_one_verified(first, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fit(Coupled(first), DepthPruningCallback("1:2", max_nonfinite=2), folder=tmp_path)
