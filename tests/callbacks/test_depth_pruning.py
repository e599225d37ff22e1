import copy
import json
from importlib.metadata import version

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks.toy_module import (
    Classifier,
    InConfigureModel,
    InInit,
    InSetup,
    Manual,
    new_classifier,
)
from tinyfusion_pl.callbacks import DepthPruningCallback, EMAWithWarmup
from tinyfusion_pl.models import load_shallow
from tinyfusion_pl.pruning import find_gates


def trainer(tmp_path, *callbacks, max_steps=6, **kwargs):
    kwargs = {"logger": False, "enable_checkpointing": False, **kwargs}
    return Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **kwargs,
    )


@pytest.mark.parametrize("kind", [InInit, InSetup, InConfigureModel])
@pytest.mark.parametrize("stacks", [None, "model.blocks"])
def test_works_on_a_foreign_module_wherever_its_model_is_built(kind, stacks, tmp_path):
    callback = DepthPruningCallback("1:2", stacks=stacks)
    module = kind()
    trainer(tmp_path, callback).fit(module)
    assert isinstance(callback.shallow_model, Classifier)
    assert len(callback.shallow_model.blocks) == 2
    original, kept = new_classifier(), callback.decision.kept_blocks["blocks"]
    for new, old in enumerate(kept):
        for a, b in zip(
            callback.shallow_model.blocks[new].parameters(), original.blocks[old].parameters()
        ):
            assert torch.equal(a, b)
    assert all(
        torch.equal(a, b)
        for a, b in zip(callback.shallow_model.head.parameters(), original.head.parameters())
    )
    assert find_gates(callback.shallow_model) is None
    loaded = load_shallow(tmp_path / "shallow", model=original)
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), callback.shallow_model.eval()(x))


def test_a_budget_in_place_of_a_pattern(tmp_path):
    callback = DepthPruningCallback(keep=3)
    trainer(tmp_path, callback).fit(InInit())
    stack = callback.decision.stacks["blocks"]
    assert len(callback.shallow_model.blocks) == 3 == len(stack.kept_blocks)
    assert (
        stack.pattern == "3:4"
        and len(stack.groups) == 1
        and len(stack.groups[0].probabilities) == 4
    )


@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
@pytest.mark.parametrize("delta_w", ["discard", "merge"])
def test_freezing_discards_or_merges_the_weight_update(update, delta_w, tmp_path):
    callback = DepthPruningCallback("1:2", weight_update=update, delta_w=delta_w)
    trainer(tmp_path, callback).fit(InInit())
    original, shallow = new_classifier(), callback.shallow_model
    assert (
        shallow.state_dict().keys()
        == load_shallow(tmp_path / "shallow", model=original).state_dict().keys()
    )
    moved = {
        name
        for name, p in shallow.named_parameters()
        if not name.startswith("blocks") and not torch.equal(p, original.get_parameter(name))
    }
    expected = {
        ("lora", "merge"): {"stem.weight", "head.weight"},
        ("full", "merge"): {"stem.weight", "stem.bias", "head.weight", "head.bias"},
    }
    assert moved == expected.get((update, delta_w), set())
    assert all(p.requires_grad for p in shallow.parameters())


def test_merged_lora_computes_what_the_adapted_model_computed(tmp_path):
    callback = DepthPruningCallback("1:2", delta_w="merge")
    module = InInit()
    trainer(tmp_path, callback).fit(module)
    x = torch.randn(5, 3)
    torch.testing.assert_close(callback.shallow_model.eval()(x), module.model.eval()(x))


