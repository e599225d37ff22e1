"""How training codes name what they save: averaged weights, raw weights, and what is no model at all."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable

from torch import Tensor

EMA, RAW, UNSTATED = "ema", "raw", "unstated"

# An entry is of averaged weights when its name has one of these words: ema, model_ema,
# state_dict_ema, EMACallback, ema_0.9999, shadow_params, average_model_state, swa_model, avg_model,
# ...
AVERAGED = frozenset({"ema", "average", "averaged", "averaging", "avg", "shadow", "polyak", "swa"})
NEGATIONS = frozenset({"non", "no", "not", "without"})  # non_ema
NOT_AVERAGED = frozenset(
    {"online", "raw", "current"}
)  # online_model of ema_pytorch, current_model_state of Lightning
RAW_NAMES = frozenset(
    {
        "model",
        "module",
        "net",
        "network",
        "nnet",
        "unet",
        "dit",
        "sit",
        "transformer",
        "denoiser",
        "backbone",
        "student",
        "generator",
        "state_dict",
        "model_state",
        "model_state_dict",
        "network_state_dict",
        "net_state_dict",
        "model_dict",
        "model_weights",
        "weights",
        "params",
        "parameters",
        "state",
    }
)
# Entries that hold tensors by name as well, and no weights: optimizers (Adam's exp_avg),
# schedulers, scalers, generators.
NO_MODEL = frozenset(
    {
        "opt",
        "optim",
        "optimizer",
        "optimizers",
        "momentum",
        "grad",
        "grads",
        "gradients",
        "scheduler",
        "schedulers",
        "scaler",
        "loops",
        "rng",
        "random",
    }
)
# The last part of names that no training changes, and that averages of parameters lack.
FIXED = frozenset(
    {
        "pos_embed",
        "freqs",
        "inv_freq",
        "freqs_cos",
        "freqs_sin",
        "running_mean",
        "running_var",
        "relative_position_index",
    }
)
# its state in a checkpoint holds the weights that the search started from
SEARCH_STATE = "DepthPruningCallback"
# What wrappers put inside names, anywhere: torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def is_no_model(name: str) -> bool:
    found = words(name)
    if name == SEARCH_STATE:
        return True
    return not found.isdisjoint(NO_MODEL) or found >= {"exp", "avg"}


def get_kind(names: Iterable[str]) -> str:
    """`EMA`, `RAW` or `UNSTATED`, by the names of the entries that lead to the weights; the innermost that says it decides."""
    raw = False
    for name in reversed(list(names)):
        found = words(name)
        if found & NOT_AVERAGED or (found & AVERAGED and found & NEGATIONS):
            return RAW
        if found & AVERAGED:
            return EMA
        raw = raw or name.lower() in RAW_NAMES
    return RAW if raw else UNSTATED


def without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def core_names(keys: Iterable[str]) -> dict[str, str]:
    """Name -> key: the keys without what all of them begin with, and without wrappers: the same for a model under any prefix."""
    parts = {key: without_wrappers(key).split(".") for key in keys}
    shared = len(os.path.commonprefix([each[:-1] for each in parts.values()])) if parts else 0
    return {".".join(each[shared:]): key for key, each in parts.items()}


def is_fixed(key: str, tensor: Tensor) -> bool:
    """Whether training leaves a tensor as it is, or it is no parameter, so that averages lack it: position tables, counters, buffers."""
    return not tensor.is_floating_point() or key.rpartition(".")[2] in FIXED


def are_alike(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two lists of keys are those of one model, but for a few."""
    some, others = core_names(some).keys(), core_names(others).keys()
    return len(some & others) >= 0.8 * max(len(some), len(others), 1)
