"""prefixkit's plugin for LLaMA and its cousins: one decoder, rotary positions, grouped heads."""

from prefixkit import Adapter, PositionIds, Site, Stack, UnsupportedModelError, find_stack, hookimpl, join_path

MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "granite",
    "olmo2",
    "phi3",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
)


def window(config, attention):
    """The sliding window of one layer: stated by the layer, or once for all of them."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None)


def stacks(model):
    """Yield the decoder of any task class."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        raise UnsupportedModelError(
            "longrope changes its rotation at a length that generate() counts without the prefix; "
            "use a model with another rope_type"
        )
    path = find_stack(model, "layers.0.self_attn")
    paths = [join_path(path, f"layers.{layer}.self_attn") for layer in range(config.num_hidden_layers)]
    modules = [model.get_submodule(name) for name in paths]
    sites = tuple(
        Site(
            path=name,
            stack="decoder",
            layer=layer,
            kv_heads=config.num_key_value_heads,
            key_dim=module.head_dim,
            value_dim=module.head_dim,
            window=window(config, module),
        )
        for layer, (name, module) in enumerate(zip(paths, modules, strict=True))
    )
    yield Stack(name="decoder", path=path, positions=PositionIds(), sites=sites)


@hookimpl
def prefixkit_adapters():
    """LLaMA, and the models that share its layout."""
    yield Adapter(model_types=MODEL_TYPES, stacks=stacks)
