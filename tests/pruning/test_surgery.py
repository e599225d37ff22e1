import copy

import pytest
import timm
import torch
from peft import LoHaConfig

from pruning.toys import Toy
from tinyfusion_pl.pruning import WeightUpdate, find_stacks, remove_blocks
from tinyfusion_pl.pruning.adapter_state import adapter_state, load_adapter_state


def test_kept_blocks_stay_the_same_objects_in_order():
    model = Toy(5)
    first, last = model.blocks[1], model.blocks[4]
    remove_blocks(model, {"blocks": [1, 4]})
    assert list(model.blocks) == [first, last]


@pytest.mark.parametrize("kept", [[], [0, 0], [2, 1], [0, 9], [-1, 0]])
def test_wrong_indices_are_refused(kept):
    with pytest.raises(ValueError, match="ascending indices out of 0..3"):
        remove_blocks(Toy(4), {"blocks": kept})


def test_stacks_are_found_in_a_timm_model_and_survive_surgery():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=3)
    assert list(find_stacks(vit)) == ["blocks"]
    x = torch.randn(2, 3, 32, 32)
    remove_blocks(vit, {"blocks": [0, 3]})
    assert vit(x).shape == (2, 3) and len(vit.blocks) == 2


def test_lora_goes_on_every_linear_and_leaves_everything_else_frozen():
    model = Toy(2)
    WeightUpdate("lora").start(model)
    trainable = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        name for name, m in Toy(2).named_modules() if isinstance(m, torch.nn.Linear)
    }
    a = model.blocks[0].lin.lora_A["tinyfusion"]
    assert a.weight.shape[0] == 8 and model.blocks[0].lin.scaling["tinyfusion"] == 2.0


def test_lora_goes_on_linear_layers_whose_names_are_numbers_and_on_no_block_that_ends_alike():
    lin = torch.nn.Linear
    model = torch.nn.Sequential(
        lin(3, 8),
        torch.nn.Sequential(Toy(2), Toy(2)),
        torch.nn.Sequential(torch.nn.LayerNorm(8)),
        lin(8, 2),
    )
    config = LoHaConfig(r=2)
    for kind in ("lora", config):
        mine = copy.deepcopy(model)
        WeightUpdate(kind).start(mine)
        adapted = {
            name.rpartition(".base_layer")[0]
            for name, _ in mine.named_modules()
            if name.endswith(".base_layer")
        }
        assert adapted == {name for name, m in model.named_modules() if isinstance(m, lin)}
    assert config.target_modules is None  # the caller's own is not written to


def test_any_peft_config_will_do():
    model = Toy(2)
    WeightUpdate(LoHaConfig(r=2)).start(model)
    assert any("hada" in name for name, p in model.named_parameters() if p.requires_grad)


def test_discard_restores_every_weight_and_buffer_and_who_trains():
    for kind in ("lora", "full", "frozen"):
        torch.manual_seed(0)
        model = Toy(2)
        model.register_buffer("running", torch.zeros(1))
        model.embed.weight.requires_grad_(False)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        update = WeightUpdate(kind)
        update.start(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
            model.running.add_(1)
        update.finish(model, delta_w="discard")
        after = model.state_dict()
        assert after.keys() == before.keys() and all(
            torch.equal(after[k], before[k]) for k in before
        )
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed.weight"]
        assert type(model.embed) is torch.nn.Linear


def test_adapter_state_goes_round_and_refuses_other_adapters():
    torch.manual_seed(0)
    a, b, c = Toy(2), Toy(2), Toy(3)
    for model in (a, b, c):
        WeightUpdate("lora").start(model)
    with torch.no_grad():
        a.head.lora_B["tinyfusion"].weight.fill_(0.5)
    load_adapter_state(b, adapter_state(a))
    assert torch.equal(b.head.lora_B["tinyfusion"].weight, a.head.lora_B["tinyfusion"].weight)
    with pytest.raises(ValueError, match="do not match"):
        load_adapter_state(c, adapter_state(a))


def test_a_model_with_adapters_saves_and_loads_its_plain_keys_nested_too():
    torch.manual_seed(0)
    model, holder = Toy(2), torch.nn.Module()
    plain = {f"model.{k}": torch.randn_like(v) for k, v in model.state_dict().items()}
    holder.model = model
    WeightUpdate("lora").start(model)
    assert set(holder.state_dict()) == set(plain)
    holder.load_state_dict(plain)
    assert torch.equal(model.head.base_layer.weight, plain["model.head.weight"])


def test_a_bare_sequential_loses_blocks_in_place():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    kept = [model[0], model[2]]
    assert remove_blocks(model, {"": [0, 2]}) is model
    assert list(model) == kept and set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }
