"""The teacher: frozen, without a graph, with its own device and precision."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.calls import Call, block_signature

# Arguments that a pipeline in half precision gives in float32, where they would lose their meaning:
# timesteps, positions, angles.
_PRECISE = re.compile(r"time|sigma|ids|coord|rot|rope|freq|pos")


class Teacher:
    """A frozen model in evaluation mode.

    Holding it does not make it a submodule (checkpoints, DDP, optimizers), and a copy of its holder
    shares it (weight averaging).

    Args:
        model: The dense model.
        device: Where it runs; default: where it is asked to.
        offload: Whether `rest` moves it to the CPU.

    Raises:
        ValueError: for a model without weights (on the meta device).
    """

    def __init__(self, model: nn.Module, *, device: Any = None, offload: bool = False) -> None:
        tensors = list(model.parameters())
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                "The teacher has parameters on the meta device, which hold no values. Load its "
                "weights first."
            )
        self.model = model.eval().requires_grad_(False)
        self.device, self.offload = None if device is None else torch.device(device), offload
        # Spread over devices by its library, which moves the inputs itself.
        self.placed = len({tensor.device for tensor in tensors}) > 1 or hasattr(
            model, "hf_device_map"
        )
        if self.placed and (device is not None or offload):
            raise ValueError(
                "The teacher is spread over several devices, so it is not moved. Leave out "
                "device and offload."
            )
        self._casts = any(map(_holds_values, tensors))
        self._writes: bool | None = (
            None  # whether it writes into its inputs; known after the first call
        )

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    def wake(self, device: torch.device) -> None:
        """Move the model to where it runs: its own device, or else `device`."""
        where = self.device or device
        if not self.placed and any(
            tensor.device != where for tensor in (*self.model.parameters(), *self.model.buffers())
        ):
            self.model.to(where)

    def rest(self) -> None:
        """Move the model to the CPU, where it is to be offloaded."""
        if self.offload:
            self.model.to("cpu")

    @torch.no_grad()
    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the model; arguments and random number generators stay unchanged.

        Raises:
            ValueError: for a key-value cache among the arguments, which two models cannot share.
        """
        if not self._casts:
            return self.model(*args, **kwargs)
        call = Call(block_signature(self.model), args, kwargs)
        if caches := [
            name for name in call.remembering if "cache" in type(call.value(name)).__name__.lower()
        ]:
            raise ValueError(
                f"The student is called with {caches[0]!r}, a cache that the teacher would write "
                "into too. Train without a cache (use_cache=False)."
            )
        like = next(t for t in self.model.parameters() if _holds_values(t))
        moved = {name: self._moved(name, tensor, like) for name, tensor in call.tensors.items()}
        if self._writes is not False:
            moved = {
                name: tensor.clone() if tensor is call.tensors[name] else tensor
                for name, tensor in moved.items()
            }
        versions = {name: tensor._version for name, tensor in moved.items()}
        args, kwargs = call.replace(moved)
        with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
            output = self.model(*args, **kwargs)
        if self._writes is None:
            self._writes = any(tensor._version != versions[name] for name, tensor in moved.items())
        return output

    @staticmethod
    def _moved(name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """`tensor` on the teacher's device, and in its precision unless that matters."""
        if not tensor.is_floating_point() or tensor.ndim < 2 or _PRECISE.search(name):
            return tensor.to(like.device)
        return tensor.to(like.device, like.dtype)


def _holds_values(tensor: Tensor) -> bool:
    """Whether the dtype supports computation: not an integer or a packed 8-bit float."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def reset_compiled(*models: nn.Module) -> bool:
    """Recompile compiled parts of `models` at their next call, with the current hooks.

    Returns whether there are compiled parts.
    """
    modules = [module for model in models for module in model.modules()]
    compiled = any(
        hasattr(m, "_orig_mod") or m.__dict__.get("_compiled_call_impl") is not None
        for m in modules
    )
    if compiled:
        torch.compiler.reset()
    return compiled


def lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` whose linear and convolution weights are kept in `dtype`.

    For use under autocast to `dtype`, which casts these weights at each call of a frozen model: the
    same numbers from half the memory. `model` itself stays as it is.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                memo[id(parameter)] = nn.Parameter(
                    parameter.detach().to(dtype), requires_grad=False
                )
    return copy.deepcopy(model, memo)
