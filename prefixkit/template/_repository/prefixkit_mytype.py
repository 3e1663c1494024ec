"""prefixkit's plugin for mytype: one decoder, learned absolute positions.

This is the plugin for GPT-2 under another name, and every TODO is a place where your architecture may differ.
"Write an adapter" in prefixkit's documentation goes through it.
"""

from prefixkit import Adapter, PositionIds, Site, Stack, find_stack, hookimpl, join_path


def stacks(model):
    """Yield the decoder of any task class."""
    config = model.config
    # TODO: raise prefixkit.UnsupportedModelError for a variant that cannot be served, and say what can be done.
    path = find_stack(model, "h.0.attn")  # TODO: the first attention module, as seen from the one that runs the layers
    head_dim = config.hidden_size // config.num_attention_heads  # TODO: config.head_dim, if the config has one
    sites = tuple(
        Site(
            path=join_path(path, f"h.{layer}.attn"),  # TODO: the attention module of each layer
            stack="decoder",
            layer=layer,
            kv_heads=config.num_attention_heads,  # TODO: heads of keys: config.num_key_value_heads, if there are fewer
            key_dim=head_dim,
            value_dim=head_dim,
        )
        for layer in range(config.num_hidden_layers)
    )
    # TODO: how positions are counted: PositionIds() if they are rotary, PositionTable or RelativeBias for others.
    yield Stack(name="decoder", path=path, positions=PositionIds(limit=config.max_position_embeddings), sites=sites)


@hookimpl
def prefixkit_adapters():
    """What prefixkit asks for."""
    # TODO: more types, if they are built alike; each is an entry point in pyproject.toml too.
    yield Adapter(model_types=("mytype",), stacks=stacks)
