"""Who is called chat-only, and who is wrongly: by hand-sized tables."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.diffing.chat_only import (
    RULES,
    agreement,
    best_matches,
    by_norm,
    by_ratio,
    chat_only_ratios,
    counts_at,
    counts_below,
    larger_ratio,
    lowest,
    rule_scores,
    shrunk,
    twinned,
)


def latents(rows, columns):
    return pd.DataFrame(rows, columns=columns)


def test_the_rules_by_hand():
    columns = ["class", "nu_reconstruction", "nu_error"]
    rows = [["chat-only", 0.4, 0.1], ["shared", 0.4, 0.2], ["other", -0.9, -0.9], ["base-only", 0.5, 0.0]]
    table = latents(rows, columns)
    assert by_norm(table).tolist() == [True, False, False, False]
    assert by_ratio(table).tolist() == [True, False, True, False]
    assert not by_ratio(table.assign(nu_error=np.nan)).any()


def test_the_larger_ratio_counts_without_its_sign():
    table = latents([[-0.9, 0.1], [0.2, 0.3], [np.nan, np.nan]], ["nu_error", "nu_reconstruction"])
    assert larger_ratio(table)[:2].tolist() == [0.9, 0.3] and np.isnan(larger_ratio(table)[2])


def test_the_lowest_come_before_the_missing():
    assert lowest(pd.Series([0.3, np.nan, 0.1, 0.2]), 2).tolist() == [False, False, True, True]
    assert lowest(pd.Series([0.3, np.nan]), 9).all()


def test_each_crosscoder_and_rule_gets_a_score():
    columns = ["method", "seed", "class", "nu_reconstruction", "nu_error", "kind", "planted"]
    table = latents(
        [
            ["L1", 0, "chat-only", 0.1, 0.1, "chat-only", 0],
            ["L1", 0, "chat-only", 0.9, 0.9, "weak", 5],
            ["L1", 1, "shared", 0.9, 0.9, "chat-only", 1],
        ],
        columns,
    )
    found = rule_scores(table, torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5, 0.75])).set_index(["method", "seed", "rule"])
    assert len(found) == 2 * len(RULES)
    assert found.loc["L1", 0, "by norm"].tolist() == [1 / 2, 1 / 2, 2, 2]
    assert found.loc["L1", 0, "by ratio"].tolist() == [1.0, 1 / 2, 1, 2]
    assert np.isnan(found.loc["L1", 1, "by norm"].precision) and found.loc["L1", 1, "by norm"].live == 1


def test_a_planted_direction_has_its_best_match_in_each_crosscoder():
    columns = ["method", "seed", "planted", "match"]
    table = latents([["a", 0, 3, 0.8], ["a", 0, 3, 0.9], ["a", 0, -1, 0.99], ["a", 1, 3, 0.7]], columns)
    assert sorted(best_matches(table).match) == [0.7, 0.9]


def test_shrunk_leaves_out_what_is_rightly_called_chat_only():
    """At rho = 0.1 the exact Delta is 0.95, above the cut; at 0.25 it is 0.875."""
    rows = [["weak", 0.1, 0.95], ["weak", 0.25, 0.9], ["weak", 0.25, 0.89], ["chat-only", 0.0, 1.0]]
    table = latents(rows, ["kind", "rho", "delta"])
    assert shrunk(table) == 1 / 2
    assert np.isnan(shrunk(table[:1]))


def test_twinned_asks_for_a_latent_of_either_model():
    columns = ["kind", "planted", "class"]
    both = [["context", 0, "chat-only"], ["context", 0, "base-only"]]
    table = latents([*both, ["context", 1, "chat-only"], ["shared", 2, "other"]], columns)
    assert twinned(table, ["context", "context", "shared", "context", "context"]) == 1 / 4
    assert twinned(table[2:], ["context"]) == 0


def test_the_ratio_of_chat_only_latents_of_twinned_and_of_true_directions():
    columns = ["kind", "planted", "class", "nu_reconstruction"]
    rows = [
        ["context", 0, "chat-only", 0.5],
        ["context", 0, "base-only", 9.0],
        ["context", 1, "chat-only", 0.9],  # without a twin
        ["chat-only", 2, "chat-only", 0.1],
        ["chat-only", 3, "chat-only", 0.3],
        ["chat-only", 3, "shared", 1.0],
    ]
    assert chat_only_ratios(latents(rows, columns)) == {"twinned": 0.5, "alone": pytest.approx(0.2)}
    assert np.isnan(chat_only_ratios(latents(rows[1:], columns))["twinned"])


def test_counts_at_each_cut_with_what_the_ratios_say():
    columns = ["delta", "nu_error", "nu_reconstruction"]
    rows = [[0.5, 1.0, 1.0], [0.85, 0.1, 0.4], [0.95, 0.1, 0.6], [1.0, 0.3, np.nan]]
    found = counts_at(latents(rows, columns)).set_index("cut")
    assert found.per_1000.to_dict() == {0.8: 750.0, 0.9: 500.0}
    assert found.nu_error.to_dict() == {0.8: 0.1, 0.9: pytest.approx(0.2)}
    assert found.nu_reconstruction[0.9] == 0.6 and found.unspecific.to_dict() == {0.8: pytest.approx(2 / 3), 0.9: 1.0}
    assert counts_at(latents(rows[:1], columns)).drop(columns=["cut", "per_1000"]).isna().all(axis=None)


def test_agreement_leaves_out_ratios_that_mean_nothing():
    table = latents([[0.5, 1.0], [0.7, 0.5], [0.9, 0.0], [0.9, 7.0]], ["delta", "nu_error"])
    assert agreement(table, "nu_error") == pytest.approx(1.0)


def test_counts_below_a_cut_for_each_crosscoder():
    rows = [["a", 0, 0.1, 0.3], ["a", 0, -0.5, 0.2], ["b", 0, 0.0, 0.0]]
    found = counts_below(latents(rows, ["method", "seed", "nu_error", "nu_reconstruction"]), [0.2, 0.4, 1.0])
    assert found.cut.tolist() == [0.2, 0.4, 1.0] * 2
    assert found.latents.tolist() == [0, 1, 2, 1, 1, 1]
