"""Models beyond the table of docs/any_model.md, checked the same way: verified, cut, saved and reopened by their own library."""

from types import SimpleNamespace

import pytest
import torch
from torch import randn as g

from foreign.zoo import of, randomize, sample_of
from tinyfusion_pl.models import load_shallow, save_shallow
from tinyfusion_pl.pruning import find_stacks, verify
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.drops import earliest_drops
from tinyfusion_pl.pruning.pruner import DepthPruner

pytestmark = pytest.mark.slow


def ids(n):
    places = torch.arange(n)
    return torch.stack([torch.zeros(n), places // 4, places % 4], 1).float()


def tokens(b):
    return torch.randint(5, 90, (b, 9))


DIFFUSERS = {  # class, config, inputs
    "cogview4": (
        "CogView4Transformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            out_channels=4,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 8, 8),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 900,
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "cogview3": (
        "CogView3PlusTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            out_channels=4,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 8, 8),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 900,
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "mochi": (
        "MochiTransformer3DModel",
        dict(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=7,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 2, 8, 8),
            encoder_hidden_states=g(b, 7, 16),
            timestep=torch.rand(b) * 900,
            encoder_attention_mask=torch.ones(b, 7).bool(),
        ),
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            text_embed_dim=12,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 1, 8, 8),
            timestep=torch.rand(b),
            encoder_hidden_states=g(b, 7, 12),
            fps=30,
            padding_mask=torch.zeros(1, 1, 64, 64),
        ),
    ),
    "omnigen": (
        "OmniGenTransformer2DModel",
        dict(
            in_channels=4,
            patch_size=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            num_layers=4,
            pad_token_id=0,
            vocab_size=100,
            time_step_dim=8,
            rope_scaling=dict(
                long_factor=list(range(1, 5)), short_factor=list(range(1, 5)), type="su"
            ),
            pos_embed_max_size=8,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 4, 4),
            timestep=torch.rand(b),
            input_ids=torch.randint(100, (b, 10)),
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=torch.ones(b, 15, 15),
            position_ids=torch.arange(15)[None].expand(b, -1),
        ),
    ),
    "bria": (
        "BriaTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=[0, 4, 4],
        ),
        lambda b: dict(
            hidden_states=g(b, 16, 4),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b),
            img_ids=ids(16),
            txt_ids=torch.zeros(7, 3),
        ),
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        dict(
            in_visual_dim=4,
            in_text_dim=12,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=2,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
        ),
        lambda b: dict(
            hidden_states=g(b, 1, 8, 8, 4),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 900,
            pooled_projections=g(b, 8),
            visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)],
            text_rope_pos=torch.arange(7),
        ),
    ),
    "skyreels": (
        "SkyReelsV2Transformer3DModel",
        dict(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=4,
            rope_max_seq_len=32,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 2, 8, 8),
            timestep=(torch.rand(b) * 900).long(),
            encoder_hidden_states=g(b, 7, 16),
        ),
    ),
    "prior": (
        "PriorTransformer",
        dict(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            embedding_dim=8,
            num_embeddings=7,
            additional_embeddings=4,
        ),
        lambda b: dict(
            hidden_states=g(b, 8),
            timestep=2,
            proj_embedding=g(b, 8),
            encoder_hidden_states=g(b, 7, 8),
        ),
    ),
    "hvideo15": (
        "HunyuanVideo15Transformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            num_refiner_layers=2,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 1, 8, 8),
            timestep=torch.rand(b) * 900,
            encoder_hidden_states=g(b, 6, 16),
            encoder_attention_mask=torch.ones(b, 6),
            encoder_hidden_states_2=g(b, 4, 8),
            encoder_attention_mask_2=torch.ones(b, 4),
            image_embeds=torch.zeros(b, 3, 12),
        ),
    ),
    "himage": (
        "HunyuanImageTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            num_single_layers=4,
            num_refiner_layers=2,
            text_embed_dim=16,
            rope_axes_dim=(4, 4),
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 4, 4),
            timestep=torch.rand(b) * 900,
            encoder_hidden_states=g(b, 6, 16),
            encoder_attention_mask=torch.ones(b, 6),
        ),
    ),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=8,
            sample_size=8,
            patch_size=(1, 2, 2),
            rope_max_seq_len=32,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 2, 8, 8),
            timestep=torch.rand(b) * 900,
            encoder_hidden_states=g(b, 7, 8),
        ),
    ),
    "prx": (
        "PRXTransformer2DModel",
        dict(
            in_channels=4,
            patch_size=2,
            context_in_dim=12,
            hidden_size=16,
            num_heads=2,
            depth=4,
            axes_dim=[4, 4],
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 8, 8),
            timestep=torch.rand(b),
            encoder_hidden_states=g(b, 7, 12),
            attention_mask=torch.ones(b, 7),
        ),
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=4,
            caption_channels=12,
        ),
        lambda b: dict(
            hidden_states=g(b, 2 * 4 * 4, 4),
            audio_hidden_states=g(b, 6, 4),
            encoder_hidden_states=g(b, 7, 12),
            audio_encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 900,
            num_frames=2,
            height=4,
            width=4,
            fps=25.0,
            audio_num_frames=6,
        ),
    ),
    "ovis": (
        "OvisImageTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
        ),
        lambda b: dict(
            hidden_states=g(b, 16, 4),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b),
            img_ids=ids(16),
            txt_ids=torch.zeros(7, 3),
        ),
    ),
    "longcat": (
        "LongCatImageTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=4,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            axes_dims_rope=[4, 2, 2],
        ),
        lambda b: dict(
            hidden_states=g(b, 16, 4),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b),
            img_ids=ids(16),
            txt_ids=torch.zeros(7, 3),
        ),
    ),
    "glm_image": (
        "GlmImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 8, 8),
            encoder_hidden_states=g(b, 7, 12),
            prior_token_id=torch.randint(32, (b, 16)),
            prior_token_drop=torch.zeros(b).bool(),
            timestep=(torch.rand(b) * 900).long(),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "ernie": (
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=4,
            ffn_hidden_size=48,
            in_channels=4,
            out_channels=4,
            text_in_dim=12,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 4, 4),
            timestep=torch.rand(b),
            text_bth=g(b, 7, 12),
            text_lens=torch.full((b,), 7),
        ),
    ),
    "easyanimate": (
        "EasyAnimateTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=4,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=12,
        ),
        lambda b: dict(
            hidden_states=g(b, 4, 2, 8, 8),
            timestep=torch.rand(b) * 900,
            encoder_hidden_states=g(b, 7, 12),
        ),
    ),
    "consisid": (
        "ConsisIDTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=12,
            num_layers=4,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=7,
            is_train_face=False,
        ),
        lambda b: dict(
            hidden_states=g(b, 2, 4, 8, 8),
            encoder_hidden_states=g(b, 7, 12),
            timestep=torch.rand(b) * 900,
        ),
    ),
}
TRANSFORMERS = {  # class, config class, config, inputs
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=24, n_layer=4, n_head=2, vocab_size=100, n_positions=32),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            vocab_size=100,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            vocab_size=100,
            sliding_window=4,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=100,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        dict(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7
        ),
        lambda b: dict(pixel_values=g(b, 3, 28, 28)),
    ),
    "clipvision": (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        lambda b: dict(pixel_values=g(b, 3, 28, 28)),
    ),
    "roberta": (
        "RobertaModel",
        "RobertaConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=100,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        lambda b: dict(pixel_values=g(b, 3, 28, 28)),
    ),
    "deit": (
        "DeiTModel",
        "DeiTConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        lambda b: dict(pixel_values=g(b, 3, 28, 28)),
    ),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        dict(dim=24, hidden_dim=32, n_layers=4, n_heads=2, vocab_size=100),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=100,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "gptneox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=100,
        ),
        lambda b: dict(input_ids=tokens(b)),
    ),
    "siglip": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        lambda b: dict(pixel_values=g(b, 3, 28, 28)),
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        dict(hidden_size=24, state_size=4, num_hidden_layers=4, vocab_size=100),
        lambda b: dict(input_ids=tokens(b)),
    ),
}


# fmt: off
def grid(n, axes=3):
    places = torch.zeros(n, axes)
    places[:, 1], places[:, 2] = torch.arange(n) // 4, torch.arange(n) % 4
    return places


def steps(b):
    return torch.randint(0, 900, (b,))


def ideogram_inputs(b):
    from diffusers.models.transformers import transformer_ideogram4 as module

    hidden, text, positions, kinds = torch.zeros(b, 8, 4), torch.zeros(b, 8, 24), torch.zeros(b, 8, 3).long(), torch.empty(b, 8).long()
    hidden[:, 4:], text[:, :4] = g(b, 4, 4), g(b, 4, 24)
    positions[:, 4:] = module.IMAGE_POSITION_OFFSET
    kinds[:, :4], kinds[:, 4:] = module.LLM_TOKEN_INDICATOR, module.OUTPUT_IMAGE_INDICATOR
    return dict(hidden_states=hidden, encoder_hidden_states=text, timestep=torch.rand(b), position_ids=positions,
                segment_ids=torch.ones(b, 8).long(), indicator=kinds)


WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
           ffn_dim=32, num_layers=4, rope_max_seq_len=32)
DIFFUSERS |= {
    "allegro": ("AllegroTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=4,
        cross_attention_dim=48, sample_width=8, sample_height=8, sample_frames=8, caption_channels=8),
        lambda b: dict(hidden_states=g(b, 4, 2, 8, 8), encoder_hidden_states=g(b, 7, 8), timestep=steps(b),
            attention_mask=torch.ones(b, 2, 8, 8), encoder_attention_mask=torch.ones(b, 7))),
    "framepack": ("HunyuanVideoFramepackTransformer3DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=10, num_layers=4, num_single_layers=4, num_refiner_layers=2, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        guidance_embeds=True, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        lambda b: dict(hidden_states=g(b, 4, 3, 4, 4), timestep=steps(b), encoder_hidden_states=g(b, 12, 16), pooled_projections=g(b, 8),
            encoder_attention_mask=torch.ones(b, 12), guidance=steps(b), image_embeds=g(b, 12, 16), indices_latents=torch.ones(3),
            latents_clean=g(b, 4, 2, 4, 4), indices_latents_clean=torch.ones(2), latents_history_2x=g(b, 4, 2, 4, 4),
            indices_latents_history_2x=torch.ones(2), latents_history_4x=g(b, 4, 8, 4, 4), indices_latents_history_4x=torch.ones(8))),
    "chronoedit": ("ChronoEditTransformer3DModel", dict(WAN, rope_temporal_skip_len=8),
        lambda b: dict(hidden_states=g(b, 4, 2, 8, 8), timestep=steps(b), encoder_hidden_states=g(b, 12, 16))),
    "anyflow": ("AnyFlowTransformer3DModel", dict(WAN, gate_value=0.25, deltatime_type="r"),
        lambda b: dict(hidden_states=g(b, 2, 4, 8, 8), timestep=torch.full((b, 2), 500.0), r_timestep=torch.full((b, 2), 250.0),
            encoder_hidden_states=g(b, 12, 16))),
    "helios": ("HeliosTransformer3DModel", dict({k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, rope_dim=(4, 4, 4)),
        lambda b: dict(hidden_states=g(b, 4, 2, 16, 16), timestep=steps(b), encoder_hidden_states=g(b, 12, 16),
            indices_hidden_states=torch.ones(b, 2), indices_latents_history_short=torch.ones(b, 1),
            indices_latents_history_mid=torch.ones(b, 1), indices_latents_history_long=torch.ones(b, 4),
            latents_history_short=g(b, 4, 1, 16, 16), latents_history_mid=g(b, 4, 1, 16, 16), latents_history_long=g(b, 4, 4, 16, 16))),
    "krea2": ("Krea2Transformer2DModel", dict(in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=2, num_refiner_text_blocks=2,
        axes_dims_rope=(4, 2, 2)),
        lambda b: dict(hidden_states=g(b, 16, 4), encoder_hidden_states=g(b, 4, 3, 16), timestep=torch.rand(b),
            position_ids=torch.cat([torch.zeros(4, 3), grid(16)]), encoder_attention_mask=torch.ones(b, 4).bool())),
    "ideogram4": ("Ideogram4Transformer2DModel", dict(in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        intermediate_size=32, adaln_dim=16, llm_features_dim=24, mrope_section=(2, 1, 1)), ideogram_inputs),
    "joyimage": ("JoyImageEditTransformer3DModel", dict(patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2,
        text_dim=16, num_layers=4, rope_dim_list=[4, 6, 6], theta=256),
        lambda b: dict(hidden_states=g(b, 4, 1, 4, 4), encoder_hidden_states=g(b, 12, 16), timestep=torch.rand(b))),
    "nucleus": ("NucleusMoEImageTransformer2DModel", dict(patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0] * 4),
        lambda b: dict(hidden_states=g(b, 16, 16), encoder_hidden_states=g(b, 7, 16), encoder_hidden_states_mask=torch.ones(b, 7).long(),
            timestep=torch.rand(b), img_shapes=[(1, 4, 4)] * b)),
    "lumina_next": ("LuminaNextDiT2DModel", dict(sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=4,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, learn_sigma=False, cross_attention_dim=32),
        lambda b: dict(hidden_states=g(b, 4, 8, 8), encoder_hidden_states=g(b, 7, 32), timestep=torch.rand(b),
            encoder_mask=torch.ones(b, 7), image_rotary_emb=torch.polar(torch.ones(384, 384, 4), g(384, 384, 4)),
            cross_attention_kwargs={})),
    "motif_video": ("MotifVideoTransformer3DModel", dict(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=4, num_single_layers=4, num_decoder_layers=0, patch_size=2, patch_size_t=1, text_embed_dim=16, image_embed_dim=4,
        rope_axes_dim=(4, 4, 4)),
        lambda b: dict(hidden_states=g(b, 9, 2, 8, 8), encoder_hidden_states=g(b, 7, 16), timestep=steps(b))),
    "stable_audio": ("StableAudioDiTModel", dict(sample_size=8, in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=12, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=12),
        lambda b: dict(hidden_states=g(b, 4, 8), timestep=torch.rand(b), encoder_hidden_states=g(b, 7, 12), global_hidden_states=g(b, 1, 8),
            rotary_embedding=(g(9, 8), g(9, 8)))),
    "dreamlite": ("DreamLiteTransformer2DModel", dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, out_channels=16,
        num_layers=4, norm_num_groups=4, cross_attention_dim=8),
        lambda b: dict(hidden_states=g(b, 16, 4, 4), encoder_hidden_states=g(b, 7, 8))),
}
TEXT = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=100)
IMAGE = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7)
EXPERTS = dict(TEXT, num_key_value_heads=2, num_experts_per_tok=2, moe_intermediate_size=16)


