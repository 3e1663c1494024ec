"""Where the prefix goes, and that it alone trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import prefixkit
from prefixkit.layout import Layout
from prefixkit.testing.attention_call import AttentionCall
from prefixkit.testing.recording import recorded_calls, window_inside
from prefixkit.testing.subject import TOKENS, Subject
from prefixkit.testing.traits import LONGER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = 4


class Sites:
    """The adapter's sites against the attention calls of a forward pass."""

    def test_sites_are_the_attention_calls(self, subject: Subject) -> None:
        """Sites are exactly the attention calls of a forward pass."""
        model = subject.bare()
        inputs = subject.inputs(length=7, targets=TARGETS)
        with recorded_calls(model) as calls:
            subject.logits(model, **inputs)
        found = _described(subject, model, calls)
        stacks = list(subject.adapter.stacks(model))
        for stack in stacks:
            for site in stack.sites:
                assert (site.stack == "encoder") == (stack.name == "encoder"), f"{site.path} in the wrong stack"
                assert not stack.path or site.path.startswith(stack.path + "."), f"{site.path} is not in {stack.path}"
        stated = {
            (site.path, site.stack, site.layer, site.kv_heads, site.key_dim, site.value_dim, site.window)
            for stack in stacks
            for site in stack.sites
            # Off the interface the calls of an encoder-decoder are seen in its cache, which its encoder has none of.
            if subject.traits.on_interface or not subject.is_encoder_decoder or stack.name == "decoder"
        }
        assert stated == found

    def test_every_slot_gets_its_own_gradient(self, subject: Subject, engine: str) -> None:
        """Every key and value of every virtual token in sight gets a gradient of its own."""
        model = subject.with_prefix(engine=engine)
        subject.loss(model, **subject.inputs()).backward()
        gradient = subject.flat_of(model).grad
        assert gradient is not None
        slides = prefixkit.config(model).window == "slide"
        rows = []
        for site, piece in zip(prefixkit.sites(model), Layout(prefixkit.sites(model)).split(gradient), strict=True):
            # Sliding, the first text token at position P sees positions from P − window + 1.
            hidden = max(0, TOKENS - site.window + 1) if slides and site.window else 0
            for part in piece:
                assert not part[:, :hidden].any(), "a gradient out of sight"
                rows += [part[:, token].reshape(-1) for token in range(hidden, TOKENS)]
        assert all(row.abs().max() > 0 for row in rows), "a slot without a gradient"
        for index, one in enumerate(rows):
            for other in rows[index + 1 :]:
                assert one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=0), "a shared slot"

    def test_nothing_else_trains(self, subject: Subject, method: str) -> None:
        """A training step changes the prefix and no weight of the base."""
        model = subject.bare()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        subject.apply(model, method=method, head=False)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert trained
        assert all(name.startswith("prefixkit.") for name in trained)
        started = {name: value.detach().clone() for name, value in trained.items()}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        subject.loss(model, **subject.inputs()).backward()
        optimizer.step()
        assert all(not torch.equal(started[name], value) for name, value in trained.items())
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_a_short_prefix_is_a_small_part(self, subject: Subject) -> None:
        """The prefix has num_virtual_tokens × the widths of the sites, and no number more."""
        model = subject.with_prefix(head=False)
        sites = prefixkit.sites(model)
        width = sum(site.kv_heads * (site.key_dim + site.value_dim) for site in sites)
        assert sum(value.numel() for value in model.parameters() if value.requires_grad) == TOKENS * width


Described = set[tuple[str, str, int, int, int, int, int | None]]


def _described(subject: Subject, model: PreTrainedModel, calls: list[AttentionCall]) -> Described:
    """Recorded calls as path, stack, layer, kv_heads, key_dim, value_dim and window."""
    encoder = model.get_encoder() if subject.is_encoder_decoder else None
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    counts: dict[str, int] = {}
    described: Described = set()
    for call in calls:
        if encoder is None:
            stack = "decoder" if subject.traits.decodes else "encoder"
        elif id(model.get_submodule(call.path)) in inside:
            stack = "encoder"
        else:
            stack = "decoder" if call.key.shape[2] == TARGETS else "cross"
        layer = counts.get(stack, 0) if call.layer is None else call.layer
        counts[stack] = layer + 1
        window = call.options.get("sliding_window")
        if not subject.traits.on_interface:
            window = window_inside(model, call.path, subject.tokens(1, LONGER))
        heads = (call.key.shape[1], call.key.shape[3], call.value.shape[3])
        described.add((call.path, stack, layer, *heads, window))
    return described
