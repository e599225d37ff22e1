"""``strategy="fsdp2"``: Lightning's ModelParallelStrategy with all processes in one data-parallel group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.optim import Optimizer


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state are shared out over all processes, as a module's ``configure_model`` says.

    Checkpoints are single files of whole tensors, the same as any other strategy's, written and read by the Trainer's ``CheckpointIO``:
    a run may resume on another number of devices.

    Args:
        timeout: See `ModelParallelStrategy`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = (
            self.num_nodes * self.num_processes
        )  # else Lightning's is the number of nodes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not optimizer.param_groups:  # Lightning's stand-in where nothing but gate logits trains
            return {}
        return super().optimizer_state(optimizer)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = self.checkpoint_io.load_checkpoint(
            self.broadcast(checkpoint_path), weights_only=weights_only
        )
        expected, found = self.lightning_module.state_dict().keys(), content["state_dict"].keys()
        if (
            expected != found
        ):  # torch's own check would miss the gate logits, which are in no state dict
            raise RuntimeError(f"The checkpoint {checkpoint_path} does not fit the model: {sorted(expected - found)[:3]} are missing, and "
                               f"{sorted(found - expected)[:3]} are not known.")  # fmt: skip
        set_model_state_dict(
            self.model,
            content["state_dict"],
            options=StateDictOptions(full_state_dict=True, strict=False),
        )
        for optimizer, state in zip(self.optimizers, content["optimizer_states"]):
            if state:
                named = FullyShardedDataParallel.rekey_optim_state_dict(
                    state, OptimStateKeyType.PARAM_NAME, self.model
                )
                set_optimizer_state_dict(
                    self.model, optimizer, named, options=StateDictOptions(full_state_dict=True)
                )
        return content


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register(
        "fsdp2", FSDP2Strategy, description="Fully sharded data parallel (FSDP2) over all processes"
    )
