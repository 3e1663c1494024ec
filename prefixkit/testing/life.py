"""What happens to a model with a prefix in use: put in a pipeline, saved, copied, sent, placed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prefixkit
from prefixkit.errors import EngineError
from prefixkit.testing import jobs, workers
from prefixkit.testing.subject import NEW, Subject, numbers_of
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# accelerate wants a place for a tensor that belongs to the model itself, and warns about its name.
root_has_tensors: pytest.MarkDecorator = pytest.mark.filterwarnings(
    "ignore:The following device_map keys do not match:UserWarning"
)


class Life:
    """Pipelines, saving, copies, other processes, placement."""

    def test_saved_and_loaded(self, subject: Subject, engine: str, method: str, tmp_path: Path) -> None:
        """Saved and loaded, the prefix gives the same outputs, bit for bit."""
        model = subject.with_prefix(engine=engine, method=method)
        prefixkit.save(model, tmp_path)
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert sum(value.numel() for value in tensors_of(tmp_path / "prefix.safetensors").values()) == trained
        loaded = prefixkit.load(subject.bare(), tmp_path, adapter=subject.adapter)
        inputs = subject.inputs()
        assert torch.equal(subject.logits(loaded, **inputs), subject.logits(model, **inputs))
        assert not any(value.requires_grad for value in loaded.parameters())

    def test_base_saves_as_if_there_had_been_no_prefix(self, subject: Subject, engine: str, tmp_path: Path) -> None:
        """save_pretrained writes no base weight with a prefix on, and after remove the very files of the bare model."""
        subject.bare().save_pretrained(tmp_path / "bare")
        model = subject.with_prefix(engine=engine)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        expected = subject.logits(model, **subject.inputs())
        model.save_pretrained(tmp_path / "with")
        assert tensors_of(tmp_path / "with" / "model.safetensors").keys() == trained
        prefixkit.remove(model)
        model.save_pretrained(tmp_path / "after")
        assert _files(tmp_path / "after") == _files(tmp_path / "bare")
        again = type(model).from_pretrained(tmp_path / "after").train(False).to(subject.device)
        prefixkit.load(again, tmp_path / "with", adapter=subject.adapter)
        assert torch.equal(subject.logits(again, **subject.inputs()), expected)

    @needs("prompt_decodes")
    def test_text_generation_pipeline(self, subject: Subject, engine: str) -> None:
        """The text-generation pipeline gives the tokens of generate(), in padded batches too."""
        rows = subject.ragged(4, 7, 5)
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine)
            expected = [subject.generate(model, row[None])[0].tolist() for row in rows]
            run = _pipeline("text-generation", model, subject)
            for size in (1, len(rows)):
                found = run(
                    [_text(row) for row in rows],
                    batch_size=size,
                    max_new_tokens=NEW,
                    do_sample=False,
                    return_tensors=True,
                )
                assert [_unpadded(one[0]["generated_token_ids"], subject) for one in found] == expected

    def test_feature_extraction_pipeline(self, subject: Subject, engine: str) -> None:
        """The feature-extraction pipeline gives the model's first outputs, of an encoder-decoder the encoder's."""
        row = subject.tokens(6)
        model = subject.with_prefix(engine=engine)
        part = model.get_encoder() if subject.is_encoder_decoder else model
        found = torch.tensor(_pipeline("feature-extraction", part, subject)(_text(row)))
        inputs = {**subject.inputs(batch=1), "input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        with torch.no_grad():
            whole = model(**inputs)
        expected = whole["encoder_last_hidden_state"] if subject.is_encoder_decoder else numbers_of(whole)
        torch.testing.assert_close(found, expected.cpu(), atol=1e-5, rtol=1e-5)

    def test_copy_is_whole_and_apart(self, subject: Subject, engine: str, method: str) -> None:
        """A deep copy has the same outputs, and neither training it nor removing its prefix changes the original."""
        inputs = subject.inputs()
        base = subject.logits(subject.bare(), **inputs)
        model = subject.with_prefix(engine=engine, method=method)
        expected = subject.logits(model, **inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(subject.logits(twin, **inputs), expected)
        optimizer = torch.optim.SGD([value for value in twin.parameters() if value.requires_grad], lr=0.1)
        subject.loss(twin, **inputs).backward()
        optimizer.step()
        assert not torch.equal(subject.logits(twin, **inputs), expected), "training the copy changes nothing"
        assert not any(gradient.numel() for gradient in subject.gradients(model))
        assert torch.equal(subject.logits(model, **inputs), expected)
        prefixkit.remove(twin)
        assert torch.equal(subject.logits(twin, **inputs), base)
        assert torch.equal(subject.logits(model, **inputs), expected)

    def test_pickled_for_a_spawned_process(self, subject: Subject, engine: str, method: str) -> None:
        """Pickled and unpickled in a spawned process, the model gives the same outputs there."""
        model = subject.with_prefix(engine=engine, method=method)
        inputs = subject.inputs()
        expected = subject.logits(model, **inputs)
        for found in workers.run(jobs.outputs, model, inputs=inputs):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    @root_has_tensors
    @pytest.mark.parametrize("first", ["placement", "prefix"])
    def test_layers_on_disk(self, subject: Subject, engine: str, method: str, first: str, tmp_path: Path) -> None:
        """With layers offloaded to disk, before or after apply, outputs and gradients are those of the whole model."""
        inputs = subject.inputs()
        whole = subject.with_prefix(engine=engine, method=method)
        expected = subject.logits(whole, **inputs)
        subject.loss(whole, **inputs).backward()
        model = subject.bare()
        if first == "placement":
            _place(model, tmp_path)
        subject.apply(model, engine=engine, method=method)
        if first == "prefix":
            _place(model, tmp_path)
        assert any(value.is_meta for value in model.parameters()), "nothing is offloaded"
        torch.testing.assert_close(subject.logits(model, **inputs), expected, atol=1e-5, rtol=1e-5)
        subject.loss(model, **inputs).backward()
        for found, gradient in zip(subject.gradients(model), subject.gradients(whole), strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)
        prefixkit.remove(model)
        torch.testing.assert_close(
            subject.logits(model, **inputs), subject.logits(subject.bare(), **inputs), atol=1e-5, rtol=1e-5
        )

    def test_offloaded_prefix_is_refused(self, subject: Subject, engine: str, method: str) -> None:
        """Offloading the prefix itself is right or a clear error, and it can be removed."""
        from accelerate import cpu_offload  # type: ignore[import-untyped]

        inputs = subject.inputs()
        model = subject.with_prefix(engine=engine, method=method)
        expected = subject.logits(model, **inputs)
        cpu_offload(model)
        try:
            found = subject.logits(model, **inputs)
        except EngineError as error:
            subject.refusals.append(str(error))
        else:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        base = subject.logits(subject.bare(), **inputs)
        prefixkit.remove(model)
        torch.testing.assert_close(subject.logits(model, **inputs), base, atol=1e-5, rtol=1e-5)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file holds, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def _files(folder: Path) -> dict[str, Any]:
    """What every file holds, by name; a config without the name of the folder it came from."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {name: json.loads(content) if name.endswith(".json") else content for name, content in files.items()}


