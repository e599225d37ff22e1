"""Adapters of the weight update: what they may go on, evaluation of layers that torch fuses, and the user's own adapters beside them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from callbacks.test_lifecycle import fit
from callbacks.toy_module import Base, InInit
from pruning.toys import Toy
from tinyfusion_pl.callbacks import DepthPruningCallback
from tinyfusion_pl.pruning import WeightUpdate
from tinyfusion_pl.pruning.linear_layers import linear_names


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


class EncoderModule(Base):
    """Validates with the fused path of torch allowed, and again without it."""

    def __init__(self):
        super().__init__()
        self.model, self.distances = encoder(), []

    def training_step(self, batch, batch_idx):
        return self.model(batch[0].unsqueeze(1).repeat(1, 3, 3)[:, :, :8]).square().mean()

    def validation_step(self, batch, batch_idx):
        x = batch[0].unsqueeze(1).repeat(1, 3, 3)[:, :, :8]
        with torch.no_grad():
            y = self.model(x)
            torch.backends.mha.set_fastpath_enabled(False)
            plain = self.model(x)
            torch.backends.mha.set_fastpath_enabled(True)
        self.distances.append(float((y - plain).abs().max()))

    def val_dataloader(self):
        return self.train_dataloader()


# -- where they may go -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets", [["out_proj"], ["self_attn"], ["linear1", "out_proj"], r".*self_attn\.out_proj"]
)
def test_targets_inside_multihead_attention_are_refused_by_name_before_any_step(targets, tmp_path):
    module = EncoderModule()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"target_modules reach layers\.0\.self_attn.*MultiheadAttention reads its weights without",
    ):
        fit(
            module,
            DepthPruningCallback("1:2", weight_update=LoraConfig(r=2, target_modules=targets)),
            folder=tmp_path,
        )
    assert module.trainer.global_step == 0 and not (tmp_path / "shallow").exists()
    assert module.state_dict().keys() == before.keys() and all(
        p.requires_grad for p in module.model.parameters()
    )


class ReadsItsWeight(nn.Module):
    """As some modulation layers do, to compute in float32."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.outer(
            nn.functional.linear(x.float(), self.inner.weight.float(), self.inner.bias.float())
        )


def test_a_layer_that_is_read_but_never_called_gets_no_adapter():
    model = nn.Sequential(*(ReadsItsWeight() for _ in range(2)))
    assert linear_names(model) == ["0.outer", "1.outer"]
    with pytest.raises(ValueError, match=r"reach 0\.inner and 1 more: ReadsItsWeight reads"):
        WeightUpdate(LoraConfig(r=2, target_modules=["inner", "outer"])).start(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_linear_layers_of_other_kinds_are_adapted_too():
    transformers = pytest.importorskip("transformers")
    falcon = transformers.FalconConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    assert "h.0.mlp.dense_h_to_4h" in linear_names(
        transformers.FalconModel(falcon)
    )  # a subclass of nn.Linear
    assert "h.0.attn.c_attn" in linear_names(transformers.GPT2Model(gpt2))  # transposed


def test_a_model_without_linear_layers_is_told_what_else_there_is():
    model = nn.Sequential(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match="no linear layer .* weight_update='full' or 'frozen'"):
        WeightUpdate("lora").start(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_peft_refuses_leaves_the_model_as_it_was():
    model = Toy(2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin"]), model, adapter_name="mine")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=["lin", "blocks.0"])
    with pytest.raises(
        ValueError,
        match="do not go onto Toy: Target module Block is not supported.*or weight_update='full'",
    ):
        WeightUpdate(config).start(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.blocks[0].lin.active_adapters == ["mine"]


def test_fused_experts_keep_their_adapters_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.Qwen2MoeModel(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update = WeightUpdate("lora")
    update.start(model)
    assert model.state_dict().keys() == before.keys()
    update.finish(model, delta_w="merge")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- evaluation while they are on ------------------------------------------------------------------
def test_validation_during_fit_sees_the_adapters_where_torch_fuses_the_layer(tmp_path):
    module = EncoderModule()
    fit(module, DepthPruningCallback("1:2", weight_update="lora"), folder=tmp_path, num_sanity_val_steps=0, limit_val_batches=1,
        val_check_interval=2)  # fmt: skip
    moved = [p for name, p in module.model.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 1e-3 for p in moved)
    assert len(module.distances) >= 3 and max(module.distances) < 1e-5


def test_the_fused_path_is_back_when_the_adapters_are_gone():
    model, update = encoder(), WeightUpdate("lora")
    before = [layer.activation_relu_or_gelu for layer in model.layers]
    update.start(model)
    assert all(layer.activation_relu_or_gelu == 0 for layer in model.layers)
    update.finish(model, delta_w="discard")
    assert [layer.activation_relu_or_gelu for layer in model.layers] == before and before[0]


# -- the user's own --------------------------------------------------------------------------------
@pytest.mark.parametrize("delta_w", ["discard", "merge"])
@pytest.mark.parametrize(
    "update", ["lora", "full", "frozen", LoraConfig(r=2, target_modules=["fc", "head"])]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_users_adapter_goes_into_the_shallow_model(update, delta_w, wrapped, tmp_path):
    module = InInit(optimizers_kind="plain")
    mine = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    if wrapped:
        module.model = get_peft_model(module.model, mine, adapter_name="mine")
    else:
        inject_adapter_in_model(mine, module.model, adapter_name="mine")
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    callback = DepthPruningCallback("1:2", weight_update=update, delta_w=delta_w)
    fit(module, callback, folder=tmp_path, max_steps=3)
    shallow = callback.shallow_model
    assert isinstance(shallow, PeftModel) == wrapped
    (path, kept), after = next(iter(callback.decision.kept_blocks.items())), shallow.state_dict()
    assert not any("tinyfusion" in k for k in after) and "tinyfusion" not in shallow.peft_config
    renamed = {
        k.replace(f"{path}.{old}.", f"{path}.{new}."): k
        for new, old in enumerate(kept)
        for k in before
        if f"{path}.{old}." in k
    }
    renamed |= {k: k for k in before if f"{path}." not in k}
    assert after.keys() == renamed.keys() and any("lora_B.mine" in k for k in after)
    unmoved = all(
        torch.equal(after[new], before[old]) for new, old in renamed.items() if ".mine." in new
    )
    assert unmoved == (update != "full" or delta_w == "discard")
    if delta_w == "discard" or update == "frozen":
        assert all(torch.equal(after[new], before[old]) for new, old in renamed.items())
    layer = shallow.get_submodule(f"{path}.0.fc")
    assert layer.active_adapters == ["mine"] and all(
        p.requires_grad for n, p in layer.named_parameters() if "mine" in n
    )
