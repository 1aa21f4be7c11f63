"""Normalisation, and what the stream promises: all once an epoch, well mixed, repeatable, within its memory."""

import json
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import CONTEXT, N_VOCAB, CountingSubject, Twin, save_tiny

from helpers.activations.stream import ActivationStream, Harvest, harvest_rows, normalise, undo
from helpers.subjects.subject import load_subject

RAW = Harvest(context=8, normalisation="none", rows=3)  # activations that tell their token and position
BYTES = 4 * 4 + 8  # an activation of CountingSubject in float32, and its place in the order


def limit(rows, harvest=RAW):
    """Memory for so many rows, in GB."""
    return rows * harvest.kept * BYTES / 1e9


def stream(n_rows=40, harvest=RAW, **options):
    tokens = torch.arange(n_rows * harvest.context)  # every token another one
    options = {"batch_size": 32, **options}
    return ActivationStream(CountingSubject(), tokens, harvest, **options)


def token_ids(activations):
    return activations[:, 0].long()


def all_ids(n_rows, harvest=RAW):
    return torch.arange(n_rows * harvest.context).view(n_rows, -1)[:, harvest.context - harvest.kept :].flatten()


# --- normalisation


def test_normalisation_of_a_hand_sized_vector():
    y, scale = normalise(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert scale.mean.item() == 3 and math.isclose(scale.norm.item(), math.sqrt(14), rel_tol=1e-6)
    assert torch.allclose(y * math.sqrt(14), torch.tensor([-2.0, -1.0, 0.0, 3.0]))


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e4]))
def test_normalised_vectors_are_centred_and_of_unit_length_and_undo_inverts(n, d_model, seed, size):
    x = size * (torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed)) + 5)
    y, scale = normalise(x)
    assert torch.allclose(y.norm(dim=-1), torch.ones(n), atol=1e-5)
    assert torch.allclose(y.mean(-1), torch.zeros(n), atol=1e-5)
    assert torch.allclose(undo(y, scale), x, rtol=1e-5, atol=1e-5 * size)


def test_no_normalisation_changes_nothing_and_undoes_to_the_same():
    x = torch.randn(5, 7)
    y, scale = normalise(x, "none")
    assert torch.equal(y, x) and torch.equal(undo(y, scale), x)


def test_a_constant_vector_becomes_zero_and_comes_back():
    y, scale = normalise(torch.full((2, 3), 7.0))
    assert torch.equal(y, torch.zeros(2, 3)) and torch.equal(undo(y, scale), torch.full((2, 3), 7.0))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='normalisation "l2": use one of unit, none'):
        normalise(torch.ones(2), "l2")
    with pytest.raises(ValueError, match='normalisation "l2": use one of unit, none'):
        Harvest(normalisation="l2")
    with pytest.raises(ValueError, match='positions "bos": use one of special, none'):
        Harvest(drop="bos")
    with pytest.raises(ValueError, match="gives nothing"):
        Harvest(context=1)
    with pytest.raises(ValueError, match="gives nothing"):
        Harvest(rows=0)


# --- one forward pass