def _text(row: torch.Tensor) -> str:
    return " ".join(f"<{token}>" for token in row.tolist())


def _unpadded(tokens: list[int], subject: Subject) -> list[int]:
    """Without the padding in front, which no prompt here begins with."""
    first = next(index for index, token in enumerate(tokens) if token != subject.padding)
    return tokens[first:]


def _pipeline(task: str, model: Any, subject: Subject) -> Any:
    """A pipeline with a tokenizer for which token 7 is the word ``<7>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"<{token}>": token for token in range(subject.vocabulary)}
    plain = Tokenizer(WordLevel(words))
    plain.pre_tokenizer = WhitespaceSplit()
    pad = f"<{subject.padding}>"
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=plain, pad_token=pad, padding_side="left"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return pipeline(task, model=model, tokenizer=tokenizer, device=subject.device)  # type: ignore[call-overload]


def _place(model: PreTrainedModel, folder: Path) -> None:
    """Every second layer on disk, the rest where it is."""
    from accelerate import dispatch_model

    layers, here = jobs.layers_of(model), str(model.device)
    places: dict[str, Any] = {path: "disk" if index % 2 == 0 else here for index, path in enumerate(layers)}
    for name in model.state_dict():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            places[name.rpartition(".")[0] or name] = here
    dispatch_model(model, places, offload_dir=str(folder))
