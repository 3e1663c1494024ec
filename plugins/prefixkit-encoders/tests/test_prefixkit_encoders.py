"""The adapters pass the conformance kit, family by family; the rarer ones' tests are marked so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import prefixkit_encoders
import pytest
import torch
import transformers
from packaging.version import Version

import prefixkit
from prefixkit.testing import Conformance, Deviation
from prefixkit.testing.subject import strengthen

OLD = Version("5") > Version(transformers.__version__)
refused_when_old = pytest.mark.skipif(OLD, reason="its attention takes something else before transformers 5: refused")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 98,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}
XLM_SIZES = {
    "vocab_size": 64,
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 98,
    "pad_token_id": 1,
    "pad_index": 1,
    "bos_index": 0,
    "eos_index": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BREAKS = "a state beside the call breaks torch.compile's graph, and the test asks for one graph"
OFFLOADED = "accelerate does not bring back a table that the model reads outside of its own call, prefix or not"
CONVOLUTION = "ConvBERT's convolution reads the tokens beside its own, padding and prompt too, prefix or not"
CHANNELS_FIRST = "SqueezeBERT's attention gives channels before tokens, and the kit looks for a window by tokens"
PAST_HOOKS = "SqueezeBERT calls its layers past their hooks, and FSDP2 gathers no weights, prefix or not"
COMPILED = (Deviation(BREAKS, "test_compiled_forward"),)


class Encoder(Conformance):
    adapter = next(prefixkit_encoders.prefixkit_adapters())
    deviations = COMPILED


class TestDebertaV2(Encoder):
    """As the published models are: no table, buckets, shared projections."""

    deviations = (*COMPILED, Deviation(OFFLOADED, "test_offloaded_prefix_is_refused"))

    def make_model(self):
        distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        shared = {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
        config = transformers.DebertaV2Config(**SIZES, **distances, **shared)
        return transformers.DebertaV2ForMaskedLM(config)


@pytest.mark.rare
class TestDeberta(Encoder):
    deviations = TestDebertaV2.deviations

    def make_model(self):
        distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        return transformers.DebertaForMaskedLM(transformers.DebertaConfig(**SIZES, **distances))


class TestMPNet(Encoder):
    def make_model(self):
        return transformers.MPNetForMaskedLM(transformers.MPNetConfig(**SIZES))


def test_mpnet_counts_behind_its_own_padding():
    """The model takes 1 for its padding, whatever the config says."""
    config = transformers.MPNetConfig(**{**SIZES, "pad_token_id": 0})
    assert prefixkit_encoders.mpnet_positions(config).offset == 2


@pytest.mark.rare
class TestRoFormer(Encoder):
    def make_model(self):
        return transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(**SIZES, rotary_value=True))


@pytest.mark.rare
class TestMegatronBert(Encoder):
    def make_model(self):
        return transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**SIZES))


@pytest.mark.rare
class TestRemBert(Encoder):
    def make_model(self):
        sizes = {"input_embedding_size": 16, "output_embedding_size": 24}
        return transformers.RemBertForMaskedLM(transformers.RemBertConfig(**SIZES, **sizes))


@refused_when_old
class TestLuke(Encoder):
    def make_model(self):
        sizes = {"entity_vocab_size": 20, "entity_emb_size": 16}
        return transformers.LukeForMaskedLM(transformers.LukeConfig(**SIZES, **sizes))


@pytest.mark.rare
class TestConvBert(Encoder):
    deviations = (
        *COMPILED,
        Deviation(CONVOLUTION, "test_padding_is_not_seen"),
        Deviation(CONVOLUTION, "test_padded_rows_equal_rows_alone"),
        Deviation(CONVOLUTION, "test_prefix_of_a_text_is_that_text_as_a_prompt", {"positions": "shift"}),
    )

    def make_model(self):
        sizes = {"embedding_size": 32, "conv_kernel_size": 3}
        return transformers.ConvBertForMaskedLM(transformers.ConvBertConfig(**SIZES, **sizes))


@pytest.mark.rare
class TestSqueezeBert(Encoder):
    deviations = (
        *COMPILED,
        Deviation(PAST_HOOKS, "test_shards_give_the_gradients_of_one_process"),
        Deviation(PAST_HOOKS, "test_sharded_model_saves_the_whole_prefix"),
        Deviation(CHANNELS_FIRST, "test_sites_are_the_attention_calls"),
    )

    def make_model(self):
        return transformers.SqueezeBertForMaskedLM(transformers.SqueezeBertConfig(**SIZES, embedding_size=32))


@pytest.mark.rare
@refused_when_old
class TestIBert(Encoder):
    def make_model(self):
        return transformers.IBertForMaskedLM(transformers.IBertConfig(**SIZES))


@pytest.mark.rare
class TestXLM(Encoder):
    def make_model(self):
        return transformers.XLMWithLMHeadModel(transformers.XLMConfig(**XLM_SIZES))


@pytest.mark.rare
class TestFlaubert(Encoder):
    def make_model(self):
        return transformers.FlaubertWithLMHeadModel(transformers.FlaubertConfig(**XLM_SIZES))


@pytest.mark.rare
class TestBigBird(Encoder):
    def make_model(self):
        config = transformers.BigBirdConfig(**SIZES, attention_type="original_full", sep_token_id=3)
        return transformers.BigBirdForMaskedLM(config)


@pytest.mark.rare
class TestLayoutLMv3(Encoder):
    deviations = (
        *COMPILED,
        Deviation(OFFLOADED, "test_offloaded_prefix_is_refused"),
        Deviation(
            "the prefix has no box, so no bias of distance, and a text has one to its prompt",
            "test_prefix_of_a_text_is_that_text_as_a_prompt",
            {"positions": "shift"},
        ),
    )

    def make_model(self):
        sizes = {"coordinate_size": 6, "shape_size": 4, "visual_embed": False}
        return transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**SIZES, **sizes))


class BrosInOneBox(transformers.BrosModel):
    """BROS wants boxes; here those of a line of text."""

    def forward(self, input_ids, bbox=None, **options):
        places = torch.arange(input_ids.shape[-1], device=input_ids.device) / 100
        boxes = torch.stack([places, places * 0, places + 0.01, places * 0 + 0.01], dim=-1).to(self.dtype)
        return super().forward(input_ids, bbox=boxes.expand(len(input_ids), -1, -1), **options)


@pytest.mark.rare
class TestBros(Encoder):
    deviations = (*COMPILED, *TestLayoutLMv3.deviations[2:])

    def make_model(self):
        # The boxes' distances take an eighth of a quarter of the width.
        sizes = {"hidden_size": 128, "bbox_scale": 1.0}
        return BrosInOneBox(transformers.BrosConfig(**{**SIZES, **sizes}))


@pytest.mark.rare
@refused_when_old
class TestVisualBert(Encoder):
    def make_model(self):
        config = transformers.VisualBertConfig(**SIZES, visual_embedding_dim=16)
        return transformers.VisualBertModel(config)


@pytest.mark.rare
@refused_when_old
class TestLilt(Encoder):
    deviations = (
        *COMPILED,
        Deviation("a layer's layout has attention of its own, without a prefix", "test_sites_are_the_attention_calls"),
        # test_lilt_sees_the_prefix_as_text has the numbers.
        Deviation("the kit puts keys in front of text and layout", "test_prefix_of_a_text_is_that_text_as_a_prompt"),
    )

    def make_model(self):
        # A box takes six equal parts of the width.
        sizes = {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64}
        return transformers.LiltModel(transformers.LiltConfig(**{**SIZES, **sizes}))


HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
REFUSED = (TestLuke, TestIBert, TestVisualBert, TestLilt)
TASKS = [
    pytest.param(
        family, getattr(transformers, f"{prefix}For{head}"), marks=refused_when_old if family in REFUSED else ()
    )
    for family, prefix in (
        (TestDebertaV2, "DebertaV2"),
        (TestDeberta, "Deberta"),
        (TestMPNet, "MPNet"),
        (TestRoFormer, "RoFormer"),
        (TestMegatronBert, "MegatronBert"),
        (TestRemBert, "RemBert"),
        (TestLuke, "Luke"),
        (TestConvBert, "ConvBert"),
        (TestSqueezeBert, "SqueezeBert"),
        (TestIBert, "IBert"),
        (TestXLM, "XLM"),
        (TestFlaubert, "Flaubert"),
        (TestBigBird, "BigBird"),
        (TestLayoutLMv3, "LayoutLMv3"),
        (TestLilt, "Lilt"),
    )
    for head in (*HEADS, "QuestionAnsweringSimple")
    if hasattr(transformers, name := f"{prefix}For{head}")
]


@pytest.mark.parametrize(("family", "cls"), TASKS)
def test_a_head_trains_and_is_saved_with_the_prefix(family, cls, tmp_path):
    """Two steps change the prefix and the head and nothing else, and both come back from a file."""
    config = family().make_model().config
    torch.manual_seed(0)
    model = cls(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prefixkit.apply(model, num_virtual_tokens=4, adapter=family.adapter)
    strengthen(model)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) > 1, "no head"
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    inputs, labels = task(cls)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, **labels).loss.backward()
        optimizer.step()
    after = dict(model.state_dict())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    # I-BERT's buffers watch the ranges of what passes.
    assert changed <= {*trained, *(name for name, _ in model.named_buffers())}
    prefixkit.save(model.eval(), tmp_path)
    again = cls(config).eval()
    again.load_state_dict(before)
    for buffer, trained_buffer in zip(again.buffers(), model.buffers(), strict=True):
        buffer.copy_(trained_buffer)
    prefixkit.load(again, tmp_path, adapter=family.adapter)
    with torch.no_grad():
        for one, other in zip(numbers(again(**inputs)), numbers(model(**inputs)), strict=True):
            assert torch.equal(one, other)


def task(cls):
    """Two padded rows for a task, and their labels."""
    choices = cls.__name__.endswith("MultipleChoice")
    ids = torch.randint(4, 64, (2, 3, 7) if choices else (2, 7), generator=torch.Generator().manual_seed(1))
    ids[..., 3] = 3  # BigBird looks for the end of the question
    mask = torch.ones_like(ids)
    mask[1, ..., 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "QuestionAnswering" in cls.__name__:
        return inputs, {"start_positions": torch.tensor([4, 4]), "end_positions": torch.tensor([5, 4])}
    shape = (2, 7) if cls.__name__.endswith("TokenClassification") else (2,)
    return inputs, {"labels": torch.ones(shape, dtype=torch.long)}


def numbers(output):
    """What a task class computed."""
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BigBirdConfig(**SIZES), "attention_type='block_sparse'.* set attention_type='original_full'"),
        (transformers.RemBertConfig(**SIZES, is_decoder=True), "use is_decoder=False"),
        (transformers.XLMConfig(**XLM_SIZES, causal=True), "use causal=False"),
        (transformers.DebertaConfig(**SIZES, talking_head=True), "use talking_head=False"),
        (transformers.IBertConfig(**SIZES, quant_mode=True), "use quant_mode=False"),
    ],
)
def test_what_has_another_attention_is_refused(config, message):
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(prefixkit.UnsupportedModelError, match=message):
        prefixkit.apply(model, num_virtual_tokens=4, adapter=Encoder.adapter)


def test_deberta_with_a_table_counts_its_positions():
    """Under shift the table's rows are moved, as where the bare model is given moved ids."""
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
    model = transformers.DebertaV2Model(config).eval()
    ids = torch.arange(4, 11)[None]
    prefixkit.apply(model, num_virtual_tokens=4, adapter=Encoder.adapter)
    with torch.no_grad():
        model.get_parameter("prefixkit.default.embedding.weight").copy_(torch.randn(4, 128))
        found = model(ids).last_hidden_state
        flat = model.get_parameter("prefixkit.default.embedding.weight").clone()
        prefixkit.remove(model)
        prefixkit.apply(model, num_virtual_tokens=4, adapter=Encoder.adapter, positions="none", init=flat)
        torch.testing.assert_close(found, model(ids, position_ids=torch.arange(4, 11)[None]).last_hidden_state)
        assert (found - model(ids).last_hidden_state).abs().max() > 1e-3


