"""Attention engines with one mistake each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional
from wrong.right import GPT2, T5, Bart, BartDecoder, Bert, Gemma2, Llama, Mistral

from prefixkit import attention_engine, positions as positions_module, prefix_state, widening
from prefixkit.attachment import Attachment
from prefixkit.attention_engine import AttentionEngine
from prefixkit.call import StackCall
from prefixkit.hooks import FLAT, BeforeStack
from prefixkit.layout import KeyValue, Layout
from prefixkit.prefix_state import STATE, PrefixState

PROMPT = "test_prefix_of_a_text_is_that_text_as_a_prompt"
ENGINES = "test_engines_agree"
NATIVE = "test_native_cache_on_the_bare_model"
SLOTS = "test_every_slot_gets_its_own_gradient"
PADDED = "test_padded_rows_equal_rows_alone"
TARGETS = "test_padded_targets_equal_targets_alone"
SLIDE = "test_a_sliding_prefix_leaves_the_window_as_context_does"
SEEN = "test_every_query_sees_the_prefix"
CAUSAL = "test_a_later_token_changes_no_earlier_output"
PADDING = "test_padding_is_not_seen"
AGREE = "test_attention_implementations_agree"
CHECKPOINTING = "test_checkpointing_gives_equal_gradients"
PACKED = "test_packed_rows_equal_rows_apart"
DROPOUT = "test_dropout_of_the_prefix_is_the_same_when_recomputed"
GREEDY = "test_greedy"
BY_HAND = "test_decoding_by_hand"


# Masks


class TestMaskNotWidened(Llama):
    """The mask is as wide as the text; here torch itself sees it."""

    caught_by = (PROMPT, SEEN)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(prefix_state, "widen_mask", lambda mask, seen, columns: mask)


class TestMaskHidesThePrefix(Llama):
    caught_by = (PROMPT, SEEN, SLOTS)

    def plant(self, monkeypatch):
        def widen_mask(mask, seen, columns):
            nobody = torch.zeros(1, 1, mask.shape[-2], columns, dtype=torch.bool)
            return widening.widen_mask(mask, nobody, columns)

        monkeypatch.setattr(prefix_state, "widen_mask", widen_mask)


class TestMaskHidesTheFirstToken(GPT2):
    """One virtual token of the prefix is out of sight."""

    caught_by = (PROMPT, SEEN, SLOTS)

    def plant(self, monkeypatch):
        def widen_mask(mask, seen, columns):
            some = torch.ones(1, 1, mask.shape[-2], columns, dtype=torch.bool)
            some[..., 0] = False
            return widening.widen_mask(mask, some, columns)

        monkeypatch.setattr(prefix_state, "widen_mask", widen_mask)


class TestMaskWidenedAtItsEnd(Llama):
    caught_by = (PROMPT, CAUSAL, SEEN)

    def plant(self, monkeypatch):
        def widen_mask(mask, seen, columns):
            wide = widening.widen_mask(mask, seen, columns)
            return wide.roll(-columns, dims=-1)

        monkeypatch.setattr(prefix_state, "widen_mask", widen_mask)


class TestMaskOfTheFirstRow(Bart):
    """All rows get the mask of the first."""

    caught_by = (PADDED, PADDING)

    def plant(self, monkeypatch):
        def widen_mask(mask, seen, columns):
            return widening.widen_mask(mask[:1], seen, columns)

        monkeypatch.setattr(prefix_state, "widen_mask", widen_mask)


class TestPrefixHiddenInPaddedRows(Bert):
    """Rows with padding do not see the prefix."""

    caught_by = (PADDED,)

    def plant(self, monkeypatch):
        def widen_mask(mask, seen, columns):
            whole = mask.dtype == torch.bool and mask.shape[-2] > 1
            shown = mask[..., -1:, :].all(-1, keepdim=True) if whole else torch.ones(1, 1, 1, 1, dtype=torch.bool)
            return widening.widen_mask(mask, shown.expand(-1, 1, mask.shape[-2], columns), columns)

        monkeypatch.setattr(prefix_state, "widen_mask", widen_mask)


class TestSdpaMakesItsOwnMask(Llama):
    """Given no mask, sdpa aligns a causal one at the upper left, as AdapterHub has it."""

    caught_by = (PROMPT, SEEN)

    def plant(self, monkeypatch):
        monkeypatch.setattr(attention_engine, "_sdpa_would_be_causal", lambda *call: False)


class TestCrossAttentionMadeCausal(T5):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(
            attention_engine, "_sdpa_would_be_causal", lambda name, module, queries, kwargs: name == "sdpa"
        )


class TestEncoderMadeCausal(Bert):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(
            attention_engine, "_sdpa_would_be_causal", lambda name, module, queries, kwargs: name == "sdpa"
        )


class TestTextSeesItsFuture(GPT2):
    """Where no mask is given, everything is seen."""

    caught_by = (PROMPT, CAUSAL)

    def plant(self, monkeypatch):
        def causal_mask(self, queries, keys, device):
            return torch.ones(1, 1, queries, keys, dtype=torch.bool)

        monkeypatch.setattr(PrefixState, "causal_mask", causal_mask)


class TestFlexHidesThePrefix(Llama):
    caught_by = (f"{PROMPT}[attention-flex_attention-shift-pinned]", f"{SEEN}[flex_attention]", AGREE)

    def plant(self, monkeypatch):
        def widen(mask, seen, columns, *rest):
            nobody = torch.zeros(1, 1, mask.seq_lengths[0], columns, dtype=torch.bool)
            return widening.widen_block_mask(mask, nobody, columns, *rest)

        monkeypatch.setattr(prefix_state, "widen_block_mask", widen)


class TestFlexMaskNotMoved(Llama):
    """Real keys are looked up at the places they have with the prefix in front."""

    caught_by = (f"{PROMPT}[attention-flex_attention-shift-pinned]", f"{PADDING}[attention-flex_attention-left]", AGREE)

    def plant(self, monkeypatch):
        original = attention_engine.internals.new_block_mask

        def new_block_mask(wider, batch, queries, keys, *rest):
            columns = keys - queries

            def unmoved(row, head, query, key):
                real = wider(row, head, query, (key + columns).clamp(max=keys - 1))
                return (key < columns) | real

            return original(unmoved, batch, queries, keys, *rest)

        monkeypatch.setattr(attention_engine.internals, "new_block_mask", new_block_mask)


class TestFlexMaskOfTheFirstRow(Bart):
    caught_by = (AGREE, f"{PADDING}[attention-flex_attention-left]")

    def plant(self, monkeypatch):
        original = attention_engine.internals.new_block_mask

        def new_block_mask(wider, *rest):
            return original(lambda row, head, query, key: wider(row * 0, head, query, key), *rest)

        monkeypatch.setattr(attention_engine.internals, "new_block_mask", new_block_mask)


# Windows


class TestSlidingIsPinned(Mistral):
    caught_by = (PROMPT, SLIDE, ENGINES)

    def plant(self, monkeypatch):
        monkeypatch.setattr(PrefixState, "seen", lambda state, site: None)


class TestPinnedSlides(Gemma2):
    caught_by = (PROMPT, SEEN, SLOTS)

    def plant(self, monkeypatch):
        original = PrefixState.seen

        def seen(state, site):
            state.slide = True
            return original(state, site)

        monkeypatch.setattr(PrefixState, "seen", seen)


class TestWindowOneTooWide(Mistral):
    caught_by = (PROMPT, SLIDE, ENGINES)

    def plant(self, monkeypatch):
        def seen(state, site):
            if not state.slide or site.window is None:
                return None
            columns = torch.arange(state.num_virtual_tokens)
            return (state.query_positions[:, None, :, None] - columns) <= site.window

        monkeypatch.setattr(PrefixState, "seen", seen)


class TestWindowOfThePaddedRow(Mistral):
    """The window counts padding as context."""

    caught_by = (PADDED,)

    def plant(self, monkeypatch):
        def seen(state, site):
            if not state.slide or site.window is None:
                return None
            queries = torch.arange(state.query_positions.shape[1])[:, None] + state.num_virtual_tokens
            return (queries - torch.arange(state.num_virtual_tokens) < site.window)[None, None]

        monkeypatch.setattr(PrefixState, "seen", seen)


class TestWindowOfUnmovedPositions(Gemma2):
    """With positions='none' the prefix is taken to stand where the text stands."""

    caught_by = (PROMPT, SLIDE)

    def plant(self, monkeypatch):
        original = AttentionEngine._state

        def state_of(module, stack, attachment, flat, real, **kept):
            state = original(module, stack, attachment, flat, real, **kept)
            state.query_positions = real + attachment.offset(stack)
            return state

        monkeypatch.setattr(AttentionEngine, "_state", staticmethod(state_of))


# Positions


def moved_by(monkeypatch, amount):
    """Have the engine move positions by ``amount(offset, call)``."""

    def place_positions(module, stack, arguments, call, offset, **_):
        return positions_module.place_positions(module, stack, arguments, call, amount(offset, call))

    monkeypatch.setattr(attention_engine, "place_positions", place_positions)


class TestPositionsNotMoved(GPT2):
    caught_by = (PROMPT, ENGINES, NATIVE)

    def plant(self, monkeypatch):
        moved_by(monkeypatch, lambda offset, call: 0)


class TestTablePositionsNotMoved(Bart):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        moved_by(monkeypatch, lambda offset, call: 0)


class TestPositionsMovedTwice(GPT2):
    caught_by = (PROMPT, ENGINES, NATIVE)

    def plant(self, monkeypatch):
        moved_by(monkeypatch, lambda offset, call: 2 * offset)


class TestPositionsAlwaysMoved(Llama):
    """positions='none' is not heard."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(Attachment, "offset", lambda self, stack: self.config.num_virtual_tokens)