def of_tokens(b):
    return dict(input_ids=tokens(b))


def of_pixels(b):
    return dict(pixel_values=g(b, 3, 28, 28))


TRANSFORMERS |= {
    "umt5": ("UMT5EncoderModel", "UMT5Config", dict(vocab_size=100, d_model=24, d_kv=12, d_ff=32, num_layers=4, num_heads=2), of_tokens),
    "clip_text": ("CLIPTextModel", "CLIPTextConfig", TEXT, of_tokens),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(TEXT, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2),
        of_tokens),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", dict(EXPERTS, num_experts=4, shared_expert_intermediate_size=16), of_tokens),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", dict(EXPERTS, n_routed_experts=4, first_k_dense_replace=1, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12), of_tokens),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=100, hidden_size=24, n_layer=4, n_head=2), of_tokens),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(vocab_size=100, hidden_size=24, num_hidden_layers=4, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=24), of_tokens),
    "falcon": ("FalconForCausalLM", "FalconConfig", dict(vocab_size=100, hidden_size=24, num_hidden_layers=4, num_attention_heads=2),
        of_tokens),
    "xlnet": ("XLNetModel", "XLNetConfig", dict(vocab_size=100, d_model=24, n_layer=4, n_head=2, d_inner=32), of_tokens),
    "modernbert": ("ModernBertModel", "ModernBertConfig", dict(TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2, local_attention=4), of_tokens),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", dict(hidden_size=24, state_size=4, num_hidden_layers=4, vocab_size=100, num_heads=4,
        head_dim=12, n_groups=1, chunk_size=4), of_tokens),
    "beit": ("BeitModel", "BeitConfig", dict(IMAGE, use_relative_position_bias=True), of_pixels),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", dict(IMAGE, num_frames=4, tubelet_size=2),
        lambda b: dict(pixel_values=g(b, 4, 3, 28, 28))),
    "whisper": ("WhisperForAudioClassification", "WhisperConfig", dict(d_model=24, encoder_layers=4, encoder_attention_heads=2,
        encoder_ffn_dim=32, vocab_size=100, num_mel_bins=8, max_source_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1), lambda b: dict(input_features=g(b, 8, 32))),
}
# what ties blocks to their place: frames' embedding, text and face features given to each block by
# its index
REFUSED = {
    "latte": ("LatteTransformer3DModel", dict(sample_size=8, num_layers=4, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        caption_channels=8, in_channels=4, cross_attention_dim=8, out_channels=8, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2),
        lambda b: dict(hidden_states=g(b, 4, 2, 8, 8), encoder_hidden_states=g(b, 7, 8), timestep=steps(b))),
    "hidream": ("HiDreamImageTransformer2DModel", dict(patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_single_layers=4,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=tuple(range(8)), force_inference_output=True),
        lambda b: dict(hidden_states=g(b, 4, 8, 8), encoder_hidden_states_t5=g(b, 7, 8), encoder_hidden_states_llama3=g(8, b, 7, 4),
            pooled_embeds=g(b, 8), timesteps=steps(b))),
    "bria_fibo": ("BriaFiboTransformer2DModel", dict(patch_size=1, in_channels=4, num_layers=4, num_single_layers=4, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, text_encoder_dim=8, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4]),
        lambda b: dict(hidden_states=g(b, 16, 4), encoder_hidden_states=g(b, 7, 16), img_ids=grid(16), txt_ids=torch.zeros(7, 3),
            timestep=torch.rand(b), text_encoder_layers=[g(b, 7, 8) for _ in range(8)])),
}
# fmt: on


