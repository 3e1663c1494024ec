"""The right subjects as they are. They pass every test that something wrong has to fail."""

from __future__ import annotations

from wrong import right


class TestGPT2(right.GPT2):
    pass


class TestLlama(right.Llama):
    pass


class TestQwen3(right.Qwen3):
    pass


class TestMistral(right.Mistral):
    pass


class TestGemma2(right.Gemma2):
    pass


class TestT5(right.T5):
    pass


class TestBart(right.Bart):
    pass


class TestBartDecoder(right.BartDecoder):
    pass


class TestBert(right.Bert):
    pass


class TestGptJ(right.GptJ):
    pass


class TestGptNeo(right.GptNeo):
    pass


class TestBloom(right.Bloom):
    pass


class TestMpt(right.Mpt):
    pass
