"""prefixkit's plugin for BART: encoder, decoder and cross-attention, learned positions in a table."""

from prefixkit import Adapter, PositionTable, Site, Stack, find_stack, hookimpl, join_path

ATTENTION = {"encoder": "self_attn", "decoder": "self_attn", "cross": "encoder_attn"}


def sites(model, path, stack, layers, heads):
    """The sites of one kind of attention, one per layer."""
    head_dim = model.config.d_model // heads
    return tuple(
        Site(
            path=join_path(path, f"layers.{layer}", ATTENTION[stack]),
            stack=stack,
            layer=layer,
            kv_heads=heads,
            key_dim=head_dim,
            value_dim=head_dim,
        )
        for layer in range(layers)
    )


def stacks(model):
    """Yield what a task class has of encoder and decoder."""
    config = model.config
    # BART reserves two rows of its table: position 0 is row 2.
    positions = PositionTable(path="embed_positions", offset=2, limit=config.max_position_embeddings)
    encoder = find_stack(model, "encoder.layers.0")
    if encoder is not None:
        path = join_path(encoder, "encoder")
        own = sites(model, path, "encoder", config.encoder_layers, config.encoder_attention_heads)
        yield Stack(name="encoder", path=path, positions=positions, sites=own)
    decoder = find_stack(model, "decoder.layers.0")
    if decoder is not None:
        path, layers, heads = join_path(decoder, "decoder"), config.decoder_layers, config.decoder_attention_heads
        own = sites(model, path, "decoder", layers, heads)
        # BartForCausalLM is a decoder alone: its cross-attention never runs.
        cross = sites(model, path, "cross", layers, heads) if encoder is not None else ()
        yield Stack(name="decoder", path=path, positions=positions, sites=own + cross)


@hookimpl
def prefixkit_adapters():
    """BART."""
    yield Adapter(model_types=("bart",), stacks=stacks)
