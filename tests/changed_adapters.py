"""Adapters that say something else than the one they are made from."""

from __future__ import annotations

from dataclasses import replace


def with_stacks(adapter, change):
    """``adapter`` with all its stacks changed: ``change(model, stacks)``."""
    return replace(adapter, stacks=lambda model: change(model, list(adapter.stacks(model))))


def with_each_stack(adapter, change):
    """``adapter`` with each stack changed: ``change(model, stack)``."""
    return with_stacks(adapter, lambda model, stacks: [change(model, stack) for stack in stacks])


def with_sites(adapter, change):
    """``adapter`` with the sites of each stack changed: ``change(model, sites)``."""
    return with_each_stack(adapter, lambda model, stack: replace(stack, sites=tuple(change(model, stack.sites))))


def with_each_site(adapter, change):
    """``adapter`` with each site changed: ``change(model, site)`` gives the fields that differ."""
    return with_sites(adapter, lambda model, sites: [replace(site, **change(model, site)) for site in sites])


def with_positions(adapter, change):
    """``adapter`` with the positions of each stack changed: ``change(stack)``."""
    return with_each_stack(adapter, lambda model, stack: replace(stack, positions=change(stack)))


def with_site_forward(adapter, function):
    """``adapter`` with another ``site_forward``."""
    return with_each_stack(adapter, lambda model, stack: replace(stack, site_forward=function))
