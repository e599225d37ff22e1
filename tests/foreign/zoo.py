"""Tiny random models of other libraries, called with the inputs that their pipelines give them.

``ZOO[name]`` is a `Row`: ``row.build()`` gives the model, the function that makes its inputs, and
the paths of its stacks:

    model, make_inputs, stacks = ZOO["flux"].build()
    args, kwargs = make_inputs(3)  # a batch of three
    output = sample_of(model(*args, **kwargs))

``build(**config)`` passes settings of the library's own configuration on, so
``build(**row.shallow(kept_blocks))`` is the shallow model as the library itself makes it. Every
parameter is drawn anew (`randomize`), so that no block is the identity. `COUPLED` holds calls and
settings that tie blocks to their index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

Call = tuple[tuple, dict[str, Any]]


class Foreign(NamedTuple):
    model: nn.Module
    make_inputs: Callable[[int], Call]
    stacks: list[str]


@dataclass(frozen=True)
class Row:
    """One model: its builder, and which setting holds the depth of which stack (empty: the model cannot state it)."""

    build: Callable[..., Foreign]
    depths: Mapping[str, str] = field(default_factory=dict)
    library: str = "diffusers"
    found: bool = True  # whether the stacks are found without being named
    kept: Mapping[str, Sequence[int]] = field(
        default_factory=dict
    )  # a structure that this model allows; default: [0, 2, 3]
    lists: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings that hold indices, as they are after that cut

    def kept_blocks(self, stacks: Sequence[str]) -> dict[str, list[int]]:
        return {path: list(self.kept.get(path, [0, 2, 3])) for path in stacks}

    def shallow(self, kept_blocks: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The settings of the shallow model."""
        return {
            **{self.depths[path]: len(kept) for path, kept in kept_blocks.items()},
            **self.lists,
        }


def sample_of(output: Any) -> Tensor:
    """The sample, as a pipeline takes it."""
    if isinstance(output, Tensor):
        return output
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: no zero-initialized gate hides a block, and nothing is left uninitialized."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            p.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.copy_(0.1 * noise + float(name.endswith("weight")))
    return model.eval()


def g(*shape: int) -> Tensor:
    return torch.randn(*shape)


def padded(batch_size: int, length: int = 7, dtype: torch.dtype = torch.long) -> Tensor:
    """A mask (B, length) with two padded tokens in every sample but the first."""
    mask = torch.ones(batch_size, length, dtype=dtype)
    mask[1:, length - 2 :] = 0
    return mask


def of(library: str, name: str) -> type:
    """The class, or a skip where the installed version lacks it."""
    module = pytest.importorskip(library)
    if not hasattr(module, name):
        pytest.skip(f"{name} is not in this version of {library}")
    return getattr(module, name)


def diffusers_model(name: str, defaults: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(of("diffusers", name)(**{**defaults, **config}))


# -- one stream ------------------------------------------------------------------------------------
def dit(**config) -> Foreign:
    model = diffusers_model(
        "DiTTransformer2DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        ),
        config,
    )
    for block in (
        model.transformer_blocks
    ):  # as in the published weights: every block holds the same embedder
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.class_embedder.dropout_prob = (
            0.0  # draws, also in a call that is to be repeated
        )

    def make_inputs(b):
        return (g(b, 4, 8, 8),), dict(
            timestep=torch.randint(0, 10, (b,)),
            class_labels=torch.randint(0, 10, (b,)),
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


def pixart(**config) -> Foreign:
    model = diffusers_model(
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=24,
            caption_channels=12,
            norm_num_groups=1,
            use_additional_conditions=False,
        ),
        config,
    )

    def make_inputs(b):
        return (g(b, 4, 8, 8),), dict(
            encoder_hidden_states=g(b, 7, 12),
            encoder_attention_mask=padded(b),
            timestep=torch.randint(0, 10, (b,)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


def sana(**config) -> Foreign:
    model = diffusers_model(
        "SanaTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=4,
            num_cross_attention_heads=3,
            cross_attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=12,
            sample_size=4,
            patch_size=1,
        ),
        config,
    )

    def make_inputs(b):
        return (g(b, 4, 4, 4),), dict(
            encoder_hidden_states=g(b, 7, 12),
            encoder_attention_mask=padded(b, dtype=torch.float32),
            timestep=torch.rand(b) * 1000,
            return_dict=False,
            attention_kwargs=None,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=12,
    freq_dim=16,
    ffn_dim=24,
    num_layers=4,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=32,
)


def wan(**config) -> Foreign:
    model = diffusers_model("WanTransformer3DModel", WAN, config)

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 4, 2, 8, 8),
            timestep=torch.rand(b) * 1000,
            encoder_hidden_states=g(b, 7, 12),
            attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["blocks"])