class TestPositionsNeverMoved(T5):
    """positions='shift' is not heard, so the prefix has no bias."""

    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        monkeypatch.setattr(Attachment, "offset", lambda self, stack: 0)


class TestBareEncoderMoved(Bart):
    """A stack without a prefix is moved too."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        def offset(self, stack):
            return self.config.num_virtual_tokens if self.config.positions == "shift" else 0

        def count_positions(module, stack, arguments):
            call = StackCall.read(arguments, 0)
            positions_module.place_positions(module, stack, arguments, call, offset=5)

        monkeypatch.setattr(Attachment, "offset", offset)
        monkeypatch.setattr("prefixkit.hooks.count_positions", count_positions)


class TestPositionsCountPadding(GPT2):
    """As PEFT has it in a left-padded forward."""

    caught_by = (PADDED,)

    def plant(self, monkeypatch):
        def token_positions(self):
            return (torch.arange(self.queries) + self.past).unsqueeze(0)

        monkeypatch.setattr(StackCall, "token_positions", token_positions)


class TestTablePositionsCountPadding(Bart):
    caught_by = (PADDED, TARGETS)
    plant = TestPositionsCountPadding.plant


class TestBiasCountsPadding(T5):
    caught_by = (PADDED, TARGETS)
    plant = TestPositionsCountPadding.plant


class TestPackedPositionsLost(Llama):
    """The caller's position_ids are not heard."""

    caught_by = (PACKED,)

    def plant(self, monkeypatch):
        def place_positions(module, stack, arguments, call, offset, **_):
            arguments.pop("position_ids", None)
            return positions_module.place_positions(module, stack, arguments, call, offset)

        monkeypatch.setattr(attention_engine, "place_positions", place_positions)


