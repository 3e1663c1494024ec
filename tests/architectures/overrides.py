"""What the rules on field names do not get right, by model type or by ``type.sub_config``."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CONVOLVED = ["conv", "full_attention", "conv", "full_attention"]
MAMBA = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

CAUSAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "blt": {"encoder_hash_byte_group_vocab": 50, "num_hidden_layers": 2},  # its cache asks for the number
    "cohere_compass_text": {
        "layer_types": MIXED,
        "num_hidden_layers": 4,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in set(MIXED)
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {
        "layer_types": MIXED,
        "num_hidden_layers": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "sliding_window": 4,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant.text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": MAMBA, "num_hidden_layers": 4},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "hrm_text": {"num_hidden_layers": 1},  # run through eight times
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "laguna": {"layer_types": MIXED},
    "lfm2": {"layer_types": CONVOLVED, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": CONVOLVED, "num_hidden_layers": 4, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": MIXED, "mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_hidden_layers": 4},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "num_hidden_layers": 4,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_hidden_layers": 4,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (10, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # rounds both up to 64
    "xmod": {"default_language": "en_XX"},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_hidden_layers": 4, "sliding_window": 4},
}

TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # its sparse blocks are refused
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": (2, 2)},
    "neomme": {"head_dim": 16},  # a quarter of it is rotated, four numbers at a time
    "squeezebert": {"embedding_size": 32},
    "switch_transformers": {"router_jitter_noise": 0.0},  # a dropout by another name
}

HIERARCHY = {"image_size": 64, "window_size": 2}  # four stages that halve the image each

VISION: dict[str, dict[str, Any]] = {
    "perceiver": {"d_latents": 32, "num_latents": 16},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "donut-swin": HIERARCHY,
    "efficientnet": {"width_coefficient": 0.125, "hidden_dim": 160},
    "hgnet_v2": {
        "stem_channels": (3, 8, 8),
        "stage_in_channels": (8, 16, 16, 32),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 16, 32, 32),
        "hidden_sizes": (16, 16, 32, 32),
    },
    "levit": {"image_size": 64, "patch_size": 16, "key_dim": (8, 8, 8)},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"image_size": 64, "neck_hidden_sizes": (8, 8, 16, 16, 24, 32, 48), "hidden_sizes": (16, 24, 32)},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": (64, 64, 128)},
    "pp_lcnet": {"scale": 0.25, "class_expand": 64},
    "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
    "swin": HIERARCHY,
    "swinv2": HIERARCHY,
}

SPEECH: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 8},
    "granite_speech": {"downsample_rate": 2},
    "granite_speech_plus": {"downsample_rate": 2},
    "granite_speech_encoder": {"hidden_dim": 32},
    "granite_speech_plus_encoder": {"hidden_dim": 32},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},  # no field of its own, but the model asks for it
    "vibevoice_acoustic_tokenizer": {"downsampling_ratios": (2, 2), "depths": (1, 1, 1)},
    "vibevoice_acoustic_tokenizer_encoder": {"downsampling_ratios": (2, 2), "depths": (1, 1, 1)},
    "voxtral": {"audio_token_id": 99},
    "voxtral_encoder": {"intermediate_size": 128},  # its projector takes four frames as one
}

PADDED = {"pad_token_id": 0}  # the models of transformers 5.0 ask for it, the configs have no such field
OLDER: dict[str, dict[str, dict[str, Any]]] = {
    "5.23": {
        "vibevoice_acoustic_tokenizer_encoder": {**SPEECH["vibevoice_acoustic_tokenizer_encoder"], "vae_std": 0.0},
    },
    "5.15": {
        "dbrx": {
            **CAUSAL["dbrx"],
            "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
        },  # takes it for the other size
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
        "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    },
    "5.5": {
        "exaone4": PADDED,
        "jamba": {**CAUSAL["jamba"], "use_mamba_kernels": False},
        "jetmoe": PADDED,
        "phi": PADDED,
        "stablelm": PADDED,
    },
}
"""The same for the versions of transformers before the one that is named."""

OVERRIDES = {**CAUSAL, **TEXT_ENCODERS, **VISION, **SPEECH}
for end, overrides in OLDER.items():
    if Version(transformers.__version__) < Version(end):
        OVERRIDES.update(overrides)

ASSISTANT = "transformers contradicts itself: the config demands that all layers share keys, the model that some do not"
TIMM = "needs timm and Pillow, which are not installed: its image encoder is a timm model"

REASONS: dict[str, str] = {
    "dinat": "needs natten, which is not installed",
    "gemma3n": TIMM,
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": ASSISTANT,
    "timm_wrapper": TIMM,
}
"""Why a type cannot be built, said only where building it fails."""
