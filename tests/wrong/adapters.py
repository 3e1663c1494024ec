"""Adapters with one mistake each, as a plugin's author might make it."""

from __future__ import annotations

from dataclasses import replace

import prefixkit_t5
import torch
from changed_adapters import with_each_site, with_each_stack, with_positions, with_sites, with_stacks
from wrong.right import GPT2, T5, Bart, BartDecoder, Bert, Gemma2, Llama, Mistral, Qwen3

from prefixkit import PositionIds, RelativeBias

SITES = "test_sites_are_the_attention_calls"
PROMPT = "test_prefix_of_a_text_is_that_text_as_a_prompt"
ENGINES = "test_engines_agree"
NATIVE = "test_native_cache_on_the_bare_model"
SLOTS = "test_every_slot_gets_its_own_gradient"
PADDED = "test_padded_rows_equal_rows_alone"
TARGETS = "test_padded_targets_equal_targets_alone"
SLIDE = "test_a_sliding_prefix_leaves_the_window_as_context_does"
SEEN = "test_every_query_sees_the_prefix"


# Which sites


class TestLastLayerLeftOut(GPT2):
    adapter = with_sites(GPT2.adapter, lambda model, sites: sites[:-1])
    caught_by = (SITES, PROMPT)


class TestCrossLeftOut(T5):
    adapter = with_sites(T5.adapter, lambda model, sites: [site for site in sites if site.stack != "cross"])
    caught_by = (SITES, PROMPT)


class TestEncoderLeftOut(Bart):
    adapter = with_stacks(Bart.adapter, lambda model, stacks: stacks[1:])
    caught_by = (SITES, PROMPT)


class TestDepthOfTheDecoderForBoth(T5):
    """One depth for both stacks, as PEFT has it."""

    adapter = with_sites(
        T5.adapter, lambda model, sites: [site for site in sites if site.layer < model.config.num_decoder_layers]
    )
    caught_by = (SITES, PROMPT)


class TestCrossOfADecoderAlone(BartDecoder):
    """BartForCausalLM has cross-attention modules that never run."""

    @staticmethod
    def with_cross(model, sites):
        return (*sites, *(replace(s, stack="cross", path=s.path.replace("self_attn", "encoder_attn")) for s in sites))

    adapter = with_sites(BartDecoder.adapter, with_cross)
    caught_by = (SITES, SLOTS)


class TestTwoSitesOfOnePath(GPT2):
    adapter = with_each_site(GPT2.adapter, lambda model, site: {"path": "transformer.h.0.attn"})
    caught_by = (SITES, PROMPT, SLOTS)


class TestPathOfTheLayer(Llama):
    """The layer in place of its attention."""

    adapter = with_each_site(Llama.adapter, lambda model, site: {"path": site.path.removesuffix(".self_attn")})
    caught_by = (SITES,)


class TestNoSuchPath(GPT2):
    adapter = with_each_site(GPT2.adapter, lambda model, site: {"path": f"{site.path}.self"})
    caught_by = (SITES, PROMPT)


# What is said of them


class TestLayersFromTheEnd(GPT2):
    adapter = with_each_site(GPT2.adapter, lambda model, site: {"layer": model.config.n_layer - 1 - site.layer})
    caught_by = (SITES, ENGINES, NATIVE)


class TestLayersFromOne(GPT2):
    adapter = with_each_site(GPT2.adapter, lambda model, site: {"layer": site.layer + 1})
    caught_by = (SITES,)


class TestPermutedCrossLayers(T5):
    """The layers of one stack in the order of their names as text, or any other."""

    adapter = with_each_site(
        T5.adapter, lambda model, site: {"layer": (site.layer + 1) % 2} if site.stack == "cross" else {}
    )
    caught_by = (SITES, ENGINES)


class TestQueryHeads(Llama):
    """Heads of the queries in place of those of keys and values."""

    adapter = with_each_site(Llama.adapter, lambda model, site: {"kv_heads": model.config.num_attention_heads})
    caught_by = (SITES, PROMPT)


class TestOneHead(Llama):
    """A single head, which broadcasting would hide."""

    adapter = with_each_site(Llama.adapter, lambda model, site: {"kv_heads": 1})
    caught_by = (SITES, PROMPT)


class TestHeadsTimesDim(Llama):
    """The right width, cut into the wrong heads."""

    adapter = with_each_site(Llama.adapter, lambda model, site: {"kv_heads": 4, "key_dim": 4, "value_dim": 4})
    caught_by = (SITES, PROMPT)


