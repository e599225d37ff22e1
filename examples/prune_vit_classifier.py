"""Prune a timm ViT that classifies digits, in your own LightningModule.

    python examples/prune_vit_classifier.py [--output-dir outputs/vit]

Trains 8 blocks, learns which 4 to keep (two added lines: the callback and its path), creates the
shallow model, fine-tunes it, and prints the accuracy on held-out digits at each stage. About a
minute on 2 cores.
"""

from __future__ import annotations

import argparse

import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl import DepthPruningCallback, load_shallow

MODEL = {
    "name": "timm/vit_tiny_patch16_224",
    "kwargs": dict(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=8, num_heads=4
    ),
}


class Classifier(LightningModule):
    """An ordinary LightningModule: nothing in it knows of pruning."""

    def __init__(self, model: nn.Module, lr: float = 3e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def digits() -> tuple[DataLoader, tuple[Tensor, Tensor]]:
    """Training batches, and held-out images with their labels."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    train, held_out = train_test_split(
        range(len(y)), test_size=0.2, stratify=labels, random_state=0
    )
    return DataLoader(
        TensorDataset(x[train], y[train]), batch_size=64, shuffle=True, drop_last=True
    ), (x[held_out], y[held_out])


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    x, y = data
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def fit(module: LightningModule, loader: DataLoader, num_steps: int, *callbacks) -> None:
    module.train()
    Trainer(
        max_steps=num_steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    ).fit(module, loader)


def main(output_dir: str, num_steps: int) -> dict[str, float]:
    seed_everything(0)
    loader, held_out = digits()
    dense = timm.create_model(MODEL["name"].removeprefix("timm/"), **MODEL["kwargs"])
    fit(Classifier(dense), loader, num_steps)
    results = {f"dense, {len(dense.blocks)} blocks": accuracy(dense, held_out)}

    pruning = DepthPruningCallback(
        "1:2", stacks="model.blocks", save_dir=output_dir, model_factory=MODEL
    )
    fit(Classifier(dense, lr=1e-3), loader, num_steps // 2, pruning)

    shallow = load_shallow(output_dir)  # the folder is all it takes
    results[f"shallow, {len(shallow.blocks)} blocks, before fine-tuning"] = accuracy(
        shallow, held_out
    )
    fit(Classifier(shallow, lr=1e-3), loader, num_steps // 2)
    results[f"shallow, {len(shallow.blocks)} blocks, fine-tuned"] = accuracy(shallow, held_out)

    print(f"kept blocks: {pruning.decision.kept_blocks['blocks']}; saved in {output_dir}")
    for name, value in results.items():
        print(f"{name}: {value:.1%} of {len(held_out[1])} held-out digits")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", default="outputs/vit", help="folder of the shallow model")
    parser.add_argument(
        "--num-steps",
        type=int,
        default=500,
        help="optimizer steps of the dense model; half as many for the others",
    )
    args = parser.parse_args()
    main(args.output_dir, args.num_steps)
