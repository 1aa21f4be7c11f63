"""The table that grows: what has a line is not trained again, what has none is added, and nothing else changes."""

import dataclasses
import json

import pytest
from tiny_shelf import TINY

from helpers.dictionaries import sweeps
from helpers.dictionaries.collection import PLANS
from helpers.evaluation import frontier
from helpers.evaluation.frontier import EVERY_SIZE, GRID, HALF, RATES, SPARSITIES, frontier_cells, grow

ABOUT = {"commit": "abc", "hardware": "a machine"}


@pytest.fixture
def shelf(open_shelf):
    return open_shelf(seeds=2)


def of_grid(cells):
    return dict.fromkeys(cells, GRID)


def test_the_cells_by_hand(shelf, monkeypatch):
    monkeypatch.setattr(frontier, "SPARSITIES", {"TopK": (8, 4, 2), "ReLU": (0.1, 0.2, 0.3), "Gated": (1.0,)})
    monkeypatch.setattr(shelf, "plan", dataclasses.replace(TINY, sizes=(8, 16, 32)))
    parts = frontier_cells(shelf)
    cells = [cell for cell, part in parts.items() if part != RATES]
    first, last = cells[:14], cells[-6:]
    assert {parts[c] for c in cells[:-6]} == {GRID} and {parts[c] for c in last} == {HALF}
    assert [(c.method, c.n_latents) for c in first] == 6 * [("TopK", 8)] + 6 * [("ReLU", 8)] + 2 * [("Gated", 8)]
    assert [(c.sparsity, c.seed) for c in first[:6]] == [(8, 3), (4, 3), (2, 3), (8, 4), (4, 4), (2, 4)]
    assert {c.n_latents for c in cells if c.method == "Gated"} == {8, 16}
    assert [(c.method, c.n_latents, c.sparsity) for c in last[:2]] == [("TopK", 8, 4), ("ReLU", 8, 0.2)]
    assert {c.tokens for c in last} == {TINY.tokens // 2} and {c.tokens for c in cells[:-6]} == {TINY.tokens}


def test_other_rates_are_half_and_twice_the_rule_at_the_small_sizes(shelf, monkeypatch):
    monkeypatch.setattr(shelf, "plan", dataclasses.replace(TINY, sizes=(8, 16, 32)))
    other = [cell for cell, part in frontier_cells(shelf).items() if part == RATES]
    assert {(c.method, c.n_latents, c.seed) for c in other} == {(m, n, 3) for m in EVERY_SIZE for n in (8, 16)}
    rule = [shelf.cell(c.method, c.n_latents, c.sparsity, c.seed) for c in other]
    assert [c.lr / r.lr for c, r in zip(other, rule, strict=True)] == 4 * [0.5, 2.0]


def test_methods_of_every_size_have_a_middle():
    assert all(len(SPARSITIES[method]) == 5 for method in SPARSITIES) and set(EVERY_SIZE) < set(SPARSITIES)
    assert PLANS["frontier"].ks == SPARSITIES["TopK"] and PLANS["frontier"].prices == SPARSITIES["ReLU"]


def test_a_line_is_what_sweep_and_splice_measure(shelf, tmp_path):
    cells = [shelf.cell("TopK", 16, k, seed) for seed in (3, 4) for k in (2, 4)]
    found = grow(shelf, of_grid(cells), tmp_path / "lines", ABOUT)
    frame, curves, saes = sweeps.sweep(cells, shelf.stream.batches, shelf.heldout, 0)
    assert found.frame.nmse.tolist() == pytest.approx(frame.nmse.tolist(), rel=1e-5)
    costs = frontier.downstream(shelf.model, shelf.heldout_rows()[::3], list(saes.values()), shelf.heldout.mean(0))
    assert found.frame.delta_ce.tolist() == pytest.approx(costs.delta_ce.tolist(), rel=1e-4)
    columns = ["seed", "sparsity", "budget", "tokens", "nmse"]
    assert found.curves[columns].to_numpy() == pytest.approx(curves[columns].to_numpy(), rel=1e-5)
    assert set(found.frame.commit) == {"abc"}


def test_what_has_a_line_is_not_trained_again(shelf, tmp_path, monkeypatch):
    path, cells = tmp_path / "lines", [shelf.cell("TopK", 16, k, 3) for k in (2, 4, 8)]
    first = grow(shelf, of_grid(cells[:2]), path, ABOUT)
    trained = []
    monkeypatch.setattr(frontier, "sweep", lambda cells, *rest: trained.extend(cells) or sweeps.sweep(cells, *rest))
    both = grow(shelf, of_grid(cells), path, ABOUT | {"commit": "def"})
    assert trained == cells[2:] and both.frame.commit.tolist() == ["abc", "abc", "def"]
    assert both.frame.iloc[:2].equals(first.frame) and len(path.read_text().splitlines()) == 3


def test_other_tokens_are_another_line(shelf, tmp_path):
    cell = shelf.cell("TopK", 16, 4, 3)
    half = dataclasses.replace(cell, tokens=cell.tokens // 2)
    found = grow(shelf, {cell: GRID, half: HALF}, tmp_path / "lines", ABOUT)
    assert found.frame.tokens.tolist() == [cell.tokens, cell.tokens // 2]
    assert found.frame.part.tolist() == [GRID, HALF]
    assert found.curves.groupby("budget").tokens.max().to_dict() == {cell.tokens: cell.tokens, half.tokens: half.tokens}


def test_stopped_between_two_parts_it_keeps_the_first(shelf, tmp_path, monkeypatch):
    path, cells = tmp_path / "lines", [shelf.cell("TopK", 16, 4, seed) for seed in (3, 4)]

    def dies_at_the_second(cells, *rest):
        if cells[0].seed == 4:
            raise KeyboardInterrupt
        return sweeps.sweep(cells, *rest)

    monkeypatch.setattr(frontier, "sweep", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        grow(shelf, of_grid(cells), path, ABOUT)
    assert [json.loads(line)["row"]["seed"] for line in path.read_text().splitlines()] == [3]


def test_what_is_stored_is_read_without_a_subject(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "RESULTS", tmp_path)
    assert frontier.stored("hub").frame.empty and frontier.stored("hub").curves.empty
    found = grow(shelf, of_grid([shelf.cell("TopK", 16, k, 3) for k in (4, 2)]), frontier.ledger("hub"), ABOUT)
    again = frontier.stored("hub")
    assert again.frame.sort_values("sparsity").reset_index(drop=True).equals(found.frame[::-1].reset_index(drop=True))
    assert len(again.curves) == len(found.curves)


def test_a_broken_file_is_named(shelf, tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"key": "half')
    with pytest.raises(ValueError, match="lines is no table of lines of JSON"):
        grow(shelf, of_grid([shelf.cell("TopK", 16, 4, 3)]), path, ABOUT)
