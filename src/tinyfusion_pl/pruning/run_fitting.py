"""The linear maps that removed runs leave, in closed form: ridge least squares of what a run adds to the hidden states of each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import get_stack, stated_units
from tinyfusion_pl.pruning.calls import Call, block_signature, quiet
from tinyfusion_pl.pruning.run_maps import Run, get_maps, get_place, removed_runs
from tinyfusion_pl.pruning.streams import find_streams

RIDGE = 1e-4  # over the mean variance of the hidden states' channels; our choice
Calls = Iterable[tuple[tuple, Mapping[str, Any]]]
Fitted = dict[str, dict[Run, tuple[Tensor, Tensor]]]


class RidgeSums:
    """Sums over tokens, in float64, from which a ridge regression with an intercept is solved."""

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)

        self.num, self.x, self.y = 0, zeros(width), zeros(width)
        self.xx, self.xy = zeros(width, width), zeros(width, width)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Tokens `x` and targets `y` (..., D)."""
        x, y = (each.detach().reshape(-1, each.shape[-1]).double() for each in (x, y))
        self.num += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (D, D), as of `nn.Linear`, and bias (D,): least mean |W x + b - y|^2 + ridge * v * |W|^2, v the mean variance of x."""
        mean_x, mean_y = self.x / self.num, self.y / self.num
        covariance = self.xx / self.num - torch.outer(mean_x, mean_x)
        cross = self.xy / self.num - torch.outer(mean_x, mean_y)
        variance = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        penalty = (
            ridge
            * variance
            * torch.eye(len(mean_x), dtype=covariance.dtype, device=covariance.device)
        )
        weight = torch.linalg.solve(covariance + penalty, cross).T
        return weight, mean_y - weight @ mean_x


@torch.no_grad()
def stream_widths(
    model: nn.Module, paths: Sequence[str], call: tuple[tuple, Mapping[str, Any]]
) -> dict[str, int]:
    """The width of the hidden states in each stack, where runs of its blocks can be replaced by linear maps.

    Args:
        model: The dense model; it is run once.
        paths: Paths of its stacks.
        call: ``(args, kwargs)``; a few samples do.

    Raises:
        ValueError: for blocks that only go together, of more than one stream, whose hidden states
            are not (N, T, D), or that do not take what the block before them returned.
    """
    for path in paths:
        if whole := [unit for unit in stated_units(model, path) or () if len(unit) > 1]:
            raise ValueError(
                _refusal(path, f"some of its blocks only go together, as {list(whole[0])}")
            )
    found: dict[str, int] = {}
    last: dict[str, tuple[Tensor, int]] = {}  # what the block before returned

    def look(
        path: str, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        given, name = Call(block_signature(block), args, kwargs), f"{path}.{index}"
        if not isinstance(output, Tensor):
            raise ValueError(
                _refusal(
                    path,
                    f"block {index} returns a {type(output).__name__}, not one tensor of hidden states",
                )
            )
        streams = find_streams(block, given, output, name=name)
        first = given.parameters[0] if given.parameters else None
        x = given.tensors.get(streams.names[0])
        if (
            streams.names != [first]
            or x is None
            or x.ndim != 3
            or any(getattr(m, "batch_first", True) is False for m in block.modules())
        ):
            shape = "none" if x is None else tuple(x.shape)
            raise ValueError(_refusal(path, f"block {index} carries {streams.names} of shape {shape}, where its first argument of shape "
                                            "(batch, tokens, width) was expected"))  # fmt: skip
        if path in last and last[path][1] == index - 1 and not torch.equal(last[path][0], x):
            raise ValueError(
                _refusal(path, f"block {index} does not take what block {index - 1} returned")
            )
        found[path], last[path] = x.shape[-1], (output, index)

    hooks = [
        block.register_forward_hook(
            lambda block, args, kwargs, output, path=path, index=index: look(path, index, block, args, kwargs, output), with_kwargs=True
        )
        for path in paths
        for index, block in enumerate(get_stack(model, path))
    ]  # fmt: skip
    try:
        with quiet(model):
            model(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [path for path in paths if path not in found]:
        raise ValueError(_refusal(unseen[0], "its blocks did not run"))
    return found


@torch.no_grad()
def fit_maps(
    model: nn.Module,
    kept_blocks: Mapping[str, Sequence[int]],
    calls: Calls,
    *,
    ridge: float = RIDGE,
) -> Fitted:
    """For each removed run, weight and bias of the map from its input to what it adds, output minus input, of each token.

    Args:
        model: The dense model.
        kept_blocks: By stack path; stacks that `stream_widths` accepts.
        calls: ``(args, kwargs)`` of the model, on its device.
        ridge: Penalty on the weights, over the mean variance of the input's channels, > 0.
    """
    sums: dict[tuple[str, Run], RidgeSums] = {}
    with quiet(model), _collecting(model, kept_blocks, sums):
        for args, kwargs in calls:
            model(*args, **kwargs)
    fitted: Fitted = {}
    for (path, run), each in sums.items():
        fitted.setdefault(path, {})[run] = each.solve(ridge)
    return fitted


@contextmanager
def _collecting(
    model: nn.Module,
    kept_blocks: Mapping[str, Sequence[int]],
    sums: dict[tuple[str, Run], RidgeSums],
) -> Iterator[None]:
    inputs: dict[tuple[str, Run], tuple[Tensor, int]] = {}
    hooks: list[Any] = []

    def collect(key: tuple[str, Run]) -> None:
        def before(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (
                args[0] if args else kwargs[list(block_signature(block).parameters)[1]]
            )  # behind self
            inputs[key] = x, x._version

        def after(block: nn.Module, args: tuple, output: Tensor) -> None:
            x, version = inputs.pop(key)
            if x._version != version:
                raise ValueError(
                    _refusal(key[0], f"a block of the run {key[1]} writes into its input")
                )
            sums.setdefault(key, RidgeSums(x.shape[-1], x.device)).add(
                x, output.double() - x.double()
            )

        stack = get_stack(model, key[0])
        hooks.append(stack[key[1][0]].register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(stack[key[1][1]].register_forward_hook(after))

    try:
        for path, kept in kept_blocks.items():
            for run in removed_runs(kept, len(get_stack(model, path))):
                collect((path, run))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def fill_maps(
    shallow: nn.Module, kept_blocks: Mapping[str, Sequence[int]], fitted: Fitted
) -> nn.Module:
    """Put fitted weights into the maps that `shallow` has (see `attach_maps`), in place."""
    names = {(each.module, each.position) for each in get_maps(shallow)}
    for path, of_path in fitted.items():
        for run, (weight, bias) in of_path.items():
            place, position = get_place(run, kept_blocks[path])
            if (f"{path}.{place}", position) not in names:
                raise ValueError(
                    f"The shallow model has no map {position} block {place} of '{path}' for the run {run}."
                )
            linear = getattr(get_stack(shallow, path)[place], f"run_{position}")
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return shallow


def _refusal(path: str, why: str) -> str:
    return (f"Runs of '{path}' cannot be replaced by linear maps: {why}. Set replace to null (recover.replace=null); linear maps are for "
            "blocks of one stream of tokens.")  # fmt: skip
