"""Cache engines with one mistake each."""

from __future__ import annotations

from wrong.right import GPT2, T5, Bart, Llama, Mistral

from prefixkit import cache_engine, positions as positions_module
from prefixkit.attachment import Attachment
from prefixkit.cache_engine import CacheEngine
from prefixkit.errors import EngineError
from prefixkit.layout import KeyValue

PROMPT = "test_prefix_of_a_text_is_that_text_as_a_prompt"
ENGINES = "test_engines_agree"
NATIVE = "test_native_cache_on_the_bare_model"
SLOTS = "test_every_slot_gets_its_own_gradient"
PADDED = "test_padded_rows_equal_rows_alone"
TARGETS = "test_padded_targets_equal_targets_alone"
CHECKPOINTING = "test_checkpointing_gives_equal_gradients"
PACKED = "test_packed_rows_equal_rows_apart"


class TestCrossCacheMarkedUpdated(T5):
    """The prefix stands in place of the encoder's states."""

    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        def set_updated(cache, layers):
            cache.is_updated.update(dict.fromkeys(layers, True))

        monkeypatch.setattr(cache_engine.internals, "set_not_updated", set_updated)


class TestMaskNotWidened(Llama):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine, "_widen", lambda mask, tokens, *_: mask)


class TestMaskWidenedAtItsEnd(GPT2):
    caught_by = (PADDED,)

    def plant(self, monkeypatch):
        original = cache_engine._widen
        monkeypatch.setattr(
            cache_engine, "_widen", lambda mask, tokens, *_: original(mask.flip(1), tokens, None).flip(1)
        )


class TestMaskWidenedWithZeros(Llama):
    caught_by = (PROMPT, ENGINES, SLOTS)

    def plant(self, monkeypatch):
        original = cache_engine._widen

        def widen(mask, tokens, *_):
            wide = original(mask, tokens, None)
            wide[:, :tokens] = 0
            return wide

        monkeypatch.setattr(cache_engine, "_widen", widen)


class TestEncoderMaskNotWidened(Bart):
    """The prefix's columns take the place of the source's first tokens."""

    caught_by = (PADDED,)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        def narrow(arguments, tokens, *_):
            return arguments.get("encoder_attention_mask")

        monkeypatch.setattr(cache_engine, "_wider_encoder_mask", narrow)


class TestRefusesEverything(GPT2):
    """An engine that raises is never wrong, and of no use."""

    caught_by = (SLOTS, "test_disabled_and_removed")

    def plant(self, monkeypatch):
        def before(*call, **kept):
            raise EngineError("the cache engine cannot serve that")

        monkeypatch.setattr(CacheEngine, "before", before)


class TestRefusesToGoOn(GPT2):
    """A forward is served, the next token is not."""

    caught_by = ("test_beam_search", "test_seeded_sampling")

    def plant(self, monkeypatch):
        original = cache_engine._held

        def held(cache, attachment):
            tokens = original(cache, attachment)
            if tokens:
                raise EngineError("the cache engine cannot serve that")
            return tokens

        monkeypatch.setattr(cache_engine, "_held", held)


class TestFilledAgainAtEveryToken(Llama):
    caught_by = ("test_greedy", "test_decoding_by_hand", "test_greedy_on_padded_rows", "test_text_generation_pipeline")

    def plant(self, monkeypatch):
        original = cache_engine.internals.mark_prefix

        def held(cache, attachment):
            identity = cache_engine.internals.held_prefix(cache)
            length = cache.get_seq_length()
            if identity is None:
                return 0
            tokens = attachment.config.num_virtual_tokens
            del cache.prefixkit_identity
            return length - tokens * (1 + getattr(cache, "fills", 0))

        def mark_prefix(cache, identity):
            cache.fills = getattr(cache, "fills", -1) + 1
            original(cache, identity)

        monkeypatch.setattr(cache_engine, "_held", held)
        monkeypatch.setattr(cache_engine.internals, "mark_prefix", mark_prefix)


