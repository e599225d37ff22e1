"""A LightningModule around a model that the project did not write, fitted by a real Trainer."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from foreign.zoo import sample_of


class Fitted(LightningModule):
    """Calls `model` with the inputs of its pipeline, made anew for each batch."""

    def __init__(self, model, make_inputs, *, batch_size=3):
        super().__init__()
        self.transformer, self.make_inputs, self.batch_size = model.train(), make_inputs, batch_size

    def training_step(self, batch, batch_idx):
        args, kwargs = self.make_inputs(self.batch_size)
        return sample_of(self.transformer(*args, **kwargs)).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad] or self.parameters(), lr=1e-2
        )

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(12, 1)))


def fit(module, *callbacks, folder, max_steps=2, **kwargs):
    """Fit `module`; without files beside those of the callbacks."""
    kwargs = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **kwargs}
    trainer = Trainer(
        max_steps=max_steps, accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(module)
    return trainer