def test_logits_move_and_are_in_no_group_of_the_users_optimizer(tmp_path):
    callback, seen = DepthPruningCallback("1:2"), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(
                {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            )

    module = InInit()
    trainer(tmp_path, callback, Look()).fit(module)
    logits = {id(p) for p in module.depth_gates.logits()}
    assert logits <= {id(p) for p in module.parameters()}
    assert all(not logits & groups for groups in seen)
    assert all((p != 0.02).any() for p in module.depth_gates.logits())


@pytest.mark.parametrize("kind", ["onecycle", "lambda", "plain"])
def test_the_users_schedulers_and_optimizers_keep_working(kind, tmp_path):
    module = InInit(optimizers_kind=kind)
    trainer(tmp_path, DepthPruningCallback("1:2", weight_update="full"), max_steps=10).fit(
        module
    )  # more than an epoch
    if kind != "plain":
        assert module.lr_schedulers().get_last_lr() != [module.lr]


def test_two_manual_optimizers_step_the_logits_once_per_batch(tmp_path):
    callback = DepthPruningCallback("1:2", weight_update="full")
    module = Manual()
    trainer(tmp_path, callback, max_steps=8).fit(module)  # two optimizer steps a batch
    steps = {int(state["step"]) for state in callback.optimizer._optimizer.state.values()}
    assert steps == {4}
    assert all((p != 0.02).any() for p in module.depth_gates.logits())


def test_gradient_accumulation_also_applies_to_the_logits(tmp_path):
    callback = DepthPruningCallback("1:2")
    trainer(tmp_path, callback, max_steps=3, accumulate_grad_batches=2).fit(InInit())
    assert {int(state["step"]) for state in callback.optimizer._optimizer.state.values()} == {3}


def test_temperature_falls_from_start_to_end_by_step(tmp_path):
    taus = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            taus.append(pl_module.depth_gates.tau)

    trainer(tmp_path, DepthPruningCallback("1:2"), Look(), max_steps=4).fit(InInit())
    assert taus == pytest.approx([4.0, 2.7, 1.4, 0.1])


def test_saved_checkpoints_keep_the_users_keys(tmp_path):
    expected = set(InInit().state_dict())
    for update in ("lora", "full"):
        saving = ModelCheckpoint(dirpath=tmp_path / update, filename="last", every_n_train_steps=2)
        trainer(
            tmp_path,
            DepthPruningCallback("1:2", weight_update=update),
            saving,
            enable_checkpointing=True,
        ).fit(InInit())
        checkpoint = torch.load(next((tmp_path / update).glob("*.ckpt")), weights_only=True)
        assert set(checkpoint["state_dict"]) == expected
        InInit().load_state_dict(checkpoint["state_dict"])


@pytest.mark.parametrize(
    "options",
    [
        {"relaxation": "hard_concrete"},
        {"relaxation": "hard_concrete", "pattern": None, "keep": 3},
        {"straight_through": "kept"},
    ],
    ids=str,
)
def test_an_interrupted_search_resumes_bit_by_bit(options, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    class SameDraws(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.manual_seed(100 + trainer.global_step)

    def fit(folder, *extra, ckpt=None, **annealed):
        seed_everything(1)
        callback, module = (
            DepthPruningCallback(**{"pattern": "1:2", **options, **annealed}),
            InInit(),
        )
        trainer(
            folder, SameDraws(), callback, *extra, max_steps=8, enable_checkpointing=bool(extra)
        ).fit(module, ckpt_path=ckpt, weights_only=True)
        return callback, module.depth_gates.stacks[0]

    whole, expected = fit(tmp_path / "whole")
    saving = ModelCheckpoint(dirpath=tmp_path / "cut", filename="last", every_n_train_steps=4)
    fit(tmp_path / "cut", Stop(), saving)
    resumed, found = fit(tmp_path / "cut", ckpt=tmp_path / "cut" / "last.ckpt")
    for a, b in zip(
        [*found.logits, *found.averages, *found.multipliers],
        [*expected.logits, *expected.averages, *expected.multipliers],
    ):
        assert torch.equal(a, b)
    assert resumed.decision == whole.decision and len(found.multipliers) == (
        len(found.groups) if "relaxation" in options else 0
    )
    assert all((m != 0).all() for m in found.multipliers)


@pytest.mark.parametrize("kind", [InInit, InSetup, InConfigureModel])
@pytest.mark.parametrize("update", ["lora", "full"])
def test_an_interrupted_fit_resumes_to_the_same_result(kind, update, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.should_stop = True

    class SameDraws(Callback):  # the toy's own randomness is not what this test is about
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.manual_seed(100 + trainer.global_step)

    def fit(folder, *extra, ckpt=None):
        seed_everything(1)
        callback = DepthPruningCallback(
            "1:2", weight_update=update, anneal_steps=8, decisions_path=folder / "decisions.jsonl"
        )
        module = kind()
        trainer(
            folder, SameDraws(), callback, *extra, max_steps=8, enable_checkpointing=bool(extra)
        ).fit(module, ckpt_path=ckpt, weights_only=True)
        return callback, module

    whole, whole_module = fit(tmp_path / "whole")
    saving = ModelCheckpoint(dirpath=tmp_path / "cut", filename="last", every_n_train_steps=4)
    fit(tmp_path / "cut", Stop(), saving)
    resumed, module = fit(tmp_path / "cut", ckpt=tmp_path / "cut" / "last.ckpt")
    for a, b in zip(module.depth_gates.logits(), whole_module.depth_gates.logits()):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        module.depth_gates.stacks[0].averages, whole_module.depth_gates.stacks[0].averages
    ):
        torch.testing.assert_close(a, b)
    for a, b in zip(module.model.parameters(), whole_module.model.parameters()):
        torch.testing.assert_close(a, b)
    for a, b in zip(resumed.shallow_model.parameters(), whole.shallow_model.parameters()):
        assert torch.equal(a, b)


def test_weight_averaging_listed_before_pruning_is_refused(tmp_path):
    ema = EMAWeightAveraging(decay=0.9, use_buffers=False)
    with pytest.raises(ValueError, match="List DepthPruningCallback first"):
        trainer(tmp_path, ema, DepthPruningCallback("1:2")).fit(InInit())


def test_weight_averaging_of_a_model_built_in_setup_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match="If the model is built in setup: EMAWithWarmup copies the module before that",
    ):
        trainer(tmp_path, DepthPruningCallback("1:2"), EMAWithWarmup(decay=0.5)).fit(InSetup())
    trainer(tmp_path, DepthPruningCallback("1:2"), EMAWithWarmup(decay=0.5)).fit(InConfigureModel())


def test_weight_averaging_does_not_change_the_decision(tmp_path):
    torch.manual_seed(0)
    callback = DepthPruningCallback("1:2", weight_update="full", delta_w="merge")
    decided = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            decided.append(pl_module.depth_gates.decide().stacks["blocks"].block_probabilities)

    module = InInit()
    trainer(tmp_path, callback, EMAWithWarmup(decay=0.5), Look()).fit(module)
    assert callback.decision.stacks["blocks"].block_probabilities == decided[-1]
    assert torch.equal(callback.shallow_model.head.weight, module.model.head.weight)


def test_attaching_twice_does_nothing(tmp_path):
    callback, module = DepthPruningCallback("1:2"), InInit()
    fit_trainer = trainer(tmp_path, callback)
    fit_trainer.fit(module)
    gates = module.depth_gates
    callback.attach(fit_trainer, module)
    assert module.depth_gates is gates and len([m for m in module.modules() if m is gates]) == 1


def test_decision_is_logged_and_kept_as_a_file(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    callback = DepthPruningCallback("1:2", decisions_path=tmp_path / "decisions.jsonl")
    trainer(tmp_path, callback, logger=logger).fit(InInit())
    header = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    for key in (
        "gates/tau",
        "gates/entropy",
        "gates/confidence",
        "gates/blocks/probability_3",
        "gates/blocks/kept_0",
        "gates/blocks/confidence_1",
        "gates/blocks/entropy_1",
    ):
        assert key in header
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert sum(lines[-1]["stacks"]["blocks"]["block_probabilities"]) == pytest.approx(2)
    assert lines[-1]["stacks"]["blocks"]["kept_blocks"] == callback.decision.kept_blocks["blocks"]


def test_the_record_says_what_was_decided_and_how(tmp_path):
    callback = DepthPruningCallback("1:2", source={"path": "teacher.pt", "sha256": "0"})
    trainer(tmp_path, callback).fit(InInit())
    record = json.loads((tmp_path / "shallow" / "record.json").read_text())
    assert record["stacks"]["blocks"]["kept_blocks"] == callback.decision.kept_blocks["blocks"]
    assert record["stacks"]["blocks"]["pattern"] == "1:2"
    assert all(
        len(g["probabilities"]) == 2 and 0 <= g["entropy"] < 0.694
        for g in record["stacks"]["blocks"]["groups"]
    )
    assert record["source"] == {"path": "teacher.pt", "sha256": "0"}
    assert record["configuration"]["scaling"] == 100 and record["versions"]["torch"] == version(
        "torch"
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"pattern": 62}, "YAML reads"),
        ({"pattern": "5:4"}, "keeps 5 of 4"),
        ({"pattern": "0:2"}, "keeps 0 of 2"),
        ({"pattern": "1:2", "tau_start": 0.0}, "tau_start=0.0"),
        ({"pattern": "1:2", "scaling": -1.0}, "scaling=-1.0"),
        ({"pattern": "1:2", "delta_w": "keep"}, "'discard'"),
        ({"pattern": "1:2", "weight_update": "half"}, "'lora'"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(bad, message):
    with pytest.raises(ValueError, match=message):
        DepthPruningCallback(**bad)


def test_a_pattern_that_does_not_divide_the_depth_is_refused(tmp_path):
    module = InInit()
    before = copy.deepcopy(module.model)
    with pytest.raises(ValueError, match="does not divide the depth 4"):
        trainer(tmp_path, DepthPruningCallback("1:3")).fit(module)
    assert module.model.state_dict().keys() == before.state_dict().keys()
    assert type(module.model.head) is torch.nn.Linear


def test_a_path_without_a_stack_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="'model.blocks'"):
        trainer(tmp_path, DepthPruningCallback("1:2", stacks="model.layers")).fit(InInit())


def test_nonfinite_losses_are_skipped_counted_and_stop_the_run(tmp_path):
    class Nan(InInit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx in self.bad else loss

    module = Nan()
    module.bad = {1, 3}
    callback = DepthPruningCallback("1:2", weight_update="full")
    with pytest.warns(UserWarning, match="not finite"):
        trainer(tmp_path, callback).fit(module)
    assert callback.guard.num_skipped == 2
    assert all(torch.isfinite(p).all() for p in module.parameters())
    module = Nan()
    module.bad = set(range(100))
    with (
        pytest.raises(FloatingPointError, match="3 optimizer steps in a row"),
        pytest.warns(UserWarning),
    ):
        trainer(tmp_path, DepthPruningCallback("1:2", max_nonfinite=3)).fit(module)
