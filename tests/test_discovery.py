"""Plugins: found by name, broken ones contained, conflicts named."""

from __future__ import annotations

import itertools
import sys
import textwrap
from dataclasses import dataclass
from importlib import import_module

import pytest
import tiny

import prefixkit
from prefixkit import Adapter, AdapterConflictError, MethodError, UnknownAdapterError
from prefixkit.discovery import Registry

GOOD = """
from prefixkit import Adapter, hookimpl

@hookimpl
def prefixkit_adapters():
    yield Adapter(model_types={types!r}, stacks=lambda model: [])
"""


NUMBERS = itertools.count()
"""A module of its own for every plugin: Python imports a name once."""


@dataclass
class Distribution:
    name: str
    version: str = "1.0"


@dataclass
class Entry:
    """An entry point of a distribution that does not exist."""

    name: str
    value: str
    dist: Distribution

    def load(self):
        return import_module(self.value)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, source, dist=None):
        module = f"fake_{name}_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return Entry(name, module, Distribution(dist or f"dist-{name}"))

    return write


def unknown(registry, model_type):
    with pytest.raises(UnknownAdapterError) as caught:
        registry.adapter_for(model_type)
    return str(caught.value)


def test_a_type_whose_own_plugin_failed_is_not_served_by_another_way(plugin):
    registry = Registry(
        lambda: [plugin("one", GOOD.format(types=("one",))), plugin("x", "raise ValueError('no luck')")]
    )
    assert unknown(registry, "x") == (
        "the plugin for model type 'x' failed to load: dist-x: ValueError: no luck; mend or uninstall it, or pass "
        "adapter="
    )


def test_a_type_that_nobody_names_gets_the_generic_adapter(plugin):
    broken = plugin("x", "raise ValueError('no luck')")
    for registry in (Registry(list), Registry(lambda: [broken])):
        assert registry.adapter_for("one").model_types == ()


def test_the_types_own_plugin_is_loaded_and_no_other(plugin):
    one, two = plugin("one", GOOD.format(types=("one", "cousin"))), plugin("two", GOOD.format(types=("two",)))
    registry = Registry(lambda: [two, one])
    assert "one" in registry.adapter_for("one").model_types
    assert two.value not in sys.modules
    assert "one" in registry.adapter_for("cousin").model_types
    assert two.value in sys.modules


@pytest.mark.parametrize("source", ["raise ValueError('no luck')", "import sys; sys.exit(1)", "1 +"])
def test_a_broken_plugin_stops_no_other(plugin, source):
    good = plugin("one", GOOD.format(types=("one",)))
    registry = Registry(lambda: [plugin("one", source, dist="broken"), good])
    assert registry.adapter_for("one").model_types == ("one",)
    broken, fine = registry.plugins()
    assert broken.error is not None
    assert fine.error is None
    assert fine.model_types == ("one",)


def test_conflict_names_both_distributions_in_any_order(plugin):
    entries = [
        plugin("one", GOOD.format(types=("one",)), dist="alpha"),
        plugin("one", GOOD.format(types=("one",)), dist="beta"),
    ]
    for order in (entries, entries[::-1]):
        with pytest.raises(AdapterConflictError) as caught:
            Registry(lambda order=order: order).adapter_for("one")
        assert str(caught.value) == (
            "two distributions bring an adapter for model type 'one': alpha and beta; "
            "uninstall one, or pass adapter= to choose"
        )


def test_a_conflict_within_one_distribution_is_one_too(plugin):
    entries = [plugin("one", GOOD.format(types=("one",)), dist="alpha") for _ in range(2)]
    for order in (entries, entries[::-1]):
        with pytest.raises(AdapterConflictError, match="^two modules of alpha bring an adapter for model type 'one': "):
            Registry(lambda order=order: order).adapter_for("one")


def test_all_conflicts_are_listed_and_nothing_else(plugin):
    """A type's own plugin is asked alone, so one that serves the type without saying so is no conflict."""
    one, two = (plugin("one", GOOD.format(types=("one", "cousin")), dist=dist) for dist in ("alpha", "beta"))
    silent = plugin("other", GOOD.format(types=("other", "third")))
    third = plugin("third", GOOD.format(types=("third",)))
    assert Registry(lambda: [silent, third]).conflicts() == []
    assert [message.split(":")[0] for message in Registry(lambda: [one, two, silent, third]).conflicts()] == [
        "two distributions bring an adapter for model type 'cousin'",
        "two distributions bring an adapter for model type 'one'",
    ]