# Biases


def widened_bias(monkeypatch, change):
    """Have the engine widen a bias as ``change(bias, front, columns, batch)`` does."""
    monkeypatch.setattr(attention_engine, "widen_bias", change)


class TestBiasNotWidened(T5):
    """The bias is as wide as the text; here torch itself sees it."""

    caught_by = (PROMPT,)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        widened_bias(monkeypatch, lambda bias, front, columns, batch: bias)


class TestBiasWidenedAtItsEnd(T5):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        widened_bias(monkeypatch, lambda *call: widening.widen_bias(*call).roll(-call[2], dims=-1))


class TestBiasWidenedWithZeros(T5):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        widened_bias(monkeypatch, lambda bias, front, *rest: widening.widen_bias(bias, None, *rest))


class TestBiasOfRealTokensMoves(T5):
    """The real tokens' bias changes with the length of the prefix, as AdapterHub has it."""

    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        def widen_bias(bias, front, columns, batch):
            wide = widening.widen_bias(bias, front, columns, batch)
            return torch.cat([wide[..., :columns], bias.roll(1, dims=-1).expand(batch, -1, -1, -1)], dim=-1)

        widened_bias(monkeypatch, widen_bias)


class TestCrossGetsTheBiasOfTheDecoder(T5):
    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        last = {}

        def widen_bias(bias, front, columns, batch):
            last["front"] = last.get("front") if front is None else front
            front = front if last["front"] is None or last["front"].shape[2] != bias.shape[2] else last["front"]
            return widening.widen_bias(bias, front, columns, batch)

        widened_bias(monkeypatch, widen_bias)


