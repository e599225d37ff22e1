"""LightningModules of a user: a small residual classifier, built at three different times."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class ResidualBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x)))


class Classifier(nn.Module):
    def __init__(self, depth=4, dim=8):
        super().__init__()
        self.stem = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(ResidualBlock(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def new_classifier():
    torch.manual_seed(0)
    return Classifier()


class Base(LightningModule):
    """`optimizers_kind`: what configure_optimizers gives."""

    def __init__(self, lr=1e-2, optimizers_kind="onecycle"):
        super().__init__()
        self.lr, self.optimizers_kind = lr, optimizers_kind
        self.model = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.optimizers_kind == "plain":
            return optimizer
        if self.optimizers_kind == "lambda":
            return [optimizer], [
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            ]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=1000)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self):
        g = torch.Generator().manual_seed(1)
        # Every batch has the same eight samples, so a resumed run sees the same data although
        # its loader restarts.
        x = torch.randn(8, 3, generator=g).repeat(8, 1)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


class InInit(Base):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model = new_classifier()


class InSetup(Base):
    def setup(self, stage):
        if self.model is None:
            self.model = new_classifier()


class InConfigureModel(Base):
    def configure_model(self):
        if self.model is None:
            self.model = new_classifier()


class Manual(InInit):
    """Manual optimization with two optimizers, each stepped every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(
                [*self.model.stem.parameters(), *self.depth_gates.parameters()], lr=0.1
            ),
            torch.optim.AdamW(
                [*self.model.blocks.parameters(), *self.model.head.parameters()], lr=1e-2
            ),
        )
