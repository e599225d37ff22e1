"""`Denoising`: trains a denoiser, such as the teacher. The base of the other training modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tinyfusion_pl.modules.optimizers import use_fused
from tinyfusion_pl.modules.random_state import OwnRandomness
from tinyfusion_pl.objectives import Objective
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.pruning.compiled import compile_blocks, uncompile_blocks
from tinyfusion_pl.pruning.sharding import is_sharded, shard

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class Denoising(OwnRandomness):
    """Trains a denoiser on an objective. Batches are ``(x, y)``.

    The denoiser is set to training mode when fit starts.

    Args:
        denoiser: Called as ``denoiser(x_t, t, y)``. Its ``num_classes`` is also its null label.
        objective: See `tinyfusion_pl.objectives.Objective`.
        optimizer: Creates the optimizer from the parameters. Default: AdamW with learning rate 1e-4
            and no weight decay.
        scheduler: Creates a learning rate scheduler from ``(optimizer, num_steps=...)``, stepped
            after each optimizer step. Default: none.
        label_dropout: Probability of replacing a label by the null label, in [0, 1]
            (published: 0.1).
    """

    default_lr = 1e-4
    compiles = False
    """Whether fit compiles each block. Gates, hooks and parameter names do not change."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        objective: Objective,
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
                f"label_dropout is {label_dropout}, but the denoiser has no null label to replace "
                "labels by (class_dropout_prob=0). Set label_dropout to 0, or build the denoiser "
                "with class_dropout_prob > 0."
            )
        self.denoiser, self.objective = denoiser, objective
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.label_dropout = label_dropout

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of all models that a training step runs."""
        yield from get_blocks(self.denoiser)

    def configure_model(self) -> None:
        """Shard the denoiser under Lightning's ModelParallelStrategy (``trainer=fsdp2``).

        Raises:
            ValueError: for tensor parallelism, where each process would draw different noise for
                the same samples.
        """
        mesh = self._device_mesh
        if mesh is None or is_sharded(self.denoiser):
            return
        self.check_sharded()
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"The strategy splits each layer over {mesh['tensor_parallel'].size()} processes "
                "(tensor_parallel_size), which denoisers do not support. Use strategy='fsdp2', "
                "which shards whole blocks."
            )
        self.shard(mesh["data_parallel"])

    def check_sharded(self) -> None:
        """Raise `ValueError` for settings that sharded weights do not support."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the denoiser's weights over the processes of `mesh`."""
        shard(self.denoiser, mesh)

    def on_fit_start(self) -> None:
        """Set the denoiser to training mode, prepare the fit, compile the blocks."""
        # Loading a model leaves it in evaluation mode, where gates draw no masks. Lightning keeps
        # the mode.
        self.denoiser.train()
        self.get_ready()
        if self.compiles:
            compile_blocks(self.blocks())

    def get_ready(self) -> None:
        """Prepare the fit, before blocks are compiled."""

    def uncompile(self) -> None:
        """Run the blocks uncompiled again."""
        uncompile_blocks(self.blocks())

    def drop_labels(self, y: Tensor) -> Tensor:
        """Replace each label of `y` (N,) by the null label with probability `label_dropout`."""
        if not self.label_dropout:
            return y
        null_label = cast(int, self.denoiser.num_classes)
        return torch.where(torch.rand(y.shape, device=y.device) < self.label_dropout, null_label, y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Drop labels, compute the losses, log their means, return the mean loss."""
        x, y = batch
        return self._logged(self.losses(x, self.drop_labels(y)), num_samples=len(x))

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Per-sample losses (N,); "loss" is the one to minimize."""
        draw = self.objective.draw(x)
        return self.objective.losses(self.denoiser(draw.x_t, draw.t, y), draw)

    def _logged(self, losses: Mapping[str, Tensor], *, num_samples: int) -> Tensor:
        means = {name: value.mean() for name, value in losses.items()}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in means.items() if name != "loss"},
            batch_size=num_samples,
        )
        self.log("train/loss", means["loss"].detach(), prog_bar=True, batch_size=num_samples)
        # Lightning uses a logged "step" as the x-axis. Steps count from 1, as in the callbacks.
        self.log("step", torch.tensor(self.trainer.global_step + 1.0), batch_size=num_samples)
        return means["loss"]

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler for the trainable parameters; None if only gates are trained."""
        parameters = [p for p in self.trained_parameters() if p.requires_grad]
        if not parameters:
            return None
        num_steps = int(self.trainer.estimated_stepping_batches)
        configured = self.make_optimizers(parameters, num_steps=num_steps)
        use_fused(configured["optimizer"] if isinstance(configured, dict) else configured)
        return configured

    def make_optimizers(self, parameters: list[nn.Parameter], *, num_steps: int) -> Any:
        """Create what ``configure_optimizers`` returns for `parameters` and `num_steps`."""
        if self.optimizer_factory is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters, lr=self.default_lr, weight_decay=0.0
            )
        else:
            optimizer = self.optimizer_factory(parameters)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer, num_steps=num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Candidates for the optimizer; those with ``requires_grad=False`` are filtered out."""
        return self.denoiser.parameters()


def get_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all stacks of `model`."""
    for stack in find_stacks(model).values():
        yield from stack