def prepared_as(monkeypatch, change):
    """Have the cache be filled with ``change(pieces)``, by site path."""
    original = Attachment.prepared
    monkeypatch.setattr(Attachment, "prepared", lambda self, flat, **how: change(original(self, flat, **how)))


class TestKeysAndValuesSwapped(Llama):
    caught_by = (PROMPT, ENGINES, NATIVE)

    def plant(self, monkeypatch):
        prepared_as(monkeypatch, lambda pieces: {path: KeyValue(*piece[::-1]) for path, piece in pieces.items()})


class TestLayersBackwards(GPT2):
    caught_by = (PROMPT, ENGINES, NATIVE)

    def plant(self, monkeypatch):
        prepared_as(monkeypatch, lambda pieces: dict(zip(pieces, [*pieces.values()][::-1], strict=True)))


class TestDecoderAndCrossSwapped(T5):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        def swapped(pieces):
            own, cross = [*pieces.values()][:2], [*pieces.values()][2:]
            return dict(zip(pieces, [*cross, *own], strict=True))

        prepared_as(monkeypatch, swapped)


class TestPrefixDetached(Llama):
    """No gradient at all, which torch itself sees."""

    caught_by = (SLOTS, ENGINES)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        def detached(pieces):
            return {path: KeyValue(key.detach(), value.detach()) for path, (key, value) in pieces.items()}

        prepared_as(monkeypatch, detached)


class TestPrefixInTheFirstRowOnly(GPT2):
    caught_by = (PROMPT, NATIVE)

    def plant(self, monkeypatch):
        def fill_cache(cache, attachment, pieces, batch):
            original(cache, attachment, pieces, batch)
            for layer in cache.layers:
                layer.keys = layer.keys.clone()
                layer.keys[1:] = 0

        original = cache_engine.fill_cache
        monkeypatch.setattr(cache_engine, "fill_cache", fill_cache)
        monkeypatch.setattr("prefixkit.native_cache.fill_cache", fill_cache)


class TestPositionsMovedTwice(Llama):
    """Moved by the engine, and by the length of the cache once more."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        def place_positions(module, stack, arguments, call, offset):
            return positions_module.place_positions(module, stack, arguments, call, 2 * offset)

        monkeypatch.setattr(cache_engine, "place_positions", place_positions)


class TestPositionsFromTheCache(GPT2):
    """The model counts its positions itself: padding too, and positions='none' is not heard."""

    caught_by = (PROMPT, PADDED)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine, "place_positions", lambda *call: None)


class TestPinnedPrefixNotRefused(Mistral):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine, "check_cacheable", lambda attachment: None)


class TestBiasTakenAway(T5):
    """positions='none' is not refused, and the native cache counts the prefix."""

    caught_by = (PROMPT,)
    plant = TestPinnedPrefixNotRefused.plant


class TestPaddedWindowNotRefused(Mistral):
    caught_by = (PADDED,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine, "_check_padding", lambda *call: None)


class TestPaddedTargetsNotRefused(T5):
    caught_by = (TARGETS,)
    plant = TestPaddedWindowNotRefused.plant


class TestPackedRowsNotRefused(Llama):
    caught_by = (PACKED,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine, "_check_positions", lambda *call: None)


class TestCheckpointingNotRefused(Llama):
    """transformers drops the cache, and the prefix with it; torch sees that the mask does not fit."""

    caught_by = (CHECKPOINTING, "test_cache_engine_refuses_checkpointing")
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(cache_engine.internals, "is_checkpointing", lambda stack: False)


class TestLeavesItsCacheInTheOutput(Llama):
    """A caller who asked for no cache gets one."""

    caught_by = ("test_beam_search", "test_without_a_cache")

    def plant(self, monkeypatch):
        monkeypatch.setattr(CacheEngine, "after", lambda *called: called[-1])


class TestEncoderPrefixNotRefused(Bart):
    """The encoder's part of the prefix is left out without a word."""

    caught_by = ("test_cache_engine_refuses_an_encoder_prefix",)

    def plant(self, monkeypatch):
        monkeypatch.setattr(CacheEngine, "check", lambda *call: None)