class TestHeadsOfTheEncoderForBoth(Bart):
    adapter = with_each_site(Bart.adapter, lambda model, site: {"kv_heads": 4, "key_dim": 8, "value_dim": 8})
    caught_by = (SITES, PROMPT)


class TestHeadDimFromTheHiddenSize(Qwen3):
    """``hidden_size / heads`` where the config says ``head_dim``."""

    adapter = with_each_site(Qwen3.adapter, lambda model, site: {"key_dim": 8, "value_dim": 8})
    caught_by = (SITES, PROMPT)


class TestWrongValueDim(GPT2):
    adapter = with_each_site(GPT2.adapter, lambda model, site: {"value_dim": site.value_dim * 2})
    caught_by = (SITES, PROMPT)


class TestWindowLeftOut(Mistral):
    adapter = with_each_site(Mistral.adapter, lambda model, site: {"window": None})
    caught_by = (SITES, PROMPT, SLIDE)


class TestWindowOneTooWide(Mistral):
    adapter = with_each_site(Mistral.adapter, lambda model, site: {"window": site.window + 1})
    caught_by = (SITES, PROMPT, SLIDE)


class TestWindowInEveryLayer(Gemma2):
    """The config's window, in the layers of full attention too."""

    adapter = with_each_site(Gemma2.adapter, lambda model, site: {"window": model.config.sliding_window})
    caught_by = (SITES, PROMPT, SLIDE)


class TestWindowsInTheOtherLayers(Gemma2):
    adapter = with_each_site(
        Gemma2.adapter, lambda model, site: {"window": None if site.window else model.config.sliding_window}
    )
    caught_by = (SITES, PROMPT, SLIDE)


class TestWindowWhereNoneIs(Llama):
    adapter = with_each_site(Llama.adapter, lambda model, site: {"window": 4})
    caught_by = (SITES,)


# Which stack


class TestDecoderCalledEncoder(GPT2):
    adapter = with_each_stack(
        with_each_site(GPT2.adapter, lambda model, site: {"stack": "encoder"}),
        lambda model, stack: replace(stack, name="encoder"),
    )
    caught_by = (SITES,)


class TestSitesOfADecoderCalledEncoder(Llama):
    """The stack is a decoder and its sites say encoder: the prefix is seen and no position moves."""

    adapter = with_each_site(Llama.adapter, lambda model, site: {"stack": "encoder"})
    caught_by = (SITES, PROMPT)


class TestEncoderCalledDecoder(Bert):
    adapter = with_each_stack(
        with_each_site(Bert.adapter, lambda model, site: {"stack": "decoder"}),
        lambda model, stack: replace(stack, name="decoder"),
    )
    caught_by = (SITES,)


class TestCrossInPlaceOfTheEncoder(T5):
    """The encoder's prefix stands in the cross-attention, and the encoder has none."""

    @staticmethod
    def moved(model, stacks):
        encoder, decoder = stacks
        own = [site for site in decoder.sites if site.stack == "decoder"]
        cross = [site for site in decoder.sites if site.stack == "cross"]
        instead = [replace(site, stack="encoder") for site in cross]
        return [replace(encoder, sites=()), replace(decoder, sites=(*own, *instead))]

    adapter = with_stacks(T5.adapter, moved)
    caught_by = (SITES, PROMPT)


class TestCrossAndDecoderSwapped(T5):
    adapter = with_each_site(
        T5.adapter, lambda model, site: {"stack": {"cross": "decoder", "decoder": "cross"}.get(site.stack, site.stack)}
    )
    caught_by = (SITES, ENGINES)


class TestCrossInTheEncodersStack(T5):
    """The cross sites are named with the encoder, whose call does not reach them."""

    @staticmethod
    def moved(model, stacks):
        encoder, decoder = stacks
        own = tuple(site for site in decoder.sites if site.stack == "decoder")
        cross = tuple(site for site in decoder.sites if site.stack == "cross")
        return [replace(encoder, sites=encoder.sites + cross), replace(decoder, sites=own)]

    adapter = with_stacks(T5.adapter, moved)
    caught_by = (SITES,)


