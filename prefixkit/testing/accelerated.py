"""What only an accelerator has: fused kernels, compiled decoding, flex attention that trains."""

from __future__ import annotations

from typing import Any

import torch

from prefixkit.testing.subject import Subject, numbers_of
from prefixkit.testing.traits import needs
from prefixkit.transformers_internals import cache_in, given_cache


class Accelerated:
    """Kernels and compilers of the device, each against plain attention on it."""

    @needs("accelerated")
    def test_bfloat16_kernels_agree(self, subject: Subject, attention: str) -> None:
        """In bfloat16 every attention implementation is near float32."""
        inputs = subject.inputs(batch=4, length=33, targets=17)
        expected = subject.logits(subject.with_prefix(attention="eager"), **inputs)
        model: Any = subject.bare(attention=attention)
        model.to(torch.bfloat16)
        found = subject.logits(subject.apply(model), **inputs).float()
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert cosine.median() > 0.97, f"cosine {cosine.median():.3f}"

    @needs("accelerated")
    def test_gradients_of_the_kernels_agree(self, subject: Subject, attention: str) -> None:
        """Every attention implementation trains the prefix with the same gradient."""
        found = []
        for name in ("eager", attention):
            model = subject.with_prefix(attention=name)
            subject.loss(model, **subject.inputs(batch=3, length=17, targets=9)).backward()
            found.append(subject.gradients(model)[0])
        torch.testing.assert_close(found[1], found[0], atol=1e-4 * float(found[0].abs().max()), rtol=1e-3)

    @needs("accelerated", "generates")
    def test_decoding_compiled_for_the_device(self, subject: Subject) -> None:
        """Decoding as generate compiles it for the device gives the same tokens."""
        torch.compiler.reset()
        rows = subject.ragged(2, 6, 4)
        ids, mask = subject.padded(rows)
        model = subject.with_prefix()
        expected = subject.generate(model, ids, mask)
        found = subject.generate(model, ids, mask, cache_implementation="static")
        assert torch.equal(found, expected)

    @needs("accelerated", "prompt_decodes", "has_sdpa")
    def test_decoding_with_the_flash_kernel(self, subject: Subject) -> None:
        """A decoding step in torch's flash kernel gives what plain attention gives."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model: Any = subject.with_prefix(attention="sdpa")
        model.to(torch.bfloat16)
        ids = subject.tokens(2, 9)
        steps = []
        for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            with torch.no_grad():
                cache = cache_in(model(input_ids=ids[:, :-1], use_cache=True))
                with sdpa_kernel(kernel):
                    steps.append(numbers_of(model(input_ids=ids[:, -1:], **given_cache(model, cache))).float())
        cosine = torch.nn.functional.cosine_similarity(steps[0], steps[1], dim=-1)
        assert cosine.min() > 0.99, f"cosine {cosine.min():.3f}"
