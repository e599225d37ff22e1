"""The weight update that learns beside the gates (TinyFusion, section 3.3: low-rank, full, or none), and how to undo it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tinyfusion_pl.pruning.adapter_state import (
    ADAPTER,
    keep_plain_keys,
    our_layers,
    plain_name,
    release_plain_keys,
)
from tinyfusion_pl.pruning.copies import copy_to_meta
from tinyfusion_pl.pruning.linear_layers import linear_names, reads_weight
from tinyfusion_pl.pruning.sharding import whole

WEIGHT_UPDATES = ("lora", "full", "frozen")


class WeightUpdate:
    """What trains beside the gates, and the original values to go back to.

    Args:
        kind: ``"lora"`` (rank 8, alpha 16, every Linear, through peft), ``"full"``, ``"frozen"``
            (gates alone), or any peft config; one that names no target modules gets every Linear.
            The user's own adapters stay as they are.

    Raises:
        ValueError: for another word, or a config that replaces whole modules (``modules_to_save``).
    """

    def __init__(self, kind: str | PeftConfig = "lora") -> None:
        if not isinstance(kind, PeftConfig) and kind not in WEIGHT_UPDATES:
            raise ValueError(
                f"weight_update is {kind!r}; give one of {', '.join(map(repr, WEIGHT_UPDATES))} or a peft config."
            )
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(kind, name, None):
                raise ValueError(f"The peft config sets {name}, which puts copies in place of whole modules; they could not be taken back. "
                                 "Leave it out, or use weight_update='full'.")  # fmt: skip
        for name in ("lora_alpha", "alpha"):
            if (alpha := getattr(kind, name, None)) is not None and not (
                math.isfinite(alpha) and alpha > 0
            ):
                raise ValueError(f"{name} is {alpha}; give a finite number > 0 (published: 16).")
        self.kind = kind
        self.original: dict[str, Tensor] = {}  # by the keys that the model had before
        self.trainable: dict[str, bool] = {}

    def describe(self) -> str | dict[str, Any]:
        """The kind, or the peft config's settings in JSON-able types without those left at nothing."""
        if isinstance(self.kind, str):
            return self.kind
        settings = self.kind.to_dict()
        return {
            k: sorted(v) if isinstance(v, set) else v
            for k, v in settings.items()
            if v not in (None, False, {}, [], set())
        }

    def check(self, model: nn.Module) -> None:
        """Find out whether the adapters go onto `model`, which is not changed.

        Raises:
            ValueError: for a peft config that peft refuses, or whose adapters would have no effect,
                or only in training.
        """
        if self.kind in ("full", "frozen"):
            return
        self._inject(copy_to_meta(model))

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
            except ValueError:
                self._restore_trainable(model)
                raise
        self.remember(model)

    def _inject(self, model: nn.Module) -> None:
        config = copy.copy(
            LoraConfig(r=8, lora_alpha=16) if self.kind == "lora" else self.kind
        )  # peft changes it
        target = model
        if getattr(config, "target_modules", None) in (None, "all-linear") and not getattr(
            config, "target_parameters", None
        ):
            if not (names := linear_names(model)):
                raise ValueError(f"{type(model).__name__} has no linear layer for the adapters of weight_update={self.kind!r:.80}. Use "
                                 "weight_update='full' or 'frozen'.")  # fmt: skip
            # A pattern of whole names: of a list peft takes the names for endings, and "0" would be
            # every first block. In a holder without a config, by which peft would give some
            # mixtures of experts other targets.
            target = nn.ModuleDict({"model": model})
            config.target_modules = "|".join(re.escape(f"model.{name}") for name in names)
        users = {
            n: list(m.active_adapters)
            for n, m in model.named_modules()
            if isinstance(m, BaseTunerLayer)
        }
        try:
            inject_adapter_in_model(config, target, adapter_name=ADAPTER)
        # peft refuses settings by errors of several types, some with a part of the layers wrapped
        except Exception as error:
            _take_back(model, users)
            # Without the printed modules that some of its messages hold.
            reason = (
                re.sub(r"\(\n.*\n\)", "", str(error).strip(), flags=re.DOTALL)
                .partition("\n")[0]
                .rstrip(".")
            )
            raise ValueError(f"The adapters of weight_update do not go onto {type(model).__name__}: {reason}. Give a peft config that "
                             "does, or weight_update='full'.") from error  # fmt: skip
        for name, active in users.items():  # peft turns the others off, and frees their parameters
            layer = model.get_submodule(name)
            layer.set_adapter([*active, ADAPTER] if _has_ours(layer) else active)
            for key, parameter in layer.named_parameters():
                if f".{ADAPTER}" not in f".{key}":
                    parameter.requires_grad_(False)
        try:
            _check_effect(model)
        except ValueError:
            _take_back(model, users)
            raise
        # torch's fused encoder path reads the linear layers' weights, not their adapters; this is
        # what it asks for.
        for layer in _fused_layers(model):
            layer.__dict__["_tinyfusion_activation"] = layer.activation_relu_or_gelu
            layer.activation_relu_or_gelu = 0
        keep_plain_keys(model)

    def remember(self, model: nn.Module) -> None:
        """Keep the present values of everything that can change: what trains and is no adapter of ours, and buffers.

        `start` does it; again where the weights come only afterwards.
        """
        ours = our_layers(model)
        movable = {
            plain_name(name, ours) for name, p in model.named_parameters() if p.requires_grad
        } & self.trainable.keys()
        movable |= {plain_name(name, ours) for name, _ in model.named_buffers()}
        self.original = {
            k: whole(v.detach()).cpu().clone()
            for k, v in model.state_dict().items()
            if k in movable
        }

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


