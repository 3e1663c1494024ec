"""Adapters and engines with one mistake each, for attention that is not on transformers' attention interface."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import prefixkit_legacy
import torch
from changed_adapters import with_each_site, with_positions, with_site_forward
from wrong.right import Bloom, GptJ, GptNeo, Mpt, Subject

from prefixkit import PositionIds, RelativeBias, attention_engine, in_front, site_forward, through_cache
from prefixkit.site_forward import CacheInFront

SITES = "test_sites_are_the_attention_calls"
PROMPT = "test_prefix_of_a_text_is_that_text_as_a_prompt"
UNMOVED = f"{PROMPT}[attention-eager-none-pinned]"
ENGINES = "test_engines_agree"
SEEN = "test_every_query_sees_the_prefix"
SLIDE = "test_a_sliding_prefix_leaves_the_window_as_context_does"
PADDED = "test_padded_rows_equal_rows_alone"
BY_HAND = "test_decoding_by_hand"
DISABLED = "test_disabled_and_removed"


# What an adapter says


class TestPathOfTheBlock(GptJ):
    """The layer in place of its attention; the layer's update of the cache is the attention's."""

    adapter = with_each_site(GptJ.adapter, lambda model, site: {"path": site.path.removesuffix(".attn")})
    caught_by = (SITES,)


class TestLayersFromTheEnd(GptJ):
    adapter = with_each_site(GptJ.adapter, lambda model, site: {"layer": 2 - site.layer})
    caught_by = (SITES, ENGINES)


class TestHeadsAndSizeExchanged(Bloom):
    adapter = with_each_site(
        Bloom.adapter, lambda model, site: {"kv_heads": site.key_dim, "key_dim": site.kv_heads, "value_dim": 2}
    )
    caught_by = (SITES, PROMPT)


class TestWindowLeftOut(GptNeo):
    adapter = with_each_site(GptNeo.adapter, lambda model, site: {"window": None})
    caught_by = (SITES,)


class TestWindowInEveryLayer(GptNeo):
    adapter = with_each_site(GptNeo.adapter, lambda model, site: {"window": 4})
    caught_by = (SITES, SLIDE)


class TestPositionsFromOne(GptJ):
    adapter = with_positions(GptJ.adapter, lambda stack: PositionIds(offset=1))
    caught_by = (PROMPT,)


class TestPaddingTakenForNoDistance(Mpt):
    """The cache engine would serve rows that MPT counts the padding of."""

    adapter = with_positions(Mpt.adapter, lambda stack: RelativeBias(counts_padding=False))
    caught_by = (PADDED,)


# What a site_forward does


class TestMaskLeftNarrow(GptJ):
    adapter = with_site_forward(GptJ.adapter, partial(through_cache, mask_name=None))
    caught_by = (PROMPT, SEEN)
    fails_with = (RuntimeError,)


class TestAnotherVersion(GptJ):
    """A parameter that the module's forward does not have."""

    adapter = with_site_forward(GptJ.adapter, partial(through_cache, cache_name="past_key_value"))
    caught_by = (PROMPT, DISABLED)


class TestPrefixSlidesOut(GptNeo):
    """Attention that hides what is beyond its window by places in the cache hides a pinned prefix too."""

    adapter = with_site_forward(GptNeo.adapter, through_cache)
    caught_by = (f"{PROMPT}[attention-eager-shift-pinned]", SEEN)


class TestNoBiasInFront(Bloom):
    """The prefix stands where the first token stands."""

    @staticmethod
    def attention(module, hidden_states, residual, alibi, attention_mask, **options):
        state = site_forward.find_state(module, {})
        tokens = 0 if state is None else state[1].num_virtual_tokens
        alibi = torch.nn.functional.pad(alibi, (tokens, 0))
        return through_cache(module, hidden_states, residual, alibi, attention_mask, **options)

    adapter = with_site_forward(Bloom.adapter, attention)
    caught_by = (PROMPT, UNMOVED, ENGINES)


class TestBiasFromTheCacheEnd(Mpt):
    """The bias of a padded row counts its padding, and the prefix does not."""

    @staticmethod
    def attention(module, hidden_states, position_bias, past_key_values=None, attention_mask=None, **options):
        keys = attention_mask.shape[-1]
        slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
        alibi = position_bias[:, :, -keys:] - position_bias[:, :, -keys, None]
        alibi = site_forward.alibi_in_front(module, alibi[None], slopes)[0]
        mask = ~site_forward.mask_in_front(module, ~attention_mask)
        arguments = {"past_key_values": past_key_values, "attention_mask": mask}
        return through_cache(
            module, hidden_states, alibi, cache_name="past_key_values", mask_name=None, **arguments, **options
        )

    adapter = with_site_forward(Mpt.adapter, attention)
    caught_by = (PADDED,)


class TestMaskOfTheHidden(Mpt):
    """True hides in MPT's mask, and is seen in ours."""

    @staticmethod
    def attention(module, hidden_states, position_bias, past_key_values=None, attention_mask=None, **options):
        found = site_forward.find_state(module, {})
        wide = site_forward.mask_in_front(module, attention_mask)
        position_bias = torch.nn.functional.pad(position_bias, (0 if found is None else 5, 0))
        arguments = {"past_key_values": past_key_values, "attention_mask": wide}
        return through_cache(
            module, hidden_states, position_bias, cache_name="past_key_values", mask_name=None, **arguments, **options
        )

    adapter = with_site_forward(Mpt.adapter, attention)
    caught_by = (PROMPT, SEEN)


# What the engine does


class TestBiasAsIfMoved(Bloom):
    """Without moving positions the prefix keeps its distance all the same."""

    caught_by = (UNMOVED,)

    def plant(self, monkeypatch):
        original = site_forward.find_state

        def find_state(*call, **options):
            found = original(*call, **options)
            return found and (found[0], replace(found[1], shifts=True))

        monkeypatch.setattr(site_forward, "find_state", find_state)


class TestSlopesOfTheOtherHeads(Bloom):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        original = prefixkit_legacy.slopes_of
        monkeypatch.setattr(prefixkit_legacy, "slopes_of", lambda *call: original(*call).flip(0))


class TestStandsInWhileDisabled(Mpt):
    """Attention written again is not the module's own to the last bit."""

    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(attention_engine, "is_served", lambda module: True)


class TestPrefixInTheCache(GptJ):
    """The prefix enters the real cache, once with every token."""

    caught_by = (BY_HAND, "test_greedy")
    fails_with = (*Subject.fails_with, RuntimeError)

    def plant(self, monkeypatch):
        def update(self, key, value, *args, **kwargs):
            self.used = True
            key, value, _ = in_front(self.module, key, value)
            return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)

        monkeypatch.setattr(CacheInFront, "update", update)


class TestCacheForgotten(GptJ):
    """Earlier tokens are not seen."""

    caught_by = (BY_HAND, "test_greedy")
    fails_with = (*Subject.fails_with, RuntimeError)

    def plant(self, monkeypatch):
        def update(self, key, value, *args, **kwargs):
            self.used = True
            if self.cache is not None:
                self.cache.update(key, value, *args, **kwargs)
            return in_front(self.module, key, value)[:2]

        monkeypatch.setattr(CacheInFront, "update", update)


class TestStaysAfterRemove(GptJ):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(site_forward.internals, "stand_aside", lambda module: None)
