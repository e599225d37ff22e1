import json

import pytest
import torch

from tinyfusion_pl.models import DiT, SiT, create_model, list_models, load_shallow, save_shallow
from tinyfusion_pl.pruning import remove_blocks

SMALL = {
    "input_size": 8,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}


def trained_like(**overrides):
    model = SiT(**{**SMALL, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch():
    return torch.randn(3, 2, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 4, 5])


@pytest.mark.parametrize(
    ("name", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)]
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_every_published_size_and_patch_is_there_under_both_names():
    sizes = [(size, patch) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    assert set(list_models("sit_*")) == {f"sit_{size.lower()}_{patch}" for size, patch in sizes}
    with torch.device("meta"):
        for size, patch in sizes:
            model = create_model(f"SiT-{size}/{patch}", depth=1)
            assert (
                type(model) is SiT
                and model.model_name == f"sit_{size.lower()}_{patch}"
                and model.config["patch_size"] == patch
            )


def test_it_computes_the_first_half_of_the_dit_with_the_same_weights():
    model, (x, t, y) = trained_like(), batch()
    dit = DiT(**model.config)
    dit.load_state_dict(model.state_dict())
    assert torch.equal(model(x, t, y), dit(x, t, y)[:, :2])


def test_times_between_0_and_1_are_told_apart():
    model, (x, _, y) = trained_like(), batch()
    outputs = [model(x, torch.full((3,), t), y) for t in (0.0, 0.1, 0.9, 1.0)]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(outputs, outputs[1:]))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_as_many_channels_come_out_as_go_in(learn_sigma):
    model = trained_like(learn_sigma=learn_sigma)
    assert model(*batch()).shape == (3, 2, 8, 8)
    assert model.final_layer.linear.out_features == 4 * 2 * (1 + learn_sigma)


def test_config_is_json_and_rebuilds_the_model():
    model, (x, t, y) = trained_like(), batch()
    again = SiT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(x, t, y), again(x, t, y))


def test_a_shallow_one_is_saved_and_loaded(tmp_path):
    torch.manual_seed(1)
    model, (x, t, y) = create_model("sit_s_2", **SMALL), batch()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    shallow = remove_blocks(model, {"blocks": [0, 2]})
    save_shallow(tmp_path, shallow, {"stacks": {}})
    loaded = load_shallow(tmp_path)
    assert type(loaded) is SiT and len(loaded.blocks) == 2
    assert torch.equal(loaded(x, t, y), shallow.eval()(x, t, y))


def test_sizes_that_do_not_fit_name_the_family():
    with pytest.raises(ValueError, match="A SiT's sizes .* depth=0"):
        SiT(**{**SMALL, "depth": 0})
