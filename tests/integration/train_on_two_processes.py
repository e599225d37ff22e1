"""Real fits on two processes, each leaving what it saw; `on_two_processes` runs them."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from pruning.toys import TwoStreamToy
from tinyfusion_pl import DepthPruningCallback, MaskLearning, Recovery, create_model
from tinyfusion_pl.callbacks import NonFiniteGuard
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning.masks import Masks

NUM_STEPS = 3
CASES = ("full", "saturated", "lora", "nan", "recovery", "direct", "two_streams", "reentrant")


class Direct(LightningModule):
    """Blocks in the LightningModule itself, called twice in a step: on all samples, and on some."""

    def __init__(self, *, reentrant):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.reentrant, self.equal = torch.nn.Linear(3, 8), reentrant, []
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(8)
        )

    def net(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
        return x

    def training_step(self, batch, batch_idx):
        first, second = (
            self.net(batch[0]),
            self.net(batch[0]),
        )  # of equal size: they share their masks
        self.equal.append(bool(torch.equal(first, second)))
        return first.sum() + second.sum() + self.net(batch[0][:1]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoStreams(LightningModule):
    """A block as diffusers writes it, called on whole and on part batches; keeps what was drawn and the logits after each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model, self.seen = TwoStreamToy(mode="checkpoint"), {"masks": [], "logits": []}

    def training_step(self, batch, batch_idx):
        x, c = batch[0].view(-1, 3, 6), batch[0][:, :6]
        y = self.model(x, c)
        gates = self.depth_gates
        self.seen["masks"].append(
            torch.stack(
                [gates.masks.column(gates.stacks[0], i, len(x)).detach() for i in range(4)], 1
            )
        )
        return y.square().mean() + self.model(x[:2], c[:2]).square().mean()

    def on_train_batch_end(self, *args):
        self.seen["logits"].append(
            torch.cat([p.detach().clone() for p in self.depth_gates.logits()])
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def denoiser():
    torch.manual_seed(3)
    model = create_model(
        "dit_digits", depth=4, hidden_size=16, num_heads=2, input_size=4, num_classes=5
    )
    for p in (
        model.parameters()
    ):  # the last layers start at zero, where nothing would be learned in three steps
        torch.nn.init.normal_(p, std=0.2)
    return model


class Watch(Callback):
    """Keeps what one rank drew, and its weights after each step."""

    def __init__(self, objective):
        self.seen = {
            "masks": [],
            "x_t": [],
            "t": [],
            "noise": [],
            "y": [],
            "logits": [],
            "weights": [],
        }
        column, draw = Masks.column, objective.draw

        def seen_column(masks, gates, unit, num_samples):
            mask = column(masks, gates, unit, num_samples)
            if not masks.is_forced:
                if unit == 0:
                    self.seen["masks"].append([])
                self.seen["masks"][-1].append(mask.detach().clone())
            return mask

        def drawing(x0, **kwargs):
            drawn = draw(x0, **kwargs)
            for name in ("x_t", "t", "noise"):
                self.seen[name].append(getattr(drawn, name).clone())
            return drawn

        Masks.column, objective.draw = seen_column, drawing
        self.undo = lambda: setattr(Masks, "column", column)

    def on_train_start(self, trainer, pl_module):
        drop = pl_module.drop_labels

        def drop_labels(y):
            y = drop(y)
            self.seen["y"].append(y.clone())
            return y

        pl_module.drop_labels = drop_labels

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gates = getattr(pl_module, "depth_gates", None)
        if gates is not None:
            self.seen["logits"].append([p.detach().clone() for p in gates.logits()])
        self.seen["weights"].append(
            {k: v.clone() for k, v in pl_module.denoiser.state_dict().items()}
        )


def direct(case, folder):
    """Leaves whether two passes of a step were equal, or the error."""
    module = Direct(reentrant=case == "reentrant")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=NUM_STEPS,
        logger=False,
        enable_checkpointing=False,
        callbacks=[
            DepthPruningCallback(
                "1:2", stacks="blocks", weight_update="full", save_dir=folder / "shallow"
            )
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    left = {}
    try:
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    except RuntimeError as error:
        left["error"] = str(error)
    torch.save({**left, "equal": module.equal}, folder / f"rank{trainer.global_rank}.pt")


def two_streams(folder):
    """Leaves masks and logits of every step."""
    module = TwoStreams()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=NUM_STEPS,
        logger=False,
        enable_checkpointing=False,
        callbacks=[
            DepthPruningCallback("1:2", weight_update="full", save_dir=folder / "shallow", init=0.0)
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(
        module, DataLoader(TensorDataset(torch.ones(24, 18)), batch_size=4)
    )  # alike on both ranks
    torch.save(module.seen, folder / f"rank{trainer.global_rank}.pt")


def main(case, folder):
    seed_everything(7)
    if case == "two_streams":
        return two_streams(folder)
    if case in ("direct", "reentrant"):
        return direct(case, folder)
    objective = GaussianDiffusion()
    x = torch.ones(16, 1, 4, 4)  # alike on both ranks, so that only the drawing can differ
    if case == "nan":
        x[1] = float("nan")  # the first batch of rank 1, and of it alone
    loader = DataLoader(
        TensorDataset(x, torch.zeros(16, dtype=torch.long)), batch_size=2, shuffle=False
    )
    watch = Watch(objective)
    kwargs = {"objective": objective, "label_dropout": 0.5}
    if case == "recovery":
        student = denoiser()
        student.blocks = student.blocks[:2]
        module = Recovery(
            student,
            teacher=denoiser(),
            distillation=Distillation(pairs={"blocks": [[0, 1], [1, 3]]}),
            **kwargs,
        )
        callbacks = [NonFiniteGuard(), watch]
    else:
        module = MaskLearning(denoiser(), **kwargs)
        pruning = DepthPruningCallback(
            "1:2",
            weight_update="lora" if case == "lora" else "full",
            save_dir=folder / "shallow",
            decisions_path=folder / "decisions.jsonl",
            init=0.0,
        )
        callbacks = [pruning, watch]
        if case == "saturated":
            callbacks.insert(1, Saturate())
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=NUM_STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(module, loader)
    watch.undo()
    watch.seen["masks"] = [torch.stack(columns, 1) for columns in watch.seen["masks"]]
    left = {
        **watch.seen,
        "teacher_in_state_dict": any("teacher" in key for key in module.state_dict()),
    }
    if case != "recovery":
        left |= {
            "kept_blocks": pruning.decision.kept_blocks,
            "num_skipped": pruning.guard.num_skipped,
            "shallow": pruning.shallow_model.state_dict(),
        }
    torch.save(left, folder / f"rank{trainer.global_rank}.pt")


class Saturate(Callback):
    """Logits so far apart that every sample of every rank drops the same blocks."""

    def on_fit_start(self, trainer, pl_module):
        with torch.no_grad():
            for logits in pl_module.depth_gates.logits():
                logits.copy_(torch.tensor([50.0, -50.0]))