class TestBiasOfUnmovedQueries(T5):
    """The prefix's bias is taken for queries that stand at 0."""

    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        original = AttentionEngine._state

        def state_of(module, stack, attachment, flat, real, **kept):
            return original(module, stack, attachment, flat, real - attachment.config.num_virtual_tokens, **kept)

        monkeypatch.setattr(AttentionEngine, "_state", staticmethod(state_of))


# Keys and values


def split_as(monkeypatch, change):
    """Have the layout cut the flat prefix as ``change(pieces)`` does."""
    original = Layout.split
    monkeypatch.setattr(Layout, "split", lambda self, flat: change(original(self, flat)))


class TestKeysAndValuesSwapped(Llama):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [KeyValue(value, key) for key, value in pieces])


class TestValuesStoredBeforeKeys(Bart):
    """Cut and joined alike, so that only the stored order tells."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        join = Layout.join
        split_as(monkeypatch, lambda pieces: [KeyValue(value, key) for key, value in pieces])
        monkeypatch.setattr(
            Layout, "join", lambda self, pieces: join(self, [KeyValue(value, key) for key, value in pieces])
        )


class TestKeysAsValues(GPT2):
    """The values' part of the flat prefix is never used."""

    caught_by = (PROMPT, SLOTS)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [KeyValue(key, key) for key, _ in pieces])


class TestHeadsInTheWrongOrder(Llama):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [KeyValue(key.flip(0), value) for key, value in pieces])


class TestHeadsAndDimsMixed(Llama):
    """Each row is cut as (dim, kv_heads)."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        def mixed(part):
            heads, tokens, dim = part.shape
            return part.transpose(0, 1).reshape(tokens, dim, heads).permute(2, 0, 1)

        split_as(monkeypatch, lambda pieces: [KeyValue(mixed(key), mixed(value)) for key, value in pieces])


class TestTwoSitesShareOnePrefix(Bart):
    """Layers i and i + L/2 of a stack share theirs, as PEFT's sequence-to-sequence prefixes do."""

    caught_by = (PROMPT, SLOTS)

    def plant(self, monkeypatch):
        def shared(pieces):
            return [*pieces[:-3], pieces[-3], pieces[-3], pieces[-1]]

        split_as(monkeypatch, shared)


class TestDecoderAndCrossShareOnePrefix(T5):
    caught_by = (PROMPT, SLOTS)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [*pieces[:-2], *pieces[-4:-2]])


class TestLayersBackwards(GPT2):
    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: pieces[::-1])


class TestDecoderBeforeEncoder(T5):
    """The stacks in another order than the one that is stored."""

    caught_by = (PROMPT,)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [*pieces[3:], *pieces[:3]])


def put_as(monkeypatch, change):
    """Have the engine join the prefix with keys and values as ``change(prefix, own)`` does."""
    monkeypatch.setattr(prefix_state, "put_in_front", change)


def cast_as(monkeypatch, change):
    """Have the engine cast the prefix, and drop of it, as ``change(prefix, own, dropout)`` does."""
    monkeypatch.setattr(prefix_state, "as_in_call", change)


class TestPrefixPutBehind(Llama):
    """The masks and biases are widened in front."""

    caught_by = (PROMPT, ENGINES, CAUSAL)

    def plant(self, monkeypatch):
        def put_behind(prefix, own):
            return widening.put_in_front(prefix, own).roll(-prefix.shape[1], dims=2)

        put_as(monkeypatch, put_behind)


