"""What the tests of a family share: weights that are nowhere zero, and a short mask learning in a real Trainer."""

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl import DepthPruningCallback, MaskLearning
from tinyfusion_pl.objectives import GaussianDiffusion


def stirred(model):
    """`model` with noise on its trained parameters: adaLN-Zero would hide every block."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def learn_masks(denoiser, pattern, folder, *, learn_sigma, max_steps=3, **kwargs):
    """The callback after a few steps of mask learning on random latents of the denoiser's size."""
    c = denoiser.config
    x = torch.randn(8, c["in_channels"], c["input_size"], c["input_size"])
    data = DataLoader(TensorDataset(x, torch.arange(8) % c["num_classes"]), batch_size=4)
    callback = DepthPruningCallback(pattern, save_dir=folder / "shallow", **kwargs)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(MaskLearning(denoiser, objective=GaussianDiffusion(learn_sigma=learn_sigma)), data)
    return callback
