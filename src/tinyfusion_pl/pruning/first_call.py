"""Catches the first training call of a gated model and has it verified."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tinyfusion_pl.pruning.calls import unwrapped
from tinyfusion_pl.pruning.gates import DepthGates
from tinyfusion_pl.pruning.verification import verify


class FirstCallCheck:
    """Runs `verify` at the first training call of whatever module on the way to the stacks is called, then takes itself off.

    A call whose output is not finite shows nothing: the next one is taken (`postponed` until then).

    Args:
        module: The module that training runs.
        gates: Its gates.
        paths: For each stack, by the gates' path, its path in `module`.
    """

    def __init__(self, module: nn.Module, gates: DepthGates, paths: dict[str, str]) -> None:
        self.module, self.gates, self.paths = module, gates, paths
        self.unverified = set(paths)
        self.postponed: set[str] = set()
        self._handles: list[Any] = []
        for owner in sorted({outer for path in paths.values() for outer in _outer_paths(path)}):
            called = _submodule(module, owner)
            hook = torch.compiler.disable(self._hook(owner, called))
            self._handles.append(called.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, owner: str, own: nn.Module):
        def before_call(called: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if called is not own or _is_redirected(called):
                # a copy, on which the hook is too; or a strategy has routed a whole training step
                # through it
                return
            start = f"{owner}." if owner else ""
            inside = {own: path.removeprefix(start) for own, path in self.paths.items()
                      if own in self.unverified and path.startswith(start)}  # fmt: skip
            if inside and not self.gates.bypassed and self._trains(set(inside)):
                self.unverified -= set(inside)
                if verify(called, self.gates, args, kwargs, paths=inside):
                    self.postponed -= set(inside)
                else:
                    self.unverified |= set(inside)
                    self.postponed |= set(inside)
                if not self.unverified:
                    self.remove()

        return before_call

    def _trains(self, paths: set[str]) -> bool:
        return any(
            gated.block.training for gated in self.gates.gated_forwards if gated.gates.path in paths
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _is_redirected(module: nn.Module) -> bool:
    """Whether a call of `module` runs something else than its own forward."""
    own = module.__dict__.get("forward")
    return (
        own is not None
        and "_orig_mod" not in module._modules
        and getattr(own, "__func__", None) is not type(module).forward
    )


def _outer_paths(path: str) -> list[str]:
    """Paths of the modules around the stack at `path`, outermost first."""
    parts = path.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        module = getattr(unwrapped(module), name)
    return module
