"""The weight update that learns beside the gates (TinyFusion, section 3.3: low-rank, full, or none), and how to undo it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ADAPTER_KEY = re.compile(r"\.(lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|ln_tuning_|fourierft_|hra_)\w+(\.|$)")
WEIGHT_UPDATES = ("lora", "full", "frozen")


def linear_names(model: nn.Module) -> list[str]:
    """Names of every ``nn.Linear`` of `model`, embedders and modulation included.

    Subclasses are left out: the output projection of ``nn.MultiheadAttention`` is one, and its weight is read without a forward.
    """
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


class WeightUpdate:
    """What trains beside the gates, and the original values to go back to.

    Args:
        kind: ``"lora"`` (rank 8, alpha 16, every Linear, through peft), ``"full"``, ``"frozen"`` (gates alone), or any peft config; one
            that names no target modules gets every Linear.

    Raises:
        ValueError: for another word, or a config that replaces whole modules (``modules_to_save``).
    """

    def __init__(self, kind: str | PeftConfig = "lora") -> None:
        if not isinstance(kind, PeftConfig) and kind not in WEIGHT_UPDATES:
            raise ValueError(f"weight_update is {kind!r}; give one of {', '.join(map(repr, WEIGHT_UPDATES))} or a peft config.")
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(kind, name, None):
                raise ValueError(f"The peft config sets {name}, which puts copies in place of whole modules; they could not be taken back. "
                                 "Leave it out, or use weight_update='full'.")
        self.kind = kind
        self.original: dict[str, Tensor] = {}  # by the keys that the model had before
        self.trainable: dict[str, bool] = {}

    def describe(self) -> str | dict[str, Any]:
        """The kind, or the peft config's settings in JSON-able types without those left at nothing."""
        if isinstance(self.kind, str):
            return self.kind
        settings = self.kind.to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items() if v not in (None, False, {}, [], set())}

    def start(self, model: nn.Module) -> None:
        """Remember what can change and set up `model` in place: adapters in, parameters frozen or free."""
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        if self.kind != "full":
            model.requires_grad_(False)
        if self.kind in ("full", "frozen"):
            self.remember(model)
            return
        config = LoraConfig(r=8, lora_alpha=16) if self.kind == "lora" else self.kind
        if getattr(config, "target_modules", None) in (None, "all-linear"):
            config = copy.copy(config)  # the caller's, who may use it for another model
            # A pattern of whole names: of a list peft takes the names for endings, and "0" would be every first block.
            config.target_modules = "|".join(map(re.escape, linear_names(model)))
        inject_adapter_in_model(config, model)
        keep_plain_keys(model)
        self.remember(model)

    def remember(self, model: nn.Module) -> None:
        """Keep the present values of everything that can change: what trains and is no adapter, and buffers.

        `start` does it; again where the weights come only afterwards.
        """
        movable = {plain_name(name) for name, p in model.named_parameters() if p.requires_grad} & self.trainable.keys()
        movable |= {plain_name(name) for name, _ in model.named_buffers()}
        self.original = {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if k in movable}

    def finish(self, model: nn.Module, *, delta_w: str) -> None:
        """Make `model` an ordinary one again, in place: ``"discard"`` the update (published behaviour) or ``"merge"`` it.

        Raises:
            ValueError: for another word.
        """
        check_delta_w(delta_w)
        unload_adapters(model, merge=delta_w == "merge")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable.get(name, True))
        if delta_w == "discard":
            with torch.no_grad():
                own = model.state_dict()
                for name, value in self.original.items():
                    own[name].copy_(value)


def check_delta_w(delta_w: str) -> None:
    if delta_w not in ("discard", "merge"):
        raise ValueError(f"delta_w is {delta_w!r}; give 'discard' (kept blocks get their original weights back) or 'merge'.")


def plain_name(name: str) -> str:
    """The name that a parameter had before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def is_adapter_key(key: str) -> bool:
    """Whether a key of a state dict is an adapter's own: peft names them so, all kinds of them."""
    return bool(ADAPTER_KEY.search(key))


def unload_adapters(model: nn.Module, *, merge: bool) -> None:
    """Replace every peft layer of `model` by the layer it wraps, with (`merge`) or without its update."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        if merge:
            layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) in (_to_plain_keys, _from_plain_keys)]:
            del hooks[key]


# -- state dicts with the keys that the model had before -----------------------------------------------------------------------------------
def keep_plain_keys(model: nn.Module) -> None:
    """Let `model` save and load with the keys it had before adapters came; `adapter_state` has the adapters' own weights."""
    model.register_state_dict_post_hook(_to_plain_keys)
    model.register_load_state_dict_pre_hook(_from_plain_keys)


def _wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _to_plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _wrapped(module):
        start = f"{prefix}{name}."
        for key in [k for k in state if k.startswith(start)]:
            value = state.pop(key)
            if key.startswith(start + "base_layer."):
                state[start + key.removeprefix(start + "base_layer.")] = value


def _from_plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _wrapped(module):
        layer, start = module.get_submodule(name), f"{prefix}{name}."
        for key, own in layer.state_dict(prefix=start).items():
            plain = start + key.removeprefix(start + "base_layer.")
            if key.startswith(start + "base_layer."):
                if plain in state:
                    state[key] = state.pop(plain)
            else:
                state.setdefault(key, own)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights in `model`, by full name, on CPU."""
    return {f"{name}.{key}": value.detach().cpu().clone() for name in _wrapped(model)
            for key, value in model.get_submodule(name).state_dict().items() if not key.startswith("base_layer.")}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take back what `adapter_state` gave.

    Raises:
        ValueError: when the adapters differ.
    """
    own = {f"{name}.{key}": value for name in _wrapped(model) for key, value in model.get_submodule(name).state_dict().items()
           if not key.startswith("base_layer.")}
    if own.keys() != state.keys() or any(own[k].shape != v.shape for k, v in state.items()):
        raise ValueError(f"The checkpoint holds {len(state)} adapter tensors that do not match this model's {len(own)}; "
                         "resume with the adapter configuration it was made with.")
    for key, value in state.items():
        own[key].copy_(value)
