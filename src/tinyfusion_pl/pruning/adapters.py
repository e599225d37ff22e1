"""The weight update that learns beside the gates (TinyFusion, section 3.3: low-rank, full, or none), and how to undo it."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tinyfusion_pl.pruning.adapter_state import ADAPTER, keep_plain_keys, our_layers, plain_name, release_plain_keys

WEIGHT_UPDATES = ("lora", "full", "frozen")


def linear_names(model: nn.Module) -> list[str]:
    """Names of every ``nn.Linear`` of `model`, embedders and modulation included, those with the user's adapters too.

    Subclasses are left out: the output projection of ``nn.MultiheadAttention`` is one, and its weight is read without a forward.
    """
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)
    return [
        name
        for name, module in model.named_modules()
        if not name.startswith(inside) and type(adapted[name].get_base_layer() if name in adapted else module) is nn.Linear
    ]


class WeightUpdate:
    """What trains beside the gates, and the original values to go back to.

    Args:
        kind: ``"lora"`` (rank 8, alpha 16, every Linear, through peft), ``"full"``, ``"frozen"`` (gates alone), or any peft config; one
            that names no target modules gets every Linear. The user's own adapters stay as they are.

    Raises:
        ValueError: for another word, or a config that replaces whole modules (``modules_to_save``).
    """

    def __init__(self, kind: str | PeftConfig = "lora") -> None:
        if not isinstance(kind, PeftConfig) and kind not in WEIGHT_UPDATES:
            raise ValueError(f"weight_update is {kind!r}; give one of {', '.join(map(repr, WEIGHT_UPDATES))} or a peft config.")
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(kind, name, None):
                raise ValueError(f"The peft config sets {name}, which puts copies in place of whole modules; they could not be taken back. "
                                 "Leave it out, or use weight_update='full'.")  # fmt: skip
        for name in ("lora_alpha", "alpha"):
            if (alpha := getattr(kind, name, None)) is not None and not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"{name} is {alpha}; give a finite number > 0 (published: 16).")
        self.kind = kind
        self.original: dict[str, Tensor] = {}  # by the keys that the model had before
        self.trainable: dict[str, bool] = {}

    def describe(self) -> str | dict[str, Any]:
        """The kind, or the peft config's settings in JSON-able types without those left at nothing."""
        if isinstance(self.kind, str):
            return self.kind
        settings = self.kind.to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items() if v not in (None, False, {}, [], set())}

    def check(self, model: nn.Module) -> None:
        """Find out whether the adapters go onto `model`, which is not changed.

        Raises:
            ValueError: for a peft config that peft refuses, or whose adapters would have no effect, or only in training.
        """
        if self.kind in ("full", "frozen"):
            return
        try:
            self._inject(_without_values(model))
        except Exception as error:  # peft refuses settings by errors of several types
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"The adapters of weight_update do not go onto {type(model).__name__}: {reason}") from error

    def start(self, model: nn.Module) -> None:
        """Remember what can change and set up `model` in place: adapters in, parameters frozen or free.

        Raises:
            ValueError: for a peft config whose adapters would have no effect, or only in training.
        """
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        if self.kind != "full":
            model.requires_grad_(False)
        if self.kind not in ("full", "frozen"):
            try:
                self._inject(model)
            except Exception:
                self._restore_trainable(model)
                raise
        self.remember(model)

    def _inject(self, model: nn.Module) -> None:
        config = LoraConfig(r=8, lora_alpha=16) if self.kind == "lora" else self.kind
        if getattr(config, "target_modules", None) in (None, "all-linear"):
            config = copy.copy(config)  # the caller's, who may use it for another model
            # A pattern of whole names: of a list peft takes the names for endings, and "0" would be every first block.
            config.target_modules = "|".join(map(re.escape, linear_names(model)))
        users = {n: list(m.active_adapters) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        for name, active in users.items():  # peft turns the others off, and frees their parameters
            layer = model.get_submodule(name)
            layer.set_adapter([*active, ADAPTER] if _has_ours(layer) else active)
            for key, parameter in layer.named_parameters():
                if f".{ADAPTER}" not in f".{key}":
                    parameter.requires_grad_(False)
        try:
            _check_effect(model)
        except ValueError:
            unload_adapters(model, merge=False)
            raise
        # torch's fused encoder path reads the linear layers' weights, not their adapters; this is what it asks for.
        for layer in _fused_layers(model):
            layer.__dict__["_tinyfusion_activation"] = layer.activation_relu_or_gelu
            layer.activation_relu_or_gelu = 0
        keep_plain_keys(model)

    def remember(self, model: nn.Module) -> None:
        """Keep the present values of everything that can change: what trains and is no adapter of ours, and buffers.

        `start` does it; again where the weights come only afterwards.
        """
        ours = our_layers(model)
        movable = {plain_name(name, ours) for name, p in model.named_parameters() if p.requires_grad} & self.trainable.keys()
        movable |= {plain_name(name, ours) for name, _ in model.named_buffers()}
        self.original = {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if k in movable}

    def finish(self, model: nn.Module, *, delta_w: str) -> None:
        """Make `model` an ordinary one again, in place: ``"discard"`` the update (published behaviour) or ``"merge"`` it.

        Raises:
            ValueError: for another word.
        """
        check_delta_w(delta_w)
        unload_adapters(model, merge=delta_w == "merge")
        self._restore_trainable(model)
        if delta_w == "discard":
            with torch.no_grad():
                own = model.state_dict()
                for name, value in self.original.items():
                    own[name].copy_(value)

    def _restore_trainable(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable.get(name, True))


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of `model` whose tensors have shapes, but no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def check_delta_w(delta_w: str) -> None:
    """`ValueError` for anything but the two ways to end a weight update."""
    if delta_w not in ("discard", "merge"):
        raise ValueError(f"delta_w is {delta_w!r}; give 'discard' (kept blocks get their original weights back) or 'merge'.")


def _has_ours(layer: nn.Module) -> bool:
    return any(name == ADAPTER or name.endswith(f".{ADAPTER}") or f".{ADAPTER}." in name for name, _ in layer.named_parameters())


def _check_effect(model: nn.Module) -> None:
    """Refuse adapters on modules that `nn.MultiheadAttention` computes with without calling them."""
    inert = []
    for name in our_layers(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(model.get_submodule(name).get_base_layer(), nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
            inert.append(name)
    if inert:
        raise ValueError(
            f"The peft config's target_modules reach {inert[0]}{f' and {len(inert) - 1} more' if len(inert) > 1 else ''}, inside "
            "nn.MultiheadAttention, which reads its weights without calling its layers, so that the adapters would not learn or could "
            "not be taken back. Leave these targets out: linear layers around the attention are adapted by target_modules=None."
        )


def _fused_layers(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]


def unload_adapters(model: nn.Module, *, merge: bool) -> None:
    """Take our adapter out of every layer of `model`, with (`merge`) or without its update; the user's adapters stay."""
    for name, wrapped_by_us in our_layers(model).items():
        layer = model.get_submodule(name)
        if merge:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
        if wrapped_by_us:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        else:
            active = [each for each in layer.active_adapters if each != ADAPTER]
            layer.merged_adapters = [each for each in layer.merged_adapters if each != ADAPTER]
            layer.delete_adapter(ADAPTER)
            layer.set_adapter(active)
    for layer in _fused_layers(model):
        if "_tinyfusion_activation" in layer.__dict__:
            layer.activation_relu_or_gelu = layer.__dict__.pop("_tinyfusion_activation")
    release_plain_keys(model)
