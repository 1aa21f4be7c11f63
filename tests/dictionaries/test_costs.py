"""The cost model: a shape counted by hand, how costs grow, what is predicted from them, and that steps can be timed."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.base import products
from helpers.dictionaries import costs, kernels
from helpers.dictionaries import speed as timings
from helpers.dictionaries.costs import Cost, Machine, Part, estimate, memory, predict, step_cost, training_flops

TINY = (3, 16, 2, 5)  # d_model, n_latents, k, batch
UNIT = Machine(**{field.name: 1.0 for field in dataclasses.fields(Machine)})
SLOW = Machine(product=1e9, maxima=1e9, selection=1e8, pairs=1e7, gather=1e9, stream=1e9, overhead=0.01)

shapes = st.tuples(st.integers(1, 900), st.integers(1, 9000), st.integers(1, 200), st.integers(1, 5000)).filter(
    lambda shape: shape[2] <= shape[1]
)


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def itemsize(request, monkeypatch):
    monkeypatch.setattr(products, "has_fast_bf16", lambda device_type="cpu": request.param)
    return 2 if request.param else 4


def test_a_tiny_shape_counted_by_hand(itemsize):
    rows = Part(60, 120, "gather")  # 10 pairs, 3 wide, a product and a sum each, 4 bytes
    assert step_cost(*TINY).parts == {
        "encoder product": Part(480, itemsize * (15 + 48 + 80), "product"),
        "maxima": Part(80, itemsize * 80, "maxima"),
        "selection": Part(60, 480, "selection"),  # 8 of 16 members, then all 4 groups, of 5 tokens
        "pairs": Part(10, 400, "pairs"),
        "decode": Part(60, itemsize * 30, "gather"),
        "latents' gradient": rows,
        "encoder rows": rows,
        "decoder rows": rows,
        "activations": Part(240, 960, "stream"),
        "copies": Part(96, 48 * (12 + 2 * itemsize), "stream"),
        "Adam": Part(1440, 2304, "stream"),
    }


def test_sparse_products_are_two_of_the_dense_ten():
    d, n, k, batch = 256, 8192, 32, 2048
    products = {"encoder product", "decode", "latents' gradient", "encoder rows", "decoder rows"}
    flops = sum(part.flops for name, part in step_cost(d, n, k, batch).parts.items() if name in products)
    assert flops == training_flops(d, n, k, batch) == batch * d * (2 * n + 8 * k)


@given(st.integers(1, 300), st.integers(1, 40))
@example(64, 16)  # as many groups as are kept
def test_candidates_are_those_that_topk_selects_from(n, k):
    k, seen, select = min(k, n), [], kernels._select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_select", lambda x, k: (seen.append(x.shape[1]), select(x, k))[1])
        kernels.topk(torch.ones(1, n), k)
    assert timings.candidates(n, k) == sum(seen)


@given(shapes, st.integers(0, 3))
def test_costs_grow_with_every_argument(shape, which):
    larger = tuple(size * (4 if i == which else 1) for i, size in enumerate(shape))
    if larger[2] <= larger[1]:
        for before, after in zip(*(step_cost(*s).parts.values() for s in (shape, larger)), strict=True):
            assert (
                after.bytes >= before.bytes > 0 or before.rate == "selection"
            )  # more groups may leave fewer to select
        assert memory(*larger) > memory(*shape)
        assert training_flops(*larger) > training_flops(*shape)
        assert predict(step_cost(*larger), SLOW) > predict(step_cost(*shape), SLOW)


@given(shapes)
def test_twice_the_batch_is_twice_the_flops_but_one_update(shape):
    d, n, k, batch = shape
    once, twice = (step_cost(d, n, k, b).parts for b in (batch, 2 * batch))
    for name, part in once.items():
        assert twice[name].flops == part.flops * (1 if name in ("Adam", "copies") else 2)


def test_memory_holds_weights_and_moments_but_no_more_latents_for_a_larger_batch():
    d, n, k = 768, 16384, 32
    assert memory(d, n, k, 2048) > 3 * 4 * (2 * n * d + n + d)
    growth = {memory(d, n, k, 16384) - memory(d, n, k, 8192) for n in (8192, 16384)}
    assert growth == {8192 * (64 * k + 40 * d)}


def test_auxk_is_a_step_of_the_dead_on_its_share_of_the_tokens():
    plain, with_it = step_cost(8, 64, 4, 100).parts, step_cost(8, 64, 4, 100, k_aux=16, dead=32, share=0.25).parts
    among_dead = step_cost(8, 32, 16, 25).parts
    assert {name: with_it[name] for name in plain} == plain
    assert with_it.keys() - plain.keys() == {f"AuxK {name}" for name in plain if name != "Adam"}
    for name in ("encoder product", "maxima", "selection", "pairs", "decoder rows"):
        assert with_it[f"AuxK {name}"] == among_dead[name]
    assert step_cost(8, 64, 4, 100, k_aux=16).parts == plain
    few = step_cost(8, 64, 4, 100, k_aux=16, dead=3).parts["AuxK pairs"]
    assert few.flops == 300  # no more than are dead


def test_predict_is_the_sum_of_the_parts_and_the_overhead():
    cost = Cost({"encoder product": Part(6, 70, "product"), "AuxK decode": Part(7, 80, "gather")})
    machine = dataclasses.replace(UNIT, product=2.0, gather=4.0, overhead=100.0)
    assert costs.part_seconds(cost, machine) == {"encoder product": 3.0, "AuxK decode": 20.0, "overhead": 100.0}
    assert predict(cost, machine) == 123.0
    assert predict(step_cost(*TINY), UNIT) == pytest.approx(
        1 + sum(costs.part_seconds(Cost({name: part}), UNIT)[name] for name, part in step_cost(*TINY).parts.items())
    )


def test_estimate_is_a_line():
    made = estimate(256, [(512, 32, 2_000_000), (8192, 32, 4_000_000)], 2048, SLOW)
    steps = {n: math.ceil(tokens / 2048) for n, tokens in ((512, 2_000_000), (8192, 4_000_000))}
    assert made.seconds == pytest.approx(sum(t * predict(step_cost(256, n, 32, 2048), SLOW) for n, t in steps.items()))
    assert (made.tokens, made.autoencoders, made.bytes) == (6_000_000, 2, memory(256, 8192, 32, 2048))
    line = str(dataclasses.replace(made, seconds=7560.0, bytes=1_230_000_000))
    assert line == "2 autoencoders, 6.00M tokens in all: about 2.1 h, 1.23GB at the peak"
    assert str(estimate(8, [(16, 1, 999)], 100, SLOW)).startswith("1 autoencoder, 999 tokens in all: about ")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.042, "0.042 s"), (59, "59 s"), (180, "3 min"), (3500, "58 min"), (7560, "2.1 h"), (4e5, "111 h")],
)
def test_durations_are_for_people(seconds, text):
    assert costs._duration(seconds) == text


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: step_cost(8, 16, 17, 4), "k at most n_latents, .*n_latents=16, k=17"),
        (lambda: memory(0, 16, 2, 4), "sizes must be at least 1 .*d_model=0"),
        (lambda: training_flops(8, 16, 2, -1), "with -1 tokens"),
        (lambda: step_cost(8, 16, 2, 4, k_aux=4, dead=17), "dead=17"),
        (lambda: step_cost(8, 16, 2, 4, k_aux=4, dead=8, share=0.0), "share=0.0"),
        (lambda: estimate(8, [(16, 2, 100), (16, 20, 100)], 4), "k=20"),
        (lambda: estimate(8, [(16, 2, 0)], 4), "with 0 tokens"),
        (lambda: timings.time_step(8, 4, 5, 4, 1), "k=5"),
        (lambda: timings.time_step(8, 16, 2, 4, 0), "repeats = 0"),
        (lambda: timings.time_step(8, 16, 2, 4, 1, dead_share=1.5), "dead_share .* not 1.5"),
    ],
)
def test_wrong_arguments_are_named(call, message, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda: pytest.fail("measured before looking at the arguments"))
    with pytest.raises(ValueError, match=message):
        call()
