"""The oracle: a prefix that was read off a prompt, and the bare model on prompt and text together.

The keys and values of the prompt are taken from real attention calls of the bare model, by module
path. The prompt sees itself only, as a prefix does; where attention is not causal, a 4-D mask sees
to that. Nothing here uses an engine or the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import prefixkit
from prefixkit.adapter import PositionTable, Site, join_path
from prefixkit.testing.arithmetic import AlonePrompt, InFront, watched
from prefixkit.testing.recording import recorded_calls, uncompiled
from prefixkit.testing.scores import ChangedScores, bias_of
from prefixkit.testing.subject import TOKENS, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Policies:
    """Which stacks have a prefix, and how positions and windows treat it."""

    encoder: bool
    shift: bool
    pinned: bool


class PromptOracle:
    """The bare model, a prompt, and what a prefix read off that prompt must give.

    Args:
        subject: The model under test.
        policies: As the prefix will have them.
    """

    def __init__(self, subject: Subject, policies: Policies) -> None:
        self.subject = subject
        self.policies = policies
        self.model: PreTrainedModel = subject.bare(attention="eager")
        self.source: torch.Tensor = subject.tokens(1, TOKENS, seed=11)
        self.target: torch.Tensor = subject.tokens(1, TOKENS, seed=12)

    def flat(self, sites: Sequence[Site]) -> torch.Tensor:
        """The flat prefix ``(P, width)`` that holds the prompt's keys and values, written out plainly."""
        inputs: dict[str, Any] = {"input_ids": self.source}
        if self.subject.traits.on_interface:
            inputs["use_cache"] = False
        if self.subject.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.target
        elif self.subject.traits.encodes:
            inputs.pop("use_cache", None)
        with recorded_calls(self.model) as calls:
            self.subject.logits(self.model, **inputs)
        held = {call.path: call for call in calls}
        order = ("encoder", "decoder", "cross")
        columns: list[torch.Tensor] = []
        for site in sorted(sites, key=lambda site: (order.index(site.stack), site.layer)):
            assert site.path in held, f"{site.path!r} calls no attention: see test_sites_are_the_attention_calls first"
            for part in (held[site.path].key[0], held[site.path].value[0]):
                columns.extend(part[head] for head in range(len(part)))
        return torch.cat(columns, dim=1)

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The bare model's outputs for the text, with the prompt in front of it."""
        if self.subject.is_encoder_decoder:
            return self._encoder_decoder(inputs)
        return self._one_stack(inputs["input_ids"])

    def _one_stack(self, text: torch.Tensor) -> torch.Tensor:
        subject, length = self.subject, text.shape[1]
        ids = torch.cat([self.source.expand(len(text), -1), text], dim=1)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not subject.traits.decodes:
            arguments["attention_mask"] = self._mask(len(text), causal=False, queries=length, keys=length)
        elif not subject.traits.on_interface:
            return self._off_the_interface(arguments, length)[:, TOKENS:]
        elif subject.traits.windowed and self.policies.pinned:
            arguments["attention_mask"] = self._windowed_masks(arguments)
        if self.policies.shift:
            return subject.logits(self.model, **arguments)[:, TOKENS:]
        if not subject.traits.position_ids:
            stack = "decoder" if subject.traits.decodes else "encoder"
            return self._with_moved_table(stack, self.model, arguments, length)[:, TOKENS:]
        arguments["position_ids"] = self._unmoved_places(ids, length)
        return subject.logits(self.model, **arguments)[:, TOKENS:]

    def _unmoved_places(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Position ids that start anew behind the prompt."""
        places = torch.cat([torch.arange(TOKENS), torch.arange(length)]) + self.subject.traits.first_position
        return places.repeat(len(ids), 1).to(ids.device)

    def _off_the_interface(self, arguments: dict[str, Any], length: int) -> torch.Tensor:
        """Outputs of one causal stack that takes no mask of ours: its scores are changed inside of it."""
        if self.policies.shift:
            with ChangedScores(TOKENS + length, pinned=self.policies.pinned):
                return self.subject.logits(self.model, **arguments)
        if self.subject.traits.position_ids:
            arguments["position_ids"] = self._unmoved_places(arguments["input_ids"], length)
        with ChangedScores(TOKENS + length, bias=bias_of(self.model, arguments), pinned=self.policies.pinned):
            if self._position_table("decoder"):
                return self._with_moved_table("decoder", self.model, arguments, length)
            return self.subject.logits(self.model, **arguments)

    def _encoder_decoder(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """As :meth:`_one_stack`; the encoder's prompt is read by encoder and cross-attention."""
        text, target = inputs["input_ids"], inputs["decoder_input_ids"]
        rows, length, targets = len(text), text.shape[1], target.shape[1]
        states = self._encoder_states(text)
        ids = torch.cat([self.target.expand(rows, -1), target], dim=1)
        arguments: dict[str, Any] = {
            "encoder_outputs": (states,),
            "decoder_input_ids": ids,
            "attention_mask": self._mask(rows, causal=False, queries=targets, keys=length),
        }
        return self._placed("decoder", arguments, "decoder_attention_mask", rows, targets)[:, TOKENS:]

    def _encoder_states(self, text: torch.Tensor) -> torch.Tensor:
        rows, length = text.shape
        encoder = self.model.get_encoder()
        prompt = self.source.expand(rows, -1)
        if not self.policies.encoder:
            with torch.no_grad():
                parts = [encoder(input_ids=ids)[0] for ids in (prompt, text)]
            return torch.cat(parts, dim=1)
        arguments = {"input_ids": torch.cat([prompt, text], dim=1)}
        return self._placed("encoder", arguments, "attention_mask", rows, length)

    def _placed(self, stack: str, arguments: dict[str, Any], mask: str, rows: int, length: int) -> torch.Tensor:
        """Outputs of a stack of an encoder-decoder on prompt and text, under the position policy.

        Without ``shift`` a bias of the prompt's columns is taken away again, as the bare model itself
        computed it, and a position table is moved.
        """
        causal = stack == "decoder"
        call: Any = self.model if causal else self.model.get_encoder()
        mine = self._mask(rows, causal=causal, queries=length, keys=length)
        with recorded_calls(self.model) as calls:
            plain = self._run(call, {**arguments, mask: mine})
        if self.policies.shift:
            return plain
        bias = calls[0].options.get("position_bias")  # the stack's first call is to its self-attention
        if bias is not None:
            mine = mine.expand(-1, bias.shape[1], -1, -1).clone()
            mine[:, :, TOKENS:, :TOKENS] -= bias[:, :, TOKENS:, :TOKENS]
            return self._run(call, {**arguments, mask: mine})
        return self._with_moved_table(stack, call, {**arguments, mask: mine}, length)

    def _with_moved_table(self, stack: str, call: Any, arguments: dict[str, Any], length: int) -> torch.Tensor:
        """What ``call`` gives when the text's places in the position table hold the table's first rows."""
        found = self._position_table(stack)
        assert found, f"the {stack} of this model has neither position_ids, nor a bias, nor a stated table"
        table, first = found
        kept = table.weight.detach().clone()
        with torch.no_grad():
            table.weight[first + TOKENS : first + TOKENS + length] = kept[first : first + length]
        try:
            return self._run(call, arguments)
        finally:
            with torch.no_grad():
                table.weight.copy_(kept)

    @staticmethod
    def _run(call: Any, arguments: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = call(**arguments)[0]
        return output

    def _position_table(self, stack: str) -> tuple[Any, int] | None:
        """A learned position table and its first row, for which there is no oracle but the adapter's word."""
        for stated in self.subject.adapter.stacks(self.model):
            if stated.name == stack and isinstance(stated.positions, PositionTable):
                path = join_path(stated.path, stated.positions.path)
                return self.model.get_submodule(path), stated.positions.offset
        return None

    def _mask(self, rows: int, *, causal: bool, queries: int, keys: int) -> torch.Tensor:
        """``(rows, 1, P + queries, P + keys)``, additive: the prompt sees itself, the text sees both."""
        mask = torch.zeros(TOKENS + queries, TOKENS + keys, device=self.subject.device)
        hidden = torch.finfo(mask.dtype).min
        mask[:TOKENS, TOKENS:] = hidden
        if causal:
            mask += torch.full_like(mask, hidden).triu(1)
            mask.clamp_(min=hidden)
        return mask.expand(rows, 1, -1, -1)

    def _windowed_masks(self, arguments: dict[str, Any]) -> Any:
        """The model's own masks, with the prompt pinned in sight of the text."""
        with recorded_calls(self.model) as calls:
            self.subject.logits(self.model, **arguments)
        masks = {}
        for call in calls:
            assert call.mask is not None
            mask = call.mask.clone()
            mask[:, :, TOKENS:, :TOKENS] = 0
            masks["sliding_attention" if call.options.get("sliding_window") else "full_attention"] = mask
        kinds = getattr(self.model.config, "layer_types", None)
        return masks if kinds is not None and len(set(kinds)) > 1 else masks["sliding_attention"]


class PlainOracle(PromptOracle):
    """The same for an encoder that calls no attention function: its softmax is told what to look at.

    With ``shift`` the prompt is read with the text. Without, or where no position can be moved, the text
    stands alone, and its attention gets the prompt's keys and values in front, with no bias.
    """

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The bare model's outputs for the text, with the prompt in front of it."""
        if not self.policies.shift:
            with watched(InFront(self.model, self._pieces())):
                return self.subject.logits(self.model, **inputs)
        ids = torch.cat([self.source.expand(len(inputs["input_ids"]), -1), inputs["input_ids"]], dim=1)
        with watched(AlonePrompt(self.model, TOKENS)):
            return self.subject.logits(self.model, input_ids=ids, attention_mask=torch.ones_like(ids))[:, TOKENS:]

    def _pieces(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        with recorded_calls(self.model) as calls:
            self.subject.logits(self.model, input_ids=self.source)
        return {call.path: (call.key[0], call.value[0]) for call in calls}


def text_as_prompt(subject: Subject, *, engine: str, attention: str, shift: bool, pinned: bool) -> None:
    """Check one engine against the oracle."""
    model = subject.bare(attention=attention)
    options: dict[str, Any] = {"positions": "shift" if shift else "none", "window": "pinned" if pinned else "slide"}
    subject.apply(model, engine=engine, strong=False, **options)
    # The config has "none" where no position can be moved.
    shift = prefixkit.config(model).positions == "shift"
    policies = Policies(encoder=engine == "attention", shift=shift, pinned=pinned)
    no_cache = not subject.traits.on_interface and not subject.traits.decodes
    kind = PlainOracle if no_cache else PromptOracle
    oracle = kind(subject, policies)
    sites = prefixkit.sites(model)
    flat = oracle.flat(sites)
    prefixkit.remove(model)
    subject.apply(model, engine=engine, init=flat, **options)
    inputs = subject.inputs(batch=3)
    with uncompiled():
        found = subject.logits(model, **inputs)
    hint = f"with {options}: where one positions= is right and the other not, look at the stack's positions"
    torch.testing.assert_close(
        found, oracle.logits(inputs), atol=1e-4, rtol=1e-4, msg=lambda difference: f"{difference}\n{hint}"
    )