class Site:
    """The last attention of a model in float64 with a random prefix, what it was given and what it gave."""

    def __init__(self, model, path, width=32):
        torch.manual_seed(0)
        self.model = model.double().eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        flat = torch.randn(4, 4 * width)
        prefixkit.apply(model, num_virtual_tokens=4, adapter=Encoder.adapter, init=flat)
        self.key, self.value = (
            half.view(4, 4, -1).transpose(0, 1) for half in flat.double()[:, 2 * width :].chunk(2, 1)
        )
        self.module = model.get_submodule(path)
        self.module.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, options, output):
        self.args, self.options, self.output = args, options, output

    def run(self, **inputs):
        with torch.no_grad():
            self.model(**inputs)

    def heads(self, states):
        return states[0].view(len(states[0]), 4, -1).transpose(0, 1)

    def check(self, found, scores, value):
        """``found`` is what the scores of prefix and tokens give."""
        weights = torch.cat(scores, dim=-1).softmax(-1)
        expected = (weights @ torch.cat([self.value, value], dim=1)).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@refused_when_old
def test_entities_of_luke_see_the_prefix_as_words():
    config = transformers.LukeConfig(**SIZES, entity_vocab_size=20, entity_emb_size=16)
    site = Site(transformers.LukeModel(config), "encoder.layer.1.attention.self")
    entities = {"entity_ids": torch.tensor([[5, 6]]), "entity_position_ids": torch.tensor([[[1, 2, -1], [4, -1, -1]]])}
    site.run(input_ids=torch.arange(4, 11)[None], **entities)
    module = site.module
    words, others = site.args[:2]
    both = torch.cat([words, others], dim=1)
    key, value = (site.heads(one(both)) / scale for one, scale in ((module.key, 8**0.5), (module.value, 1)))
    for states, to_word, to_entity, found in (
        (words, module.query, module.w2e_query, site.output[0]),
        (others, module.e2w_query, module.e2e_query, site.output[1]),
    ):
        ask, ask_entity = site.heads(to_word(states)), site.heads(to_entity(states))
        scores = [ask @ site.key.mT / 8**0.5, ask @ key[:, :-2].mT, ask_entity @ key[:, -2:].mT]
        site.check(found[0], scores, value)


