"""What trains, and with which gradients."""

from __future__ import annotations

import pytest
import tiny
import torch

import prefixkit

TOKENS = 4


def loss(model, **arguments):
    weights = torch.randn(tiny.VOCAB, generator=torch.Generator().manual_seed(7))
    return (model(**arguments).logits * weights).square().mean()


@pytest.mark.parametrize("engine", ["attention", "cache"])
@pytest.mark.parametrize("name", tiny.EVERY)
def test_every_slot_of_every_site_gets_its_own_gradient(name, engine):
    model = tiny.make(name)
    stacks = ("decoder", "cross") if engine == "cache" and model.config.is_encoder_decoder else None
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine, stacks=stacks)
    weight = model.prefixkit.default.embedding.weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    loss(model, **tiny.inputs(model)).backward()
    slots = [part for piece in prefixkit.Layout(prefixkit.sites(model)).split(weight.grad) for part in piece]
    rows = [row for slot in slots for row in slot.transpose(0, 1).reshape(TOKENS, -1)]
    assert all(row.abs().max() > 0 for row in rows)
    for index, one in enumerate(rows):
        for other in rows[index + 1 :]:
            assert one.shape != other.shape or not torch.allclose(one, other)


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_nothing_else_trains(name, method):
    model = tiny.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prefixkit.apply(model, method=method, num_virtual_tokens=TOKENS)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trainable
    assert all(name.startswith("prefixkit.default.") for name in trainable)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    prefix = [value.clone() for value in model.prefixkit.parameters()]
    loss(model, **tiny.inputs(model)).backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(prefix, model.prefixkit.parameters(), strict=True))
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_checkpointing_gives_equal_gradients(name, method):
    """Also with two forwards, one of them padded, before one backward."""
    model = tiny.make(name)
    prefixkit.apply(model, method=method, num_virtual_tokens=TOKENS)
    model.train()
    first, second = tiny.inputs(model), tiny.inputs(model)
    second["attention_mask"] = second["attention_mask"].clone()
    second["attention_mask"][0, :3] = 0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.enable_checkpointing(model)
        model.zero_grad()
        (loss(model, **first, use_cache=False) + 2 * loss(model, **second, use_cache=False)).backward()
        gradients.append([value.grad.clone() for value in model.prefixkit.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_dropout_of_the_prefix_survives_checkpointing():
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, prefix_dropout=0.5)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.enable_checkpointing(model)
        model.zero_grad()
        torch.manual_seed(0)
        loss(model, **tiny.inputs(model), use_cache=False).backward()
        gradients.append(model.prefixkit.default.embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert 0.3 < (gradients[0] == 0).float().mean() < 0.7
    model.eval()
    assert torch.equal(tiny.logits(model, **tiny.inputs(model)), tiny.logits(model, **tiny.inputs(model)))


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_checkpointing_that_cannot_work_is_refused(engine):
    model = tiny.make("gpt2")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine)
    model.train()
    tiny.enable_checkpointing(model, reentrant=True)
    expected = "reentrant gradient checkpointing gives" if engine == "attention" else "cannot train under gradient"
    with pytest.raises(prefixkit.EngineError, match=expected):
        model(**tiny.inputs(model))
    model.eval()
    model(**tiny.inputs(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_half_precision_base_with_float32_prefix(name, dtype):
    model = tiny.make(name).to(dtype)
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS)
    assert {value.dtype for value in model.prefixkit.parameters()} == {torch.float32}
    loss(model, **tiny.inputs(model)).float().backward()
    assert all(value.grad.abs().max() > 0 for value in model.prefixkit.parameters())


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_autocast(engine):
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine)
    expected = tiny.logits(model, **tiny.inputs(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**tiny.inputs(model)).logits
    torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0.2)
    found.float().sum().backward()
    assert model.prefixkit.default.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_rows_equal_rows_apart(name):
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with torch.no_grad():
        model.prefixkit.default.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    rows = [tiny.tokens(length, seed=length) for length in (4, 7)]
    expected = torch.cat([tiny.logits(model, input_ids=row[None]) for row in rows], dim=1)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    found = tiny.logits(model, input_ids=packed, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    prefixkit.remove(model)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine="cache")
    with pytest.raises(prefixkit.EngineError, match="packed rows"):
        model(input_ids=packed, position_ids=positions, use_cache=False)


# Dynamo itself reads .grad of every tensor that is handed down between modules.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_compiles_in_one_graph(name):
    model = tiny.make(name)
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS)
    inputs = tiny.inputs(model)
    expected = tiny.logits(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits.detach(), expected, atol=1e-5, rtol=0)
