"""State dicts of a model that carries our adapter: its own with the keys it had before, and the adapter's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ADAPTER = "tinyfusion"
"""Name of the adapter that learns beside the gates; the user's own have other names."""


ADAPTER_KEY = re.compile(
    r"\.(lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|ln_tuning_|fourierft_|hra_)\w+(\.|$)"
)


def is_adapter_key(key: str) -> bool:
    """Whether a key of a state dict is an adapter's own: peft names them so, all kinds of them."""
    return bool(ADAPTER_KEY.search(key))


def _is_ours(key: str) -> bool:
    """Whether a parameter of an adapted layer belongs to our adapter (``lora_A.tinyfusion.weight``, ``lora_E.tinyfusion``)."""
    return ADAPTER in key.split(".")


def our_layers(model: nn.Module) -> dict[str, bool]:
    """Layers with our adapter, by name; whether we wrapped them (False: the user's adapters are there too)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            keys = [
                key
                for key, _ in (*module.named_parameters(), *module.named_buffers())
                if not key.startswith("base_layer.")
            ]
            if any(map(_is_ours, keys)):
                found[name] = all(map(_is_ours, keys))
    return found


def plain_name(name: str, ours: Mapping[str, bool]) -> str:
    """The name that a parameter had before its layer was wrapped."""
    for layer, wrapped_by_us in ours.items():
        start = f"{layer}.base_layer."
        if wrapped_by_us and name.startswith(start):
            return f"{layer}.{name.removeprefix(start)}"
    return name


def keep_plain_keys(model: nn.Module) -> None:
    """Let `model` save and load with the keys it had before our adapter came; `adapter_state` has the adapter's own weights."""
    model.register_state_dict_post_hook(_to_plain_keys)
    model.register_load_state_dict_pre_hook(_from_plain_keys)


def release_plain_keys(model: nn.Module) -> None:
    """Undo `keep_plain_keys`."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for key in [
            k
            for k, hook in hooks.items()
            if getattr(hook, "hook", hook) in (_to_plain_keys, _from_plain_keys)
        ]:
            del hooks[key]


def _to_plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, wrapped_by_us in our_layers(module).items():
        start = f"{prefix}{name}."
        for key in [k for k in state if k.startswith(start)]:
            rest = key.removeprefix(start)
            if rest.startswith("base_layer."):
                if wrapped_by_us:
                    state[start + rest.removeprefix("base_layer.")] = state.pop(key)
            elif _is_ours(rest):
                del state[key]


def _from_plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, wrapped_by_us in our_layers(module).items():
        layer, start = module.get_submodule(name), f"{prefix}{name}."
        for key, own in layer.state_dict(prefix=start).items():
            rest = key.removeprefix(start)
            if rest.startswith("base_layer."):
                plain = start + rest.removeprefix("base_layer.")
                if wrapped_by_us and plain in state:
                    state[key] = state.pop(plain)
            elif _is_ours(rest):
                state.setdefault(key, own)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name in our_layers(model)
        for key, value in model.get_submodule(name).state_dict().items()
        if not key.startswith("base_layer.") and _is_ours(key)
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Our adapter's weights in `model`, by full name, on CPU."""
    return {name: value.detach().cpu().clone() for name, value in _own_tensors(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take back what `adapter_state` gave.

    Raises:
        ValueError: when the adapters differ.
    """
    own = _own_tensors(model)
    if own.keys() != state.keys() or any(own[k].shape != v.shape for k, v in state.items()):
        raise ValueError(f"The checkpoint holds {len(state)} adapter tensors that do not match this model's {len(own)}; "
                         "resume with the adapter configuration it was made with.")  # fmt: skip
    for key, value in state.items():
        own[key].copy_(value)