def check_delta_w(delta_w: str) -> None:
    """`ValueError` for anything but the two ways to end a weight update."""
    if delta_w not in ("discard", "merge"):
        raise ValueError(
            f"delta_w is {delta_w!r}; give 'discard' (kept blocks get their original weights back) or 'merge'."
        )


def _has_ours(layer: nn.Module) -> bool:
    return any(
        name == ADAPTER or name.endswith(f".{ADAPTER}") or f".{ADAPTER}." in name
        for name, _ in layer.named_parameters()
    )


def _check_effect(model: nn.Module) -> None:
    """Refuse adapters on modules that what holds them computes with without calling them."""
    inert, twice = [], []
    for name in our_layers(model):
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent)
        if isinstance(holder, BaseTunerLayer):
            twice.append(parent)
        elif isinstance(base := model.get_submodule(name).get_base_layer(), nn.MultiheadAttention):
            inert.append((name, base))
        elif reads_weight(holder, own):
            inert.append((name, holder))
    for name, holder in inert[:1]:
        raise ValueError(
            f"The peft config's target_modules reach {name}{f' and {len(inert) - 1} more' if len(inert) > 1 else ''}: "
            f"{type(holder).__name__} reads its weights without calling its layers, so that the adapters would not learn or could "
            "not be taken back. Leave these targets out: linear layers around it are adapted by target_modules=None."
        )
    if twice:
        raise ValueError(f"The peft config reaches several parameters of {twice[0]} (fused experts), of which the adapters could not be "
                         "taken back. Leave these targets out, or use weight_update='full'.")  # fmt: skip


def _take_back(model: nn.Module, users: Mapping[str, list[str]]) -> None:
    """Our adapters out again, and the user's (active ones by layer) as they were."""
    unload_adapters(model, merge=False)
    for name, active in users.items():
        model.get_submodule(name).set_adapter(active)


def _fused_layers(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]


def unload_adapters(model: nn.Module, *, merge: bool) -> None:
    """Take our adapter out of every layer of `model`, with (`merge`) or without its update; the user's adapters stay."""
    for name, wrapped_by_us in reversed(our_layers(model).items()):  # peft wraps some layers twice
        layer = model.get_submodule(name)
        if merge:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
        if wrapped_by_us:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
        else:
            active = [each for each in layer.active_adapters if each != ADAPTER]
            layer.merged_adapters = [each for each in layer.merged_adapters if each != ADAPTER]
            layer.delete_adapter(ADAPTER)
            layer.set_adapter(active)
    for layer in _fused_layers(model):
        if "_tinyfusion_activation" in layer.__dict__:
            layer.activation_relu_or_gelu = layer.__dict__.pop("_tinyfusion_activation")
    configs = getattr(model, "peft_config", None)
    if (
        isinstance(configs, dict)
        and configs.pop(ADAPTER, None) is not None
        and not configs
        and "peft_config" in vars(model)
    ):
        del model.peft_config
    release_plain_keys(model)