def wan_vace(**config) -> Foreign:
    model = diffusers_model(
        "WanVACETransformer3DModel",
        {**WAN, "num_layers": 6, "vace_layers": [0, 3], "vace_in_channels": 6},
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 4, 2, 8, 8),
            timestep=torch.rand(b) * 1000,
            encoder_hidden_states=g(b, 7, 12),
            control_hidden_states=g(b, 6, 2, 8, 8),
            attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["blocks"])


def ltx(**config) -> Foreign:
    model = diffusers_model(
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            num_layers=4,
            caption_channels=12,
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 2 * 16, 4),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 1000,
            encoder_attention_mask=padded(b),
            num_frames=2,
            height=4,
            width=4,
            rope_interpolation_scale=(8 / 25, 32, 32),
            attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


def uvit2d(**config) -> Foreign:
    model = diffusers_model(
        "UVit2DModel",
        dict(
            hidden_size=24,
            cond_embed_dim=8,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=12,
            vocab_size=33,
            codebook_size=32,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=2,
            block_num_heads=2,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=24,
            sample_size=4,
        ),
        config,
    )

    def make_inputs(b):
        return (torch.randint(0, 33, (b, 4, 4)),), dict(
            encoder_hidden_states=g(b, 7, 12),
            pooled_text_emb=g(b, 8),
            micro_conds=torch.rand(b, 5) * 10,
        )

    return Foreign(model, make_inputs, ["transformer_layers"])


def transformer2d(**config) -> Foreign:
    model = diffusers_model(
        "Transformer2DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=8,
            num_layers=4,
            norm_num_groups=2,
            cross_attention_dim=12,
        ),
        config,
    )

    def make_inputs(b):
        return (g(b, 8, 4, 4),), dict(encoder_hidden_states=g(b, 7, 12), return_dict=False)

    return Foreign(model, make_inputs, ["transformer_blocks"])


def hunyuandit(**config) -> Foreign:
    model = diffusers_model(
        "HunyuanDiT2DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=24,
            num_layers=8,
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=10,
            text_len=5,
            text_len_t5=6,
            use_style_cond_and_image_meta_size=False,
        ),
        config,
    )
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rope = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), device="cpu", output_type="pt")

    def make_inputs(b):
        return (g(b, 4, 8, 8), torch.rand(b) * 1000), dict(
            encoder_hidden_states=g(b, 5, 12),
            text_embedding_mask=padded(b, 5),
            encoder_hidden_states_t5=g(b, 6, 16),
            text_embedding_mask_t5=padded(b, 6),
            image_meta_size=None,
            style=None,
            image_rotary_emb=rope,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["blocks"])


def zimage(**config) -> Foreign:
    model = diffusers_model(
        "ZImageTransformer2DModel",
        dict(
            in_channels=4,
            dim=36,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=12,
            axes_dims=[4, 4, 4],
            axes_lens=[64, 32, 32],
        ),
        config,
    )

    def make_inputs(b):
        images, captions = [g(4, 1, 8, 8) for _ in range(b)], [g(7 + i % 2, 12) for i in range(b)]
        return (images, torch.rand(b), captions), dict(return_dict=False)

    return Foreign(model, make_inputs, ["layers"])


def lumina2(**config) -> Foreign:
    model = diffusers_model(
        "Lumina2Transformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=4,
            num_refiner_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(32, 32, 32),
            cap_feat_dim=12,
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 4, 8, 8),
            timestep=torch.rand(b),
            encoder_hidden_states=g(b, 7, 12),
            encoder_attention_mask=padded(b),
            return_dict=False,
            attention_kwargs=None,
        )

    return Foreign(model, make_inputs, ["layers"])


# -- two streams -----------------------------------------------------------------------------------
def sd3(**config) -> Foreign:
    model = diffusers_model(
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            caption_projection_dim=24,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 4, 8, 8),
            timestep=torch.rand(b) * 1000,
            encoder_hidden_states=g(b, 7, 12),
            pooled_projections=g(b, 10),
            joint_attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


