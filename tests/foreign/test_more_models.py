"""Models beyond the table of docs/any_model.md, checked the same way: verified, cut, saved and reopened by their own library."""

import pytest
import torch
from torch import randn as g

from foreign.zoo import of, randomize, sample_of
from tinyfusion_pl.models import save_shallow
from tinyfusion_pl.pruning import (
    DepthGates,
    find_stacks,
    get_stack,
    remove_blocks,
    remove_gates,
    verify,
)
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.library_configs import check_library_config
from tinyfusion_pl.pruning.verification import earliest_drops

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


def build(name):
    library = "diffusers" if name in DIFFUSERS else "transformers"
    try:
        if library == "diffusers":
            class_name, config, inputs = DIFFUSERS[name]
            model = of(library, class_name)(**config)
            return randomize(model), lambda b: dict(return_dict=False, **inputs(b))
        class_name, config_name, config, inputs = TRANSFORMERS[name]
        return randomize(of(library, class_name)(of(library, config_name)(**config))), inputs
    except AttributeError:
        pytest.skip(f"this {library} has no {class_name}")


@pytest.mark.parametrize("name", [*DIFFUSERS, *TRANSFORMERS])
def test_it_is_found_verified_cut_and_reopened(name, tmp_path):
    model, make_inputs = build(name)
    stacks = list(find_stacks(model))
    depths = {path: len(get_stack(model, path)) for path in stacks}
    model.train()
    gates = DepthGates(
        model,
        {path: "1:2" if n % 2 == 0 else f"1:{n}" for path, n in depths.items()},
        stacks=stacks,
    )
    verify(model, gates, (), make_inputs(3))
    kept = {each.path: each.blocks_of(earliest_drops(each)) for each in gates.stacks}
    remove_gates(model)
    assert check_library_config(model, kept) is None
    remove_blocks(model, kept)
    records = {path: {"pattern": "1:2", "num_blocks": depths[path], "kept_blocks": kept[path], "groups": [],
                      "block_probabilities": []} for path in stacks}  # fmt: skip
    save_shallow(tmp_path, model, {"stacks": records})
    inputs, outputs = make_inputs(2), []
    for each in (model, type(model).from_pretrained(tmp_path)):
        with quiet(each, seed=1), torch.no_grad():
            outputs.append(sample_of(each(**inputs)))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
