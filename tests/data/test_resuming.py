"""With a real Trainer: an interrupted and resumed run sees the very batches of one that was never interrupted."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from tinyfusion_pl.data import DigitsDataModule, GenerationDataModule
from tinyfusion_pl.data.sampler import epoch_order

NUM_SAMPLES, BATCH_SIZE = 23, 4
pytestmark = [  # Lightning's own; the warning that matters here is an error in `fit`
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
]


class Numbered(GenerationDataModule):
    """Sample i is the number i, so that what was seen can be read off."""

    latent_shape, num_classes = (1, 1, 1), 1

    def train_set(self):
        return TensorDataset(torch.arange(NUM_SAMPLES), torch.zeros(NUM_SAMPLES, dtype=torch.long))

    def decode(self, latents):
        raise NotImplementedError

    reference_images = decode


class Eyes(LightningModule):
    """Notes the batches of its finished training steps; the loss is there so that optimizer steps are real."""

    def __init__(self, *, interrupt_at=None, ask_for_steps=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.interrupt_at, self.ask_for_steps = [], interrupt_at, ask_for_steps

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.interrupt_at:
            raise Interrupted
        self.seen.append(batch[0].tolist())
        return self.weight.square()

    def configure_optimizers(self):
        if self.ask_for_steps:
            assert (
                self.trainer.estimated_stepping_batches > 0
            )  # makes Lightning load the data before it restores its loops
        return torch.optim.SGD([self.weight], lr=0.1)


class Interrupted(Exception):
    pass


class SaveWhenInterrupted(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def fit(module, data=None, *, ckpt_path=None, callbacks=(), **kwargs):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **kwargs,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*your dataloader is not resumable.*")
        trainer.fit(module, data or Numbered(batch_size=BATCH_SIZE), ckpt_path=ckpt_path)
    return trainer


def batches(first, last):
    """Batches first..last-1 of the stream, from the definition."""
    stream = [i for epoch in range(12) for i in epoch_order(NUM_SAMPLES, 0, epoch).tolist()]
    return [stream[i * BATCH_SIZE : (i + 1) * BATCH_SIZE] for i in range(first, last)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_resumed_from_a_model_checkpoint_sees_the_rest_of_the_batches(
    tmp_path, accumulate, num_workers
):
    data = Numbered(batch_size=BATCH_SIZE, num_workers=num_workers)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    limits = {"max_steps": 8, "accumulate_grad_batches": accumulate}
    fit(whole := Eyes(), data, callbacks=[saving], **limits)
    assert whole.seen == batches(0, 8 * accumulate)
    for step in (3, 6):  # the second lies in the second pass over the data
        trainer = fit(resumed := Eyes(), data, ckpt_path=tmp_path / f"step={step}.ckpt", **limits)
        assert resumed.seen == whole.seen[step * accumulate :]
        assert (trainer.global_step, trainer.current_epoch) == (8, 1)


def test_run_interrupted_in_mid_step_sees_that_batch_again(tmp_path):
    saving = SaveWhenInterrupted(tmp_path / "x.ckpt")
    with pytest.raises(Interrupted):
        fit(Eyes(interrupt_at=5), callbacks=[saving], max_steps=9)
    for _ in range(2):  # and a second interruption, of the resumed run
        with pytest.raises(Interrupted):
            fit(
                resumed := Eyes(interrupt_at=1),
                callbacks=[saving],
                max_steps=9,
                ckpt_path=tmp_path / "x.ckpt",
            )
    assert resumed.seen == batches(6, 7)
    fit(resumed := Eyes(), max_steps=9, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == batches(7, 9)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_run_that_reached_its_end_goes_on_when_given_more_steps(tmp_path, num_workers):
    data = Numbered(batch_size=BATCH_SIZE, num_workers=num_workers)
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=4)
    fit(Eyes(), data, callbacks=[saving], max_steps=4)
    trainer = fit(longer := Eyes(), data, max_steps=9, ckpt_path=tmp_path / "end.ckpt")
    assert longer.seen == batches(4, 9) and trainer.global_step == 9


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [4, 6, 9])
def test_run_counted_in_epochs_resumes_in_the_middle_and_at_the_end_of_one(
    tmp_path, step, num_workers
):
    data = Numbered(batch_size=BATCH_SIZE, num_workers=num_workers)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(whole := Eyes(), data, callbacks=[saving], max_epochs=3)
    assert trainer.num_training_batches == 6 and whole.seen == batches(
        0, 18
    )  # 23 samples fill 5.75 batches
    trainer = fit(
        resumed := Eyes(ask_for_steps=True),
        data,
        max_epochs=3,
        ckpt_path=tmp_path / f"step={step}.ckpt",
    )
    assert resumed.seen == batches(step, 18) and trainer.current_epoch == 3


def test_epochs_cut_short_leave_no_batch_out(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole := Eyes(), callbacks=[saving], max_epochs=3, limit_train_batches=4)
    assert whole.seen == batches(0, 12)
    fit(resumed := Eyes(), max_epochs=3, limit_train_batches=4, ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.seen == batches(7, 12)


def test_run_resumed_with_another_batch_size_goes_on_at_the_same_sample(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    fit(Eyes(), callbacks=[saving], max_steps=3)
    fit(resumed := Eyes(), Numbered(batch_size=6), max_steps=5, ckpt_path=tmp_path / "step=3.ckpt")
    assert sum(resumed.seen, []) == sum(batches(3, 6), [])


def test_resumed_fit_leaves_nothing_behind_for_the_next_one(tmp_path):
    data = Numbered(batch_size=BATCH_SIZE)
    saving = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=3)
    fit(Eyes(), data, callbacks=[saving], max_steps=3)
    fit(Eyes(), data, max_steps=5, ckpt_path=tmp_path / "x.ckpt")
    fit(another := Eyes(), data, max_steps=2)
    assert another.seen == batches(0, 2)


def test_loading_batches_leaves_the_global_generator_alone():
    for num_workers in (0, 2):
        state = torch.get_rng_state()
        next(iter(Numbered(batch_size=BATCH_SIZE, num_workers=num_workers).train_dataloader()))
        assert torch.equal(torch.get_rng_state(), state)


def test_overfit_batches_is_refused():
    with pytest.raises(ValueError, match="overfit_batches=2.*Leave it out"):
        fit(Eyes(), overfit_batches=2, max_steps=4)


class WriteSeen(Eyes):
    """Optimizer steps without a backward pass: autograd fails in processes forked from one that has used it."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].tolist())
        self.optimizers().step()

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_processes_see_disjoint_halves_of_each_global_batch(tmp_path, use_distributed_sampler):
    ddp = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": use_distributed_sampler}
    fit(WriteSeen(tmp_path), Numbered(batch_size=2), max_steps=8, **ddp)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    together = [
        [i for pair in zip(*halves, strict=True) for i in pair]
        for halves in zip(*ranks, strict=True)
    ]
    assert together == batches(0, 8)  # the batches of 4 that one process sees


def test_digits_train_through_lightning():
    class Shapes(Eyes):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self.seen.append((tuple(x.shape), x.dtype, tuple(y.shape), y.dtype))
            return self.weight.square()

    fit(module := Shapes(), DigitsDataModule(), max_steps=2)
    assert module.seen == [((128, 1, 8, 8), torch.float32, (128,), torch.int64)] * 2
