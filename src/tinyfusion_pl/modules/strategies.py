"""``strategy="fsdp2"``: ModelParallelStrategy with one data-parallel group of all processes."""

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
    """Shards weights, gradients and optimizer state over all processes.

    The module's ``configure_model`` does the sharding. Checkpoints are single files of full tensors
    like those of other strategies, written and read by the Trainer's ``CheckpointIO``, so a run can
    resume on a different number of devices.

    Args:
        kwargs: Further arguments of `ModelParallelStrategy`, such as ``timeout``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Put all processes of all nodes into one data-parallel group."""
        # Lightning's default is the number of nodes.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Full state of `optimizer`; empty for Lightning's stand-in when only gate logits train."""
        if not optimizer.param_groups:
            return {}
        return super().optimizer_state(optimizer)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load full tensors into the sharded module and optimizers; returns the checkpoint."""
        module = self.lightning_module
        assert self.model is not None and module is not None
        content = self.checkpoint_io.load_checkpoint(
            self.broadcast(checkpoint_path), weights_only=weights_only
        )
        expected, found = module.state_dict().keys(), content["state_dict"].keys()
        # torch's strict check would report gate logits as missing: no state dict contains them.
        if expected != found:
            raise RuntimeError(
                f"The checkpoint {checkpoint_path} does not fit the model. Missing keys: "
                f"{sorted(expected - found)[:3]}. Unexpected keys: {sorted(found - expected)[:3]}."
            )
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
