"""The conformance kit catches what is wrong: subjects with one mistake each, and the tests that must fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import prefixkit_legacy
import pytest
from test_prefixkit_llama import TestLlama as Llama
from versions import since

from prefixkit.testing import Conformance

pytestmark = since("5.20", "some subjects fail in other ways, and some right ones are off the interface")
RUN = Path(__file__).parent / "wrong" / "run.py"
OFF = ("off_interface",) if prefixkit_legacy.transformers_is("5.5") else ()
HALVES = (("adapters", "lives", *OFF), ("attention_engines", "cache_engines", "rows"))
"""The files of wrong subjects, for two processes side by side."""
UNPROVEN = {
    "they run in processes of their own, where nothing is planted": {
        "test_parallel_checkpointing",
        "test_pickled_for_a_spawned_process",
        "test_replicas_give_the_gradients_of_one_process",
        "test_sharded_before_apply_is_refused",
        "test_sharded_model_generates",
        "test_sharded_model_saves_the_whole_prefix",
        "test_shards_give_the_gradients_of_one_process",
        "test_spread_heads_generate",
        "test_spread_heads_start_alike",
        "test_spread_heads_train_as_on_one_process",
    },
    "they need a GPU, or too long": {
        "test_bfloat16_kernels_agree",
        "test_compiled_static_cache",
        "test_compiled_training_step",
        "test_decoding_compiled_for_the_device",
        "test_decoding_with_the_flash_kernel",
        "test_gradients_of_the_kernels_agree",
        "test_offloaded_cache",
    },
    "what can be planted breaks the plain test first": {
        "test_continuous_batching_is_right_or_refused",
        "test_layers_on_disk",
        "test_resume_under_checkpointing",
    },
}
"""Tests of the kit that no wrong subject names, by reason."""


def start(files):
    """A process that runs ``files`` of wrong subjects, and then the right ones on what was found."""
    paths = os.pathsep.join([str(RUN.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(RUN), *(f"{name}.py" for name in files)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})


def outcomes_of(process):
    """How each test of each class ended; see ``wrong/run.py``."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return json.loads(output.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def halves():
    return [outcomes_of(process) for process in [start(half) for half in HALVES]]


@pytest.fixture(scope="module")
def wrong(halves):
    """The wrong subjects that must be seen, by file and class."""
    return {name: outcome for half in halves for name, outcome in half.items() if outcome["caught_by"]}


def ended(outcome, test, how):
    """Errors of the runs of ``test``, by name or by name and parameters, that ended so."""
    runs = outcome["tests"].items()
    return [error for name, (what, error) in runs if test in {name, name.partition("[")[0]} and what == how]


def test_each_wrong_subject_fails_each_test_it_names(wrong):
    assert len(wrong) > 100
    names = [(name, test) for name, outcome in wrong.items() for test in outcome["caught_by"]]
    missed = [f"{name}: {test}" for name, test in names if not ended(wrong[name], test, "caught")]
    assert not missed, "\n".join(["the kit no longer sees:", *missed])


def test_no_wrong_subject_crashes(wrong):
    """An error that is no finding, or of the wrong subject itself, proves nothing."""
    names = [(name, test) for name, outcome in wrong.items() for test in outcome["caught_by"]]
    crashed = [f"{name}: {test}: {error}" for name, test in names for error in ended(wrong[name], test, "crash")]
    assert not crashed, "\n".join(crashed)


def test_the_right_subjects_pass_the_very_tests_that_found_something(halves):
    right = [outcome for half in halves for outcome in half.values() if not outcome["caught_by"]]
    ends = [(outcome["subject"], test, *end) for outcome in right for test, end in outcome["tests"].items()]
    assert len(ends) > 100
    assert not [end for end in ends if end[2] != "passed"]


def test_every_test_of_the_kit_has_found_something(wrong):
    tests = {name for name in dir(Conformance) if name.startswith("test_")}
    named = {test.partition("[")[0] for outcome in wrong.values() for test in outcome["caught_by"]}
    assert tests - named == set().union(*UNPROVEN.values())


def test_a_subclass_on_another_device_has_the_tests_of_that_device():
    class OnGPU(Llama):
        device = "cuda"

    class BackOnCPU(OnGPU):
        device = "cpu"

    for cls, offloaded, replicas in ((Llama, False, True), (OnGPU, True, False), (BackOnCPU, False, True)):
        assert (cls.test_offloaded_cache is not None) is offloaded
        assert (cls.test_replicas_give_the_gradients_of_one_process is not None) is replicas
        assert cls.test_padded_targets_equal_targets_alone is None
