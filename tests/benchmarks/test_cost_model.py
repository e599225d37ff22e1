"""What `benchmarks/cost_model.py` predicts, against torch's counter of FLOPs and real tensors."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cost_model import Step, step_bytes, step_flops, step_seconds, trained_params
from cost_tables import tables
from measured_costs import cases, small
from model_sizes import MODELS, mmdit

from tinyfusion_pl import create_model
from tinyfusion_pl.pruning import WeightUpdate

BOUNDS = {"FLOPs": 0.03, "bytes": 0.15, "parameters": 0.02}


@pytest.fixture(scope="module")
def measured():
    return list(cases())


@pytest.mark.parametrize("kind", BOUNDS)
def test_steps_of_a_small_dit_cost_what_is_predicted(measured, kind):
    found = {
        name: predicted / real - 1 for name, predicted, real in measured if name.endswith(kind)
    }
    assert len(found) >= (1 if kind == "parameters" else 4)
    assert all(abs(error) <= BOUNDS[kind] for error in found.values()), found


def test_gathering_halves_the_backward_of_blocks(measured):
    """A backward pass is two forward passes, and half of the rows are dropped: (1 + 2) / (1 + "
    "1)."""
    real = {name: value for name, _, value in measured}
    assert real["search, full, plain: FLOPs"] / real[
        "search, full, gathered: FLOPs"
    ] == pytest.approx(1.5, abs=0.02)


def test_published_sizes_are_met():
    """Parameters of the published weights: 675.1 M, 8.1 B, 11.9 B."""
    with torch.device("meta"):
        assert MODELS["DiT-XL/2"].params() == pytest.approx(
            sum(p.numel() for p in create_model("dit_xl_2").parameters()), rel=0.01
        )
    assert MODELS["SD3.5-L"].params() == pytest.approx(8.06e9, rel=0.02)
    assert MODELS["FLUX.1-dev"].params() == pytest.approx(11.90e9, rel=0.01)


def test_lora_has_the_parameters_that_are_predicted():
    model = small()
    WeightUpdate("lora").start(model)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad)
    from measured_costs import SIZES
    from model_sizes import dit

    assert trained_params(dit("small", **SIZES), Step("search", 1, update="lora")) == blocks


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_two_stream_models_cost_what_is_predicted(name):
    """diffusers' own models, small, on the meta device."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    heads, head, image, text, pooled, context = 4, 64, 64, 16, 32, 96
    width = heads * head
    with torch.device("meta"):
        if name == "sd3":
            model = SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=16,
                num_layers=4,
                attention_head_dim=head,
                num_attention_heads=heads,
                joint_attention_dim=context,
                caption_projection_dim=width,
                pooled_projection_dim=pooled,
                out_channels=16,
                pos_embed_max_size=16,
            )
            arguments = {"hidden_states": torch.zeros(1, 16, 16, 16), "timestep": torch.zeros(1)}
        else:
            model = FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=head,
                num_attention_heads=heads,
                joint_attention_dim=context,
                pooled_projection_dim=pooled,
                guidance_embeds=True,
                axes_dims_rope=(16, 24, 24),
            )
            arguments = {
                "hidden_states": torch.zeros(1, image, 64),
                "timestep": torch.zeros(1),
                "guidance": torch.zeros(1),
            }
        arguments |= {
            "encoder_hidden_states": torch.zeros(1, text, context),
            "pooled_projections": torch.zeros(1, pooled),
        }
    if name == "flux":  # positions have values
        model, arguments = (
            model.to_empty(device="cpu"),
            {k: torch.zeros(v.shape) for k, v in arguments.items()},
        )
        arguments |= {"img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3)}
    predicted = mmdit(
        name,
        num_joint=4 if name == "sd3" else 2,
        num_single=0 if name == "sd3" else 3,
        width=width,
        image=image,
        text=text,
        pooled=pooled,
        guidance=name == "flux",
        ends_image=name == "sd3",
        context=context,
    )
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**arguments)
    assert predicted.flops() == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert predicted.params() == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)


def test_a_sharded_step_holds_less_and_sends_more():
    model, whole = MODELS["FLUX.1-dev"], Step("recovery", 1, checkpointing=1.0)
    sharded = Step("recovery", 1, checkpointing=1.0, sharded=True)
    held = [sum(step_bytes(model, step, devices=8).values()) for step in (whole, sharded)]
    sent = [step_seconds(model, step, devices=8)["communication"] for step in (whole, sharded)]
    assert held[1] < held[0] / 6 and sent[1] > sent[0]
    assert step_flops(model, whole) == step_flops(model, sharded)


def test_the_page_has_the_tables_that_are_predicted():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert all(part in page for part in tables().split("\n\n"))
