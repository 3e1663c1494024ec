"""Ways to generate, each against whole forwards without a cache."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import prefixkit
from prefixkit import transformers_internals as internals
from prefixkit.errors import EngineError
from prefixkit.testing.subject import NEW, Subject, numbers_of, strengthen
from prefixkit.testing.traits import needs
from prefixkit.transformers_internals import cache_in, given_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (2, 6, 4)


def _few_pages() -> dict[str, Any]:
    """Options of ``generate_batch``: greedy, and little memory, where transformers would take most of it."""
    if not internals.has_paged_attention():
        return {}
    pages = transformers.ContinuousBatchingConfig(num_blocks=32, page_size=8, max_batch_tokens=32)
    greedy = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
    return {"generation_config": greedy, "continuous_batching_config": pages}


class Generation:
    """Searches, caches, assistants, turns, and decoding by hand."""

    @needs("generates")
    def test_greedy(self, subject: Subject, engine: str, positions: str, window: str) -> None:
        """Greedy search chooses what whole forwards choose."""
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine, positions=positions, window=window)
            ids = subject.tokens(3, 6)
            assert torch.equal(_new(subject.generate(model, ids)), _recompute(subject, model, ids))

    @needs("generates")
    def test_greedy_on_padded_rows(self, subject: Subject, engine: str) -> None:
        """Left-padded rows generate what each row generates alone."""
        rows = subject.ragged(*LENGTHS)
        ids, mask = subject.padded(rows)
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine)
            found = _new(subject.generate(model, ids, mask))
            for index, row in enumerate(rows):
                assert torch.equal(found[index : index + 1], _recompute(subject, model, row[None]))

    @needs("generates")
    def test_beam_search(self, subject: Subject, engine: str) -> None:
        """Beam search gives the scores that whole forwards give its sequences."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(2, 6)
        settings: dict[str, Any] = {
            "num_beams": 3,
            "length_penalty": 0.0,
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        found = subject.generate(model, ids, **settings)
        scores = _log_probabilities(subject, model, ids, found.sequences)
        torch.testing.assert_close(found.sequences_scores, scores, atol=1e-3, rtol=1e-4)
        uncached = subject.generate(model, ids, use_cache=False, **settings)
        assert torch.equal(uncached.sequences, found.sequences)

    @needs("generates")
    def test_seeded_sampling(self, subject: Subject, engine: str) -> None:
        """Sampling with a seed draws what whole forwards with that seed draw."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(2, 6)
        torch.manual_seed(0)
        found = _new(subject.generate(model, ids, do_sample=True, top_k=0, temperature=2.0))
        torch.manual_seed(0)
        assert torch.equal(found, _recompute(subject, model, ids, temperature=2.0))
        assert not torch.equal(found, _new(subject.generate(model, ids)))

    @needs("generates")
    def test_without_a_cache(self, subject: Subject, engine: str) -> None:
        """use_cache=False generates the same."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(2, 6)
        assert torch.equal(subject.generate(model, ids, use_cache=False), subject.generate(model, ids))

    @needs("generates")
    def test_static_cache(self, subject: Subject, engine: str) -> None:
        """A static cache generates the same, padded rows too."""
        _same_with(subject, engine, cache_implementation="static", disable_compile=True)

    @needs("generates")
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads it
    def test_compiled_static_cache(self, subject: Subject, engine: str) -> None:
        """Compiled decoding with a static cache generates the same."""
        from transformers import CompileConfig

        torch.compiler.reset()
        compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)  # type: ignore[arg-type]
        compile_config._compile_all_devices = True  # type: ignore[assignment]
        _same_with(subject, engine, cache_implementation="static", compile_config=compile_config)

    @needs("generates", "accelerated")
    def test_offloaded_cache(self, subject: Subject, engine: str) -> None:
        """An offloaded cache generates the same."""
        _same_with(subject, engine, cache_implementation="offloaded")

    @needs("prompt_decodes", "sees_everything")
    def test_quantized_cache(self, subject: Subject, engine: str) -> None:
        """A quantized cache generates the same where its quantizer loses nothing, and begins so where it does."""
        from transformers import cache_utils

        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine)
            ids = subject.tokens(2, 6)
            expected = _recompute(subject, model, ids)
            found = subject.generate(model, ids, **given_cache(model, _lossless_quantized_cache(model)))
            assert torch.equal(_new(found), expected)
            if not hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers has no quantizer of its own yet
                return
            rounded = subject.generate(model, ids, cache_implementation="quantized", cache_config={"backend": "fp8"})
            assert torch.equal(_new(rounded)[:, 0], expected[:, 0])

    @needs("generates")
    def test_prompt_lookup(self, subject: Subject, engine: str) -> None:
        """Prompt-lookup decoding generates what greedy search does."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(1, 3).repeat(1, 3)
        with subject.may_refuse(engine):
            # Some versions of transformers cannot do without an end; this one is in no text.
            found = subject.generate(model, ids, prompt_lookup_num_tokens=3, eos_token_id=subject.vocabulary)
            assert torch.equal(_new(found), _recompute(subject, model, ids))

    @needs("generates")
    @pytest.mark.parametrize("draft", ["itself", "bare", "prefixed"])
    def test_assisted_decoding(self, subject: Subject, engine: str, draft: str) -> None:
        """Assisted decoding generates what greedy search does, whatever the draft model carries."""
        model = subject.with_prefix(engine=engine)
        assistant = copy.deepcopy(model) if draft == "itself" else subject.bare(seed=1)
        if draft == "prefixed":
            subject.apply(assistant, engine=engine, num_virtual_tokens=3)
        ids = subject.tokens(1, 6)
        with subject.may_refuse(engine):
            found = subject.generate(model, ids, assistant_model=assistant)
            assert torch.equal(_new(found), _recompute(subject, model, ids))

    @needs("prompt_decodes")
    def test_several_turns(self, subject: Subject, engine: str) -> None:
        """A second turn on the returned cache generates what one shot does."""
        model = subject.with_prefix(engine=engine)
        first = subject.generate(model, subject.tokens(1, 6), return_dict_in_generate=True)
        ids = torch.cat([first.sequences, subject.tokens(1, 3, seed=9)], dim=1)
        with subject.may_refuse(engine):
            found = subject.generate(model, ids, **given_cache(model, cache_in(first)))
            assert torch.equal(_new(found), _recompute(subject, model, ids))

    @needs("prompt_decodes")
    def test_continuous_batching_is_right_or_refused(self, subject: Subject, engine: str) -> None:
        """generate_batch is right or a clear error."""
        model = subject.with_prefix(engine=engine)
        rows = subject.ragged(*LENGTHS)
        try:
            found = model.generate_batch([row.tolist() for row in rows], **_few_pages())  # type: ignore[operator]
        except EngineError as error:
            subject.refusals.append(str(error))
            return
        expected = [_recompute(subject, model, row[None])[0].tolist() for row in rows]
        assert [output.generated_tokens for output in found.values()] == expected

    @needs("decoder_only")
    @pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 9), (0, 4, 5, 6, 9)], ids=str)
    def test_decoding_by_hand(self, subject: Subject, engine: str, positions: str, cuts: tuple[int, ...]) -> None:
        """Chunks on the returned cache give the outputs of one forward, padded rows too."""
        ids, mask = subject.padded(subject.ragged(9, 5))
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine, positions=positions)
            expected = subject.logits(model, input_ids=ids, attention_mask=mask)
            cache, parts = None, []
            for start, end in pairwise(cuts):
                with torch.no_grad():
                    output = model(
                        input_ids=ids[:, start:end],
                        attention_mask=mask[:, :end],
                        use_cache=True,
                        **given_cache(model, cache),
                    )
                cache = cache_in(output)
                parts.append(numbers_of(output))
            real = mask.bool()
            torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-4, rtol=1e-4)

    @needs("generates")
    def test_generation_goes_on_after_the_prefix_changed(self, subject: Subject, engine: str) -> None:
        """Generation follows the prefix as it is trained, swapped and removed."""
        model = subject.bare()
        ids = subject.tokens(2, 2)  # short, so that a sliding prefix is in sight
        base = subject.generate(model, ids)
        subject.apply(model, engine=engine)
        first = subject.generate(model, ids)
        assert not torch.equal(first, base)
        with torch.no_grad():
            subject.flat_of(model).mul_(-1.0)
        assert not torch.equal(subject.generate(model, ids), first)
        strengthen(model)
        assert torch.equal(subject.generate(model, ids), first)
        prefixkit.remove(model)
        assert torch.equal(subject.generate(model, ids), base)


def _lossless_quantized_cache(model: PreTrainedModel) -> Any:
    """A cache that goes the way of a quantized one, and keeps all but the last two tokens "quantized"."""
    from transformers.cache_utils import Cache, QuantizedLayer

    class Lossless(QuantizedLayer):  # type: ignore[no-untyped-call]
        def _quantize(self, tensor: Any, axis: Any = None) -> Any:
            return tensor.clone()

        def _dequantize(self, q_tensor: Any) -> Any:
            return q_tensor

    layers = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[Lossless(residual_length=2) for _ in range(layers)])


def _same_with(subject: Subject, engine: str, **settings: Any) -> None:
    """``settings`` of ``generate`` change no token, on a left-padded batch."""
    ids, mask = subject.padded(subject.ragged(*LENGTHS))
    with subject.may_refuse(engine):
        model = subject.with_prefix(engine=engine)
        expected = torch.cat([_recompute(subject, model, row[None]) for row in subject.ragged(*LENGTHS)])
        assert torch.equal(_new(subject.generate(model, ids, mask, **settings)), expected)


def _new(sequences: torch.Tensor) -> torch.Tensor:
    return sequences[:, -NEW:]


def _recompute(
    subject: Subject, model: PreTrainedModel, ids: torch.Tensor, temperature: float | None = None
) -> torch.Tensor:
    """Greedy search, or sampling, by whole forwards on unpadded rows: the new tokens ``(rows, NEW)``."""
    if subject.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        text = torch.full((len(ids), 1), int(start), device=ids.device)
    else:
        text = ids
    for _ in range(NEW):
        arguments = {"input_ids": ids, "decoder_input_ids": text} if subject.is_encoder_decoder else {"input_ids": text}
        scores = subject.logits(model, **arguments, use_cache=False)[:, -1]
        if temperature is None:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial((scores / temperature).softmax(-1), 1)
        text = torch.cat([text, chosen], dim=1)
    return text[:, -NEW:]


def _log_probabilities(
    subject: Subject, model: PreTrainedModel, ids: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """The summed log-probability of each row's new tokens, by one whole forward."""
    arguments = {"input_ids": ids, "decoder_input_ids": sequences}
    if not subject.is_encoder_decoder:
        arguments = {"input_ids": sequences}
    chances = subject.logits(model, **arguments).log_softmax(-1)[:, -NEW - 1 : -1]
    return chances.gather(-1, _new(sequences)[..., None]).sum((1, 2))
