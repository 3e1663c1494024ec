"""A prefix that gets no gradient is an error at the first step and after each evaluation, and nothing else is."""

from __future__ import annotations

import copy
import pickle
import weakref
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaForSequenceClassification
from versions import since

import prefixkit
from prefixkit import attention_engine, gradient_check, prefix_state, tensor_parallel
from prefixkit.errors import EngineError
from prefixkit.prefixes import require
from prefixkit.testing.subject import enable_checkpointing

LOST = "no gradient arrived at"
CUT = "nothing that the model gave out depends on"


class Swallowing(torch.autograd.Function):
    """As a kernel without a backward pass, that says so only when it is asked: bitsandbytes nf4 once repacked."""

    @staticmethod
    def forward(ctx, states, weight):
        return states @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Swallow(nn.Module):
    """Stands in for a linear layer."""

    def __init__(self, linear, only_after_eval=False):
        super().__init__()
        self.weight = linear.weight
        self.repacked = not only_after_eval

    def forward(self, states):
        self.repacked = self.repacked or not self.training
        return Swallowing.apply(states, self.weight) if self.repacked else states @ self.weight.T


class Detach(Swallow):
    """As a kernel whose output has no graph: torchao with dynamic activations."""

    def forward(self, states):
        return (states @ self.weight.T).detach()


def swallow(model, kind=Swallow, projections=("o_proj",), layers=None, **options):
    for layer in model.model.layers[slice(layers)]:
        for name in projections:
            setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name), **options))
    return model


def with_prefix(model=None, **options):
    model = model or tiny.make("llama")
    settings = {"num_virtual_tokens": 4, "init": "random", **options}
    return prefixkit.apply(model, **settings).train()


def step(model, **options):
    inputs = tiny.inputs(model, **options)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def due(model):
    return require(model).check.due


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning", "prompt-tuning"])
def test_a_layer_that_gives_no_gradient_back_is_found_in_the_first_step(method):
    model = with_prefix(swallow(tiny.make("llama")), method=method)
    with pytest.raises(EngineError, match=LOST) as caught:
        step(model)
    layers = (f"the prefix of 'model.layers.{layer}.self_attn'" for layer in range(3))
    assert f"{', '.join(layers)}, 'prefixkit.default." in str(caught.value)


def test_one_layer_of_three_is_found_though_all_share_one_parameter():
    model = with_prefix(swallow(tiny.make("llama"), layers=1))
    with pytest.raises(EngineError, match=f"^{LOST} the prefix of 'model.layers.0.self_attn' in this backward pass"):
        step(model)


def test_a_cut_graph_is_found():
    model = with_prefix(swallow(tiny.make("llama"), Detach, layers=2))
    with pytest.raises(
        EngineError, match=f"^{CUT} the prefix of 'model.layers.0.self_attn', the prefix of 'model.layers.1"
    ):
        step(model)


def test_a_stack_that_gives_out_no_graph_raises_at_once():
    """A head that trains hides it from torch, which says so only where nothing has a graph."""
    torch.manual_seed(0)
    model = with_prefix(swallow(LlamaForSequenceClassification(tiny.make("llama").config), Detach))
    with pytest.raises(EngineError, match=CUT):
        model(tiny.tokens(2, 7))
    with torch.no_grad():
        model(tiny.tokens(2, 7))
    model.eval()(tiny.tokens(2, 7))


def test_a_base_that_loses_its_backward_pass_in_an_evaluation_is_found_after_it():
    model = with_prefix(swallow(tiny.make("llama"), only_after_eval=True))
    step(model)
    step(model)
    assert not due(model)
    model.eval()
    with torch.no_grad():
        model(tiny.tokens(1, 3))
    model.train()
    with pytest.raises(EngineError, match=LOST):
        step(model)


@pytest.mark.parametrize("how", ["disabled", "generate", "no_grad", "eval mode with gradients"])
def test_whatever_an_evaluation_is(how):
    model = with_prefix()
    step(model)
    assert not due(model)
    if how == "disabled":
        with torch.no_grad(), prefixkit.disabled(model):
            model(tiny.tokens(1, 3))
    elif how == "generate":
        model.generate(tiny.tokens(1, 3), max_new_tokens=2)
    elif how == "no_grad":
        with torch.no_grad():
            model(tiny.tokens(1, 3))
    else:
        model.eval()(tiny.tokens(1, 3))
    assert due(model)
    step(model.train())
    assert not due(model)


def test_a_head_that_gives_no_gradient_back_is_found():
    model = tiny.make("llama")
    model.lm_head = Swallow(model.lm_head)
    with pytest.raises(EngineError, match=LOST):
        step(with_prefix(model))