def sd35(**config) -> Foreign:
    return sd3(**{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **config})


FLUX_DEPTHS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def flux_ids(height: int, width: int) -> Tensor:
    return torch.cartesian_prod(
        torch.arange(1.0), torch.arange(float(height)), torch.arange(float(width))
    )


def flux(*, text_length: int = 7, **config) -> Foreign:
    """With a `text_length` of 16 it is as long as the image: then only names tell the streams apart."""
    model = diffusers_model(
        "FluxTransformer2DModel",
        dict(
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 16, 4),
            timestep=torch.rand(b),
            guidance=torch.full((b,), 3.5),
            pooled_projections=g(b, 10),
            encoder_hidden_states=g(b, text_length, 12),
            txt_ids=torch.zeros(text_length, 3),
            img_ids=flux_ids(4, 4),
            joint_attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, list(FLUX_DEPTHS))


def flux2(**config) -> Foreign:
    model = diffusers_model(
        "Flux2Transformer2DModel",
        dict(
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        config,
    )
    one, four = torch.arange(1), torch.arange(4)
    img, txt = (
        torch.cartesian_prod(one, four, four, one),
        torch.cartesian_prod(one, one, one, torch.arange(7)),
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 16, 4),
            timestep=torch.rand(b),
            guidance=torch.full((b,), 3.5),
            encoder_hidden_states=g(b, 7, 12),
            txt_ids=txt[None].expand(b, -1, -1),
            img_ids=img[None].expand(b, -1, -1),
            joint_attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, list(FLUX_DEPTHS))


def auraflow(**config) -> Foreign:
    model = diffusers_model(
        "AuraFlowTransformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=4,
            num_single_dit_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            caption_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        config,
    )

    def make_inputs(b):
        return (g(b, 4, 8, 8),), dict(
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b),
            return_dict=False,
            attention_kwargs=None,
        )

    return Foreign(model, make_inputs, ["joint_transformer_blocks", "single_transformer_blocks"])


def hunyuanvideo(**config) -> Foreign:
    model = diffusers_model(
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=4,
            num_single_layers=4,
            num_refiner_layers=2,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=12,
            pooled_projection_dim=10,
            rope_axes_dim=(2, 4, 4),
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 4, 1, 8, 8),
            timestep=torch.rand(b) * 1000,
            encoder_hidden_states=g(b, 7, 12),
            encoder_attention_mask=padded(b),
            pooled_projections=g(b, 10),
            guidance=torch.full((b,), 6000.0),
            attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, list(FLUX_DEPTHS))


def cogvideox(**config) -> Foreign:
    model = diffusers_model(
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=12,
            num_layers=4,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=7,
            use_rotary_positional_embeddings=True,
        ),
        config,
    )
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rope = get_3d_rotary_pos_embed(
        16, ((0, 0), (4, 4)), (4, 4), 2
    )  # (32, 16) each, shared: 32 is a multiple of many batches

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 2, 4, 8, 8),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.randint(0, 1000, (b,)),
            image_rotary_emb=rope,
            attention_kwargs=None,
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


def qwen_image(**config) -> Foreign:
    model = diffusers_model(
        "QwenImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
        ),
        config,
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 16, 16),
            timestep=torch.rand(b),
            guidance=None,
            encoder_hidden_states_mask=padded(b),
            encoder_hidden_states=g(b, 7, 12),
            img_shapes=[[(1, 4, 4)]] * b,
            attention_kwargs={},
            return_dict=False,
        )

    return Foreign(model, make_inputs, ["transformer_blocks"])


# -- lists inside stages ---------------------------------------------------------------------------
def unet2d(**config) -> Foreign:
    model = diffusers_model(
        "UNet2DConditionModel",
        dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=2,
            transformer_layers_per_block=(4, 2),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        config,
    )

    def make_inputs(b):
        return (g(b, 4, 8, 8), torch.randint(0, 10, (b,))), dict(
            encoder_hidden_states=g(b, 7, 12), return_dict=False
        )

    return Foreign(
        model,
        make_inputs,
        [
            "down_blocks.0.attentions.0.transformer_blocks",
            "up_blocks.1.attentions.1.transformer_blocks",
        ],
    )


