"""An adapter for TrOCR's decoder alone, for the tests: off the attention interface, with a table of positions."""

from __future__ import annotations

from functools import partial

from prefixkit import Adapter, PositionTable, Site, Stack, find_stack, join_path, through_cache


def stacks(model):
    """Yield the decoder."""
    config = model.config
    path = find_stack(model, "layers.0.self_attn")
    heads = config.decoder_attention_heads
    sites = tuple(
        Site(
            path=join_path(path, f"layers.{layer}.self_attn"),
            stack="decoder",
            layer=layer,
            kv_heads=heads,
            key_dim=config.d_model // heads,
            value_dim=config.d_model // heads,
        )
        for layer in range(config.decoder_layers)
    )
    positions = PositionTable(path="embed_positions", offset=2, limit=config.max_position_embeddings)
    reads = partial(through_cache, cache_name="past_key_values")
    yield Stack(name="decoder", path=path, positions=positions, sites=sites, site_forward=reads)


ADAPTER = Adapter(model_types=("trocr",), stacks=stacks)