class TestStacksSwapped(Bart):
    """Each stack has the other's path."""

    @staticmethod
    def swapped(model, stacks):
        encoder, decoder = stacks
        return [replace(encoder, path=decoder.path), replace(decoder, path=encoder.path)]

    adapter = with_stacks(Bart.adapter, swapped)
    caught_by = (SITES,)


# Positions


class TestPositionsUnmoved(GPT2):
    """A model with position_ids called one with a relative bias."""

    @staticmethod
    def zeros(stack, query_positions, num_virtual_tokens):
        return torch.zeros(1, 1, query_positions.shape[1], num_virtual_tokens)

    adapter = with_positions(GPT2.adapter, lambda stack: RelativeBias(prefix_bias=TestPositionsUnmoved.zeros))
    caught_by = (PROMPT,)


class TestPositionIdsForATable(Bart):
    """BART's stacks swallow position_ids without a word."""

    adapter = with_positions(Bart.adapter, lambda stack: PositionIds())
    caught_by = (PROMPT, PADDED, TARGETS)


class TestPositionIdsForABias(T5):
    adapter = with_positions(T5.adapter, lambda stack: PositionIds())
    caught_by = (PROMPT,)


class TestTableFromItsFirstRow(Bart):
    """BART's position 0 is row 2."""

    adapter = with_positions(Bart.adapter, lambda stack: replace(stack.positions, offset=0))
    caught_by = (PROMPT,)


class TestNoLimit(GPT2):
    """A learned table that is said to have no end."""

    adapter = with_positions(GPT2.adapter, lambda stack: PositionIds())
    caught_by = ("test_the_longest_text_is_right_or_refused",)


class TestLimitTooLow(GPT2):
    adapter = with_positions(GPT2.adapter, lambda stack: PositionIds(limit=8))
    caught_by = (PROMPT,)


def biased(prefix_bias):
    """T5 with another bias of the prefix's columns."""
    return with_positions(T5.adapter, lambda stack: RelativeBias(prefix_bias=prefix_bias))


class TestNoBias(T5):
    adapter = biased(lambda *call: torch.zeros_like(prefixkit_t5.prefix_bias(*call)))
    caught_by = (PROMPT, ENGINES)


class TestBiasOfTheWrongSign(T5):
    """Query minus column, where the buckets want column minus query."""

    @staticmethod
    def bias(stack, query_positions, num_virtual_tokens):
        attention = stack.block[0].layer[0].SelfAttention
        distance = query_positions[..., None] - torch.arange(num_virtual_tokens)
        buckets = attention._relative_position_bucket(distance, not attention.is_decoder, 8, 16)
        return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    adapter = biased(bias)
    caught_by = (PROMPT, ENGINES)


class TestBiasOfTheOtherDirection(T5):
    """The decoder's buckets taken as bidirectional, and the encoder's not."""

    @staticmethod
    def bias(stack, query_positions, num_virtual_tokens):
        attention = stack.block[0].layer[0].SelfAttention
        distance = torch.arange(num_virtual_tokens) - query_positions[..., None]
        buckets = attention._relative_position_bucket(distance, attention.is_decoder, 8, 16)
        return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    adapter = biased(bias)
    caught_by = (PROMPT, ENGINES)


class TestBiasOfOneQueryForAll(T5):
    """The bias does not depend on where the query stands."""

    @staticmethod
    def bias(stack, query_positions, num_virtual_tokens):
        first = torch.full_like(query_positions, num_virtual_tokens)
        return prefixkit_t5.prefix_bias(stack, first, num_virtual_tokens)

    adapter = biased(bias)
    caught_by = (PROMPT, ENGINES)


class TestBiasOfTheFirstRow(T5):
    """Every row has the bias of the first, however it is padded."""

    adapter = biased(lambda stack, places, tokens: prefixkit_t5.prefix_bias(stack, places[:1], tokens))
    caught_by = (PADDED,)


class TestBiasBackwards(T5):
    """The columns in the wrong order."""

    adapter = biased(lambda *call: prefixkit_t5.prefix_bias(*call).flip(-1))
    caught_by = (PROMPT, ENGINES)


class TestBiasOneOff(T5):
    adapter = biased(lambda stack, places, tokens: prefixkit_t5.prefix_bias(stack, places + 1, tokens))
    caught_by = (PROMPT, ENGINES)


class TestBiasOfOtherHeads(T5):
    adapter = biased(lambda *call: prefixkit_t5.prefix_bias(*call).flip(1))
    caught_by = (PROMPT, ENGINES)
