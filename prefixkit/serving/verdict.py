"""Whether a program that serves a prefix says what the model with the prefix says.

The main risk everywhere is that a prefix is lost without a word: the program goes on, and answers as the bare base.
So both are asked twice, with and without the prefix. Without it, the difference is that of the program itself: of its
kernels, or of the quantised weights that it runs. With it, the difference may not be much larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prefixkit.errors import ConfigError, UnsupportedModelError, VerificationError
from prefixkit.lifecycle import disabled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

SLACK = 4.0
"""How many times the difference without the prefix the one with it may be: another text rounds elsewhere."""
LEAST = 1e-3
"""A difference in logits that is rounding in float32, whatever the program."""
SMALL = 0.01
"""A difference that is rounding in float16, as a part of what the prefix moves: one that is read wrongly moves as much.

The difference without the prefix says how a program rounds, but of one token only, and that may be a lucky one.
"""


@dataclass(frozen=True)
class Answer:
    """What is said to a prompt.

    Attributes:
        logits: Of the first new token, ``(vocabulary,)``, in float32 on the CPU.
        tokens: The new tokens, each the likeliest.
        leads: By how much each one's logit is above that of the next that could have been said; only the model's own
            are asked for.
    """

    logits: torch.Tensor
    tokens: tuple[int, ...]
    leads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How far a program is from the model, with the prefix and without it.

    Attributes:
        target: The program.
        with_prefix: Largest difference of a logit of the first new token.
        without_prefix: The same of the two bare bases.
        effect: How far the prefix moves the model's own logits.
        tokens: How many new tokens were asked for.
        equal: How many of them are the same with the prefix, before the first that is not.
    """

    target: str
    with_prefix: float
    without_prefix: float
    effect: float
    tokens: int
    equal: int

    @property
    def allowed(self) -> float:
        """The largest difference with the prefix that is the program's own."""
        return max(LEAST, SLACK * self.without_prefix, SMALL * self.effect)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.target}: {self.equal} of {self.tokens} greedy tokens equal; largest difference of the first "
            f"logits {self.with_prefix:.2g} with the prefix, {self.without_prefix:.2g} without (the prefix moves them "
            f"by {self.effect:.2g})"
        )


def answer_of(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> Answer:
    """What ``model`` says, with its prefix unless that is disabled."""
    ids = torch.tensor([list(prompt)], device=model.device)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    shown = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **shown)  # type: ignore[operator]
    # The scores are the logits of what may be said: no token that ends the text.
    best, second = torch.cat(found.scores).float().cpu().topk(2).values.unbind(-1)
    return Answer(
        found.logits[0][0].float().cpu(),
        tuple(found.sequences[0, len(prompt) :].tolist()),
        tuple((best - second).tolist()),
    )


def greedy(
    step: Callable[[list[int]], torch.Tensor], prompt: Sequence[int], new_tokens: int, never: Sequence[int] = ()
) -> Answer:
    """What a program says to ``prompt``.

    Args:
        step: Given the tokens that the program has not read yet, the logits ``(vocabulary,)`` of the next one.
        prompt: Token ids.
        new_tokens: How many are asked for, 1 or more.
        never: Tokens that are not chosen, such as the one that ends a text.

    Raises:
        ConfigError: If the prompt is empty, or no tokens are asked for.
    """
    if not prompt or new_tokens < 1:
        raise ConfigError(f"a prompt of {len(prompt)} tokens and {new_tokens} new ones; both have to be 1 or more")
    unread, tokens, logits = list(prompt), [], []
    for _ in range(new_tokens):
        logits.append(step(unread).float())
        allowed = logits[-1].clone()
        allowed[list(never)] = -torch.inf
        unread = [int(allowed.argmax())]
        tokens += unread
    return Answer(logits[0], tuple(tokens))


def ends_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, which ``generate`` does not choose while a length is asked for."""
    settings = model.generation_config
    ends = None if settings is None else settings.eos_token_id
    return tuple([ends] if isinstance(ends, int) else ends or ())


def answers_of(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> tuple[Answer, Answer]:
    """What ``model`` says with its prefix, and without.

    Raises:
        ConfigError: If the prompt is empty.
        UnsupportedModelError: If the model is no decoder-only one that writes text.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; pass one that shows what the prefix does")
    if not model.can_generate() or model.config.is_encoder_decoder:
        what = "writes no text" if not model.can_generate() else "attends to an encoder"
        raise UnsupportedModelError(f"{type(model).__name__} {what}; what serves a decoder-only model is compared here")
    with_prefix = answer_of(model, prompt, new_tokens)
    with disabled(model):
        return with_prefix, answer_of(model, prompt, new_tokens)


def judge(target: str, ours: tuple[Answer, Answer], theirs: tuple[Answer, Answer]) -> Verdict:
    """How far ``theirs`` are from ``ours``, each with the prefix and without.

    Raises:
        VerificationError: If the program runs another base, has lost the prefix, or has it wrong; or if the prompt
            does not show the difference that the prefix makes.
    """
    verdict = Verdict(
        target=target,
        with_prefix=_apart(ours[0], theirs[0]),
        without_prefix=_apart(ours[1], theirs[1]),
        effect=_apart(*ours),
        tokens=len(ours[0].tokens),
        equal=_common(ours[0].tokens, theirs[0].tokens),
    )
    wrong = _what_is_wrong(verdict, _apart(ours[1], theirs[0])) or _where_they_part(verdict, ours[0])
    if wrong:
        raise VerificationError(f"{wrong} ({verdict})")
    return verdict


def _what_is_wrong(verdict: Verdict, from_bare: float) -> str:
    """What, or an empty text; ``from_bare`` is how far the program's answer with the prefix is from the bare base's."""
    if not verdict.without_prefix < verdict.effect:
        return (
            "without any prefix the answer differs by more than the prefix changes, so this says nothing of the "
            "prefix: the program runs another base, or weights that are quantised too coarsely for this prefix"
        )
    if verdict.allowed >= verdict.effect:
        return "the prefix changes too little here to be told from rounding; pass another prompt"
    if from_bare <= verdict.allowed:
        return "the prefix is lost: the answer is that of the bare base"
    if not verdict.with_prefix <= verdict.allowed:
        return "the prefix is there and is not read as it should be"
    return ""


def _where_they_part(verdict: Verdict, ours: Answer) -> str:
    """Where the texts part although no two tokens are as good as equal there, or an empty text."""
    if verdict.equal == verdict.tokens or ours.leads[verdict.equal] <= 2 * verdict.allowed:
        return ""
    return (
        f"new token {verdict.equal} is another one, though the model has it {ours.leads[verdict.equal]:.2g} ahead: the "
        "prefix or the text stands at other positions once text is generated"
    )


def _apart(one: Answer, other: Answer) -> float:
    return float((one.logits - other.logits).abs().max())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    same = [first == second for first, second in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)
