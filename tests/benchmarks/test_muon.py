"""An update by Muon beside PyTorch's, on the matrices of one block of a subject: never slower on any processor."""

import timeit

import torch

from helpers.subjects.muon import Muon

SHAPES = ((256, 768), (256, 256), (256, 1024), (1024, 256))


def an_update(kind: type[torch.optim.Muon]) -> float:
    """Seconds, the least of three."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return min(timeit.repeat(kind(weights, lr=1e-3).step, number=1, repeat=3))


def test_an_update_is_not_slower(capsys):
    torch.manual_seed(0)
    theirs, ours = an_update(torch.optim.Muon), an_update(Muon)
    with capsys.disabled():
        print(f"\nMuon: {1000 * ours:.0f} ms an update, torch.optim.Muon {theirs / ours:.1f} times as long")
    assert ours < 1.2 * theirs