# -- timm, transformers, torch ---------------------------------------------------------------------
def timm_model(
    name: str, stacks: Sequence[str], defaults: Mapping[str, Any], config: Mapping[str, Any]
) -> Foreign:
    torch.manual_seed(0)
    settings = {**defaults, **config}
    model = randomize(pytest.importorskip("timm").create_model(name, num_classes=5, **settings))
    size = settings.get("img_size", 32)
    return Foreign(model, lambda b: ((g(b, 3, size, size),), {}), list(stacks))


def vit(**config) -> Foreign:
    return timm_model(
        "vit_tiny_patch16_224",
        ["blocks"],
        dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2),
        config,
    )


def eva02(**config) -> Foreign:
    return timm_model(
        "eva02_tiny_patch14_224",
        ["blocks"],
        dict(img_size=28, patch_size=7, embed_dim=32, depth=4, num_heads=2),
        config,
    )


def swin(**config) -> Foreign:
    return timm_model(
        "swin_tiny_patch4_window7_224",
        ["layers.0.blocks", "layers.1.blocks"],
        dict(img_size=32, window_size=4, embed_dim=16, depths=(4, 4), num_heads=(2, 4)),
        config,
    )


def convnext(**config) -> Foreign:
    return timm_model(
        "convnext_atto",
        ["stages.1.blocks", "stages.2.blocks"],
        dict(depths=(2, 4, 4, 2), dims=(8, 16, 24, 32)),
        config,
    )


def transformers_model(
    name: str, config_name: str, defaults: Mapping[str, Any], config: Mapping[str, Any]
) -> nn.Module:
    torch.manual_seed(0)
    return randomize(
        of("transformers", name)(of("transformers", config_name)(**{**defaults, **config}))
    )


TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)


def llama(*, use_cache: bool = False, **config) -> Foreign:
    model = transformers_model(
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(**TINY, vocab_size=50, num_key_value_heads=1, max_position_embeddings=64),
        config,
    )

    def make_inputs(b):
        return (), dict(
            input_ids=torch.randint(0, 50, (b, 9)), attention_mask=padded(b, 9), use_cache=use_cache
        )

    return Foreign(model, make_inputs, ["model.layers"])