class TestTokensBackwards(T5):
    """Harmless but for the bias and the windows, which take the first column for the first token."""

    caught_by = (PROMPT, ENGINES)

    def plant(self, monkeypatch):
        put_as(monkeypatch, lambda prefix, own: widening.put_in_front(prefix.flip(1), own))


class TestPrefixInTheFirstRowOnly(GPT2):
    caught_by = (PROMPT, PADDED, "test_beam_search")

    def plant(self, monkeypatch):
        def put_in_front(prefix, own):
            joined = widening.put_in_front(prefix, own)
            others = torch.arange(len(own))[:, None, None, None] > 0
            return torch.cat([joined[:, :, : prefix.shape[1]].masked_fill(others, 0), own], dim=2)

        put_as(monkeypatch, put_in_front)


class TestPrefixDetached(GPT2):
    """No gradient at all, which torch itself sees."""

    caught_by = (SLOTS, ENGINES)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        put_as(monkeypatch, lambda prefix, own: widening.put_in_front(prefix.detach(), own))


class TestKeysDetached(Bert):
    """Half of the parameters get no gradient."""

    caught_by = (SLOTS,)

    def plant(self, monkeypatch):
        split_as(monkeypatch, lambda pieces: [KeyValue(key.detach(), value) for key, value in pieces])


class TestPrefixRoundedByTheCast(GPT2):
    """The base's dtype is reached over whole numbers."""

    caught_by = ("test_autocast", "test_half_precision_base")

    def plant(self, monkeypatch):
        def as_in_call(prefix, own, dropout):
            prefix = prefix if prefix.dtype == own.dtype else prefix - prefix.detach() + prefix.detach().round()
            return widening.as_in_call(prefix, own, dropout)

        cast_as(monkeypatch, as_in_call)


class TestGradientOfTheFirstBatch(GPT2):
    """A second batch before the step counts half."""

    caught_by = ("test_accumulated_gradients",)

    def plant(self, monkeypatch):
        def flat(self, module=None):
            found = original(self)
            again = any(value.grad is not None for value in self.encoder.parameters())
            return found / 2 + found.detach() / 2 if again else found

        original = Attachment.flat
        monkeypatch.setattr(Attachment, "flat", flat)


class TestReadsAValue(Llama):
    """A look at a tensor's numbers in Python, where torch.compile has to stop."""

    caught_by = ("test_compiled_forward",)
    fails_with = (torch._dynamo.exc.TorchDynamoException,)

    def plant(self, monkeypatch):
        def put_in_front(prefix, own):
            assert prefix.sum().item() < 1e9
            return widening.put_in_front(prefix, own)

        put_as(monkeypatch, put_in_front)


class TestDropoutInEval(GPT2):
    caught_by = (DROPOUT,)

    def plant(self, monkeypatch):
        original = AttentionEngine._state

        def state_of(module, stack, attachment, flat, real, **kept):
            dropped = functional.dropout(flat, attachment.config.prefix_dropout)
            return replace(original(module, stack, attachment, dropped, real, kept=None), dropout=0.0)

        monkeypatch.setattr(AttentionEngine, "_state", staticmethod(state_of))


class TestNoDropout(GPT2):
    """prefix_dropout is not heard."""

    caught_by = (DROPOUT,)

    def plant(self, monkeypatch):
        cast_as(monkeypatch, lambda prefix, own, dropout: widening.as_in_call(prefix, own, 0.0))


class TestOtherDropoutWhenRecomputed(GPT2):
    caught_by = (DROPOUT,)

    def plant(self, monkeypatch):
        generator = torch.Generator().manual_seed(0)

        def as_in_call(prefix, own, dropout):
            if dropout:
                prefix = prefix * (torch.rand(prefix.shape, generator=generator) > dropout) / (1 - dropout)
            return widening.as_in_call(prefix, own, 0.0)

        cast_as(monkeypatch, as_in_call)


# What travels with a call


class TestStateGoneAfterTheCall(Bert):
    """Recomputed layers find an empty prefix in the place where the call had left it."""

    caught_by = (CHECKPOINTING,)

    def plant(self, monkeypatch):
        def after(self, module, stack, arguments, attachment, output):
            pieces = arguments[STATE].pieces
            for path, (key, value) in pieces.items():
                pieces[path] = KeyValue(torch.zeros_like(key), torch.zeros_like(value))
            return output

        monkeypatch.setattr(AttentionEngine, "after", after)


