"""The benchmark suite runs: every kind of cell with every contender, on tiny models and few repetitions."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import __main__ as command, adapterhub, criteria, findings, measuring, memory, report, step, where
from benchmarks.speed.cells import ADAPTERHUB, ADAPTERHUB_BASE, BASE, PEFT, PREFIXKIT, Cell
from benchmarks.speed.plans import GRIDS, smallest
from benchmarks.speed.timing import Conditions, Contender, in_turns

# PEFT's import, and its look at the hub for the base, warn.
pytestmark = pytest.mark.filterwarnings("default")

QUICK = Conditions(threads=1, repeats=2, warmup=0)
SMALL = dict.fromkeys(smallest(cell) for plan in GRIDS.values() for cell in plan.cells)
HERE = [cell for cell in SMALL if cell.kind in measuring.IN_TURNS]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("grid", GRIDS)
def test_every_plan_has_cells_with_labels_of_their_own(grid):
    cells = (*GRIDS[grid].cells, *GRIDS[grid].on_gpu)
    assert len({cell.label for cell in cells}) == len(cells) > 0
    assert all(cell.kind in {**measuring.IN_TURNS, **measuring.IN_CHILDREN} for cell in cells)
    assert all(GRIDS[grid].beside in cell.contenders for cell in cells)


@pytest.mark.parametrize("cell", HERE, ids=lambda cell: cell.label)
def test_a_cell_gives_an_entry_with_everyone_in_it(cell, monkeypatch, capsys):
    monkeypatch.delenv(adapterhub.OVERLAY, raising=False)
    entry = measuring.measure(cell, QUICK)
    here = adapterhub.without(cell)
    assert set(entry["values"]) == set(here.contenders) == set(entry["processor"])
    assert ("AdapterHub is left out" in capsys.readouterr().out) == (here != cell)
    assert all(len(values) == 2 and min(values) > 0 for values in entry["values"].values())
    assert json.loads(json.dumps(entry)) == entry
    assert entry["versions"]["torch"] == torch.__version__


def test_imports_are_timed_in_interpreters_of_their_own():
    cell = Cell(kind="import", model="none", contenders=(PREFIXKIT,))
    (seconds, _) = measuring.measure(cell, QUICK)["values"][PREFIXKIT]
    assert 0 < seconds < 1


def test_longest_finds_the_edge():
    assert memory.longest(lambda length: 1000 * length, budget=333_000) == 320
    assert memory.longest(lambda length: length * length, budget=1) == 0


def test_memory_counts_what_a_run_adds():
    added = memory.added_by(lambda: torch.ones(2**25).sum())
    assert 0.9 * 2**27 < added < 1.5 * 2**27


def test_adapterhub_is_compared_with_the_base_of_its_own_process():
    entry = {"kind": "step", "values": {BASE: [1.0], ADAPTERHUB: [6.0], ADAPTERHUB_BASE: [3.0]}}
    assert (
        report.table([{"label": "x", **entry}], BASE).splitlines()[-1] == "| x | 1000 ms | 6000 ms (× 2.00) | 3000 ms |"
    )


def test_everyone_takes_turns():
    calls = []
    contenders = [Contender(name, lambda _, name=name: calls.append(name)) for name in "abc"]
    values, _ = in_turns(contenders, Conditions(repeats=3, warmup=0))
    assert "".join(calls) == "abcbcacab"
    assert [len(value) for value in values.values()] == [3, 3, 3]


def test_different_numbers_are_not_timed(monkeypatch):
    cell = smallest(GRIDS["train"].cells[0])
    usual = step.made

    def other(*args, **kwargs):
        ready = usual(*args, **kwargs)
        with torch.no_grad():
            next(value for value in ready[PREFIXKIT].parameters() if value.requires_grad).mul_(2)
        return ready

    monkeypatch.setattr(step, "made", other)
    with pytest.raises(step.DisagreementError, match="prefixkit and PEFT differ by"):
        step.contenders(replace(cell, contenders=(PREFIXKIT, PEFT, BASE)), QUICK)


def written(grid, index, values):
    cell = GRIDS[grid].cells[index]
    findings.write(grid, findings.entry_of(cell, QUICK, values, processor=values))
    return cell


def test_show_has_a_line_for_each_cell(results, capsys, monkeypatch):
    monkeypatch.setattr(command, "draw", lambda _: None)
    cell = written("train", 0, {PREFIXKIT: [9.0, 9.0], PEFT: [], BASE: [1.0, 1.0]})
    written("train", 0, {PREFIXKIT: [1.0, 1.2], PEFT: [], BASE: [1.0, 1.0]})  # in the place of the one before
    written("train", 1, {PREFIXKIT: [0.02, 0.02], BASE: [0.01, 0.01]})
    command.main(["show", "train", "--threads", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert f"| {cell.label} | 1100 ms (× 1.10) | — | 1000 ms |" in shown
    assert sum(line.startswith("| step") for line in shown) == 2
    assert report.text("decode") == "nothing measured; python -m benchmarks.speed run decode"


def test_a_plot_is_drawn(results, monkeypatch):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("benchmarks.speed.plots")
    monkeypatch.setattr(plots, "PLOTS", results)
    written("train", 0, {PREFIXKIT: [1.0], PEFT: [], BASE: [1.0]})
    command.draw("train")
    assert (results / "train.svg").is_file()


def test_check_says_what_passes(results):
    written("train", 0, {PREFIXKIT: [1.05], PEFT: [1.0], BASE: [1.0]})
    assert [line.split()[:2] for line in criteria.lines("train")] == [["pass", "1.050"], ["FAIL", "1.050"]]
    everywhere = list(criteria.lines())
    assert len(everywhere) == len(criteria.CRITERIA)
    assert sum(line.startswith("not measured") for line in everywhere) == len(everywhere) - 2


def test_criteria_name_cells_that_are_planned(results):
    for grid, plan in GRIDS.items():
        for index, cell in enumerate(plan.cells):
            written(grid, index, {name: [2.0 + place] for place, name in enumerate(cell.contenders)})
    assert all(measured is not None for _, measured, _ in criteria.verdicts())


def test_where_the_time_goes_is_all_of_it():
    def run(_):
        torch.ones(400, 400) @ torch.ones(400, 400)
        torch.cat([torch.ones(10**6), torch.ones(10**6)])

    found = where.seconds_by_kind(Contender("x", run))
    assert found["matrix products"] > 0 < found["copies"]
    assert [
        where.kind_of(f"aten::{name}") for name in ("mm", "_scaled_dot_product_flash_attention_for_cpu", "cat")
    ] == [*("matrix products", "attention", "copies")]
    assert where.kind_of("aten::comment") == "other operators" == where.kind_of("aten::concatenation")
    assert where.table({"x": found}).count("\n") == 6


def test_cells_with_other_contenders_have_a_table_of_their_own():
    entries = [
        {"label": label, "kind": "step", "values": {name: [1.0] for name in names}}
        for label, names in (("a", (BASE, PEFT)), ("b", (BASE,)), ("c", (BASE, PEFT)))
    ]
    heads = [text.splitlines()[0] for text in report.tables(entries, BASE).split("\n\n")]
    assert heads == [f"| | {BASE} | {PEFT} |", f"| | {BASE} |"]
    assert report.tables(entries, BASE).split("\n\n")[0].count("\n") == 3