@refused_when_old
def test_lilt_sees_the_prefix_as_text():
    site = Site(TestLilt().make_model(), "encoder.layer.1.attention.self", width=48)
    boxes = torch.randint(0, 60, (1, 7, 4), generator=torch.Generator().manual_seed(1)).sort().values
    site.run(input_ids=torch.arange(4, 11)[None], bbox=boxes)
    text, layout = site.args[:2]
    module = site.module
    query, key, value = (site.heads(one(text)) for one in (module.query, module.key, module.value))
    asks, answers = (site.heads(one(layout)) for one in (module.layout_query, module.layout_key))
    scores = query @ key.mT / 12**0.5 + asks @ answers.mT / 6**0.5
    site.check(site.output[0][0], [query @ site.key.mT / 12**0.5, scores], value)


def wavlm_config():
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2}
    quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
    sizes = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_buckets": 8}
    more = {"feat_extract_norm": "layer", "final_dropout": 0.0, "feat_proj_dropout": 0.0}
    return transformers.WavLMConfig(**SIZES, **convolutions, **quiet, **sizes, **more)


def test_wavlm_has_its_gated_bias_between_tokens_only():
    sound = torch.randn(1, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = Site(transformers.WavLMModel(wavlm_config()), "encoder.layers.1.attention")
    site.run(input_values=sound)
    module = site.module
    states = site.args[0] if site.args else site.options["hidden_states"]
    query, key, value = (site.heads(one(states)) for one in (module.q_proj, module.k_proj, module.v_proj))
    gates = (
        module.gru_rel_pos_linear(states.view(1, -1, 4, 8)).view(1, -1, 4, 2, 4).sum(-1).sigmoid()[0].transpose(0, 1)
    )
    gate = gates[..., :1] * (gates[..., 1:] * module.gru_rel_pos_const[0] - 1) + 2
    bias = gate * site.output[2].view(4, len(states[0]), -1)
    found = torch.linalg.solve(module.out_proj.weight, (site.output[0] - module.out_proj.bias)[0].mT).mT
    site.check(found, [query @ site.key.mT / 8**0.5, query @ key.mT / 8**0.5 + bias], value)


# transformers gives torch a boolean mask and a bias.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_wavlm_in_batches():
    """Disabled it is the base, bit for bit; a padded row equals the row alone; prefix and head train."""
    torch.manual_seed(0)
    model = transformers.WavLMForSequenceClassification(wavlm_config()).eval().requires_grad_(False)
    rows = torch.randn(2, 320)
    mask = torch.ones(2, 320, dtype=torch.long)
    mask[1, 160:] = 0
    inputs = {"input_values": rows * mask, "attention_mask": mask}
    with torch.no_grad():
        base = model(**inputs).logits
        prefixkit.apply(model, num_virtual_tokens=4, adapter=Encoder.adapter)
        strengthen(model)
        with prefixkit.disabled(model):
            assert torch.equal(model(**inputs).logits, base)
        states = model.wavlm(**inputs).last_hidden_state[1, :10]
        shorter = {"input_values": rows[1:, :240] * mask[1:, :240], "attention_mask": mask[1:, :240]}
        torch.testing.assert_close(states[:6], model.wavlm(**shorter).last_hidden_state[0, :6], atol=1e-5, rtol=1e-4)
    model.train()
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert {"prefixkit.default.embedding.weight", "classifier.weight"} <= trained.keys()
    assert all(gradient.abs().max() > 0 for gradient in trained.values())


def test_an_attention_that_takes_something_else_is_refused():
    """As a version of transformers may bring it."""
    families = prefixkit_encoders.FAMILIES
    wrong = replace(families["mpnet"], site_forward=prefixkit_encoders.deberta)
    adapter = prefixkit.Adapter(
        model_types=("mpnet",), stacks=partial(prefixkit_encoders.stacks, families={"mpnet": wrong})
    )
    with pytest.raises(prefixkit.EngineError, match="takes hidden_states, .*position_bias.* written for"):
        prefixkit.apply(TestMPNet().make_model(), num_virtual_tokens=4, adapter=adapter)