BROKEN = [
    (
        "def prefixkit_adapters():\n    return []",
        "function 'prefixkit_adapters' of '{module}' lacks @prefixkit.hookimpl",
    ),
    (
        "from prefixkit import hookimpl\n@hookimpl\ndef prefixkit_adapter():\n    return []",
        "'{module}' implements an unknown hook 'prefixkit_adapter' (did you mean 'prefixkit_adapters'?); "
        "possible: prefixkit_adapters, prefixkit_methods",
    ),
    (
        "from prefixkit import hookimpl\n@hookimpl\ndef prefixkit_adapters():\n    yield 3",
        "prefixkit_adapters yielded 3; it yields prefixkit.Adapter objects",
    ),
    (
        GOOD.format(types=("one",)).replace("yield", "yield Adapter(model_types=('one',), stacks=print)\n    yield"),
        "'{module}' brings more than one adapter for 'one'",
    ),
]


@pytest.mark.parametrize(("source", "message"), BROKEN)
def test_what_pluggy_would_pass_over_is_refused(plugin, source, message):
    entry = plugin("one", source)
    registry = Registry(lambda: [entry])
    assert registry.plugins()[0].error == "PluginError: " + message.format(module=entry.value)
    assert message.format(module=entry.value) in unknown(registry, "one")


def test_a_hook_that_raises_late_is_contained(plugin):
    source = GOOD.format(types=("one",)) + "    raise RuntimeError('late')\n"
    assert Registry(lambda: [plugin("one", source)]).plugins()[0].error == "RuntimeError: late"


METHOD = """
from prefixkit import Method, hookimpl

@hookimpl
def prefixkit_methods():
    yield Method(name={name!r}, build=print, options={{}})
"""


def test_methods_of_plugins(plugin):
    registry = Registry(lambda: [plugin("a", METHOD.format(name="mine"))])
    assert registry.method("mine").name == "mine"
    assert registry.method("p-tuning-v2").options["prefix_projection"] is False
    with pytest.raises(MethodError) as caught:
        registry.method("p-tuning")
    assert str(caught.value) == (
        "no method 'p-tuning' (did you mean 'p-tuning-v2'?); installed: mine, p-tuning-v2, prefix-memory, "
        "prefix-tuning, prompt-tuning"
    )
    twice = Registry(lambda: [plugin("a", METHOD.format(name="mine")), plugin("b", METHOD.format(name="mine"))])
    with pytest.raises(MethodError) as caught:
        twice.method("mine")
    assert str(caught.value) == "two plugins bring a method 'mine': mine of dist-a and mine of dist-b; uninstall one"


def test_the_two_methods_differ_in_one_option():
    registry = Registry(list)
    prefix_tuning, p_tuning = registry.method("prefix-tuning"), registry.method("p-tuning-v2")
    assert prefix_tuning.build is p_tuning.build
    assert {**prefix_tuning.options, "prefix_projection": False} == p_tuning.options
    assert prefix_tuning.options["prefix_projection"] is True


def test_the_installed_plugins():
    infos = {info.distribution: info for info in prefixkit.plugins() if info.distribution.startswith("prefixkit-")}
    ours = ("gpt2", "llama", "t5", "bart", "encoders", "legacy")
    assert {f"prefixkit-{name}" for name in ours} <= infos.keys()
    assert all(info.error is None for info in infos.values())
    llama = infos["prefixkit-llama"]
    assert sorted(llama.model_types) == sorted(llama.entry_points), "each cousin is found by its own name"


def test_an_adapter_can_be_given():
    model = tiny.make("gpt2")
    adapter = Adapter(model_types=("other",), stacks=lambda model: [])
    with pytest.raises(
        prefixkit.UnsupportedModelError, match="^the adapter for 'gpt2' finds no attention in this GPT2"
    ):
        prefixkit.apply(model, num_virtual_tokens=2, adapter=adapter)
