"""Depth pruning of a text-to-image model of diffusers: search, freeze, distil, save, reopen.

    python examples/prune_diffusers.py [--output-dir outputs/flux]
    python examples/prune_diffusers.py --model FLUX_FOLDER --data cached.safetensors
        --precision bf16-true

Without --model, a tiny FLUX is created and trained first, on synthetic latents with one prompt per
class: about two minutes on 2 cores.

`--model` is a folder that `FluxTransformer2DModel.from_pretrained` opens, or a pipeline's folder
with that model in `transformer/`. `--data` is a safetensors file of N samples, which the text
encoders and the VAE made beforehand:

    latents                (N, C, H, W)  as the VAE gives them, shifted and scaled; H and W even
    prompt_embeds          (N, L, D)     last hidden states of T5
    pooled_prompt_embeds   (N, P)        pooled output of CLIP

Ends with a table: blocks, parameters and distance to the teacher, of the teacher, the cut and the
recovered model. The distance is the mean square of the difference of the predicted velocities over
that of the teacher's, on held-out samples with fixed noise."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning threads slow each other down

import torch
from diffusers import FluxTransformer2DModel
from lightning.pytorch import LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl import DepthPruningCallback, DistillationCallback

STACKS = ("transformer_blocks", "single_transformer_blocks")
KEYS = ("latents", "prompt_embeds", "pooled_prompt_embeds")
TINY = dict(
    in_channels=16,
    num_layers=4,
    num_single_layers=8,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 6, 6),
    guidance_embeds=True,
)


class FlowMatching(LightningModule):
    """Flow matching on FLUX: an ordinary LightningModule, unaware of pruning and distillation."""

    def __init__(self, transformer: nn.Module, *, lr: float) -> None:
        super().__init__()
        self.transformer, self.lr = transformer, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        latents, prompt_embeds, pooled = (tensor.to(self.dtype) for tensor in batch)
        noise = torch.randn_like(latents)
        t = torch.randn(
            len(latents), device=self.device
        ).sigmoid()  # logit-normal, as FLUX and SD3 were trained
        velocity = predict(
            self.transformer, interpolate(latents, noise, t), t, prompt_embeds, pooled
        )
        loss = nn.functional.mse_loss(velocity.float(), pack(noise - latents).float())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, num_steps, eta_min=0.05 * self.lr
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, 1, 1, 1).to(latents.dtype)
    return (1 - t) * latents + t * noise


def pack(latents: Tensor) -> Tensor:
    """Patches of 2x2 as tokens. (B, C, H, W) -> (B, H/2 * W/2, 4 C)"""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT


def predict(
    transformer: nn.Module, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, pooled: Tensor
) -> Tensor:
    """The velocity, from the call that FluxPipeline makes. (B, T, 4 C)"""
    height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
    guided = transformer.config.guidance_embeds
    return transformer(
        hidden_states=pack(x_t),
        timestep=t.to(x_t.dtype),
        guidance=torch.full_like(t, 3.5) if guided else None,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        img_ids=img_ids.to(x_t),
        txt_ids=x_t.new_zeros(prompt_embeds.shape[1], 3),
        return_dict=False,
    )[0]


# -- model and data
# ---------------------------------------------------------------------------------
def open_model(path: str | None) -> FluxTransformer2DModel:
    if path is None:
        return FluxTransformer2DModel(**TINY)
    inside = "transformer" if (Path(path) / "transformer").is_dir() else None
    return FluxTransformer2DModel.from_pretrained(path, subfolder=inside)


def open_data(path: str, config: Mapping) -> dict[str, Tensor]:
    """The tensors of a file of cached samples, held against what the model takes."""
    data = load_file(path)
    if missing := [key for key in KEYS if key not in data]:
        raise ValueError(
            f"{path} has no {missing}; it holds {sorted(data)}. See --help for the format."
        )
    channels = {
        "latents": config["in_channels"] // 4,
        "prompt_embeds": config["joint_attention_dim"],
        "pooled_prompt_embeds": config["pooled_projection_dim"],
    }
    axis = {"latents": 1, "prompt_embeds": 2, "pooled_prompt_embeds": 1}
    for key, num in channels.items():
        shape = tuple(data[key].shape)
        if len(shape) <= axis[key] or shape[axis[key]] != num or shape[0] != len(data["latents"]):
            raise ValueError(
                f"'{key}' of {path} is {shape}; {num} was expected on axis {axis[key]}, and as "
                f"many samples in all three."
            )
    if data["latents"].ndim != 4 or any(size % 2 for size in data["latents"].shape[2:]):
        raise ValueError(
            f"'latents' of {path} is {tuple(data['latents'].shape)}; (N, C, H, W) with even H "
            f"and W was expected."
        )
    return {key: data[key] for key in KEYS}


def make_data(
    config: Mapping, *, num_samples: int = 1024, num_classes: int = 8, size: int = 8
) -> dict[str, Tensor]:
    """Waves whose direction and channels are their class's, the phase and strength their own; one
    prompt a class.
    """
    y = torch.arange(num_samples) % num_classes
    prompts = torch.randn(num_classes, 6, config["joint_attention_dim"])
    pooled = torch.randn(num_classes, config["pooled_projection_dim"])
    direction = torch.randn(num_classes, 2)[y, :, None, None] * 1.5
    channels = torch.randn(num_classes, config["in_channels"] // 4)[y]
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    phase = (direction * grid).sum(1) + torch.rand(num_samples, 1, 1) * 2 * torch.pi
    waves = (
        channels[:, :, None, None] * phase.sin()[:, None] * (0.5 + torch.rand(num_samples, 1, 1, 1))
    )
    return {"latents": waves, "prompt_embeds": prompts[y], "pooled_prompt_embeds": pooled[y]}


# -- measuring
# --------------------------------------------------------------------------------------
@torch.no_grad()
def velocities(transformer: nn.Module, held_out: list[Tensor]) -> Tensor:
    """What the model predicts for held-out samples at eight timesteps, with fixed noise."""
    training, p = transformer.training, next(transformer.parameters())
    generator, outputs = torch.Generator().manual_seed(0), []
    for t in torch.linspace(0.06, 0.94, 8):
        latents, prompt_embeds, pooled = (tensor.to(p) for tensor in held_out)
        noise = torch.randn(latents.shape, generator=generator).to(p)
        t = t.expand(len(latents)).to(p.device)
        outputs.append(
            predict(transformer.eval(), interpolate(latents, noise, t), t, prompt_embeds, pooled)
            .float()
            .cpu()
        )
    transformer.train(training)
    return torch.stack(outputs)


def distance(ours: Tensor, teacher: Tensor) -> float:
    return float((ours - teacher).square().mean() / teacher.square().mean())


def row(name: str, model: nn.Module, far: float) -> dict:
    depths = [len(getattr(model, stack)) for stack in STACKS]
    return {
        "model": name,
        "depth": depths,
        "parameters": sum(p.numel() for p in model.parameters()),
        "distance": far,
    }


def print_table(rows: list[dict]) -> None:
    print(f"\n{'':24}{'blocks':>10}{'parameters':>16}{'distance to the teacher':>26}")
    for each in rows:
        blocks = " + ".join(map(str, each["depth"]))
        print(f"{each['model']:24}{blocks:>10}{each['parameters']:>16,}{each['distance']:>26.4f}")


# -- the job
# ----------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> list[dict]:
    seed_everything(0)
    dense = open_model(args.model)
    if args.gradient_checkpointing:
        dense.enable_gradient_checkpointing()
    data = make_data(dense.config) if args.data is None else open_data(args.data, dense.config)
    samples = list(data.values())
    num_held_out = min(64, len(samples[0]) // 4)
    held_out = [tensor[:num_held_out] for tensor in samples]
    loader = DataLoader(
        TensorDataset(*(tensor[num_held_out:] for tensor in samples)),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
    )

    def fit(module: LightningModule, num_steps: int, *callbacks) -> None:
        module.train()
        Trainer(
            max_steps=num_steps,
            max_epochs=-1,
            callbacks=list(callbacks),
            precision=args.precision,
            gradient_clip_val=1.0,
            devices=1,
            accelerator=args.accelerator,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).fit(module, loader)

    if args.model is None:
        fit(FlowMatching(dense, lr=2e-3), args.pretrain_steps)
    teacher_velocities = velocities(dense, held_out)

    output_dir = Path(args.output_dir)
    pattern = dict(zip(STACKS, args.pattern))
    pruning = DepthPruningCallback(pattern, save_dir=output_dir / "cut")
    module = FlowMatching(dense, lr=args.lr)
    fit(module, args.search_steps, pruning)

    pruning.detach(module)  # the dense model again, without gates and adapters
    teacher, module.transformer = module.transformer, pruning.shallow_model
    cut = velocities(module.transformer, held_out)
    recovery = DistillationCallback(
        teacher, module="transformer", decision=pruning.decision, offload=args.offload_teacher
    )
    fit(module, args.recovery_steps, recovery)
    module.transformer.save_pretrained(output_dir / "recovered")

    recovered = FluxTransformer2DModel.from_pretrained(
        output_dir / "recovered"
    )  # the plain class: the folder is all it takes
    rows = [
        row("teacher", teacher, 0.0),
        row("cut", recovered, distance(cut, teacher_velocities)),
        row(
            "cut and recovered",
            recovered,
            distance(velocities(recovered, held_out), teacher_velocities),
        ),
    ]
    print_table(rows)
    kept = ", ".join(f"{path} {blocks}" for path, blocks in pruning.decision.kept_blocks.items())
    print(
        f"kept blocks: {kept}\nsaved in {output_dir / 'recovered'}, opened by "
        f"FluxTransformer2DModel.from_pretrained"
    )
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", default="outputs/flux", help="folder of the shallow and the recovered model"
    )
    parser.add_argument(
        "--model", help="folder of a FLUX in diffusers' format; default: a tiny one, trained first"
    )
    parser.add_argument(
        "--data",
        help="safetensors file of cached samples; default: synthetic ones of the model's widths",
    )
    parser.add_argument(
        "--pattern",
        nargs=2,
        default=["1:2", "2:4"],
        metavar="N:M",
        help="of the double- and single-stream blocks",
    )
    parser.add_argument("--pretrain-steps", type=int, default=180, help="of the tiny model")
    parser.add_argument("--search-steps", type=int, default=60)
    parser.add_argument("--recovery-steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="of search and recovery; far lower for a real model"
    )
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true", help="precision of the Trainer")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--offload-teacher", action="store_true", help="keep the teacher on the CPU between batches"
    )
    return parser


if __name__ == "__main__":
    main(parser().parse_args())
