"""Training a denoiser on an objective: the module that the teacher is trained with and the others build on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tinyfusion_pl.modules.optimizers import use_fused
from tinyfusion_pl.modules.random_state import OwnRandomness
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.pruning.compiled import compile_blocks, uncompile_blocks
from tinyfusion_pl.pruning.sharding import is_sharded, shard

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class Denoising(OwnRandomness):
    """A denoiser and an objective; batches are (x, y). The denoiser is put into training mode when fit starts.

    Args:
        denoiser: Called as ``denoiser(x_t, t, y)``; has ``num_classes``, which is also its null label.
        objective: See `tinyfusion_pl.objectives.Objective`.
        optimizer: Makes the optimizer from the parameters; default: AdamW 1e-4 without weight decay.
        scheduler: Makes a learning rate scheduler, stepped each optimizer step, from ``(optimizer, num_steps=...)``; default: none.
        label_dropout: Probability that a sample's label becomes the null label, in [0, 1] (published: 0.1).
    """

    default_lr = 1e-4
    compiles = False
    """Whether a fit compiles the blocks, each by itself; gates, hooks and the names of parameters are as without."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        objective: Any,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(
                f"label_dropout is {label_dropout}; give a probability in [0, 1] (published: 0.1)."
            )
        if label_dropout and not getattr(denoiser, "has_null_label", True):
            raise ValueError(
                f"label_dropout is {label_dropout}, but the denoiser has no null label (class_dropout_prob=0) to put in a "
                "label's place. Set label_dropout to 0, or build the denoiser with class_dropout_prob > 0."
            )
        self.denoiser, self.objective = denoiser, objective
        self.optimizer_factory, self.scheduler_factory, self.label_dropout = (
            optimizer,
            scheduler,
            label_dropout,
        )

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of all models that a step runs."""
        yield from get_blocks(self.denoiser)

    def configure_model(self) -> None:
        """Share out the denoiser's weights where the strategy is Lightning's ModelParallelStrategy (``trainer=fsdp2``).

        Raises:
            ValueError: for tensor parallelism, whose processes would each draw other noise for the same samples.
        """
        mesh = self._device_mesh
        if mesh is None or is_sharded(self.denoiser):
            return
        self.check_sharded()
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"The strategy divides each layer over {mesh['tensor_parallel'].size()} processes (tensor_parallel_size), "
                "which the denoisers do not support. Give strategy='fsdp2', which shares out whole blocks."
            )
        self.shard(mesh["data_parallel"])

    def check_sharded(self) -> None:
        """`ValueError` for settings that do not go with weights that are shared out."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Share out the denoiser's weights over the processes of `mesh`."""
        shard(self.denoiser, mesh)

    def on_fit_start(self) -> None:
        self.denoiser.train()  # what loads a model leaves it in evaluation mode, where gates draw no masks and Lightning leaves it
        self.get_ready()
        if self.compiles:
            compile_blocks(self.blocks())

    def get_ready(self) -> None:
        """What a fit starts with, before blocks are compiled."""

    def uncompile(self) -> None:
        """Let blocks run as they are."""
        uncompile_blocks(self.blocks())

    def drop_labels(self, y: Tensor) -> Tensor:
        """Labels (N,) with each one replaced by the null label with probability `label_dropout`."""
        if not self.label_dropout:
            return y
        return torch.where(
            torch.rand(y.shape, device=y.device) < self.label_dropout, self.denoiser.num_classes, y
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self._logged(self.losses(x, self.drop_labels(y)), num_samples=len(x))

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Per-sample losses (N,), the one to minimise under "loss"."""
        draw = self.objective.draw(x)
        return self.objective.losses(self.denoiser(draw.x_t, draw.t, y), draw)

    def _logged(self, losses: dict[str, Tensor], *, num_samples: int) -> Tensor:
        means = {name: value.mean() for name, value in losses.items()}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in means.items() if name != "loss"},
            batch_size=num_samples,
        )
        self.log("train/loss", means["loss"].detach(), prog_bar=True, batch_size=num_samples)
        # The step that this batch is part of, counted from 1 as callbacks count: Lightning logs by it instead of counting from 0.
        self.log("step", torch.tensor(self.trainer.global_step + 1.0), batch_size=num_samples)
        return means["loss"]

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.trained_parameters() if p.requires_grad]
        if not parameters:  # gates alone are learned: Lightning still needs something to step
            return None
        made = self.make_optimizers(
            parameters, num_steps=int(self.trainer.estimated_stepping_batches)
        )
        use_fused(made["optimizer"] if isinstance(made, dict) else made)
        return made

    def make_optimizers(self, parameters: list[nn.Parameter], *, num_steps: int) -> Any:
        """Optimizer and scheduler for `parameters` over `num_steps`, as ``configure_optimizers`` returns them."""
        optimizer = (
            self.optimizer_factory
            or (lambda p: torch.optim.AdamW(p, lr=self.default_lr, weight_decay=0.0))
        )(parameters)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer, num_steps=num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.denoiser.parameters()


def get_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all stacks of `model`."""
    for stack in find_stacks(model).values():
        yield from stack
