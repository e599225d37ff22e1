"""The README.md of a model on the Hugging Face Hub, made from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FIGURES = ("depth", "num_params", "fid", "sfid", "inception_score", "precision", "recall")
HEADER = """---
library_name: tinyfusion_pl
tags: [diffusion, depth-pruning]
---
"""


def make_model_card(record: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> str:
    """Markdown with the kept blocks, the protocol and the figures of a model.

    Args:
        record: Content of ``record.json``.
        metrics: Content of the run's ``metrics.json``, where there is one.
    """
    model = record.get("model") or {}
    kind = model.get("name", "model")
    parts = [
        f"{HEADER}# {kind}\n",
        f"{record['num_params'] / 1e6:.1f}M parameters, saved by tinyfusion_pl.\n",
        "```python\nfrom tinyfusion_pl.models import Denoiser\n\n"
        'model = Denoiser.from_pretrained("FOLDER_OR_REPOSITORY")\n```\n',
    ]
    if stacks := record.get("stacks"):
        rows = [
            [
                f"`{path}`",
                f"{len(stack['kept_blocks'])} of {stack['num_blocks']}",
                ", ".join(map(str, stack["kept_blocks"])),
            ]
            for path, stack in stacks.items()
        ]
        parts += ["## Kept blocks\n", _table(["stack", "blocks", "kept"], rows)]
    sections = {
        name: values
        for name, values in (metrics or {}).items()
        if isinstance(values, Mapping) and "num_params" in values
    }
    if sections:
        columns = [key for key in FIGURES if any(key in each for each in sections.values())]
        rows = [
            [name, *(_number(values.get(key)) for key in columns)]
            for name, values in sections.items()
        ]
        parts += ["## Figures\n", _table(["model", *columns], rows)]
    protocol = (metrics or {}).get("protocol") or record.get("protocol")
    if protocol:
        parts += ["## Protocol\n", f"```json\n{json.dumps(protocol, indent=2)}\n```\n"]
    if source := record.get("source"):
        parts += ["## Source\n", f"```json\n{json.dumps(source, indent=2)}\n```\n"]
    return "\n".join(parts)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
