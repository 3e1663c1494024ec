"""Mistakes with several prefixes on one model."""

from __future__ import annotations

import torch
from wrong.right import GPT2, T5, Bert, Llama

from prefixkit import lifecycle, mixture
from prefixkit.layout import KeyValue
from prefixkit.mixture import Mixture, Rows

ACTIVE = "test_the_active_prefix_is_served"
ROWS = "test_rows_with_prefixes_of_their_own"
GENERATE = "test_rows_generate_each_with_its_own"
TRAIN = "test_rows_train_their_own"


class TestActivatesNothing(GPT2):
    caught_by = (ACTIVE,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(lifecycle, "switch", lambda *call: None)


class TestTheOthersTrainToo(Llama):
    caught_by = (ACTIVE,)

    def plant(self, monkeypatch):
        def switch(model, prefixes, name):
            original(model, prefixes, name)
            for one in prefixes.attachments.values():
                one.encoder.requires_grad_(True)

        original = lifecycle.switch
        monkeypatch.setattr(lifecycle, "switch", switch)


class TestRowsOfOthers(Bert):
    caught_by = (ROWS, TRAIN)

    def plant(self, monkeypatch):
        original = Rows.of_call
        monkeypatch.setattr(Rows, "of_call", lambda self, batch: original(self, batch)[::-1])


class TestBeamsOfOtherRows(Llama):
    """As if all rows came again for the second beam."""

    caught_by = (GENERATE,)

    def plant(self, monkeypatch):
        monkeypatch.setattr(Rows, "of_call", lambda self, batch: self.names * (batch // len(self.names)))


class TestHiddenColumnsSeen(GPT2):
    """A row without a prefix looks at zeros."""

    caught_by = (ROWS, GENERATE, TRAIN)

    def plant(self, monkeypatch):
        monkeypatch.setattr(Mixture, "lengths", lambda self: None)


class TestShortPrefixInTheFirstColumns(T5):
    """Hidden columns stand between a short prefix and its tokens, and count as distance."""

    caught_by = (ROWS,)

    def plant(self, monkeypatch):
        def stacked(own, index, least):
            pair = original(own, index, least)
            lengths = [0 if one is None else one.key.shape[1] for one in own] + [0]
            most = pair.key.shape[2]
            moves = [lengths[int(row)] - most for row in index]
            return KeyValue(*(torch.stack([r.roll(m, 1) for r, m in zip(part, moves, strict=True)]) for part in pair))

        original = mixture._stacked
        monkeypatch.setattr(mixture, "_stacked", stacked)


class TestRowsMoveAlike(Llama):
    """Every row stands behind the longest prefix."""

    caught_by = (ROWS,)

    def plant(self, monkeypatch):
        original = Mixture.offset
        monkeypatch.setattr(Mixture, "offset", lambda self, stack: (max(original(self, stack)),) * len(self.rows))


class TestRowsWithoutAGraph(Bert):
    caught_by = (TRAIN,)
    fails_with = (RuntimeError,)

    def plant(self, monkeypatch):
        def pieces(self, flats, least=0):
            found = original(self, flats, least)
            return {place: KeyValue(key.detach(), value.detach()) for place, (key, value) in found.items()}

        original = Mixture.pieces
        monkeypatch.setattr(Mixture, "pieces", pieces)
