"""Exponential moving average of weights with warm-up, based on Lightning's weight averaging."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyfusion_pl.pruning.sharding import is_sharded, local


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)) for n updates, as in the EMA of TensorFlow and timm.

    The first updates quickly forget the initial weights.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def scaled_decay(decay: float, *, batch_size: int, reference_batch_size: int) -> float:
    """The decay with the same half-life in images for another batch size.

    It is decay ** (batch_size / reference_batch_size).
    """
    return decay ** (batch_size / reference_batch_size)


@runtime_checkable
class ShardsItself(Protocol):
    """A module whose ``configure_model`` only shards its weights, such as `Denoising`."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over the processes of `mesh`."""


class EMAWithWarmup(WeightAveraging):
    """Exponential moving average of the weights, with a warm-up of the decay.

    Buffers are copied, not averaged.

    Args:
        decay: Decay after warm-up, in [0, 1) (published: 0.9999).
        batch_size: Global batch size; None uses `decay` unscaled.
        reference_batch_size: Global batch size that `decay` was chosen for (published: 256), see
            `scaled_decay`.
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
                f"The EMA's batch_size is {batch_size} and its reference_batch_size is "
                f"{reference_batch_size}; give integers >= 1."
            )
        if batch_size is not None:
            decay = scaled_decay(
                decay, batch_size=batch_size, reference_batch_size=reference_batch_size
            )
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._update)

    def _update(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        average = get_ema_multi_avg_fn(warmed_up_decay(self.decay, int(num_averaged)))
        average([local(each) for each in averaged], [local(each) for each in current], num_averaged)

    # -- sharded weights (FSDP2) have a sharded average -----------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the module for its average; refuse half precision."""
        if stage == "fit" and trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"The Trainer's precision is {trainer.precision!r}, but averages with a decay near "
                "1 do not change in half precision. Use "
                f"{trainer.precision.replace('true', 'mixed')!r}, or train without averaged "
                "weights."
            )
        if stage != "fit" or not isinstance(pl_module, ShardsItself):
            super().setup(trainer, pl_module, stage)
        else:
            # Lightning would call configure_model first, but sharded models cannot be copied.
            self._average_model = AveragedModel(
                pl_module,
                device=self._device or pl_module.device,
                use_buffers=self._use_buffers,
                **self._kwargs,
            )
        if stage == "fit" and trainer.precision == "64-true":
            # Lightning converts the module to float64 only after this hook.
            self._average.double()

    @property
    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "setup creates the average"
        return self._average_model

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shard the average if the module is sharded."""
        if not is_sharded(pl_module):
            return
        averaged, mesh = self._average.module, pl_module.device_mesh
        assert isinstance(averaged, ShardsItself) and mesh is not None
        averaged.shard(mesh["data_parallel"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as full tensors in ``state_dict``, as Lightning does."""
        if self._average_model is None or not is_sharded(pl_module):
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        checkpoint["state_dict"] = get_model_state_dict(self._average_model.module, options=options)
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged.cpu()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average and the current weights."""
        if (
            self._average_model is None
            or not is_sharded(pl_module)
            or "current_model_state" not in checkpoint
        ):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        _load(self._average_model.module, checkpoint["state_dict"])
        self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        _load(pl_module, checkpoint["current_model_state"])


def _load(module: nn.Module, state: dict[str, Any]) -> None:
    """Load full tensors into a sharded module."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
