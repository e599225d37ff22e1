"""examples/prune_diffusers.py, its whole job in few steps."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

diffusers = pytest.importorskip("diffusers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "prune_diffusers.py"
STEPS = [
    "--pretrain-steps",
    "25",
    "--search-steps",
    "3",
    "--recovery-steps",
    "20",
    "--batch-size",
    "16",
]
COMMON = ["--lr", "3e-3", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def example():
    loaded = runpy.run_path(str(EXAMPLE))
    loaded["TINY"].update(num_layers=2, num_single_layers=4, num_attention_heads=2)
    return loaded


def run(example, *arguments):
    return example["main"](example["parser"]().parse_args([*map(str, arguments), *COMMON]))


@pytest.fixture(scope="module")
def tiny_run(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return folder, run(example, "--output-dir", folder, *STEPS)


def test_recovery_brings_the_cut_model_nearer_to_its_teacher(tiny_run):
    teacher, cut, recovered = tiny_run[1]
    assert [each["depth"] for each in (teacher, cut, recovered)] == [[2, 4], [1, 2], [1, 2]]
    assert teacher["distance"] == 0 < recovered["distance"] < 0.8 * cut["distance"]
    assert teacher["parameters"] > 1.7 * recovered["parameters"]


def test_both_models_open_with_the_plain_class(tiny_run):
    for name in ("cut", "recovered"):
        model, info = diffusers.FluxTransformer2DModel.from_pretrained(
            tiny_run[0] / name, output_loading_info=True
        )
        assert not any(info.values())
        assert (model.config.num_layers, model.config.num_single_layers) == (1, 2)


def test_the_table_has_a_line_for_each_model(example, capsys):
    each = {"depth": [2, 4], "parameters": 1234567, "distance": 0.5}
    example["print_table"]([{"model": "teacher", **each}, {"model": "cut", **each}])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and lines[1].split() == ["teacher", "2", "+", "4", "1,234,567", "0.5000"]


def test_a_model_and_data_of_ones_own(example, tmp_path):
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(**example["TINY"]).save_pretrained(
        tmp_path / "pipeline" / "transformer"
    )
    data = {
        "latents": torch.randn(24, 4, 4, 6),
        "prompt_embeds": torch.randn(24, 5, 24).bfloat16(),
        "pooled_prompt_embeds": torch.randn(24, 16),
    }
    save_file(data, tmp_path / "data.safetensors")
    rows = run(
        example,
        "--model",
        tmp_path / "pipeline",
        "--data",
        tmp_path / "data.safetensors",
        "--output-dir",
        tmp_path / "out",
        "--pattern",
        "1:2",
        "1:4",
        "--search-steps",
        2,
        "--recovery-steps",
        2,
        "--batch-size",
        8,
        "--gradient-checkpointing",
        "--offload-teacher",
        "--precision",
        "bf16-mixed",
    )
    assert rows[2]["depth"] == [1, 1] and rows[2]["distance"] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_embeds": None}, "has no \\['prompt_embeds'\\]"),
        ({"prompt_embeds": (8, 5, 20)}, "24 was expected on axis 2"),
        ({"latents": (8, 4, 4, 5)}, "even H and W"),
        ({"pooled_prompt_embeds": (7, 16)}, "as many samples"),
    ],
)
def test_data_of_the_wrong_shape_is_refused(example, tmp_path, change, message):
    shapes = {
        "latents": (8, 4, 4, 4),
        "prompt_embeds": (8, 5, 24),
        "pooled_prompt_embeds": (8, 16),
        **change,
    }
    save_file(
        {key: torch.randn(shape) for key, shape in shapes.items() if shape},
        tmp_path / "data.safetensors",
    )
    with pytest.raises(ValueError, match=message):
        example["open_data"](str(tmp_path / "data.safetensors"), example["TINY"])
