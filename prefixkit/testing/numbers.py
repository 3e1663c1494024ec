"""What the prefix does to the numbers, against oracles that know no adapter."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prefixkit
from prefixkit.errors import EngineError
from prefixkit.testing.prompt import text_as_prompt
from prefixkit.testing.subject import TOKENS, Subject, loss_of
from prefixkit.testing.traits import needs
from prefixkit.transformers_internals import attention_implementation_of, given_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Numbers:
    """The same text as a prompt, the other engine, the bare model on a native cache, rows alone."""

    def test_prefix_of_a_text_is_that_text_as_a_prompt(
        self, subject: Subject, engine: str, attention: str, positions: str, window: str
    ) -> None:
        """A prefix read off a text gives the outputs of that text as a prompt."""
        with subject.may_refuse(engine):
            text_as_prompt(
                subject, engine=engine, attention=attention, shift=positions == "shift", pinned=window == "pinned"
            )

    @needs("both_engines")
    def test_engines_agree(self, subject: Subject, method: str, positions: str) -> None:
        """Both engines give the same outputs and gradients."""
        with subject.may_refuse("cache"):
            results = []
            settings = subject.cacheable("cache")
            for engine in ("attention", "cache"):
                torch.manual_seed(0)
                model = subject.with_prefix(engine=engine, method=method, positions=positions, **settings)
                outputs = subject.outputs(model, **subject.inputs())
                loss_of(outputs).backward()
                results.append((outputs.detach(), *subject.gradients(model)))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)

    @needs("decoder_only", "caches")
    def test_native_cache_on_the_bare_model(self, subject: Subject, method: str) -> None:
        """The bare model on to_cache() gives the outputs of the model with the prefix."""
        model = subject.with_prefix(method=method, **subject.cacheable("cache"))
        ids = subject.tokens(3, 7)
        expected = subject.logits(model, input_ids=ids)
        cache = prefixkit.to_cache(model, batch_size=3)
        assert cache.get_seq_length() == TOKENS
        prefixkit.remove(model)
        found = subject.logits(model, input_ids=ids, **given_cache(model, cache))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_padded_rows_equal_rows_alone(
        self, subject: Subject, engine: str, positions: str, window: str, side: str
    ) -> None:
        """Rows padded on either side equal the rows alone."""
        rows = subject.ragged(3, 9, 5)
        ids, mask = subject.padded(rows, side=side)
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine, positions=positions, window=window)
            found = subject.logits(model, input_ids=ids, attention_mask=mask, **_targets(subject, len(rows)))
            for index, row in enumerate(rows):
                targets = {name: value[index : index + 1] for name, value in _targets(subject, len(rows)).items()}
                alone = subject.logits(model, input_ids=row[None], attention_mask=torch.ones_like(row)[None], **targets)
                real = found[index] if subject.is_encoder_decoder else found[index][mask[index].bool()]
                torch.testing.assert_close(real, alone[0], atol=1e-4, rtol=1e-4)

    @needs("encodes", "decodes")
    def test_padded_targets_equal_targets_alone(self, subject: Subject, engine: str, positions: str, side: str) -> None:
        """A decoder's rows padded on either side equal the rows alone."""
        rows = subject.ragged(3, 7, 2)
        source = subject.tokens(3, 6)
        ids, mask = subject.padded(rows, side=side)
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine, positions=positions)
            found = subject.logits(model, input_ids=source, decoder_input_ids=ids, decoder_attention_mask=mask)
            for index, row in enumerate(rows):
                alone = subject.logits(model, input_ids=source[index : index + 1], decoder_input_ids=row[None])
                torch.testing.assert_close(found[index][mask[index].bool()], alone[0], atol=1e-4, rtol=1e-4)

    def test_disabled_and_removed(self, subject: Subject, engine: str) -> None:
        """Disabled and after remove the model is the bare base, bit for bit, and nothing is left behind."""
        model = subject.bare()
        model.requires_grad_(False)
        next(model.parameters()).requires_grad_(True)
        inputs = subject.inputs()
        own: Any = partial(type(model).save_pretrained, model)
        vars(model)["save_pretrained"] = own  # an answer of the instance's own, as PEFT and custom generate give it
        before = _belongings(model)
        base = subject.logits(model, **inputs)
        subject.apply(model, engine=engine)
        changed = subject.logits(model, **inputs)
        assert (changed - base).abs().max() > 1e-3, "the prefix changes nothing"
        with prefixkit.disabled(model):
            assert torch.equal(subject.logits(model, **inputs), base)
        assert torch.equal(subject.logits(model, **inputs), changed)
        prefixkit.remove(model)
        assert torch.equal(subject.logits(model, **inputs), base)
        assert _belongings(model) == before

    def test_fold_changes_no_number(self, subject: Subject, engine: str) -> None:
        """Folding leaves the flat prefix alone, and changes no output."""
        model = subject.with_prefix(engine=engine, method="prefix-tuning", head=False)
        expected = subject.logits(model, **subject.inputs())
        prefixkit.fold(model)
        torch.testing.assert_close(subject.logits(model, **subject.inputs()), expected, atol=1e-5, rtol=1e-5)
        width = sum(site.width for site in prefixkit.sites(model))
        assert [tuple(value.shape) for value in model.parameters() if value.requires_grad] == [(TOKENS, width)]

    def test_the_longest_text_is_right_or_refused(self, subject: Subject, engine: str) -> None:
        """A text as long as the model's positions is served behind the prefix, or a clear error."""
        limit = min(getattr(subject.bare().config, "max_position_embeddings", 96), 2048)
        inputs = subject.inputs(batch=1, length=limit, targets=limit)
        model = subject.with_prefix(engine=engine, positions="none" if engine == "attention" else "shift")
        try:
            outputs = [subject.logits(model, **inputs)]
            prefixkit.remove(model)
            outputs.append(subject.logits(subject.apply(model, engine=engine), **inputs))
        except EngineError as error:
            subject.refusals.append(str(error))
        except IndexError as error:
            raise AssertionError("a position past the end of a table, without a clear error") from error
        else:
            assert all(torch.isfinite(output).all() for output in outputs)

    @needs("encodes")
    def test_cache_engine_refuses_an_encoder_prefix(self, subject: Subject) -> None:
        """The cache engine refuses an encoder prefix, and leaves the model as it was."""
        model = subject.bare()
        before = _belongings(model)
        with pytest.raises(EngineError):
            subject.apply(model, engine="cache", stacks=("encoder",), window="slide")
        assert _belongings(model) == before

    @needs("reachable")
    def test_one_layer_alone(self, subject: Subject) -> None:
        """With layers= the prefix stands in those layers alone, and trains there."""
        sites = prefixkit.sites(subject.with_prefix())
        last = max(site.layer for site in sites if site.stack == sites[-1].stack)
        model = subject.with_prefix(layers=(last,))
        assert {site.layer for site in prefixkit.sites(model)} == {last}
        subject.loss(model, **subject.inputs()).backward()
        assert all(gradient.abs().max() > 0 for gradient in subject.gradients(model))


def _belongings(model: PreTrainedModel) -> dict[str, object]:
    """All of a model that a prefix may touch, but the numbers."""
    modules = list(model.modules())
    configs: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    return {
        "parameters": {name: value.requires_grad for name, value in model.named_parameters()},
        "buffers": list(model.state_dict()),
        "attributes": sorted(vars(model)),
        "answers": [{name: value for name, value in vars(module).items() if callable(value)} for module in modules],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        "attention": [attention_implementation_of(config) for config in configs],
    }


def _targets(subject: Subject, rows: int) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": subject.tokens(rows, 4, seed=2)} if subject.is_encoder_decoder else {}
