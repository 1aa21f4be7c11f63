"""Sweeps: every cell is trained as if it were alone, and methods are compared at the same L0."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from helpers.metrics import evaluate
from helpers.sweeps import Cell, grid, matched_ratios, sweep
from helpers.training import train


def batches(tokens):
    random = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 8, generator=random).split(64)


HELDOUT = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))


def test_grid_has_a_cell_for_each_combination():
    cells = grid(method=["TopK"], n_latents=[16, 32], sparsity=[2], seed=range(3))
    assert len(set(cells)) == 6 and Cell("TopK", 32, 2, 1) in cells


def test_a_cell_in_a_sweep_is_the_cell_alone():
    first = Cell("TopK", 16, 2)
    cells = [first, Cell("ReLU", 16, 0.1, seed=1), first, dataclasses.replace(first, unit_norm=False)]
    frame, saes = sweep(cells, batches, HELDOUT, tokens=1024)
    assert len(frame) == len(saes) == 3  # the repeated cell is trained once
    for cell, row in zip(saes, frame.itertuples(), strict=True):
        alone = train(cell.build(8), batches(1024), cell.config(1024)).sae
        assert torch.equal(alone.W_dec, saes[cell].W_dec)
        assert row.nmse == evaluate(alone, HELDOUT).nmse and row.method == cell.method
    assert frame.loss.iloc[1] > frame.nmse.iloc[1] - 1 and math.isfinite(frame.loss.sum())


def test_price_goes_to_the_penalty_and_k_does_not():
    assert Cell("ReLU", 16, 0.3).config(10).sparsity == 0.3
    assert Cell("BatchTopK", 16, 3).config(10).sparsity == 0
    assert Cell("BatchTopK", 16, 3).build(8).activation.k == 3


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no method 'TopKK'; choose one of"):
        Cell("TopKK", 16, 2).build(8)


def frontier(method, seed, factor):
    return pd.DataFrame({"method": method, "seed": seed, "l0": [4.0, 64.0], "nmse": [factor / 4, factor / 64]})


def test_ratio_at_matched_l0_by_hand():
    frame = pd.concat([frontier(m, s, f) for m, s, f in [("A", 0, 3), ("B", 0, 2), ("A", 1, 5), ("B", 1, 1)]])
    ratios = matched_ratios(frame, "A", "B", at=[8, 16])
    assert ratios.to_dict() == {0: pytest.approx(1.5), 1: pytest.approx(5.0)}


def test_no_l0_in_common_is_said_and_levels_outside_do_not_count():
    shifted = frontier("B", 0, 2).assign(l0=[32.0, 640.0])
    frame = pd.concat([frontier("A", 0, 2), shifted])
    with pytest.raises(ValueError, match="L0 32.0 to 64.0 only"):
        matched_ratios(frame, "A", "B", at=[8, 16])
    assert matched_ratios(frame, "A", "B", at=[8, 32])[0] == pytest.approx((2 / 32) / (2 / 4))
