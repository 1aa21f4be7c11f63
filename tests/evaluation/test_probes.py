import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from helpers.evaluation import probes
from helpers.evaluation.probe_tasks import Labelled
from helpers.evaluation.probes import CHANCE, best_probes, fit_probes, probe, probe_loss, token_table_loss


def made(seed: int, n_tokens: int = 400, width: int = 6, n_tasks: int = 3, tail: float = 1.0) -> Labelled:
    """Noisy labels of random directions; `tail` above 1 makes outliers."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, width, generator=random)
    y = x @ torch.randn(width, n_tasks, generator=random) + torch.randn(n_tokens, n_tasks, generator=random) > 0.5
    x = x.sign() * x.abs() ** tail
    tasks = tuple(f"task {i}" for i in range(n_tasks))
    return Labelled(x, y.T, tasks, torch.arange(n_tokens) % 7)


def test_by_hand():
    z, y = (
        torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0], [-1.0]]),
        torch.tensor([1, 1, 0, 1, 0, 0, 0]).bool(),
    )
    fit = fit_probes(z, y)
    # two values: of the balanced weight at +1 the positives have p, at -1 q, and the best probabilities are these
    p, q = (2 / 3) / (2 / 3 + 1 / 4), (1 / 3) / (1 / 3 + 3 / 4)
    expected = -sum(w * math.log(c) for w, c in ((1 / 3, p), (1 / 8, 1 - p), (1 / 6, q), (3 / 8, 1 - q)))
    assert fit.loss.item() == pytest.approx(expected, abs=1e-6)
    assert (fit.weight + fit.bias).sigmoid().item() == pytest.approx(p, abs=1e-5)


def test_a_planted_unit_has_no_loss_and_the_others_chance():
    data = made(0)
    planted = data._replace(x=torch.cat([data.x, data.y[:1].T.float()], dim=1))
    found = best_probes(planted)
    assert found.unit[0] == 6 and found.fit_loss[0] < 1e-4 and np.isfinite(found.weight[0])
    noise = planted._replace(x=torch.randn(400, 5, generator=torch.Generator().manual_seed(1)))
    assert (best_probes(noise).fit_loss > CHANCE - 0.05).all()


@pytest.mark.parametrize("seed, tail", [(0, 1.0), (1, 1.0), (2, 3.0)])
def test_equals_scikit_learn(seed, tail):
    data = made(seed, tail=tail)
    for y in data.y:
        fit = fit_probes(data.x, y)
        for i in range(data.x.shape[1]):
            z = data.x[:, i : i + 1].double().numpy()
            theirs = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-10, max_iter=1000).fit(z, y.numpy())
            loss = probe_loss(data.x[:, i].double(), y, theirs.coef_.item(), theirs.intercept_.item()).item()
            assert fit.loss[i].item() == pytest.approx(loss, abs=1e-5)


@given(st.integers(0, 1000), st.integers(20, 300), st.integers(1, 12), st.sampled_from([0.5, 1.0, 3.0]), st.booleans())
def test_the_search_equals_fitting_every_unit(seed, n_tokens, width, tail, sparse):
    data = made(seed, n_tokens, width, tail=tail)
    data = data._replace(x=data.x.relu() * (data.x > 1)) if sparse else data
    data = data._replace(y=data.y ^ (torch.arange(n_tokens) == data.y.sum(1, keepdim=True) % n_tokens))
    found = best_probes(data)
    for task, y in enumerate(data.y):
        every = fit_probes(data.x, y).loss
        assert found.fit_loss[task] == pytest.approx(every.min().item(), abs=1e-9)
        assert every[found.unit[task]].item() == pytest.approx(every.min().item(), abs=1e-9)


def test_the_search_goes_on_while_a_bound_is_lower(monkeypatch):
    monkeypatch.setattr(probes, "BINS", 2)  # bounds so loose that their order misleads
    monkeypatch.setattr(probes, "FITTED", 1)
    data = made(5, n_tokens=600, width=40, tail=2.0)
    every = torch.stack([fit_probes(data.x, y).loss for y in data.y])
    loosest = probes._bounds(data.x, data.y)[2].argmin(0)
    assert (loosest != every.argmin(1)).any()  # else this tests nothing
    assert best_probes(data).unit.tolist() == every.argmin(1).tolist()


def test_only_few_units_are_fitted_exactly(monkeypatch):
    fitted, data = [], made(6, n_tokens=2000, width=300)
    exact = probes.fit_probes
    monkeypatch.setattr(probes, "fit_probes", lambda z, *rest: fitted.append(z.shape[1]) or exact(z, *rest))
    best_probes(data)
    assert sum(fitted) < 0.1 * 300 * len(data.tasks)


@given(st.integers(0, 1000), st.sampled_from([1.0, 3.0]))
def test_bounds_are_below_the_exact_loss_and_close(seed, tail):
    data = made(seed, n_tokens=1000, tail=tail)
    exact = torch.stack([fit_probes(data.x, y).loss for y in data.y], dim=1)
    bounds = probes._bounds(data.x, data.y)[2]
    assert (bounds <= exact).all()
    assert tail > 1 or (exact - bounds).max() < 5e-3


def test_a_minimum_not_reached_is_no_bound(monkeypatch):
    data = made(8, tail=3.0)
    exact = torch.stack([fit_probes(data.x, y).loss for y in data.y], dim=1)
    monkeypatch.setattr(probes, "STEPS", 1)
    assert (probes._bounds(data.x, data.y)[2] <= exact).all()


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50), st.booleans())
def test_scale_sign_and_shift_of_a_unit_change_nothing(seed, factor, shift, flip):
    data = made(seed)
    other = data._replace(x=data.x * (-factor if flip else factor) + shift)
    one, two = best_probes(data), best_probes(other)
    assert one.fit_loss.to_numpy() == pytest.approx(two.fit_loss.to_numpy(), abs=1e-5)
    assert one.unit.equals(two.unit)


def test_a_start_far_off_ends_at_the_same_place():
    data = made(3, tail=3.0)
    far = (torch.full((6,), 40.0), torch.full((6,), -40.0))
    assert torch.allclose(fit_probes(data.x, data.y[0], far).loss, fit_probes(data.x, data.y[0]).loss, atol=1e-9)


def test_classes_that_a_unit_separates_have_one_fit_and_a_finite_one():
    z, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([False, False, True, True])
    one, two = fit_probes(z, y), fit_probes(z, y, (torch.tensor([3.0]), torch.tensor([1.0])))
    assert one.weight.item() == pytest.approx(two.weight.item(), rel=1e-3) and 5 < one.weight.item() < 30


def test_a_start_at_the_minimum_costs_one_evaluation(monkeypatch):
    data = made(9)
    fit = fit_probes(data.x + 5, data.y[0])
    calls, derivatives = [], probes._derivatives
    monkeypatch.setattr(probes, "_derivatives", lambda *given: calls.append(1) or derivatives(*given))
    fit_probes(data.x + 5, data.y[0], (fit.weight, fit.bias))
    assert len(calls) == 1


def test_more_of_one_class_changes_nothing():
    data = made(4)
    y = data.y[0]
    often = torch.cat([data.x, *[data.x[~y]] * 3]), torch.cat([y, y.new_zeros(3 * int((~y).sum()))])
    assert torch.allclose(fit_probes(*often).loss, fit_probes(data.x, y).loss, atol=1e-9)
    assert torch.allclose(fit_probes(*often).bias, fit_probes(data.x, y).bias, atol=1e-5)


def test_a_unit_that_never_fires_scores_chance():
    data = made(0)._replace(x=torch.zeros(400, 2))
    found = best_probes(data)
    assert found.fit_loss.to_numpy() == pytest.approx(CHANCE) and (found.weight == 0).all()


def test_chosen_on_one_part_scored_on_the_other():
    y = torch.tensor([True, False] * 20)
    task, ids = ("a",), torch.zeros(40, dtype=torch.long)
    right, noise = y.float() + 0.3 * torch.sin(torch.arange(40.0)), torch.cos(torch.arange(40.0))
    fit = Labelled(torch.stack([noise, right], 1), y[None], task, ids)
    other = torch.arange(40) % 3 == 0
    test = Labelled(torch.stack([right, noise], 1), other[None], task, ids)
    found = probe(fit, test)
    expected = probe_loss(noise.double(), other, found.weight[0], found.bias[0]).item()
    assert found.unit[0] == 1 and found.fit_loss[0] < 0.01 and found.loss[0] == pytest.approx(expected)
    assert probe(fit, fit).loss[0] == pytest.approx(found.fit_loss[0], abs=1e-4)


def test_directions_are_read_as_products():
    data = made(7)
    directions = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    as_channels = data._replace(x=data.x @ directions.T)
    one, two = probe(data, data, directions), probe(as_channels, as_channels)
    assert one.unit.equals(two.unit) and one.loss.to_numpy() == pytest.approx(two.loss.to_numpy(), abs=1e-6)


def test_a_table_of_tokens_by_hand():
    y = torch.tensor([[1, 1, 0, 0]]).bool()
    data = Labelled(torch.zeros(4, 1), y, ("a",), torch.tensor([0, 0, 1, 0]))
    odds = (3 / 4) / (2 / 4), (1 / 4) / (2 / 4)  # with one added to each count; then of token 1
    p = [o / (1 + o) for o in (odds[1], odds[0], odds[1], odds[0])]
    expected = -np.mean([math.log(p[0]), math.log(p[1]), math.log(1 - p[2]), math.log(1 - p[3])])
    assert token_table_loss(data, data._replace(ids=torch.tensor([1, 0, 1, 0])))[0] == pytest.approx(expected)


def test_bad_input_is_named():
    data = made(0)
    one_class = data._replace(y=torch.cat([data.y[:2], torch.ones_like(data.y[:1])]))
    with pytest.raises(ValueError, match="task 'task 2'"):
        best_probes(one_class)
    with pytest.raises(ValueError, match="task 'task 2'"):
        probe(data, one_class)
    with pytest.raises(ValueError, match="directions are NaN or infinite"):
        best_probes(data, torch.full((2, 6), math.inf))
    with pytest.raises(ValueError, match="activations are NaN or infinite"):
        best_probes(data._replace(x=data.x.clone().index_fill_(0, torch.tensor([3]), math.nan)))
