"""An adapter for BERT and RoBERTa: an encoder alone, for the tests."""

from __future__ import annotations

from prefixkit import Adapter, PositionIds, Site, Stack, find_stack, join_path


def stacks(model):
    """Yield the encoder of any task class."""
    config = model.config
    path = find_stack(model, "encoder.layer.0")
    head_dim = config.hidden_size // config.num_attention_heads
    sites = tuple(
        Site(
            path=join_path(path, f"encoder.layer.{layer}.attention.self"),
            stack="encoder",
            layer=layer,
            kv_heads=config.num_attention_heads,
            key_dim=head_dim,
            value_dim=head_dim,
        )
        for layer in range(config.num_hidden_layers)
    )
    # RoBERTa's position ids start behind that of the padding.
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    positions = PositionIds(limit=config.max_position_embeddings - first, offset=first)
    yield Stack(name="encoder", path=path, positions=positions, sites=sites)


ADAPTER = Adapter(model_types=("bert", "roberta"), stacks=stacks)