def build(name):
    library = "transformers" if name in TRANSFORMERS else "diffusers"
    try:
        if library == "diffusers":
            class_name, config, inputs = (DIFFUSERS | REFUSED)[name]
            model = of(library, class_name)(**config)
            return randomize(model), lambda b: dict(return_dict=False, **inputs(b))
        class_name, config_name, config, inputs = TRANSFORMERS[name]
        return randomize(of(library, class_name)(of(library, config_name)(**config))), inputs
    except AttributeError:
        pytest.skip(f"this {library} has no {class_name}")


def started(model):
    """Gates, and adapters as by default, on the stacks that are found."""
    depths = {path: len(stack) for path, stack in find_stacks(model).items()}
    pruner = DepthPruner({path: "1:2" if n % 2 == 0 else f"1:{n}" for path, n in depths.items()})
    model.train()
    return pruner, pruner.start(model)


@pytest.mark.parametrize("name", [*DIFFUSERS, *TRANSFORMERS])
def test_it_is_found_verified_cut_and_reopened(name, tmp_path):
    model, make_inputs = build(name)
    pruner, gates = started(model)
    assert not any("cannot state its depth" in remark for remark in pruner.remarks)
    verify(model, gates, (), make_inputs(3))
    kept = {each.path: each.get_blocks(earliest_drops(each)) for each in gates.stacks}
    shallow = pruner.freeze(model, SimpleNamespace(kept_blocks=kept))
    records = {each.path: {"pattern": "1:2", "num_blocks": each.num_blocks, "kept_blocks": kept[each.path], "groups": [],
                           "block_probabilities": []} for each in gates.stacks}  # fmt: skip
    save_shallow(tmp_path, shallow, {"stacks": records})
    inputs, outputs = make_inputs(2), []
    for each in (shallow, type(shallow).from_pretrained(tmp_path), load_shallow(tmp_path)):
        with quiet(each, seed=1), torch.no_grad():
            outputs.append(sample_of(each(**inputs)))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_given_to_blocks_by_their_place_is_refused(name):
    model, make_inputs = build(name)
    _, gates = started(model)
    with pytest.raises(
        ValueError,
        match="cannot be pruned as it is called: with block .* depends on which blocks come before it",
    ):
        verify(model, gates, (), make_inputs(2))
