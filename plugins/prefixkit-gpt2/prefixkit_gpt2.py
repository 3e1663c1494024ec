"""prefixkit's plugin for GPT-2: one decoder, learned absolute positions."""

from prefixkit import Adapter, PositionIds, Site, Stack, UnsupportedModelError, find_stack, hookimpl, join_path


def stacks(model):
    """Yield the decoder of any GPT-2 task class."""
    config = model.config
    if config.reorder_and_upcast_attn:
        raise UnsupportedModelError(
            "GPT-2 with reorder_and_upcast_attn=True computes attention outside the attention interface; "
            "set config.reorder_and_upcast_attn = False"
        )
    path = find_stack(model, "h.0.attn")
    head_dim = config.hidden_size // config.num_attention_heads
    sites = tuple(
        Site(
            path=join_path(path, f"h.{layer}.attn"),
            stack="decoder",
            layer=layer,
            kv_heads=config.num_attention_heads,
            key_dim=head_dim,
            value_dim=head_dim,
        )
        for layer in range(config.num_hidden_layers)
    )
    yield Stack(name="decoder", path=path, positions=PositionIds(limit=config.max_position_embeddings), sites=sites)


@hookimpl
def prefixkit_adapters():
    """GPT-2."""
    yield Adapter(model_types=("gpt2",), stacks=stacks)
