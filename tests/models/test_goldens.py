import pytest
import torch

from goldens_util import assert_near, golden_files, load, new_dit, part
from tinyfusion_pl.distill import HiddenStates
from tinyfusion_pl.models import SiT
from tinyfusion_pl.objectives.guidance import guided


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_forward*"))
def test_against_reference_output_guided_output_and_every_block(file):
    golden = load(file)
    model = new_dit(part(golden, "weights"))
    with torch.no_grad(), HiddenStates(model, "blocks", range(len(model.blocks))) as hidden:
        assert_near(model(golden["x"], golden["t"], golden["y"]), golden["output"], 1e-5, "output")
    for i, expected in enumerate(golden["block_outputs"]):
        assert_near(hidden[i], expected, 1e-5, f"block {i}")
    for key in (k for k in golden if k.startswith("cfg.output_scale_")):
        scale, half = float(key.rsplit("_", 1)[1]), len(golden["cfg.x"]) // 2
        with torch.no_grad():
            out = guided(
                model,
                golden["cfg.x"][:half],
                golden["cfg.t"][:half],
                golden["cfg.y"][:half],
                guidance_scale=scale,
                guidance_channels=3,
            )
        assert_near(out, golden[key][:half], 1e-5, key)


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("sit*"))
def test_against_reference_output_of_sit(file):
    golden = load(file)
    with torch.no_grad():
        output = new_dit(part(golden, "weights"), SiT)(golden["x"], golden["t"], golden["y"])
    assert_near(output, golden["output"], 1e-5, "output")