def bert(**config) -> Foreign:
    model = transformers_model(
        "BertModel",
        "BertConfig",
        dict(**TINY, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        config,
    )

    def make_inputs(b):
        return (), dict(input_ids=torch.randint(0, 50, (b, 9)), attention_mask=padded(b, 9))

    return Foreign(model, make_inputs, ["encoder.layer"])


def hf_vit(**config) -> Foreign:
    model = transformers_model(
        "ViTModel",
        "ViTConfig",
        dict(
            **TINY,
            image_size=16,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        config,
    )
    path = "layers" if hasattr(model, "layers") else "encoder.layer"  # as of version 5, and before
    return Foreign(model, lambda b: ((), dict(pixel_values=g(b, 3, 16, 16))), [path])


def encoder(*, batch_first: bool, num_layers: int = 4) -> Foreign:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = randomize(nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False))

    def make_inputs(b):
        x = g(b, 9, 16) if batch_first else g(9, b, 16)
        return (x,), dict(src_key_padding_mask=padded(b, 9) == 0)

    return Foreign(model, make_inputs, ["layers"])


def encoder_batch_first(**config) -> Foreign:
    return encoder(batch_first=True, **config)


def encoder_sequence_first(**config) -> Foreign:
    return encoder(batch_first=False, **config)


ONE = {"transformer_blocks": "num_layers"}
SINGLE = {"single_transformer_blocks": [1, 3]}
ZOO: dict[str, Row] = {
    "dit": Row(dit, ONE),
    "pixart": Row(pixart, ONE),
    "sd3": Row(sd3, ONE),
    "sd35": Row(sd35, ONE, lists={"dual_attention_layers": (0,)}),
    "flux": Row(flux, FLUX_DEPTHS, kept=SINGLE),
    "flux2": Row(flux2, FLUX_DEPTHS, kept=SINGLE),
    "sana": Row(sana, ONE),
    "wan": Row(wan, {"blocks": "num_layers"}),
    "wan_vace": Row(
        wan_vace,
        {"blocks": "num_layers"},
        kept={"blocks": [0, 2, 3, 5]},
        lists={"vace_layers": [0, 2]},
    ),
    "ltx": Row(ltx, ONE),
    "hunyuanvideo": Row(hunyuanvideo, FLUX_DEPTHS, kept=SINGLE),
    "cogvideox": Row(cogvideox, ONE),
    "qwen_image": Row(qwen_image, ONE),
    "zimage": Row(zimage, {"layers": "n_layers"}),
    "auraflow": Row(
        auraflow,
        {
            "joint_transformer_blocks": "num_mmdit_layers",
            "single_transformer_blocks": "num_single_dit_layers",
        },
        kept=SINGLE,
    ),
    "lumina2": Row(lumina2, {"layers": "num_layers"}),
    "hunyuandit": Row(hunyuandit, {"blocks": "num_layers"}, kept={"blocks": [0, 3, 4, 7]}),
    "uvit2d": Row(uvit2d, {"transformer_layers": "num_hidden_layers"}),
    "transformer2d": Row(transformer2d, ONE),
    "unet2d": Row(unet2d, found=False),
    "vit": Row(vit, {"blocks": "depth"}, "timm"),
    "eva02": Row(eva02, {"blocks": "depth"}, "timm"),
    "swin": Row(
        swin, {}, "timm", found=False, kept={"layers.0.blocks": [0, 3], "layers.1.blocks": [0, 1]}
    ),
    "convnext": Row(convnext, {}, "timm", found=False),
    "bert": Row(bert, {"encoder.layer": "num_hidden_layers"}, "transformers"),
    "hf_vit": Row(
        hf_vit,
        {"layers": "num_hidden_layers", "encoder.layer": "num_hidden_layers"},
        "transformers",
    ),
    "llama": Row(llama, {"model.layers": "num_hidden_layers"}, "transformers"),
    "encoder_batch_first": Row(encoder_batch_first, {"layers": "num_layers"}, "torch"),
    "encoder_sequence_first": Row(encoder_sequence_first, {"layers": "num_layers"}, "torch"),
}


# -- blocks tied to their index by a call or a setting ---------------------------------------------
def with_inputs(foreign: Foreign, **extra: Callable[[int], Any]) -> Foreign:
    """The same model, called with further keyword arguments, each a function of the batch size."""

    def make_inputs(b):
        args, kwargs = foreign.make_inputs(b)
        return args, {**kwargs, **{name: make(b) for name, make in extra.items()}}

    return foreign._replace(make_inputs=make_inputs)


def sd3_controlnet() -> Foreign:
    return with_inputs(
        sd3(), block_controlnet_hidden_states=lambda b: [g(b, 16, 24) for _ in range(2)]
    )


def flux_controlnet() -> Foreign:
    return with_inputs(
        flux(),
        controlnet_block_samples=lambda b: [g(b, 16, 24) for _ in range(2)],
        controlnet_single_block_samples=lambda b: [g(b, 16, 24) for _ in range(2)],
    )


def sana_controlnet() -> Foreign:
    return with_inputs(
        sana(), controlnet_block_samples=lambda b: tuple(g(b, 16, 24) for _ in range(3))
    )


def chroma() -> Foreign:
    """The modulation of a block is computed outside it, for its index."""
    model = diffusers_model(
        "ChromaTransformer2DModel",
        dict(
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        {},
    )

    def make_inputs(b):
        return (), dict(
            hidden_states=g(b, 16, 4),
            timestep=torch.rand(b),
            encoder_hidden_states=g(b, 7, 12),
            txt_ids=torch.zeros(7, 3),
            img_ids=flux_ids(4, 4),
            attention_mask=torch.ones(b, 23, dtype=torch.bool),
            return_dict=False,
        )

    return Foreign(model, make_inputs, list(FLUX_DEPTHS))


def vit_rope_mixed() -> Foreign:
    """The rotary frequencies of all blocks are one parameter with a row for each."""
    return timm_model(
        "vit_small_patch16_rope_mixed_224",
        ["blocks"],
        dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2),
        {},
    )


COUPLED: dict[str, Callable[[], Foreign]] = {
    "sd3_controlnet": sd3_controlnet,
    "flux_controlnet": flux_controlnet,
    "sana_controlnet": sana_controlnet,
    "chroma": chroma,
    "vit_rope_mixed": vit_rope_mixed,
}
