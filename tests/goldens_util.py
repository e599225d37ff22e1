"""Reads golden folders: numbers of the published reference code (see goldens/README.md).

The folder is that of the environment variable TINYFUSION_GOLDENS (default: tests/goldens). Shapes,
patterns and numbers of layers come from its cases.json and the tensors.
"""

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tinyfusion_pl.models import DiT

FOLDER = Path(os.environ.get("TINYFUSION_GOLDENS", Path(__file__).parent / "goldens"))
CASES = json.loads((FOLDER / "cases.json").read_text())


def golden_files(glob):
    """Parameters for the files of the folder that match; a folder without any is told as a skip, not passed over in silence."""
    files = sorted(FOLDER.glob(f"{glob}.safetensors"))
    return [pytest.param(f, id=f.stem) for f in files] or [
        pytest.param(None, marks=pytest.mark.skip(reason=f"no {glob} in {FOLDER}"), id="none")
    ]


def load(file):
    return load_file(file)


def part(tensors, prefix):
    """The tensors under `prefix.`, without it."""
    return {
        k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")
    }


def depth_of(state):
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))


def new_dit(state, family=DiT):
    """A DiT, or another family built like one, of the folder's sizes, in evaluation mode, with the weights of a published-layout state
    dict, gates left out.
    """
    c = CASES["config"]
    state = {k: v for k, v in state.items() if not k.startswith("gumbel_gates")}
    out_features = state["final_layer.linear.weight"].shape[0]
    mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / c["hidden"]
    model = family(
        input_size=c["size"],
        patch_size=c["patch"],
        in_channels=c["inch"],
        hidden_size=c["hidden"],
        depth=depth_of(state),
        num_heads=c["heads"],
        num_classes=c["ncls"],
        mlp_ratio=mlp_ratio,
        learn_sigma=out_features == 2 * c["inch"] * c["patch"] ** 2,
    )
    model.load_state_dict(state)
    return model.eval()


def pattern_in_name(file):
    """``mask_learning_1of2_3of4`` -> "1:2+3:4"; what else the name says (``_seed7``) is no part of the pattern."""
    return "+".join(
        f"{num_kept}:{num_blocks}"
        for num_kept, num_blocks in re.findall(r"(?<=_)(\d+)of(\d+)(?=_|$)", file.stem)
    )


def assert_near(ours, theirs, tolerance, name=""):
    """Largest difference relative to the largest value; a tensor of zeros must be zeros."""
    assert ours.shape == theirs.shape, (
        f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    )
    difference = (ours.double() - theirs.double()).abs().max().item()
    scale = theirs.double().abs().max().item()
    assert difference <= (tolerance * scale or 1e-9), (
        f"{name}: {difference / max(scale, 1e-300):.2e} relative"
    )
