"""The plugin is found by name and states exactly the attention calls of a forward pass."""

import tiny


def test_sites_are_the_attention_calls():
    model = tiny.make("bart")
    assert tiny.stated_sites(model) == tiny.attention_calls(model) != set()
