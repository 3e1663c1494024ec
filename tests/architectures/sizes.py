"""A tiny config from a config class, by what its fields are called."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING

from architectures.config_classes import PreTrainedConfig, fields_of, make, part_names, part_of
from architectures.overrides import OVERRIDES

HIDDEN = 32
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
VOCAB = 100
WINDOW = 4
LAYERS = 2
HYBRID_LAYERS = 4
CHANNELS = 16

PAD, BOS, EOS, DECODER_START = 0, 1, 2, 1
SPECIAL = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": DECODER_START}

# Fields whose default is None are set by these as well: what they fall back to may be large, or no GQA.
ALWAYS: tuple[tuple[str, Any], ...] = (
    (r"num_key_value_heads|num_kv_heads", KV_HEADS),
    (r"head_dim|dim_head|d_head|kv_channels", HEAD_DIM),
    (r"n_inner|ffn_hidden_size|\w*intermediate_size", 48),
    (r"num_layers|num_decoder_layers", LAYERS),
    (r"lru_width", HIDDEN),
    (r"vocab_size", VOCAB),
)

# The first rule that matches a whole name is used; the value stands in for a plain number.
NUMBERS: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"\w*vocab_size\w*", VOCAB),
    (r"\w*max_\w*position\w*|max_pos_emb|n_positions|n_ctx|max_seq_len|max_(source|speech|text)_positions", 160),
    (r"context_length", 160),
    (r"mamba_n_heads|mamba_num_heads", HEADS),
    (r"\w*num_key_value_heads|linear_num_key_heads|\w*kv_heads|num_global_key_value_heads", KV_HEADS),
    (r"\w*(num_heads|n_heads?|num_attention_heads|attention_heads|num_value_heads)", HEADS),
    (r"mamba_head_dim|mamba_d_head|index_head_dim|indexer_head_dim", 16),
    (r"\w*(head_dim|dim_head)|d_kv|d_head|attention_head_size|kv_channels|rotary_dim", HEAD_DIM),
    (r"\w*_lora_rank|\w*_rank|embedding_size|input_embedding_size|embedding_dim", 16),
    (r"hidden_size_per_layer_input|\w*_emb_size|\w*_embed_dim|\w*projection_dim|\w*_proj_size|codevector_dim", 16),
    (r"\w*(ffn_dim|intermediate_size|ffn_hidden_size)|mlp_dim|n_inner|d_inner|d_ff|dff|dim_ff|hidden_dim", 48),
    (r"feed_forward_size|intermediate_size_mlp", 48),
    (r"(\w*_)?hidden_size(_\w+)?|d_model|n_embd|dim|emb_dim|embed_dim|\w*output_dim|out_hidden_size", HIDDEN),
    (r"(\w*_)?num_hidden_layers|n_layers?|num_layers|\w*(encoder|decoder)_layers|depth|num_blocks", LAYERS),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|\w+coder_sparse_step|num_global_tokens", 2),
    (r"mm_tokens_per_image", 4),
    (r"num_patches|image_seq_length", 16),
    (r"topk_group", 1),
    (r"num_sparse_\w+coder_layers|\w*shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"index_topk|indexer_budget|index_topk_blocks", WINDOW),
    (r"\w*d_state|\w*state_size", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"(mamba_)?chunk_size|block_size", 4),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|window_size", WINDOW),
    (r"local_radius|global_block_size", WINDOW),
    (r"local_attention", 2 * WINDOW),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|input_feat_per_channel|feature_size|input_feat_size", 16),
    (r"context_size|max_length", 16),
    (r"num_filters|upsample_groups|num_groups", 4),
    (r"adapter_(in|out|input)_(dim|size)|audio_embed_dim|mm_embed_dim", HIDDEN),
    (r"feature_projection_input_dim|input_dim", 16),
    (r"zero_expert_num|num_latents|num_self_attends_per_block", 2),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 4),
    (r"\w*channels?", CHANNELS),
)

# The same for lists of numbers, one per stage or convolution.
STAGES = {
    "depths": lambda n: (1,) * (n - 1) + (2,),
    "num_heads": lambda n: (2,) * n,
    "num_attention_heads": lambda n: (2,) * n,
    "hidden_sizes": lambda n: tuple(CHANNELS * (i + 1) for i in range(n)),
    "embed_dims": lambda n: tuple(CHANNELS * (i + 1) for i in range(n)),
    "embed_dim": lambda n: tuple(CHANNELS * (i + 1) for i in range(n)),
    "tdnn_dim": lambda n: (CHANNELS,) * n,
    "image_size": lambda n: (32,) * n,
}
# The convolutions in front of a speech encoder: three of them, so that a short sound is enough.
CONVOLUTIONS = ("conv_dim", "conv_stride", "conv_kernel")

DROPOUT = re.compile(r"\w*(dropout\w*|pdrop|layerdrop|drop_path_rate|drop_rate|drop_connect_rate|mask_\w+_prob)")
TOKEN = re.compile(r"(\w+)_token_(?:id|index)|(pad|bos|eos|unk|mask)_index")


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of a model type with tiny sizes everywhere, sub-configs included."""
    return _tiny(CONFIG_MAPPING[model_type], model_type, {}, changes)