def test_the_cache_engine_is_looked_at_too():
    with pytest.raises(EngineError, match=f"{LOST} 'prefixkit.default.embedding.weight'"):
        step(with_prefix(swallow(tiny.make("llama")), engine="cache"))


RIGHT = [
    {},
    {"method": "prefix-tuning"},
    {"method": "prompt-tuning"},
    {"method": "prefix-memory", "num_virtual_tokens": 1, "init": "auto", "positions": "none"},
    {"gate": True, "positions": "none"},
    {"layers": [1]},
    {"layer_tokens": {0: 2}},
    {"num_frozen_tokens": 2},
    {"prefix_dropout": 0.5},
    {"window": "slide"},
    {"engine": "cache"},
    {"infix": True},
]


@pytest.mark.parametrize(
    "options", RIGHT, ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items())
)
def test_what_trains_is_no_error(options):
    model = with_prefix(**options)
    step(model)
    assert not due(model)
    step(model)


@pytest.mark.parametrize(
    "name",
    [
        "t5",
        "bart",
        "mistral",
        "gemma3",
        pytest.param("bert", marks=since("5.0", "BERT is off the attention interface")),
    ],
)
def test_nor_is_any_architecture(name):
    model = with_prefix(tiny.make(name))
    model(**tiny.inputs(model)).logits.sum().backward()
    assert not due(model)


def test_nor_a_forward_pass_without_a_backward_pass():
    model = with_prefix()
    losses = [model(**tiny.inputs(model)).logits.sum() for _ in range(3)]
    assert due(model)
    losses[-1].backward()
    assert not due(model)
    losses[0].backward()


def test_nor_accumulated_gradients_and_gradients_set_to_none():
    model = with_prefix()
    for _ in range(2):
        step(model)
        step(model)
        model.zero_grad(set_to_none=True)


def test_nor_gradients_of_something_else():
    model = with_prefix()
    embedded = model.get_input_embeddings()(tiny.tokens(2, 7)).detach().requires_grad_()
    loss = model(inputs_embeds=embedded).logits.sum()
    torch.autograd.grad(loss, embedded, retain_graph=True)
    loss.backward(inputs=[embedded], retain_graph=True)
    assert due(model)
    loss.backward()
    assert not due(model)


def test_nor_an_output_from_the_middle():
    """As of a model that looks at its last layer but one; the last one has no gradient then."""
    model = with_prefix()
    model(**tiny.inputs(model), output_hidden_states=True).hidden_states[-2].sum().backward()
    assert not due(model)


def test_nor_checkpointing():
    model = with_prefix()
    enable_checkpointing(model)
    step(model)
    assert not due(model)


def test_checkpointing_hides_nothing():
    model = with_prefix(swallow(tiny.make("llama"), layers=1))
    enable_checkpointing(model)
    with pytest.raises(EngineError, match=LOST):
        step(model)


def test_nor_a_body_called_by_itself_with_a_head_of_ones_own():
    model = with_prefix()
    head = nn.Linear(32, 3)
    head(model.model(tiny.tokens(2, 7)).last_hidden_state).sum().backward()
    assert not due(model)


def test_nor_prefixes_that_are_frozen_or_not_asked_for():
    model = with_prefix()
    with_prefix(model, name="other")
    step(model)
    assert not due(model)
    prefixkit.unfreeze(model, "default")
    with prefixkit.rows(model, [None, "other"]):
        step(model)
        step(model)
    for value in model.prefixkit.parameters():
        value.requires_grad_(False)
    require(model).check.due = True
    model.lm_head.weight.requires_grad_(True)
    step(model)


def test_rows_are_looked_at_too():
    model = with_prefix(swallow(tiny.make("llama")))
    with_prefix(model, name="other")
    with prefixkit.rows(model, ["default", "other"]), pytest.raises(EngineError, match=LOST):
        step(model)


def test_nor_cross_attention_that_is_not_called():
    """A decoder of BART without an encoder's states."""
    model = with_prefix(tiny.make("bart"))
    model.model.decoder(input_ids=tiny.tokens(2, 5)).last_hidden_state.sum().backward()
    assert not due(model)


def test_nor_layers_that_are_left_out_at_random():
    model = tiny.make("bart", encoder_layerdrop=0.9, decoder_layerdrop=0.9)
    model = with_prefix(model)
    for seed in range(5):
        torch.manual_seed(seed)
        require(model).check.due = True
        logits = model(**tiny.inputs(model)).logits
        if logits.requires_grad:
            logits.sum().backward()


@since("5.0", "the compiler does not know its masks")
def test_nor_a_compiled_model():
    model = with_prefix()
    compiled = torch.compile(model, backend="eager")
    compiled(**tiny.inputs(model)).logits.sum().backward()
    assert model.prefixkit.default.embedding.weight.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_nor_compiled_layers():
    model = with_prefix()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    step(model)
    assert not due(model)


