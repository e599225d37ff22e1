"""Exponential moving average of weights with a warm-up, on Lightning's own weight averaging."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyfusion_pl.pruning.sharding import is_sharded, local


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): the first updates forget the initial weights quickly (as in TensorFlow's and timm's EMA)."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def scaled_decay(decay: float, *, batch_size: int, reference_batch_size: int) -> float:
    """The decay that keeps the half-life in images when the batch is another: decay ** (batch_size / reference_batch_size)."""
    return decay ** (batch_size / reference_batch_size)


class EMAWithWarmup(WeightAveraging):
    """Lightning's weight averaging with an exponential average, its decay warmed up, buffers copied instead of averaged.

    Args:
        decay: Decay once warmed up, in [0, 1) (published: 0.9999).
        batch_size: Images of an optimizer step, all devices together; None: `decay` holds as it is.
        reference_batch_size: Batch that `decay` was chosen for (published: 256), see `scaled_decay`.
    """

    def __init__(
        self,
        *,
        decay: float = 0.9999,
        batch_size: int | None = None,
        reference_batch_size: int = 256,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"The EMA decay is {decay}; give a number in [0, 1) (published: 0.9999)."
            )
        if (batch_size is not None and batch_size < 1) or reference_batch_size < 1:
            raise ValueError(
                f"The EMA's batch_size is {batch_size} and its reference_batch_size {reference_batch_size}; give counts >= 1."
            )
        if batch_size is not None:
            decay = scaled_decay(
                decay, batch_size=batch_size, reference_batch_size=reference_batch_size
            )
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        average = get_ema_multi_avg_fn(warmed_up_decay(self.decay, int(num_averaged)))
        average([local(each) for each in averaged], [local(each) for each in current], num_averaged)

    # -- weights that are shared out (FSDP2): so is their average ------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"The Trainer's precision is {trainer.precision!r}: averages with a decay near 1 do not move in half precision. Use "
                f"{trainer.precision.replace('true', 'mixed')!r}, or train without averaged weights."
            )
        if stage != "fit" or not _shards_itself(pl_module):
            super().setup(trainer, pl_module, stage)
        else:
            # Lightning would call configure_model, and copy a model that cannot be copied once it is shared out.
            self._average_model = AveragedModel(
                pl_module,
                device=self._device or pl_module.device,
                use_buffers=self._use_buffers,
                **self._kwargs,
            )
        if (
            stage == "fit" and trainer.precision == "64-true"
        ):  # Lightning makes the module double after this
            self._average_model.double()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module):
            self._average_model.module.shard(pl_module.device_mesh["data_parallel"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None or not is_sharded(pl_module):
            return super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        checkpoint["state_dict"] = get_model_state_dict(self._average_model.module, options=options)
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged.cpu()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (
            self._average_model is None
            or not is_sharded(pl_module)
            or "current_model_state" not in checkpoint
        ):
            return super().on_load_checkpoint(trainer, pl_module, checkpoint)
        _load(self._average_model.module, checkpoint["state_dict"])
        self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        _load(pl_module, checkpoint["current_model_state"])


def _shards_itself(pl_module: LightningModule) -> bool:
    """Whether it is one of the modules whose ``configure_model`` does nothing but that."""
    return callable(getattr(pl_module, "shard", None))


def _load(module: nn.Module, state: dict[str, Any]) -> None:
    """Put whole tensors into a sharded module."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
