"""A fine-tune as a low-rank difference: it starts at nothing, merges exactly, resumes, and fits its own base alone."""

import copy
import re

import pytest
import torch
from tiny_text import TOKENIZER

from helpers.subjects import low_rank
from helpers.subjects.chat_tuning import gemma_model
from helpers.subjects.low_rank import (
    add_low_rank,
    as_base,
    differences,
    load_differences,
    merge,
    save_differences,
    tune,
)

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8, "query_pre_attn_scalar": 8}
ROWS = torch.arange(24).view(2, 12)


@pytest.fixture
def model():
    return gemma_model(TOKENIZER, 0, **TINY).eval()


def moved(model, by: float = 0.05):
    """A copy whose differences are not zero."""
    tuned = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in add_low_rank(tuned, rank=3):
            parameter += by * torch.randn(parameter.shape, generator=random)
    return tuned


def test_at_the_start_nothing_differs_and_only_differences_are_trained(model):
    tuned = copy.deepcopy(model)
    parameters = add_low_rank(tuned, rank=3)
    torch.testing.assert_close(tuned(ROWS).logits, model(ROWS).logits)
    assert len(parameters) == 2 * 7 * 2  # up and down, of seven projections in each of two blocks
    assert sum(p.numel() for p in parameters) < sum(p.numel() for p in model.parameters()) / 10
    tuned(ROWS).logits.sum().backward()
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)


def test_its_base_can_be_asked_meanwhile(model):
    tuned = moved(model)
    wanted = tuned(ROWS).logits
    with pytest.raises(KeyError), as_base(tuned):
        torch.testing.assert_close(tuned(ROWS).logits, model(ROWS).logits)
        raise KeyError
    torch.testing.assert_close(tuned(ROWS).logits, wanted)


def test_merged_it_is_an_ordinary_model_that_says_the_same(model, tmp_path):
    tuned = moved(model)
    wanted = tuned(ROWS).logits
    assert (wanted - model(ROWS).logits).abs().max() > 1e-3
    merge(merged := copy.deepcopy(model), differences(tuned))
    torch.testing.assert_close(merged(ROWS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert [*merged.state_dict()] == [*model.state_dict()]
    save_differences(differences(tuned), tmp_path)
    merge(shipped := copy.deepcopy(model), load_differences(tmp_path))  # in bf16
    torch.testing.assert_close(shipped(ROWS).logits, wanted, rtol=0.02, atol=0.02)


def test_a_difference_fits_its_own_base_alone(model, tmp_path):
    found = differences(moved(model))
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=re.escape(f"first at {name}.up")):
        merge(copy.deepcopy(model), {key: part for key, part in found.items() if key != f"{name}.up"})
    with pytest.raises(ValueError, match=f"{name} is .16, 24., its low-rank difference .17, 3. and .3, 24."):
        merge(copy.deepcopy(model), found | {f"{name}.up": torch.zeros(17, 3)})
    (tmp_path / low_rank.FILE).write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be read"):
        load_differences(tmp_path)


def loss(model, rows):
    return torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def test_tuning_lowers_the_loss_and_resumes_where_it_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank, "SAVE_EVERY", 3)
    batches = [ROWS + i for i in range(8)]
    add_low_rank(whole := copy.deepcopy(model), rank=3)
    losses = tune(whole, batches, 8, loss, tmp_path / "whole", lr=0.02)
    assert losses[-1] < losses[0]

    def interrupted(model, rows):
        if rows[0, 0] == 5:
            raise KeyboardInterrupt
        return loss(model, rows)

    for objective in (interrupted, loss):
        add_low_rank(tuned := copy.deepcopy(model), rank=3)
        try:
            again = tune(tuned, batches, 8, objective, tmp_path / "parts", lr=0.02)
        except KeyboardInterrupt:
            continue
    assert again == losses
    assert all(torch.equal(part, differences(whole)[name]) for name, part in differences(tuned).items())


def test_tuning_says_what_is_wrong(model, tmp_path):
    add_low_rank(model, rank=3)
    with pytest.raises(ValueError, match="there are 1 batches for 2 updates"):
        tune(model, [ROWS], 2, loss, tmp_path / "a")
    with pytest.raises(ValueError, match="training diverged: the loss of update 1 is nan"):
        tune(model, [ROWS], 1, lambda model, rows: loss(model, rows) * torch.nan, tmp_path / "b")
