"""prefixkit's plugin for T5 and mT5: encoder, decoder and cross-attention, relative positions."""

from prefixkit import Adapter, RelativeBias, Site, Stack, find_stack, hookimpl, join_path

ATTENTION = {"encoder": "layer.0.SelfAttention", "decoder": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"}


def prefix_bias(stack, query_positions, num_virtual_tokens):
    """Bias of the prefix's columns, ``(batch or 1, heads, queries, num_virtual_tokens)``.

    The buckets are T5's own (Raffel et al. 2020, §2.1): distance of a column from a query, where
    the prefix stands directly before the first real token.
    """
    import torch

    attention = stack.block[0].layer[0].SelfAttention
    columns = torch.arange(num_virtual_tokens, device=query_positions.device)
    buckets = attention._relative_position_bucket(
        columns - query_positions[..., None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    table = attention.relative_attention_bias
    # Offloaded, the table comes back within its own call, which moves its arguments itself.
    buckets = buckets if table.weight.is_meta else buckets.to(table.weight.device)
    return table(buckets).permute(0, 3, 1, 2)


def sites(model, path, stack, layers):
    """The sites of one kind of attention, one per layer."""
    config = model.config
    return tuple(
        Site(
            path=join_path(path, f"block.{layer}", ATTENTION[stack]),
            stack=stack,
            layer=layer,
            kv_heads=config.num_heads,
            key_dim=config.d_kv,
            value_dim=config.d_kv,
        )
        for layer in range(layers)
    )


def stacks(model):
    """Yield what a task class has of encoder and decoder."""
    config, positions = model.config, RelativeBias(prefix_bias=prefix_bias)
    encoder = find_stack(model, "encoder.block.0")
    if encoder is not None:
        path = join_path(encoder, "encoder")
        yield Stack(
            name="encoder", path=path, positions=positions, sites=sites(model, path, "encoder", config.num_layers)
        )
    decoder = find_stack(model, "decoder.block.0")
    if decoder is not None:
        path, layers = join_path(decoder, "decoder"), config.num_decoder_layers
        both = sites(model, path, "decoder", layers) + sites(model, path, "cross", layers)
        yield Stack(name="decoder", path=path, positions=positions, sites=both)


@hookimpl
def prefixkit_adapters():
    """T5 and mT5, which differ in no way that matters here."""
    yield Adapter(model_types=("t5", "mt5"), stacks=stacks)