def _tiny(cls: type[PreTrainedConfig], path: str, initial: dict[str, Any], changes: dict[str, Any]) -> PreTrainedConfig:
    override = {**OVERRIDES.get(cls.model_type, {}), **OVERRIDES.get(path, {}), **changes}
    default = _default(cls, initial)
    parts = part_names(cls, default)
    nested = {name: value for name, value in override.items() if name in parts and value is not None}
    plain = {name: value for name, value in override.items() if name not in nested}
    values = {**initial, **_field_values(cls, default), **_layer_kinds(cls, default)}
    for name in parts:
        if default is not None and getattr(default, name, None) is None and name not in nested:
            continue
        part = part_of(cls, name, default)
        if part is not None:
            values[name] = _tiny(part.cls, f"{path}.{name}", part.initial, nested.get(name, {}))
    return make(cls, {**values, **plain})


def _default(cls: type[PreTrainedConfig], initial: dict[str, Any]) -> PreTrainedConfig | None:
    try:
        return cls(**initial)
    except Exception:  # noqa: BLE001  (some defaults contradict each other, in whatever way the validator says)
        return None


def _field_values(cls: type[PreTrainedConfig], default: PreTrainedConfig | None) -> dict[str, Any]:
    values, own = {}, fields_of(cls)
    for name, field_default in own.items():
        value = field_default
        if value is None and default is not None and not _matches(ALWAYS, name):
            value = getattr(default, name, None) if TOKEN.fullmatch(name) else None
        small = _value(name, value)
        if small is not None:
            values[name] = small
    values.update(_special_tokens(own))
    if "depths" in own and isinstance(own.get("embed_dim"), int):
        values["embed_dim"] = CHANNELS  # doubled from stage to stage
    if "kv_lora_rank" in own and "num_key_value_heads" in own:
        values["num_key_value_heads"] = HEADS  # latent attention has keys and values for every head
    return values


def _matches(rules: tuple[tuple[str, Any], ...], name: str) -> Any:
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), None)


def _value(name: str, default: Any) -> Any:
    if DROPOUT.fullmatch(name):
        return _zeros(default)
    if isinstance(default, (list, tuple)) and default:
        return _stages(name, default)
    if default is None:
        return _matches(ALWAYS, name)
    if isinstance(default, int) and not isinstance(default, bool):
        small = _matches(NUMBERS, name)
        return None if small is None else min(small, default)  # what is smaller already has its reasons
    return None


def _zeros(default: Any) -> Any:
    if isinstance(default, (list, tuple)):
        return type(default)(0.0 for _ in default)
    return None if isinstance(default, (bool, str)) or default is None else type(default)(0)


def _stages(name: str, default: Any) -> Any:
    if name in CONVOLUTIONS:
        return tuple(CHANNELS for _ in default[:3]) if name == "conv_dim" else tuple(default[:3])
    if name in STAGES and isinstance(default[0], int):
        return type(default)(STAGES[name](len(default)))
    return None


def _special_tokens(own: dict[str, Any]) -> dict[str, int]:
    """Ids within the vocabulary: the usual ones first, all others counted down from its end."""
    tokens, last = {}, VOCAB - 1
    for name, default in own.items():
        match = TOKEN.fullmatch(name)
        if not match or not (default is None or isinstance(default, (int, list))):
            continue
        usual = SPECIAL.get(match[1] or match[2])
        if usual is not None:
            tokens[name] = usual
        elif default is not None:
            tokens[name], last = last, last - 1
    return tokens


def _layer_kinds(cls: type[PreTrainedConfig], default: PreTrainedConfig | None) -> dict[str, Any]:
    """A few layers in which each kind that the default has comes up."""
    own, kinds = fields_of(cls), {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        layers = getattr(default, name, None)
        if name in own and isinstance(layers, (list, tuple)):
            kinds[name] = list(dict.fromkeys(layers))
    most = max((len(values) for values in kinds.values()), default=1)
    if not kinds:
        return {}
    depth = LAYERS if most == 1 else max(HYBRID_LAYERS, most)
    lists = {name: _spread(name, values, depth) for name, values in kinds.items()}
    return {**lists, "num_hidden_layers": depth} if "num_hidden_layers" in own else lists


def _spread(name: str, kinds: list[str], depth: int) -> list[str]:
    if name == "mlp_layer_types":  # dense layers come first, once
        return (kinds + [kinds[-1]] * depth)[:depth]
    return [kinds[i % len(kinds)] for i in range(depth)]