def test_nor_transforms_of_functions():
    model = with_prefix()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(own):
        return torch.func.functional_call(model, own, (tiny.tokens(2, 7),)).logits.sum()

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    torch.testing.assert_close(found, {name: value.grad for name, value in parameters.items()})


def test_it_keeps_nothing_alive(monkeypatch):
    made = []
    init = gradient_check.Watch.__init__
    monkeypatch.setattr(
        gradient_check.Watch, "__init__", lambda self, *args: (init(self, *args), made.append(weakref.ref(self)))[0]
    )
    model = with_prefix()
    for backward in (False, False, True):
        outputs = model(**tiny.inputs(model))
        assert made[-1]() is not None
        if backward:
            outputs.logits.sum().backward()
        del outputs
        assert made[-1]() is None, "held by a circle"
        assert not model.prefixkit.default.embedding.weight._backward_hooks
    assert len(made) == 3


def test_nothing_stays_behind_a_call_that_fails():
    model = with_prefix()
    key = require(model).attachment.state_key(require(model).stacks[0])
    seen = []
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda *_: seen.append(key in gradient_check._stacks.get()) or 1 / 0)
    for call in (model, model.model):
        with pytest.raises(ZeroDivisionError):
            call(tiny.tokens(1, 3))
        assert key not in gradient_check._stacks.get()
        assert gradient_check._model.get() is None
    assert seen == [True, True]


def test_a_long_prefix_hides_nothing():
    """Attention in two parts is a function of our own, to which a missing gradient must not be zeros."""
    model = with_prefix(swallow(tiny.make("llama", max_position_embeddings=400)), num_virtual_tokens=300)
    with pytest.raises(EngineError, match=LOST):
        step(model)


def test_a_step_after_it_is_watched_no_more(monkeypatch):
    model = with_prefix()
    step(model)
    monkeypatch.setattr(gradient_check, "Watch", None)
    step(model)


def test_a_copy_is_looked_at_by_itself():
    model = with_prefix()
    step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        swallow(other)
        other.eval()(tiny.tokens(1, 3))
        with pytest.raises(EngineError, match=LOST):
            step(other.train())
        assert not due(model)


def test_the_message_names_the_quantiser():
    model = swallow(tiny.make("llama"))
    model.config.quantization_config = {"quant_method": "some-bits"}
    with pytest.raises(EngineError, match=r"gives none back \(the base is quantised by some-bits\)\. Usual reasons: "):
        step(with_prefix(model, init="random"))


# What a tester came upon


@dataclass
class Odd:
    """What a stack of somebody's own gives."""

    last_hidden_state: torch.Tensor
    past_key_values: object = None
    hidden_states: object = None
    attentions: object = None


def test_a_stack_may_give_what_nobody_looks_into():
    model = with_prefix()
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: Odd(own(*args, **kwargs).last_hidden_state)
    step(model)
    assert all(value.grad is not None for value in model.prefixkit.parameters())


def test_a_layer_that_is_thrown_away_at_random_is_told_by_the_config():
    model = with_prefix()
    model.model.layers[1].register_forward_hook(lambda module, args, output: args[0])
    with pytest.raises(EngineError, match=f"^{CUT} the prefix of 'model.layers.1.self_attn'.* a layerdrop above 0"):
        step(model)
    model.config.layerdrop = 0.5
    step(model)


def test_of_calls_that_build_on_one_another_a_few_are_watched(monkeypatch):
    """Each would walk through the graphs of all before it."""
    walks = []
    reached = gradient_check._reached
    monkeypatch.setattr(gradient_check, "_reached", lambda root, *more: walks.append(root) or reached(root, *more))
    model, past, losses = with_prefix(), None, []
    for _ in range(9):
        output = model(tiny.tokens(1, 1), past_key_values=past, use_cache=True)
        past = output.past_key_values
        losses.append(output.logits.sum())
    assert len(walks) == 2 * gradient_check.FEW  # what the stack gave, and the model
    torch.stack(losses).sum().backward()
    assert not due(model)
    assert not require(model).check.waits("")
    assert require(model).check.waiting == []


def test_heads_that_are_shared_and_a_loss_on_attention_maps(monkeypatch):
    """The last layer's values have no part in it."""

    class Mesh:
        def get_group(self):
            return None

        def size(self):
            return 1

    def spread(module, site, key, value, query=None):
        return tensor_parallel.Heads(0, site.kv_heads, site.kv_heads, Mesh())

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    for module in (prefix_state, attention_engine):
        monkeypatch.setattr(module, "heads_here", spread)
    model = with_prefix(tiny.make("llama", attention="eager"))
    model(**tiny.inputs(model), output_attentions=True).attentions[-1].pow(2).sum().backward()
    assert not due(model)
