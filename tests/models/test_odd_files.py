"""Records, configs, indexes and metadata with any value replaced by an odd one: one sentence that names the file, no traceback, no bomb."""

import json
import time
import warnings

import pytest
import safetensors.torch
import timm
import torch
from diffusers import DiTTransformer2DModel

from odd_values import odd_copies
from small_dit_model import small_dit
from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_metadata
from tinyfusion_pl.models import export_model, load_pretrained, load_shallow, save_shallow
from tinyfusion_pl.models.registry import model_class
from tinyfusion_pl.models.shallow import load_decision
from tinyfusion_pl.pruning import remove_blocks

MAX_LENGTH, MAX_SECONDS = 1500, 5.0
OPTIONS = {"num_heads": 4, "num_classes": 10}
THEIRS = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
VIT = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
}


def decision(path):
    """That blocks 0 and 3 of 4 were kept."""
    groups = [
        {
            "start": 2 * i,
            "num_kept": 1,
            "num_blocks": 2,
            "kept": [3 * i],
            "confidence": 0.5,
            "entropy": 0.2,
            "probabilities": each,
        }
        for i, each in enumerate(([0.5, 0.5], None))
    ]
    stack = {
        "pattern": "1:2",
        "num_blocks": 4,
        "kept_blocks": [0, 3],
        "block_probabilities": [0.5] * 4,
        "groups": groups,
        "units": None,
    }
    return {"stacks": {path: stack}}


def shallow(folder):
    return save_shallow(
        folder, small_dit((0, 3)), {**decision("blocks"), "source": {"path": "x"}, "seed": 0}
    )


def library(folder):
    model = remove_blocks(DiTTransformer2DModel(**THEIRS), {"transformer_blocks": [0, 3]})
    return save_shallow(folder, model, decision("transformer_blocks"))


def factory(folder):
    model = remove_blocks(timm.create_model("vit_tiny_patch16_224", **VIT), {"blocks": [0, 3]})
    return save_shallow(
        folder,
        model,
        {
            **decision("blocks"),
            "model_factory": {"name": "timm/vit_tiny_patch16_224", "kwargs": VIT},
        },
    )


def of_diffusers(folder):
    model = DiTTransformer2DModel(**{**THEIRS, "num_layers": 2})
    model.transformer_blocks[1].norm1.emb.load_state_dict(
        model.transformer_blocks[0].norm1.emb.state_dict()
    )
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


FILES = {
    "a shallow model": (shallow, "record.json", load_pretrained),
    "a decision": (shallow, "record.json", load_decision),
    "a trained model": (
        lambda folder: save_shallow(folder, small_dit((0, 3)), {}),
        "record.json",
        load_pretrained,
    ),
    "a model of a library": (library, "record.json", load_shallow),
    "its config": (library, "config.json", load_shallow),
    "a model of timm": (factory, "record.json", load_shallow),
    "a config of diffusers": (of_diffusers, "config.json", load_pretrained),
    "an index of diffusers": (
        of_diffusers,
        "diffusion_pytorch_model.safetensors.index.json",
        load_pretrained,
    ),
}


