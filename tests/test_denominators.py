"""A ratio with nothing to divide by is NaN where that is documented, else one clear sentence, and never inf."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.base.checks import spread
from helpers.base.stats import ratio_interval, recovered
from helpers.dictionaries.autoencoders import JumpReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.quality import at_matched_l0, evaluate, nmse, recovery, refine
from helpers.dictionaries.sweeps import grid, sweep
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.chat_only import agreement, twinned
from helpers.diffing.effects import explained, gap_closed
from helpers.diffing.latent_scaling import latent_table, sae_table
from helpers.diffing.patching import Patched, difference_of
from helpers.diffing.recovery import recalls, score_behaviours, score_planted
from helpers.evaluation import scaling_laws
from helpers.evaluation.probes import fit_probes, probe_loss
from helpers.subjects.chat_tuning import closeness, drift

X = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0))
EQUAL, TORN = torch.ones(64, 2, 16), X.clone()
TORN[40, 1, 3] = math.nan
ALL, SAE = {"all": np.ones(64, bool)}, SparseAutoencoder(16, 64, TopK(4))
BROKEN = SparseAutoencoder(16, 64, TopK(4))
BROKEN.b_dec.data[3] = math.inf
DIFFERENCE = difference_of(Crosscoder(16, 8, TopK(2)))
SHARES = {  # of pairs (n, 2, d_model)
    "nmse": lambda x: nmse(x[:, 1], 0 * x[:, 1]),
    "evaluate": lambda x: evaluate(SAE, x[:, 1]),
    "recovery": lambda x: recovery(SAE, x[:, 1], [1, 4]),
    "explained": lambda x: explained(DIFFERENCE, x),
    "drift": lambda x: drift(x[:, 0], x[:, 1]),
    "closeness": lambda x: closeness(x, ALL | {"all": np.ones(len(x), bool)}),
    "sweep": lambda x: sweep(grid(method=["TopK"], n_latents=[64], sparsity=[4]), lambda n: 1 / 0, x[:, 1], 64),
    "train": lambda x: train(SAE, [x[:, 1]], TrainConfig(64)),
}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("x", [EQUAL, X[:1], TORN], ids=["equal rows", "one row", "NaN in a later row"])
def test_a_share_of_no_variance_is_refused(share, x):
    with pytest.raises(ValueError, match="varian|NaN or infinite|at least two rows"):
        share(x)


@pytest.mark.parametrize("measure", [lambda: evaluate(BROKEN, X[:, 1]), lambda: nmse(X[:, 1], BROKEN(X[:, 1]))])
def test_a_broken_autoencoder_has_no_quality(measure):
    with pytest.raises(ValueError, match="reconstructions are NaN or infinite"):
        measure()


def test_spread_is_the_squared_distance_from_a_point():
    assert spread(torch.tensor([[1.0], [3.0]])) == 2 and spread(torch.ones(2, 1), around=torch.zeros(1)) == 2


def test_a_ratio_to_a_base_of_zeros_is_refused():
    nothing = torch.stack([0 * X[:, 0], X[:, 1]], 1)
    for measure in (lambda: drift(*nothing.unbind(1)), lambda: closeness(nothing, ALL)):
        with pytest.raises(ValueError, match="base are all zero"):
            measure()


def test_of_no_gap_nothing_is_recovered():
    found = recovered(torch.tensor([1.0, 1e-9]), torch.tensor([4.0, -1e-9]))
    assert found[0] == 0.75 and found[1].isnan()
    same = Patched(pd.DataFrame(), pd.DataFrame({"None": [1e-9, 0.0], "All": [1e-8, 0.0]}))
    assert gap_closed(same).isna().all()


def test_latents_of_base_alone_have_no_ratio():
    alone, crosscoder = torch.stack([X[:, 0], 0 * X[:, 1]], 1), Crosscoder(16, 8, TopK(2))
    assert not np.isinf(sae_table(SAE, "base", alone).nu_activation).any()
    crosscoder.decoders.data[1, 0] = 0
    table = latent_table(crosscoder, alone)
    assert not np.isinf(table.filter(like="nu_")).any(axis=None) and table.nu_error.isna()[0]


def test_an_encoder_that_is_off_has_no_start():
    with pytest.raises(ValueError, match="no latent is on at the start: scale the activations"):
        train(SparseAutoencoder(16, 64, JumpReLU(64)), [1e-4 * X[:, 0]], TrainConfig(64))


def test_what_has_no_logarithm_is_left_out_or_refused():
    assert at_matched_l0([0.0, 2.0, 8.0], [1.0, 0.4, 0.1], 4.0) == pytest.approx(0.2)
    for l0, error in (([2.0, math.nan], [0.5, 0.1]), ([2.0, 8.0], [0.5, 0.0]), ([2.0, 8.0], [0.5, math.nan])):
        with pytest.raises(ValueError, match="must be finite and positive"):
            at_matched_l0(l0, error, 4.0)
    assert all(map(math.isnan, ratio_interval([1.0, math.nan])))
    for ratios in ([1.0, math.inf], [1.0, 0.0]):
        with pytest.raises(ValueError, match="positive, finite ratios"):
            ratio_interval(ratios)
    for loss in (0.0, math.nan):
        table = pd.DataFrame({"seed": 0, "n_latents": [1, 2, 4], "nmse": [1.0, 0.5, loss]})
        with pytest.raises(ValueError, match="finite and positive"):
            scaling_laws.exponents(table, "nmse")


def test_a_share_of_what_was_not_planted_is_missing():
    planted = pd.DataFrame({"kind": ["shared"], "planted": [0], "class": ["shared"]})
    called = np.ones(1, bool)
    assert math.isnan(score_planted(called, np.zeros(1, int), torch.tensor([0.5])).recall)
    assert math.isnan(score_behaviours(called, np.zeros(1, int), np.ones(1), np.zeros(1, bool)).recall)
    assert math.isnan(twinned(planted, ["shared"]))

    class Pair:
        labels, directions = ["chat-only"], torch.eye(16)[:1]

    assert recalls(torch.empty(0, 16), Pair).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("delta", [[0.1], [0.1, 0.1]])
def test_what_does_not_vary_agrees_with_nothing(delta):
    assert math.isnan(agreement(pd.DataFrame({"delta": delta, "nu_error": [0.5, 0.6][: len(delta)]}), "nu_error"))


@pytest.mark.parametrize("y", [torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)])
def test_one_class_alone_is_no_task(y):
    for measure in (lambda: fit_probes(X[:, 0], y), lambda: probe_loss(X[:, 0, 0], y, 1.0, 0.0)):
        with pytest.raises(ValueError, match="the same label"):
            measure()


def test_nothing_is_refined_where_there_is_nothing():
    assert refine(SAE, X[:0, 0]).shift().shape == (0,)
    with pytest.raises(ValueError, match="NaN or infinite"):
        refine(SAE, TORN[:, 1])
