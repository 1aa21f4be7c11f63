"""Scaling laws: known laws are found again, the paper's surface is the paper's, and edges are never called optima."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from helpers.evaluation.scaling_laws import (
    PAPER,
    JointLaw,
    PowerLaw,
    best_learning_rate,
    best_learning_rates,
    bootstrap,
    convergence,
    equal_loss_ratio,
    exponents,
    fit_joint_law,
    fit_power_law,
    has_converged,
    heldout_error,
    line_through,
    lower_envelope,
    octaves_near_best,
    residuals,
    tokens_to_converge,
)

SIZES = 2.0 ** np.arange(8, 16)
PLAIN, FLOORED = (functools.partial(fit_power_law, floor=floor) for floor in (False, True))
N, K = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(11, 20, 2), 2.0 ** np.arange(5, 10)))

PAPER_TABLE = {  # k: loss at n = 2^11, 2^13, 2^15, 2^17, 2^19; floor; exponent
    32: ([0.631, 0.544, 0.474, 0.419, 0.375], 0.199, -0.163),
    64: ([0.602, 0.506, 0.431, 0.374, 0.331], 0.188, -0.192),
    128: ([0.575, 0.470, 0.393, 0.336, 0.294], 0.177, -0.221),
    256: ([0.548, 0.437, 0.358, 0.302, 0.262], 0.167, -0.250),
    512: ([0.523, 0.406, 0.326, 0.272, 0.235], 0.157, -0.279),
}


def noise(size, scale, seed=0):
    return np.exp(scale * np.random.default_rng(seed).standard_normal(size))


# --- power laws


@pytest.mark.parametrize("b, floor", [(-0.3, 0.1), (-0.084, 0.09), (-1.5, 0.02), (0.6, 0.4)])
def test_exact_power_law_is_recovered(b, floor):
    law = FLOORED(SIZES, 3 * SIZES**b + floor)
    assert law[:3] == pytest.approx((3, b, floor), rel=1e-3)
    assert (law.n, law.parameters, law.low, law.high) == (8, 3, 256, 32768)
    assert PLAIN(SIZES, 3 * SIZES**b)[:3] == pytest.approx((3, b, 0), rel=1e-3)


def test_the_papers_curve_of_compute():
    compute = [1e-9, 1e-7, 1e-5, 4e-4]  # shares of GPT-4's pretraining
    loss = PowerLaw(0.056, -0.084, 0.09)(compute)
    assert loss == pytest.approx([0.409, 0.307, 0.237, 0.198], abs=1e-3)
    assert FLOORED(compute, loss)[:3] == pytest.approx((0.056, -0.084, 0.09), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_plain_fit_is_the_regression_of_logs_and_floored_fit_is_the_best_of_many_floors(seed):
    y = (3 * SIZES**-0.3 + 0.1) * noise(8, 0.02, seed)
    slope, height = np.polyfit(np.log(SIZES), np.log(y), 1)
    assert PLAIN(SIZES, y)[:2] == pytest.approx((math.exp(height), slope))
    law = FLOORED(SIZES, y)
    nearby = [law._replace(a=law.a * s, b=law.b * t, floor=law.floor * u) for s, t, u in noise((300, 3), 0.05)]
    assert law.rss < min(np.square(residuals(other, SIZES, y)).sum() for other in nearby)
    assert law.rss == pytest.approx(np.square(residuals(law, SIZES, y)).sum())
    assert law.r2 == pytest.approx(1 - law.rss / np.square(np.log(y) - np.log(y).mean()).sum())


def test_a_curve_without_floor_gets_a_floor_of_exactly_zero():
    bent_down = SIZES**-0.3 * np.exp(-0.01 * np.log(SIZES / 256) ** 2)
    assert FLOORED(SIZES, bent_down).floor == 0
    assert FLOORED(SIZES, bent_down).rss == PLAIN(SIZES, bent_down).rss


def test_one_high_point_over_a_plateau_stays_finite():
    compute, loss = 1e15 * SIZES, np.append(0.9, np.full(7, 0.3)) * noise(8, 0.01)
    law = FLOORED(compute, loss)
    assert -10 <= law.b < -5 and law.floor == pytest.approx(0.3, rel=0.01)
    assert np.abs(residuals(law, compute, loss)).max() < 0.03


@settings(max_examples=12)
@given(
    st.floats(-0.6, -0.1), st.floats(0.02, 0.3), st.floats(0.01, 100), st.floats(0.01, 100), st.permutations(range(8))
)
def test_scales_move_what_they_should_and_order_does_not_matter(b, floor, up, wide, order):
    y = (3 * SIZES**b + floor) * noise(8, 0.005)
    law = FLOORED(SIZES, y)
    scaled = FLOORED(SIZES, up * y)
    assert scaled[:3] == pytest.approx((up * law.a, law.b, up * law.floor), rel=1e-3, abs=1e-4 * up)
    assert FLOORED(wide * SIZES, y).b == pytest.approx(law.b, rel=1e-3)
    assert FLOORED(SIZES[order], y[order])[:3] == pytest.approx(law[:3], rel=1e-3, abs=1e-4)
    assert law.floor >= 0 and law.rss <= PLAIN(SIZES, y).rss


def test_aic_by_hand():
    law = PowerLaw(1, -1, parameters=2, n=8, rss=0.08)
    assert law.aic == pytest.approx(8 * math.log(0.01) + 6 + 24 / 4)
    assert law._replace(rss=0).aic == law._replace(rss=1e-25).aic  # both are rounding
    with pytest.raises(ValueError, match="AICc needs at least 6 points, got 5: add sizes or seeds"):
        _ = FLOORED(SIZES[:5], SIZES[:5] ** -0.3).aic


def test_aic_wants_a_floor_only_where_there_is_one():
    def gain(floor, seed):
        y = (3 * SIZES**-0.4 + floor) * noise(8, 0.01, seed)
        return PLAIN(SIZES, y).aic - FLOORED(SIZES, y).aic

    assert min(gain(0.1, seed) for seed in range(10)) > 0
    assert sum(gain(0, seed) < 0 for seed in range(20)) >= 18
    assert PLAIN(SIZES, SIZES**-0.4).aic < FLOORED(SIZES, SIZES**-0.4).aic  # both are exact


def test_heldout_error_by_hand():
    y = 3 * SIZES**-0.4
    assert heldout_error(SIZES, np.append(y[:-1], y[-1] * 1.1), floor=False) == pytest.approx(math.log(1.1))
    with_floor = y + 0.1
    assert heldout_error(SIZES, with_floor, floor=True) < 1e-3 < heldout_error(SIZES, with_floor, floor=False)
    twice = np.append(SIZES, SIZES[-1]), np.append(y, y[-1] * 1.21)
    assert heldout_error(*twice, floor=False) == pytest.approx(math.log(1.1))  # the mean of 0 and ln 1.21


def test_latents_for_the_same_loss():
    small, large = PLAIN(SIZES, SIZES**-0.5), PLAIN(SIZES, (SIZES / 4) ** -0.5)
    assert equal_loss_ratio(small, large) == pytest.approx(4)
    assert equal_loss_ratio(large, small) == pytest.approx(1 / 4)


def test_latents_for_the_same_loss_against_root_finding():
    small, large = FLOORED(SIZES, 3 * SIZES**-0.5 + 0.05), FLOORED(SIZES, 3 * SIZES**-0.4 + 0.1)
    levels = np.geomspace(large(SIZES[-1]), small(SIZES[0]), 33)  # large is above small throughout
    needs = [[brentq(lambda x, law=law, y=y: law(x) - y, 1, 1e9) for law in (small, large)] for y in levels]
    assert equal_loss_ratio(small, large) == pytest.approx(
        np.exp(np.mean([math.log(b / a) for a, b in needs])), rel=1e-4
    )


def test_laws_without_a_common_loss_are_refused():
    with pytest.raises(ValueError, match="share no loss.*0.0055, 0.0625.*0.5524, 6.25.*train more sizes"):
        equal_loss_ratio(PLAIN(SIZES, SIZES**-0.5), PLAIN(SIZES, 100 * SIZES**-0.5))


# --- the joint law


@pytest.mark.parametrize("k", PAPER_TABLE)
def test_the_papers_surface(k):
    losses, floor, exponent = PAPER_TABLE[k]
    assert PAPER(2.0 ** np.arange(11, 20, 2), k) == pytest.approx(losses, abs=1e-3)
    assert PAPER.floor(k) == pytest.approx(floor, abs=6e-4)
    assert PAPER.exponent(k) == pytest.approx(exponent, abs=6e-4)


def test_exact_joint_law_is_recovered_in_any_order():
    order = np.random.default_rng(0).permutation(25)
    for rows in (slice(None), order):
        assert fit_joint_law(N[rows], K[rows], PAPER(N, K)[rows]) == pytest.approx(PAPER, abs=1e-3)
    other = JointLaw(0.3, -0.1, -0.2, -0.03, -2.0, -0.3)
    assert fit_joint_law(N[::2], K[::2], other(N, K)[::2]) == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_joint_fit_beats_the_truth_on_noisy_data_and_no_start_beats_it(seed):
    loss = PAPER(N, K) * noise(25, 0.005, seed)
    error = np.square(residuals(fit_joint_law(N, K, loss), N, K, loss)).sum()
    assert error < np.square(residuals(PAPER, N, K, loss)).sum()
    more = fit_joint_law(N, K, loss, starts=200, seed=1)
    assert error == pytest.approx(np.square(residuals(more, N, K, loss)).sum(), rel=1e-6)


def test_a_floor_that_is_not_there_stays_on_its_bound():
    loss = np.exp(1 - 0.1 * np.log(K) - 0.3 * np.log(N) - 0.02 * np.log(N) * np.log(K))
    law = fit_joint_law(N, K, loss)
    middle = np.exp(np.log(K).mean())
    assert 0.99e-3 * loss.min() < law.floor(middle) < 1e-2 * loss.min() and abs(law.eta) <= 2
    assert np.abs(residuals(law, N, K, loss)).max() < 0.01


def test_residuals_by_hand():
    assert residuals(PowerLaw(2, -1), [1, 2], [4, 1]) == pytest.approx([math.log(2), 0])
    assert residuals(JointLaw(0, 0, -1, 0, 0, 1), [2], [3], [7]) == pytest.approx([math.log(2)])  # 1/2 + 3


# --- intervals


def half_width(interval):
    return (interval[2] - interval[1]) / 2


@pytest.mark.parametrize("seeds", [1, 3])
def test_bootstrap_covers_the_truth_and_is_as_wide_as_theory_says(seeds):
    x = np.repeat(SIZES, seeds)
    found = [bootstrap(PLAIN, x, x**-0.3 * noise(len(x), 0.05, seed), draws=100)["b"] for seed in range(30)]
    assert 26 <= sum(low < -0.3 < high for _, low, high in found)
    student = {1: 2.447, 3: 2.120}[seeds]  # of 8 - 2 and of 24 - 8 degrees of freedom
    expected = student * 0.05 / (np.log(x).std() * math.sqrt(len(x)))
    assert math.sqrt(np.mean([half_width(each) ** 2 for each in found])) == pytest.approx(expected, rel=0.15)


def test_seeds_are_redrawn_within_their_cell():
    x, y = np.repeat(SIZES[:4], 2), np.repeat([5.0, 1.0, 7.0, 2.0], 2)  # a bad fit, but without any noise
    assert half_width(bootstrap(PLAIN, x, y, draws=20)["b"]) == pytest.approx(0, abs=1e-12)
    ratio = np.array([[1.1], [1.2], [1.3], [1.4]])  # of the two seeds of a cell
    y = y * np.hstack([np.ones((4, 1)), ratio]).ravel()
    draws = []
    bootstrap(lambda x, y: draws.append(y) or {"number": 1.0}, x, y, draws=50)
    middle, student = np.sqrt(y[::2] * y[1::2])[:, None], 2.776 / 1.960  # of 8 - 4 degrees of freedom
    allowed = middle * np.exp(np.array([-1, 1]) * np.log(ratio) / 2 * math.sqrt(2) * student)
    for drawn in draws[1:]:
        assert (np.abs(drawn.reshape(4, 2, 1) / allowed[:, None] - 1).min(-1) < 1e-4).all()
    assert len({tuple(drawn) for drawn in draws}) > 30


def test_bootstrap_names_values_and_repeats_itself():
    loss = PAPER(N, K) * noise(25, 0.002)
    found = bootstrap(fit_joint_law, N, K, loss, draws=20)
    assert list(found) == list(JointLaw._fields)
    assert [value for value, _, _ in found.values()] == pytest.approx(fit_joint_law(N, K, loss), rel=1e-6)
    assert found["gamma"][1] < PAPER.gamma < found["gamma"][2] < 0
    order = np.random.default_rng(0).permutation(25)
    assert bootstrap(fit_joint_law, N[order], K[order], loss[order], draws=20) == found
    assert bootstrap(fit_joint_law, N, K, loss, draws=20, seed=1) != found


def test_any_number_can_be_bootstrapped():
    def gains(x, y):
        return {"gain": heldout_error(x, y, floor=False) / heldout_error(x, y, floor=True)}

    y = (3 * SIZES**-0.5 + 0.1) * noise(8, 0.002)
    with pytest.raises(ValueError, match="some cell has one seed only: pass `around`"):
        bootstrap(gains, SIZES, y)
    value, low, high = bootstrap(gains, SIZES, y, around=FLOORED(SIZES, y), draws=20)["gain"]
    assert value == gains(SIZES, y)["gain"] and 1 < low < high


# --- training curves


def curves_of(sizes, seed=0):
    """Larger sizes start later in compute, and end lower."""
    parts = []
    for i, size in enumerate(sizes):
        compute = size * np.geomspace(1, 1e4, 40)
        loss = (0.5 * size**-0.3 + 0.8 * (compute / size) ** -0.4) * noise(40, 0.003, seed + i)
        parts.append(pd.DataFrame({"compute": compute, "loss": loss, "n_latents": size}))
    return pd.concat(parts, ignore_index=True)


def envelope_one_by_one(curves, points):
    rows = []
    for compute in np.geomspace(curves.compute.min(), curves.compute.max(), points):
        known = []
        for size, curve in curves.groupby("n_latents"):
            if curve.compute.iloc[0] <= compute:
                log = np.interp(math.log(compute), np.log(curve.compute), np.log(curve.loss))
                known.append((math.exp(log), size, curve.compute.iloc[-1] >= compute))
        loss, best, training = min(known)
        sizes = [size for _, size, _ in known]
        if training and min(sizes) < best < max(sizes):
            rows.append((compute, loss, best))
    return pd.DataFrame(rows, columns=["compute", "loss", "n_latents"])


@settings(max_examples=12)
@given(st.lists(st.sampled_from([16, 32, 64, 128, 256, 512]), min_size=3, unique=True), st.integers(0, 99))
def test_envelope_is_the_best_of_every_curve_one_by_one(sizes, seed):
    curves = curves_of(sizes, seed)
    envelope = lower_envelope(curves, points=40)
    pd.testing.assert_frame_equal(envelope, envelope_one_by_one(curves, 40), check_dtype=False)
    assert min(sizes) < envelope.n_latents.min() and envelope.n_latents.max() < max(sizes)
    for _, curve in curves.groupby("n_latents"):
        on_curve = np.exp(np.interp(np.log(envelope.compute), np.log(curve.compute), np.log(curve.loss), left=np.inf))
        assert (envelope.loss <= on_curve * (1 + 1e-12)).all()


def test_order_of_the_curves_does_not_matter():
    curves = curves_of([16, 64, 256, 1024])
    mixed = curves.sort_values("compute", kind="stable")
    pd.testing.assert_frame_equal(lower_envelope(mixed), lower_envelope(curves))


def test_envelope_by_hand():
    compute = [1.0, 10.0, 100.0, 1000.0]
    losses = {1: [4.0, 3.8, 3.7, 3.6], 2: [5.0, 3.0, 2.9, 2.8], 3: [6.0, 4.0, 2.0, 1.9], 4: [7.0, 5.0, 3.0, 1.0]}
    parts = [pd.DataFrame({"compute": compute, "loss": loss, "n_latents": size}) for size, loss in losses.items()]
    curves = pd.concat(parts)
    envelope = lower_envelope(curves, points=4)  # size 1 is best at 1 and size 4 at 1000: edges
    assert envelope.to_numpy().tolist() == [pytest.approx([10, 3, 2]), pytest.approx([100, 2, 3])]
    late = curves[(curves.n_latents != 3) | (curves.compute >= 100)]
    assert list(lower_envelope(late, points=4).n_latents) == [2, 3]  # nobody knows size 3 before 100
    ended = curves[(curves.n_latents != 3) | (curves.compute < 100)]
    assert list(lower_envelope(ended, points=4).n_latents) == [2, 2]
    stopped = curves[(curves.n_latents != 3) | (curves.compute < 1000)].replace({"loss": {1.0: 2.5}})
    assert list(lower_envelope(stopped, points=4).n_latents) == [2, 3]  # the best at 1000 has ended before


def test_envelope_refuses_edges_only_and_curves_that_run_backwards():
    with pytest.raises(ValueError, match="at no compute does a size beat a smaller and a larger one: train 3 sizes"):
        lower_envelope(curves_of([16, 32]))
    with pytest.raises(ValueError, match="compute and loss must be one-dimensional, of one length, and not empty"):
        lower_envelope(curves_of([16, 32, 64])[:0])
    with pytest.raises(ValueError, match="compute must increase along a curve: pass one run at a time"):
        lower_envelope(pd.concat([curves_of([16, 32, 64])] * 2))


TOKENS = np.linspace(1000, 100_000, 200)


def approach(time, amplitude=2.0, floor=0.3):
    return floor * (1 + amplitude * np.exp(-TOKENS / time))


def test_tokens_until_an_exponential_is_within_one_percent():
    for time in (3000, 6000, 12000):
        assert tokens_to_converge(TOKENS, approach(time)) == pytest.approx(time * math.log(200), rel=0.03)
    assert tokens_to_converge(TOKENS, approach(6000), within=0.1) == pytest.approx(6000 * math.log(20), rel=0.01)
    assert tokens_to_converge(TOKENS, np.ones(200)) == 1000


def test_noise_hardly_moves_the_tokens_to_converge():
    found = [tokens_to_converge(TOKENS, approach(6000) * noise(200, 0.01, seed)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(6000 * math.log(200), rel=0.1) and np.std(found) < 0.15 * np.mean(found)


def test_a_loss_that_comes_back_has_not_stayed():
    dip = approach(3000).copy()
    dip[60:80] = 0.36  # between 30,000 and 40,000 tokens
    assert tokens_to_converge(TOKENS, approach(3000)) < 20_000 < tokens_to_converge(TOKENS, dip) < 41_000


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_units_of_loss_and_tokens_do_not_matter(loss, tokens):
    curve = approach(6000) * noise(200, 0.003)
    here, there = tokens_to_converge(TOKENS, curve), tokens_to_converge(tokens * TOKENS, loss * curve)
    assert there == pytest.approx(tokens * here) and has_converged(tokens * TOKENS, loss * curve)


def test_convergence_is_a_flat_last_fifth():
    assert has_converged(TOKENS, approach(6000) * noise(200, 0.005))
    assert not has_converged(TOKENS, TOKENS**-0.1)  # 0.8^-0.1 is 2 % over the last fifth
    assert has_converged(TOKENS, TOKENS**-0.1, within=0.03)
    assert not has_converged(TOKENS, approach(6000) * np.where(TOKENS > 80_000, TOKENS / 80_000, 1))  # rises


@pytest.mark.parametrize("judge", [tokens_to_converge, has_converged])
def test_curves_that_run_backwards_or_are_too_short_are_refused(judge):
    with pytest.raises(ValueError, match="tokens must increase along a curve: pass one run at a time"):
        judge(TOKENS[::-1], approach(6000))
    with pytest.raises(
        ValueError, match="the last fifth of the tokens has 2 points, not 3 or more: measure more often"
    ):
        judge([1, 2, 3, 4, 5], [5, 4, 3, 3, 3])


def test_each_run_is_judged_by_itself():
    settled, falling = (
        pd.DataFrame({"n_latents": n, "sparsity": 4, "seed": 0, "tokens": TOKENS, "nmse": nmse})
        for n, nmse in ((64, approach(6000)), (32, TOKENS**-0.1))
    )
    found = convergence(pd.concat([settled, falling]), within=0.015)
    assert found[["n_latents", "converged"]].to_numpy().tolist() == [[32, False], [64, True]]
    assert found.tokens_needed.tolist() == [tokens_to_converge(c.tokens, c.nmse) for c in (falling, settled)]


def test_a_power_for_each_seed_that_has_the_sizes():
    table = pd.DataFrame({"n_latents": [2, 4, 8, 2, 4], "seed": [0, 0, 0, 1, 1], "nmse": [4, 2, 1, 9, 9]})
    assert exponents(table, "nmse") == pytest.approx([-1])
    assert exponents(table, "nmse", sizes=2) == pytest.approx([-1, 0])


def test_a_line_of_given_power_goes_through_the_middle():
    assert line_through([1, 4], [2, 8], b=-0.5)([2, 4, 16]) == pytest.approx([4, 4 / 2**0.5, 4 / 8**0.5])
    assert np.isnan(line_through([1, 4], [2, np.nan], b=-0.5)([2, 4])).all()


# --- learning rates


@given(st.floats(-2.4, 2.4), st.floats(0.05, 2), st.permutations(range(7)))
def test_minimum_of_a_parabola_is_found(centre, curvature, order):
    lr = 1e-3 * np.exp(np.array([-3.0, -2.0, -1.1, 0.0, 1.0, 2.2, 3.0]))  # uneven
    loss = np.exp(curvature * (np.log(lr / 1e-3) - centre) ** 2)
    found, interior = best_learning_rate(lr[order], loss[order])
    assert interior and found == pytest.approx(1e-3 * math.exp(centre), rel=1e-6)


def test_minimum_at_an_edge_is_not_a_minimum():
    assert best_learning_rate([1, 2, 4], [3, 2, 1]) == (4, False)
    assert best_learning_rate([4, 1, 2], [3, 1, 2]) == (1, False)
    assert best_learning_rate([1, 2, 4], [1, 1, 1])[1] is False
    assert best_learning_rate([1, 2, 2], [1, 2, 3]) == (1, False)


def test_seeds_of_a_learning_rate_are_averaged():
    once = best_learning_rate([1, 2, 4], [3, 2, 2.5])
    assert best_learning_rate([1, 2, 4, 2], [3, 1, 2.5, 4]) == pytest.approx(once)  # 2 = sqrt(1 * 4)


def test_rates_at_an_edge_are_left_out():
    of = {"lr": [1, 2, 4] * 3, "nmse": [2, 1, 2, 3, 2, 1, 2, 1, 2], "n_latents": [8] * 3 + [16] * 3 + [8] * 3}
    found = best_learning_rates(pd.DataFrame(of | {"seed": [0] * 6 + [1] * 3}))
    assert found.to_numpy() == pytest.approx(np.array([[8, 0, 2], [8, 1, 2]]))


def test_octaves_near_the_best_by_hand():
    lr, loss = [1, 2, 4, 8], [1.1, 1.0, 1.0, 1.1]  # 5 % is reached half an octave outside of 2 and of 4
    assert octaves_near_best(lr, loss) == pytest.approx(2, abs=0.01)
    assert octaves_near_best(lr, loss, within=0.2) == pytest.approx(3)
    assert octaves_near_best([*lr, 2], [1.1, 1.2, 1.0, 1.1, 0.8]) == pytest.approx(2, abs=0.01)  # seeds are averaged


# --- bad input


@pytest.mark.parametrize(
    "fit, columns, sentence",
    [
        (PLAIN, ([1, 2], [1, 2]), "2 constants need at least 3 points with 2 different x, got 2 with 2: add sizes"),
        (FLOORED, ([1, 2, 3], [3, 2, 1]), "3 constants need at least 4 points with 3 different x, got 3 with 3"),
        (PLAIN, ([2, 2, 2], [1, 2, 3]), "3 points with 2 different x, got 3 with 1"),
        (FLOORED, ([1, 1, 2, 2], [1, 2, 3, 4]), "4 points with 3 different x, got 4 with 2"),
        (PLAIN, ([1, 2, 3], [1, math.nan, 1]), "y must be finite and positive, found nan: leave out the runs"),
        (PLAIN, ([1, 2, math.inf], [1, 1, 1]), "x must be finite and positive, found inf"),
        (FLOORED, ([1, 2, 3, 4], [1, 0, 1, 1]), "y must be finite and positive, found 0.0"),
        (PLAIN, ([1, 2, 3], [1, 2]), "x and y must be one-dimensional, of one length, and not empty"),
        (PLAIN, (np.ones((3, 2)), np.ones((3, 2))), "x and y must be one-dimensional, of one length, and not empty"),
        (PLAIN, ([], []), "x and y must be one-dimensional, of one length, and not empty"),
        (fit_joint_law, (N[:6], K[:6], N[:6]), "6 constants need at least 7 points with 3 different n, got 6"),
        (fit_joint_law, (N[:10], K[:10], N[:10]), "with 3 different k, got 10 with 2"),
        (fit_joint_law, (K[:10], N[:10], N[:10]), "with 3 different n, got 10 with 2"),
        (best_learning_rate, ([1, 2, 4], [1, 1, math.inf]), "loss must be finite and positive, found inf"),
        (has_converged, ([1, 2, 3], [1, -1, 1]), "loss must be finite and positive, found -1.0"),
        (functools.partial(bootstrap, PLAIN), (SIZES, -SIZES), "column 2 must be finite and positive, found -256.0"),
    ],
)
def test_bad_columns_are_refused_in_one_sentence(fit, columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(*columns)
