"""Where the weights of a model are from: its ``source``, and the record that it was loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


def get_source(model: nn.Module) -> dict[str, Any]:
    """The source of `model`; empty for a model that was not loaded."""
    return getattr(model, "source", None) or {}


def set_source(model: nn.Module, **source: Any) -> nn.Module:
    """Set the source of `model`, and return the model."""
    vars(model)["source"] = source
    return model


def add_source(model: nn.Module, **source: Any) -> nn.Module:
    """Add to the source of `model`, and return the model."""
    return set_source(model, **{**get_source(model), **source})


def set_record(model: nn.Module, record: Mapping[str, Any], folder: Path) -> nn.Module:
    """Note the record that `model` was loaded with and its folder, and return the model."""
    vars(model).update(record=record, record_folder=folder)
    return model
