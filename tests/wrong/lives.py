"""The life of a prefix with one mistake each: apply, disabled, fold, remove, save and load."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _IncompatibleKeys
from wrong.right import GPT2, Bart, Llama

from prefixkit import assembly, attachment, checkpoint_files, lifecycle, prefixes
from prefixkit.attention_engine import AttentionEngine
from prefixkit.instance_calls import LoadStateDict
from prefixkit.prefix_encoder import PrefixEncoder, flat_encoder

SLOTS = "test_every_slot_gets_its_own_gradient"
DISABLED = "test_disabled_and_removed"
FOLD = "test_fold_changes_no_number"
TRAINS = "test_nothing_else_trains"
SMALL = "test_a_short_prefix_is_a_small_part"
LAYER = "test_one_layer_alone"


class TestFoldDropsTheMlp(GPT2):
    caught_by = (FOLD,)

    def plant(self, monkeypatch):
        def without_mlp(flat):
            return flat_encoder(flat.tanh())

        monkeypatch.setattr(lifecycle, "flat_encoder", without_mlp)


class TestFoldRounds(Llama):
    caught_by = (FOLD,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(lifecycle, "flat_encoder", lambda flat: flat_encoder(flat.bfloat16().float()))


class TestFoldChangesNothing(Llama):
    """The MLP stays."""

    caught_by = (FOLD,)

    def plant(self, monkeypatch):
        monkeypatch.setattr("prefixkit.fold", lambda model: model)


class TestBaseNotFrozen(GPT2):
    caught_by = (TRAINS, SMALL)

    def plant(self, monkeypatch):
        def install(model, attached):
            original(model, attached)
            model.transformer.ln_f.bias.requires_grad_(True)

        original = lifecycle.install
        monkeypatch.setattr(lifecycle, "install", install)


class TestPrefixFrozen(Llama):
    caught_by = (TRAINS,)

    def plant(self, monkeypatch):
        def install(model, attached):
            original(model, attached)
            attached.attachment.encoder.requires_grad_(False)

        original = lifecycle.install
        monkeypatch.setattr(lifecycle, "install", install)


class TestOneTokenForAll(GPT2):
    """All virtual tokens are the first one."""

    caught_by = (SLOTS,)

    def plant(self, monkeypatch):
        original = PrefixEncoder.forward
        monkeypatch.setattr(PrefixEncoder, "forward", lambda self: original(self)[:1].expand(5, -1))


class TestEmbeddingOfTheMlpFrozen(GPT2):
    caught_by = (TRAINS,)

    def plant(self, monkeypatch):
        def forward(self):
            weight = self.embedding.weight
            return weight if self.transform is None else self.transform(weight.detach())

        monkeypatch.setattr(PrefixEncoder, "forward", forward)


class TestLayersNotHeard(GPT2):
    caught_by = (LAYER,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(assembly, "_asked", lambda site, config: True)


class TestDisabledLeavesPositionsMoved(GPT2):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def off(self, module, stack, arguments, attachment):
            ids = arguments["input_ids"]
            arguments["position_ids"] = torch.arange(ids.shape[1])[None] + 5
            return original(self, module, stack, arguments, attachment)

        original = AttentionEngine.off
        monkeypatch.setattr(AttentionEngine, "off", off)


class TestDisabledLeavesThePrefix(Llama):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(prefixes.Prefixes, "enabled", True)


class TestDisabledForGood(Llama):
    """The prefix does not come back."""

    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def enabled(self):
            self.__dict__["was_disabled"] = self.__dict__.get("was_disabled", False) or self.disablers > 0
            return not self.__dict__["was_disabled"]

        monkeypatch.setattr(prefixes.Prefixes, "enabled", property(enabled))
        monkeypatch.setattr(prefixes, "put_head", lambda *call: None)
        monkeypatch.setattr(prefixes, "take_head", lambda *call: None)


class TestRemoveLeavesTheHooks(Bart):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def uninstall(model):
            prefixes.require(model).handles.clear()
            original(model)

        original = lifecycle.uninstall
        monkeypatch.setattr(lifecycle, "uninstall", uninstall)


class TestRemoveLeavesAHook(GPT2):
    """One hook that does nothing any more."""

    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def uninstall(model):
            original(model)
            model.transformer.register_forward_hook(lambda *call: None)

        original = lifecycle.uninstall
        monkeypatch.setattr(lifecycle, "uninstall", uninstall)


class TestRemoveLeavesTheBaseFrozen(GPT2):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def uninstall(model):
            original(model)
            model.requires_grad_(False)

        original = lifecycle.uninstall
        monkeypatch.setattr(lifecycle, "uninstall", uninstall)


class TestRemoveLeavesTheImplementation(Llama):
    """The config names another attention than before."""

    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def attach(self, model, *where):
            homes = original(self, model, *where)
            model.config._attn_implementation_internal = "eager"
            return homes

        original = AttentionEngine.attach
        monkeypatch.setattr(AttentionEngine, "attach", attach)


class TestRemoveLeavesTheSubmodule(GPT2):
    caught_by = (DISABLED,)

    def plant(self, monkeypatch):
        def uninstall(model):
            encoder = prefixes.require(model).attachment.encoder
            original(model)
            model.add_module("prefixkit", torch.nn.ModuleDict({"default": encoder}))

        original = lifecycle.uninstall
        monkeypatch.setattr(lifecycle, "uninstall", uninstall)


class TestPrefixInTheBasesPrecision(GPT2):
    """A half-precision prefix does not train."""

    caught_by = ("test_half_precision_base",)

    def plant(self, monkeypatch):
        def install(model, attached):
            original(model, attached)
            attached.attachment.encoder.to(model.dtype)

        original = lifecycle.install
        monkeypatch.setattr(lifecycle, "install", install)


class TestSavedInHalfPrecision(GPT2):
    caught_by = ("test_saved_and_loaded",)

    def plant(self, monkeypatch):
        def write(directory, config, tensors):
            original(directory, config, {name: value.bfloat16().float() for name, value in tensors.items()})

        original = checkpoint_files.write
        monkeypatch.setattr(checkpoint_files, "write", write)


class TestCopySharesThePrefix(GPT2):
    caught_by = ("test_copy_is_whole_and_apart",)

    def plant(self, monkeypatch):
        monkeypatch.setattr(PrefixEncoder, "__deepcopy__", lambda self, memo: self, raising=False)


class TestTrainerSavesTheBase(GPT2):
    """save_pretrained is the base's own."""

    caught_by = (
        "test_trainer_checkpoints_hold_no_base_weights",
        "test_base_saves_as_if_there_had_been_no_prefix",
    )

    def plant(self, monkeypatch):
        monkeypatch.setattr(lifecycle, "start_answering", lambda model: None)


class TestRemoveLeavesTheCallsAnswered(Llama):
    caught_by = ("test_base_saves_as_if_there_had_been_no_prefix",)

    def plant(self, monkeypatch):
        monkeypatch.setattr(lifecycle, "stop_answering", lambda model: None)


class TestResumeStartsAnew(GPT2):
    """The weights of a checkpoint are not taken."""

    caught_by = ("test_resume_ends_where_an_uninterrupted_run_ends", "test_best_model_at_end")

    def plant(self, monkeypatch):
        def call(self, state_dict, strict=True, assign=False):
            return _IncompatibleKeys([], [])

        monkeypatch.setattr(LoadStateDict, "__call__", call)


class TestOffloadedPrefixNotRefused(Llama):
    """torch itself sees that there are no numbers."""

    caught_by = ("test_offloaded_prefix_is_refused",)
    fails_with = (NotImplementedError, RuntimeError)

    def plant(self, monkeypatch):
        monkeypatch.setattr(attachment.Attachment, "flat", lambda self, module=None: self.encoder())
