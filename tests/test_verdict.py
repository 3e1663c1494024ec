"""The judge of programs that serve a prefix: it lets rounding pass, and nothing that loses or bends the prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

import prefixkit
from prefixkit.errors import ConfigError
from prefixkit.serving.verdict import Answer, answers_of, greedy, judge

PROMPT = (11, 12, 13, 14)
NEW = 6


@pytest.fixture(scope="module")
def ours():
    """Answers of a model with a strong prefix, and without it."""
    model = tiny.make("llama").eval()
    prefixkit.apply(model, num_virtual_tokens=5)
    with torch.no_grad():
        next(model.prefixkit.parameters()).mul_(3)
    return answers_of(model, PROMPT, NEW)


def off_by(answer, size):
    """The same answer with logits that are off."""
    noise = torch.linspace(-1, 1, len(answer.logits))
    return replace(answer, logits=answer.logits + size * noise)


def test_answers_are_those_of_forward_calls():
    model = tiny.make("llama").eval()
    prefixkit.apply(model, num_virtual_tokens=5)
    for answer, bare in zip(answers_of(model, PROMPT, NEW), (False, True), strict=True):
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            for number in range(NEW):
                with prefixkit.disabled(model) if bare else torch.no_grad():
                    logits = model(ids).logits[0, -1]
                if number == 0:
                    torch.testing.assert_close(answer.logits, logits)
                logits[tiny.SPECIAL["eos_token_id"]] = -torch.inf
                best = logits.topk(2)
                assert answer.tokens[number] == best.indices[0]
                assert answer.leads[number] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
                ids = torch.cat([ids, best.indices[None, :1]], dim=1)


def test_rounding_passes_and_is_shown(ours):
    verdict = judge("a program", ours, tuple(off_by(answer, 1e-4) for answer in ours))
    assert (verdict.tokens, verdict.equal) == (NEW, NEW)
    assert verdict.with_prefix == pytest.approx(1e-4, rel=0.01) == verdict.without_prefix
    assert str(verdict).startswith(
        "a program: 6 of 6 greedy tokens equal; largest difference of the first logits 0.0001"
    )


def test_what_the_weights_are_off_by_without_a_prefix_is_granted_with_it(ours):
    effect = float((ours[0].logits - ours[1].logits).abs().max())
    size = effect / 10
    judge("quantised", ours, tuple(off_by(answer, size) for answer in ours))
    with pytest.raises(prefixkit.VerificationError, match="not read as it should be"):
        judge("exact", ours, (off_by(ours[0], size), ours[1]))


def test_rounding_in_float16_passes_however_well_the_bare_base_is_hit(ours):
    effect = float((ours[0].logits - ours[1].logits).abs().max())
    judge("flash attention", ours, (off_by(ours[0], effect / 200), ours[1]))
    with pytest.raises(prefixkit.VerificationError, match="not read as it should be"):
        judge("bent", ours, (off_by(ours[0], effect / 50), ours[1]))


def test_an_end_that_is_not_allowed_gives_no_lead():
    """The text has to go on, so how far its end is ahead does not say how sure the next token is."""
    model = tiny.make("llama").eval()
    prefixkit.apply(model, num_virtual_tokens=5)
    expected = answers_of(model, PROMPT, NEW)[0]
    end = model.generation_config.eos_token_id
    with torch.no_grad():
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = 10 * hidden / hidden.norm()
    answer = answers_of(model, PROMPT, NEW)[0]
    assert answer.logits.argmax() == end
    assert (answer.tokens[0], answer.leads[0]) == (expected.tokens[0], pytest.approx(expected.leads[0], abs=1e-5))


def test_a_lost_prefix_is_an_error(ours):
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        judge("forgetful", ours, (ours[1], ours[1]))
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost"):
        judge("forgetful", ours, tuple(off_by(ours[1], size) for size in (2e-4, 1e-4)))


def test_another_base_is_no_news_of_the_prefix(ours):
    other = Answer(ours[1].logits.flip(0), ours[1].tokens)
    with pytest.raises(prefixkit.VerificationError, match="runs another base"):
        judge("another", ours, (ours[0], other))


def test_numbers_that_are_none_do_not_pass(ours):
    broken = replace(ours[0], logits=ours[0].logits * torch.nan)
    with pytest.raises(prefixkit.VerificationError):
        judge("broken", ours, (broken, ours[1]))
    with pytest.raises(prefixkit.VerificationError):
        judge("broken", ours, (ours[0], broken))


def test_a_prefix_that_does_nothing_is_not_verified(ours):
    with pytest.raises(prefixkit.VerificationError, match="another prompt"):
        judge("a program", (ours[0], off_by(ours[0], 5e-4)), (ours[0], off_by(ours[0], 5e-4)))


def test_a_text_that_parts_is_an_error_unless_two_tokens_are_as_good(ours):
    tokens = (*ours[0].tokens[:3], ours[0].tokens[3] + 1, *ours[0].tokens[4:])
    theirs = replace(ours[0], tokens=tokens), ours[1]
    with pytest.raises(prefixkit.VerificationError, match="new token 3 is another one"):
        judge("a program", ours, theirs)
    close = replace(ours[0], leads=(*ours[0].leads[:3], 1e-3, *ours[0].leads[4:])), ours[1]
    assert judge("a program", close, theirs).equal == 3
    with pytest.raises(prefixkit.VerificationError, match="new token 2 is another one"):
        judge("a short one", ours, (replace(ours[0], tokens=ours[0].tokens[:2]), ours[1]))


@pytest.mark.parametrize(("prompt", "new_tokens"), [([], 4), ([5, 6], 0)])
def test_nothing_read_or_nothing_said(prompt, new_tokens):
    with pytest.raises(ConfigError, match=f"^a prompt of {len(prompt)} tokens and {new_tokens} new ones; both have to"):
        greedy(lambda _: torch.zeros(5), prompt, new_tokens)