class TestStateOfTheLastCall(T5):
    """The state stands in a global that the next call writes."""

    caught_by = (CHECKPOINTING,)

    def plant(self, monkeypatch):
        earlier = {}
        original = AttentionEngine._state

        def state_of(module, stack, attachment, flat, real, **kept):
            state = original(module, stack, attachment, flat, real, **kept)
            for other in earlier.setdefault(stack.path, []):
                other.__dict__.update(state.__dict__)
            earlier[stack.path].append(state)
            return state

        monkeypatch.setattr(AttentionEngine, "_state", staticmethod(state_of))


class TestReentrantCheckpointingNotRefused(Llama):
    """With an MLP its graph is gone when the second layer is recomputed; without one the gradient is right."""

    caught_by = ("test_reentrant_checkpointing_is_right_or_refused",)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(attention_engine.internals, "uses_reentrant_checkpointing", lambda stack: False)


class TestEncoderCalledAloneHasNoPrefix(T5):
    """generate() calls the encoder by itself, and so does a pipeline."""

    caught_by = (GREEDY, "test_feature_extraction_pipeline")

    def plant(self, monkeypatch):
        original = BeforeStack.__call__

        def call(self, module, args, kwargs):
            alone = self.stack.name == "encoder" and FLAT not in kwargs
            if alone:
                active = self.prefixes.attachment
                return args, active.engine.off(module, self.stack, kwargs, active)
            return original(self, module, args, kwargs)

        monkeypatch.setattr(BeforeStack, "__call__", call)


# Decoding


class TestPositionsNotMovedWhenDecoding(GPT2):
    """Right in a forward and in the first step of generate()."""

    caught_by = (GREEDY, BY_HAND, "test_beam_search", "test_several_turns")

    def plant(self, monkeypatch):
        moved_by(monkeypatch, lambda offset, call: 0 if call.past else offset)


class TestPositionsMovedTwiceWhenDecoding(Bart):
    caught_by = (GREEDY, "test_without_a_cache")

    def plant(self, monkeypatch):
        moved_by(monkeypatch, lambda offset, call: 2 * offset if call.past else offset)


class TestNoPrefixWhenDecoding(Llama):
    """A single query does not see the prefix."""

    caught_by = (GREEDY, BY_HAND, "test_greedy_on_padded_rows", "test_quantized_cache")

    def plant(self, monkeypatch):
        original = AttentionEngine._state

        def state_of(module, stack, attachment, flat, real, **kept):
            return original(module, stack, attachment, flat * 0 if real.shape[1] == 1 else flat, real, kept=None)

        monkeypatch.setattr(AttentionEngine, "_state", staticmethod(state_of))


class TestStaticCacheTakenForEmpty(Bart):
    caught_by = ("test_static_cache",)

    def plant(self, monkeypatch):
        original = StackCall.read

        def read(arguments, past):
            return original(arguments, past if isinstance(past, int) else 0)

        monkeypatch.setattr(StackCall, "read", read)


class TestOwnCountOfTokens(BartDecoder):
    """The engine counts the tokens itself, and a search that takes some back is not noticed."""

    caught_by = ("test_assisted_decoding", "test_prompt_lookup")

    def plant(self, monkeypatch):
        original, count = StackCall.read, [0]

        def read(arguments, past):
            count[0] = count[0] if past else 0
            call = original(arguments, count[0])
            count[0] += call.queries
            return replace(call, mask=None)

        monkeypatch.setattr(StackCall, "read", read)


class TestPrefixAsItWasAtFirst(Llama):
    """The flat prefix is kept from the first call on."""

    caught_by = ("test_generation_goes_on_after_the_prefix_changed", "test_copy_is_whole_and_apart")

    def plant(self, monkeypatch):
        def flat(self, module=None):
            if "kept" not in self.__dict__:
                self.kept = original(self).detach().clone()
            return original(self) * 0 + self.kept

        original = Attachment.flat
        monkeypatch.setattr(Attachment, "flat", flat)