def reads_or_names(load, path, what):
    """Whether it loads; when it does not, the error is a person's, and names the file or its folder."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load()
            loaded = True
        except (ValueError, ArtifactError) as error:
            named = path.name in str(error) or str(path.parent) in str(error)
            assert named and len(str(error)) < MAX_LENGTH, f"{what}: {str(error)[:MAX_LENGTH]}"
            loaded = False
    assert time.monotonic() - start < MAX_SECONDS, what
    return loaded


@pytest.mark.parametrize("case", FILES)
def test_any_odd_value_is_one_sentence(tmp_path, case):
    make, name, load = FILES[case]
    file = make(tmp_path / "model") / name
    content = json.loads(file.read_text())
    content.pop(
        "sha256", None
    )  # the file's checksum of itself, which an earlier version did not write
    for where, value, odd in odd_copies(content, num=60):
        file.write_text(json.dumps(odd))
        reads_or_names(lambda: load(file.parent), file, f"{where}: {value!r:.60}")
    file.write_text(json.dumps(content))
    assert reads_or_names(lambda: load(file.parent), file, "as it was")


def test_any_odd_metadata_is_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    export_model(small_dit((0, 3)), path)
    state, metadata = load_tensors(path), read_metadata(path)
    config = json.loads(metadata["config"])
    odd = [
        (where, {**metadata, "config": json.dumps(each)})
        for where, _, each in odd_copies(config, num=60)
    ]
    odd += [
        (name, {**metadata, name: text})
        for name in metadata
        for text in ("", "x", "null", "[]", "1", "{", "DiT-XL/2", "n" * 5000)
    ]
    for where, changed in odd:
        safetensors.torch.save_file(state, path, metadata=changed)
        reads_or_names(lambda: load_pretrained(path), path, where)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kept_blocks", [3, 0]),
        ("kept_blocks", [0]),
        ("kept_blocks", [0, 2]),
        ("kept_blocks", [0, 9]),
        ("kept_blocks", [0, 0]),
        ("num_blocks", 3),
        ("block_probabilities", [0.5] * 3),
        ("block_probabilities", [2.0, 0, 0, 0]),
        ("units", [[0, 1], [1, 2, 3]]),
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(tmp_path, field, value):
    file = shallow(tmp_path) / "record.json"
    content = json.loads(file.read_text())
    content["stacks"]["blocks"][field] = value
    file.write_text(json.dumps(content))
    for load in (load_pretrained, load_decision):
        with (
            pytest.raises(
                ArtifactError, match="record.json: 'stacks.blocks.*It was edited, or is damaged"
            ),
            pytest.warns(UserWarning),
        ):
            load(tmp_path)


def test_a_decision_of_another_depth_than_the_model_is_refused(tmp_path):
    save_shallow(tmp_path, small_dit((0, 1, 3)), decision("blocks"))
    with pytest.raises(ArtifactError, match="2 blocks of 'blocks' were kept, and its model has 3"):
        load_pretrained(tmp_path)
    save_shallow(tmp_path, small_dit((0, 3)), decision("layers"))
    with pytest.raises(
        ArtifactError, match="decides on the stack 'layers', which its model has not"
    ):
        load_pretrained(tmp_path)


def test_a_config_that_leaves_weights_out_is_refused(tmp_path):
    file = library(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_bias": False}))
    with pytest.raises(
        ArtifactError, match="hold 6 tensors that a model of its config.json has not"
    ):
        load_shallow(tmp_path)


# -- counts without end
@pytest.mark.parametrize("name", [None, "dit"])
@pytest.mark.parametrize(
    "key",
    ["blocks.999999.norm1.weight", "blocks.99999999999999999999.x", "blocks.5.mlp.fc1.weight"],
)
def test_a_block_of_a_huge_number_builds_nothing(tmp_path, key, name):
    model = small_dit((0, 3))
    torch.save({"ema": {**model.state_dict(), key: torch.ones(1)}}, tmp_path / "file.pt")
    options = {**model.config, "name": name} if name else OPTIONS
    options.pop("depth", None)
    with pytest.raises(
        (ValueError, ArtifactError), match=r"file\.pt.*(without gaps|unexpected|does not match)"
    ):
        load_pretrained(tmp_path / "file.pt", **options)


@pytest.mark.parametrize("name", ["sit_xl_2", "mar_base", "uvit_h_2", "udit_l"])
def test_a_block_of_a_huge_number_builds_nothing_of_any_family(tmp_path, name):
    for path in (part for stack in model_class(name).STACKS for part in stack.split("+")):
        torch.save(
            {f"{path}.999999.norm1.weight": torch.ones(1), f"{path}.0.norm1.weight": torch.ones(1)},
            tmp_path / "file.pt",
        )
        with pytest.raises((ValueError, ArtifactError), match=r"file\.pt"):
            load_pretrained(tmp_path / "file.pt", name=name)


@pytest.mark.parametrize("depth", [10**6, 2**40, "4", 4.0, True, None, -1])
def test_a_record_of_another_depth_builds_nothing(tmp_path, depth):
    file = shallow(tmp_path) / "record.json"
    content = json.loads(file.read_text())
    content.pop("sha256")
    content["model"]["kwargs"]["depth"] = depth
    file.write_text(json.dumps(content))
    assert not reads_or_names(lambda: load_pretrained(tmp_path), file, depth)