def test_harvest_equals_a_loop_over_positions_of_plain_transformers(tmp_path):
    save_tiny(tmp_path, "gpt2")
    rows = torch.randint(0, N_VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    residuals = Twin(tmp_path, 1).residuals(rows)
    expected = []
    for row in residuals:
        for x in row[1:]:  # without the first position
            expected.append((x - x.mean()) / (x - x.mean()).norm())
    found = harvest_rows(load_subject(tmp_path, layer=1), rows, Harvest(context=CONTEXT))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize(("drop", "positions"), [("special", [1, 2, 3]), ("none", [0, 1, 2, 3])])
def test_the_rule_for_positions(drop, positions):
    harvest = Harvest(context=4, drop=drop, normalisation="none")
    found = harvest_rows(CountingSubject(), torch.arange(8).view(2, 4), harvest)
    assert found[:, 1].tolist() == positions * 2


SPECIAL = CountingSubject(special_ids=[3, 9], pad=9)
MIXED = torch.tensor([[1, 2, 3, 4], [3, 5, 6, 9], [7, 9, 9, 9], [9, 8, 9, 8]])


@pytest.mark.parametrize(
    ("drop", "kept"),
    [("special", [[2, 4], [5, 6], [], [8, 8]]), ("none", [[1, 2, 3, 4], [3, 5, 6], [7], [9, 8, 9, 8]])],
)
def test_special_tokens_are_dropped_by_id_and_padding_always(drop, kept):
    found = harvest_rows(SPECIAL, MIXED, Harvest(context=4, drop=drop, normalisation="none"))
    assert token_ids(found).tolist() == [token for row in kept for token in row]


def test_batches_come_in_the_dtype_asked_for():
    exact = stream().take(50)
    rounded = stream(harvest=Harvest(context=8, normalisation="none", rows=3, dtype=torch.bfloat16)).take(50)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


# --- the stream


@given(
    n_rows=st.integers(5, 30),
    rows_in_memory=st.integers(5, 40),
    batch_size=st.integers(1, 35),
    seed=st.integers(0, 99),
    drop=st.sampled_from(["special", "none"]),
    special=st.sets(st.integers(0, 5)),
)
def test_every_activation_comes_exactly_once_an_epoch(n_rows, rows_in_memory, batch_size, seed, drop, special):
    """Rows of numbers that count, with special tokens among the first of them."""
    harvest, subject = Harvest(context=8, drop=drop, normalisation="none", rows=3), CountingSubject(special_ids=special)
    options = {"batch_size": batch_size, "seed": seed, "memory_limit_gb": limit(rows_in_memory, harvest)}
    found = ActivationStream(subject, torch.arange(n_rows * 8), harvest, **options)
    expected = [i for i in all_ids(n_rows, harvest).tolist() if drop == "none" or i not in special]
    for _ in range(2):
        batches = list(found.batches())
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert token_ids(torch.cat(batches)).sort().values.tolist() == expected
        two = torch.cat(list(found.batches(2 * len(expected))))
        assert token_ids(two[len(expected) :]).sort().values.tolist() == expected


@given(
    n_rows=st.integers(5, 30),
    rows_in_memory=st.integers(5, 40),
    seed=st.integers(0, 99),
    special=st.sets(st.integers(0, 5)),
)
def test_every_activation_comes_as_often_as_it_should(n_rows, rows_in_memory, seed, special):
    times = torch.randint(0, 4, (n_rows, 8), generator=torch.Generator().manual_seed(seed))
    times[:, -1] += 1
    options = {"batch_size": 4, "seed": seed, "memory_limit_gb": limit(rows_in_memory), "times": times}
    found = ActivationStream(CountingSubject(special_ids=special), torch.arange(n_rows * 8), RAW, **options)
    slow = [i for i in all_ids(n_rows).tolist() if i not in special for _ in range(times.flatten()[i])]
    for _ in range(2):
        assert token_ids(torch.cat(list(found.batches()))).sort().values.tolist() == slow
    whole = token_ids(torch.cat(list(found.batches(2 * len(slow)))))
    assert found.n_activations == len(slow) and whole[len(slow) :].sort().values.tolist() == slow
    assert found.subject.rows_read <= 5 * n_rows  # repeated, not read again


def test_repeats_read_the_same_cache_and_come_in_an_order_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    plain = stream(cache=True)
    once = token_ids(plain.take(280)).sort().values  # in 16 bits
    often = stream(cache=True, times=torch.full((40, 8), 2))
    ids = token_ids(often.take(560))
    assert often.subject.rows_read == 0 and often.fingerprint != plain.fingerprint
    assert torch.equal(ids.sort().values, once.repeat_interleave(2))
    assert torch.equal(token_ids(often.reader().take(560)), ids)
    assert torch.equal(stream(times=torch.ones(40, 8, dtype=torch.long)).take(280), stream().take(280))


@pytest.mark.parametrize("times", [torch.ones(40, 7, dtype=torch.long), torch.ones(40, 8), -torch.ones(40, 8).long()])
def test_times_that_do_not_fit_the_rows_are_refused(times):
    with pytest.raises(ValueError, match=r"give each token of the rows \(40, 8\) a whole number"):
        stream(times=times)


@pytest.mark.parametrize("rows_in_memory", [40, 12])
def test_epochs_follow_each_other_in_new_orders(rows_in_memory):
    n = 40 * RAW.kept
    ids = token_ids(torch.cat(list(stream(memory_limit_gb=limit(rows_in_memory)).batches(2 * n + 7))))
    first, second, rest = ids[:n], ids[n : 2 * n], ids[2 * n :]
    assert len(rest) == 7
    assert torch.equal(first.sort().values, second.sort().values)
    assert (first == second).float().mean() < 0.05


def test_only_the_very_last_batch_is_shorter():
    sizes = [len(batch) for batch in stream().batches(1000)]  # more than three epochs of 280
    assert sizes == [32] * 31 + [8]


def test_a_batch_mixes_rows_and_positions():
    for rows_in_memory in (200, 67):
        batch = stream(200, batch_size=100, memory_limit_gb=limit(rows_in_memory)).take(100)
        rows = (token_ids(batch) // RAW.context).unique()
        assert len(rows) > 0.6 * min(rows_in_memory, 100), rows_in_memory  # 78 or 52 expected
        assert len(batch[:, 1].unique()) == RAW.kept


@pytest.mark.parametrize("rows_in_memory", [40, 12])
def test_the_seed_decides_the_order(rows_in_memory):
    memory = limit(rows_in_memory)
    one, same, other = (stream(seed=seed, memory_limit_gb=memory).take(300) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert (one[:, 0] != other[:, 0]).float().mean() > 0.9  # tokens
    assert (one[:, 1] != other[:, 1]).float().mean() > 0.7  # positions in their rows, 7 of them


def test_a_block_holds_random_rows_by_seed_and_epoch():
    found, n_block = stream(memory_limit_gb=limit(12)), 10 * RAW.kept
    ids = torch.cat(list(found.batches(2 * found.n_activations)))[:, 0].long()
    other = token_ids(stream(memory_limit_gb=limit(12), seed=1).take(n_block))
    first, next_epoch = ids[:n_block], ids[found.n_activations :][:n_block]
    blocks = [tuple((block // RAW.context).unique().tolist()) for block in (first, next_epoch, other)]
    assert [len(block) for block in blocks] == [10, 10, 10]
    assert len(set(blocks)) == 3
    assert tuple(range(10)) not in blocks


def test_integer_types_and_numpy_make_no_difference():
    tokens = torch.arange(320)
    same = (tokens, tokens.to(torch.uint16), tokens.numpy(), tokens.numpy().astype(np.uint16), tokens.int())
    streams = [ActivationStream(CountingSubject(), t, RAW, batch_size=32) for t in same]
    assert all(torch.equal(s.take(280), streams[0].take(280)) for s in streams)
    assert len({s.state()["stream"] for s in streams}) == 1


def test_a_rest_shorter_than_a_row_is_left_out():
    found = ActivationStream(CountingSubject(), torch.arange(8 * 5 + 7), RAW, batch_size=4)
    assert found.n_activations == 35
    assert torch.equal(token_ids(torch.cat(list(found.batches()))).sort().values, all_ids(5))


def test_take_gives_the_first_of_the_stream_and_does_not_move_it():
    found = stream()
    batches = found.batches()
    first = next(batches)
    assert torch.equal(found.take(50)[:32], first)
    assert found.state()["position"] == 32
    assert torch.equal(torch.cat([first, next(batches)])[:50], found.take(50))


# --- resuming


@pytest.mark.parametrize("rows_in_memory", [40, 12])
def test_a_stream_goes_on_bitwise_where_it_was_killed(rows_in_memory):
    memory = limit(rows_in_memory)
    whole = list(stream(memory_limit_gb=memory).batches(900))
    running = stream(memory_limit_gb=memory)
    for done, _ in enumerate(running.batches(900), start=1):
        state = json.loads(json.dumps(running.state()))
        rest = list(stream(memory_limit_gb=memory).batches(900, start=state))
        assert len(rest) == len(whole) - done
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, whole[done:], strict=True))


def test_going_on_late_harvests_one_block_and_not_all_that_came_before():
    memory = limit(12)
    running = stream(memory_limit_gb=memory)
    for _ in running.batches(850):
        pass
    resumed = stream(memory_limit_gb=memory)
    next(resumed.batches(900, start=running.state()))
    assert resumed.subject.rows_read <= 12


@pytest.mark.parametrize("change", [{"seed": 1}, {"memory_limit_gb": limit(12)}, {"n_rows": 41}])
def test_the_state_of_another_stream_is_refused(change):
    with pytest.raises(ValueError, match="another stream's"):
        next(stream(**change).batches(start=stream().state()))


def test_the_batch_size_may_change_on_the_way():
    running = stream()
    next(running.batches())
    rest = torch.cat(list(stream(batch_size=10).batches(start=running.state())))
    assert torch.equal(rest, stream().take(280)[32:])


# --- several readers of one stream


@given(batch_size=st.integers(1, 280), rows_in_memory=st.sampled_from([40, 12]))
def test_another_batch_size_cuts_the_same_activations(batch_size, rows_in_memory):
    found = stream(memory_limit_gb=limit(rows_in_memory))
    batches = list(found.batches(500, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), found.take(500))


@pytest.mark.parametrize("batch_size", [0, -3, 281])
def test_a_batch_that_is_no_part_of_an_epoch_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch of {batch_size} is not within an epoch of 280"):
        next(stream().batches(batch_size=batch_size))


def test_two_readings_do_not_disturb_each_other():
    found = stream(memory_limit_gb=limit(12))
    slow, expected = found.batches(), list(stream(memory_limit_gb=limit(12)).batches())
    read = [next(slow)]
    assert all(torch.equal(a, b) for a, b in zip(found.batches(), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([*read, *slow], expected, strict=True))


def test_the_fingerprint_tells_streams_of_other_activations_or_order_apart():
    harvest = Harvest(context=8, normalisation="none", rows=3, drop="none")
    others = [stream(seed=1), stream(41), stream(harvest=harvest), stream(memory_limit_gb=limit(12))]
    assert len({found.fingerprint for found in [stream(), stream(), *others]}) == 5


# --- memory


def test_what_fits_is_harvested_once():
    found = stream(memory_limit_gb=limit(40))
    for _ in found.batches(3 * found.n_activations):
        pass
    assert found.subject.rows_read == 40


@given(n_rows=st.integers(6, 60), rows_in_memory=st.integers(6, 30))
def test_never_more_than_the_limit_is_held_beside_a_batch(n_rows, rows_in_memory):
    found = stream(n_rows, memory_limit_gb=limit(rows_in_memory))
    given_out = 0
    for batch in found.batches():
        given_out += len(batch)
        assert found.subject.rows_read * RAW.kept - given_out <= rows_in_memory * RAW.kept
    assert found.subject.rows_read == n_rows


def test_a_block_is_let_go_before_the_next_is_made():
    found = stream(memory_limit_gb=limit(20))
    harvest, blocks, alive = found._block, [], []

    def watched(rows):
        alive.append(sum(block() is not None for block in blocks))
        block = harvest(rows)
        blocks.append(weakref.ref(block))
        return block

    found._block = watched
    for _ in found.batches():
        pass
    assert alive == [0, 0]


def test_blocks_are_of_one_size():
    found = stream(41, memory_limit_gb=limit(20))
    assert found.rows_per_block == 14  # 14, 14, 13 and not 20, 20, 1


# --- what cannot be streamed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rows": 4}, "4 rows of 8 tokens give 28 activations, fewer than one batch of 32: pass more tokens"),
        ({"n_rows": 0}, "0 rows of 8 tokens give 0 activations"),
        ({"memory_limit_gb": limit(4)}, "holds 28 activations, fewer than one batch of 32: raise the limit"),
        ({"harvest": Harvest(context=65)}, "rows of 65 tokens, but counting reads at most 64"),
    ],
)
def test_too_little_of_anything_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


@pytest.mark.parametrize("tokens", [torch.zeros(100, 8, dtype=torch.int64), torch.zeros(800)])
def test_tokens_that_are_not_a_row_of_ids_are_refused(tokens):
    with pytest.raises(ValueError, match="one row of integer ids, not torch"):
        ActivationStream(CountingSubject(), tokens, RAW, batch_size=4)


def test_the_fingerprint_tells_what_was_rounded_from_what_was_not():
    found = [stream(cache=True), stream(), stream(harvest=Harvest(CONTEXT, dtype=torch.float16), cache=True)]
    assert len({each.fingerprint for each in found}) == 3


@pytest.mark.parametrize("size", [0, -1])
def test_nothing_cannot_be_taken(size):
    with pytest.raises(ValueError, match="nothing to measure on"):
        stream().take(size)
    with pytest.raises(ValueError, match="not within an epoch"):
        stream(batch_size=size)
