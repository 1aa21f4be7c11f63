"""The training step: what is dead, what AuxK may touch, what stays on the unit sphere, what is averaged."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.base import products
from helpers.base.storage import load_state
from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.dead_latents import AuxK, GhostGrads, Remedy, Resample
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.training import TrainConfig, train

D, N = 12, 48


def sparse_data(n=4096, seed=0):
    """Sums of few of 24 fixed unit directions: something a sparse code can find."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    on = (torch.rand(n, 24, generator=random) < 0.08) * (0.5 + torch.rand(n, 24, generator=random))
    return on @ directions + 0.1


CONFIG = TrainConfig(tokens=4096 * 8, lr=5e-3)


def batches(config=CONFIG, size=256, seed=0):
    x = sparse_data(config.tokens, seed)
    return x.split(size)


ACTIVATIONS = {
    "ReLU": (lambda: ReLU(), 0.15),
    "Gated": (lambda: Gated(N), 0.2),
    "JumpReLU": (lambda: JumpReLU(N, 0.2, 0.2), 0.03),
    "TopK": (lambda: TopK(3), 0.0),
    "MultiTopK": (lambda: MultiTopK(3), 0.0),
    "BatchTopK": (lambda: BatchTopK(3), 0.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_architecture_learns_and_keeps_unit_norm(name):
    activation, sparsity = ACTIVATIONS[name]
    config = dataclasses.replace(CONFIG, sparsity=sparsity)
    sae, record = train(SparseAutoencoder(D, N, activation()), batches(config), config)
    quality = evaluate(sae, sparse_data(2048, seed=1))
    assert quality.nmse < 0.25 and quality.l0 < 12
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5, rtol=0)
    assert record["tokens"] == config.tokens and record["curve"][-1]["nmse"] < record["curve"][0]["nmse"]
    assert record["config"] == json.loads(json.dumps(config.described())) and record["architecture"] == name


def test_batchtopk_l0_by_threshold_is_k():
    sae = train(SparseAutoencoder(D, N, BatchTopK(3)), batches(), CONFIG).sae
    assert evaluate(sae, sparse_data(4096, seed=1)).l0 == pytest.approx(3, rel=0.05)


def watch(monkeypatch, seen):
    """Append seen(sae) after each update."""
    found, plain = [], training.Adam.step

    def watched(optimizer, lr, unsummed):
        plain(optimizer, lr, unsummed)
        found.append(seen(optimizer.sae).detach().clone())

    monkeypatch.setattr(training.Adam, "step", watched)
    return found


def test_norms_are_one_after_every_step(monkeypatch):
    norms = watch(monkeypatch, lambda sae: sae.W_dec.norm(dim=1))
    train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG)
    assert len(norms) == CONFIG.tokens // 256
    torch.testing.assert_close(torch.stack(norms), torch.ones(len(norms), N), atol=1e-5, rtol=0)


def test_unit_norm_can_be_switched_off():
    config = dataclasses.replace(CONFIG, unit_norm=False)
    sae = train(SparseAutoencoder(D, N, TopK(3)), batches(), config).sae
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_encoder_scale_sets_the_start():
    x = batches()[0]
    one, four = (SparseAutoencoder(D, N, TopK(3)) for _ in range(2))
    one.start_from(x)
    training.Training(four, dataclasses.replace(CONFIG, encoder_scale=4.0), x)
    torch.testing.assert_close(four.W_enc, 4 * one.W_enc)


def test_dead_means_silent_for_exactly_the_window(monkeypatch):
    """Latent 0 fires in every batch, latent 1 in the first only, latent 2 never."""
    sae = SparseAutoencoder(D, 3, TopK(1))
    seen, plain = [], training.forward

    def fake(sae, x, variance, dead, config, sparsity):
        seen.append(dead.tolist())
        fired = torch.tensor([True, len(seen) == 1, False])
        return plain(sae, x, variance, dead, config, sparsity)._replace(fired=fired)

    monkeypatch.setattr(training, "forward", fake)
    config = TrainConfig(tokens=500, dead_after=0.4)  # a window of 200 tokens, two batches of 100
    train(sae, sparse_data(500).split(100), config)
    assert [row[2] for row in seen] == [False, False, True, True, True]  # dead once 200 tokens passed in silence
    assert [row[1] for row in seen] == [False, False, False, True, True]  # one batch later
    assert not any(row[0] for row in seen)


def test_ema_is_the_bias_corrected_mean_of_the_weights(monkeypatch):
    history = watch(monkeypatch, lambda sae: sae.b_enc)
    config = TrainConfig(tokens=1024, ema=0.5)
    sae = train(SparseAutoencoder(D, N, ReLU()), sparse_data(1024).split(256), config).sae
    weights = torch.tensor([0.5**i for i in reversed(range(len(history)))])
    mean = (weights[:, None] * torch.stack(history)).sum(0) / weights.sum()
    torch.testing.assert_close(sae.b_enc.detach(), mean)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reconstruct", [training._reconstruct_densely, training._reconstruct_above])
def test_gate_must_reconstruct_through_a_decoder_it_cannot_change(reconstruct, monkeypatch):
    monkeypatch.setattr(training, "_sparse_up_to", lambda x: 1.0)
    sae, x = SparseAutoencoder(D, N, Gated(N)), sparse_data(64)
    other_error = reconstruct(sae, x).other_error
    other_error.backward()
    assert sae.W_dec.grad is None and sae.W_enc.grad.abs().sum() > 0
    with torch.no_grad():
        expected = (x - sae.pre_acts(x).relu() @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    assert other_error.item() == pytest.approx(expected.item(), rel=0.02)


def of_threshold(slope, threshold):
    """Zero, with `slope` as its gradient for a threshold."""
    return slope.detach() * (threshold - threshold.detach())


def loss_by_formula(sae, x, variance, sparsity):
    """What `training.forward` must give with no latent dead: dense, by autograd alone, from the papers' formulas."""
    a, activation, other_error = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc, sae.activation, 0.0
    if isinstance(activation, Gated):
        latents = (a > 0) * (activation.log_scale.exp() * a + activation.bias).relu()
        other_error = (x - a.relu() @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(1).mean()
        price = a.relu()
    elif isinstance(activation, JumpReLU):
        threshold, width = activation.log_threshold.exp(), activation.bandwidth
        near, on = (a - threshold).abs() < width / 2, a > threshold
        latents = a * on + of_threshold(-threshold / width * near, threshold)
        price = on + of_threshold(-1 / width * near, threshold)
    else:
        latents = a.relu()
        price = latents if sae.sizes() is None else latents * sae.sizes()
    x_hat = latents @ sae.W_dec + sae.b_dec
    if sae.squared:
        misfit = (x - x_hat).square().sum(1).mean() / variance
    else:
        misfit = sae.misfit(x, x_hat) / sae.unit(variance)
    return misfit + sparsity * price.sum(1).mean() / sae.unit(variance) + other_error / variance


PRICED = {
    "ReLU": lambda d, n: SparseAutoencoder(d, n, ReLU()),
    "Gated": lambda d, n: SparseAutoencoder(d, n, Gated(n)),
    "JumpReLU": lambda d, n: SparseAutoencoder(d, n, JumpReLU(n, 0.3, 0.4)),
    "crosscoder": lambda d, n: Crosscoder(d // 2, n, ReLU()),
    "joint, squared": lambda d, n: Crosscoder(d // 2, n, ReLU(), size="joint", squared=True),
    "bridge": lambda d, n: Crosscoder(d // 2, n, ReLU(), squared=True, bridge=-0.7),
}


@pytest.mark.parametrize("up_to", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", PRICED)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 5, 64, 112]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(["plain", "ties", "all off", "all on", "empty rows"]),
    st.integers(0, 99),
)
def test_gradients_are_those_of_the_formula(name, up_to, batch, half, n, sparsity, kind, seed):
    random = torch.Generator().manual_seed(seed)
    ours, twin = (PRICED[name](2 * half, n) for _ in range(2))
    x, variance = torch.randn(batch, 2 * half, generator=random), torch.tensor(0.7)
    for p in ours.parameters():
        p.data += 0.5 * torch.randn(p.shape, generator=random)
    if kind == "ties" and not isinstance(ours.activation, JumpReLU):  # many pre-activations are zero
        x, rounded = x.round(), (ours.W_enc, ours.b_enc, ours.b_dec)
        for p in rounded:
            p.data.round_()
    if kind == "empty rows":
        ours.b_enc.data, x[::2] = -ours.b_enc.data.abs() - 0.1, ours.b_dec.data
    ours.b_enc.data += {"all off": -100.0, "all on": 100.0}.get(kind, 0.0)
    twin.load_state_dict(ours.state_dict())
    dead = torch.zeros(n, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_fast_bf16", lambda device: False)
        patch.setattr(training, "_sparse_up_to", lambda x: up_to)
        made = training.forward(ours, x, variance, dead, CONFIG, sparsity)
        made.loss.backward()
    expected = loss_by_formula(twin, x, variance, sparsity)
    expected.backward()
    torch.testing.assert_close(made.loss, expected, rtol=1e-5, atol=1e-5)
    for (which, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        scale = 1e-5 * max(1.0, b.grad.abs().max().item())
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=scale, msg=lambda m, which=which: f"{which}: {m}")


def paths_taken(monkeypatch):
    """Whether each step of a training was sparse."""
    taken, plain = [], training._reconstruct_above
    monkeypatch.setattr(
        training, "_reconstruct_above", lambda *a: (made := plain(*a), taken.append(made is not None))[0]
    )
    return taken


@pytest.mark.parametrize(("name", "switch"), [("ReLU", 0.4), ("Gated", 0.2), ("JumpReLU", 0.1)])
def test_training_through_the_switch_is_dense_training_within_rounding(name, switch, monkeypatch):
    activation, sparsity = ACTIVATIONS[name]
    config = dataclasses.replace(CONFIG, tokens=4096 * 2, sparsity=3 * sparsity, lr=2e-3)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)
    taken, trained = paths_taken(monkeypatch), []
    for up_to in (switch, 0.0):
        monkeypatch.setattr(training, "_sparse_up_to", lambda x, up_to=up_to: up_to)
        trained.append(train(SparseAutoencoder(D, N, activation()), batches(config), config).sae)
    assert not taken[0] and taken[31] and not any(taken[32:])
    for a, b in zip(*(sae.parameters() for sae in trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("k", "wider"), [(3, 12), (20, N)])
def test_multitopk_is_the_loss_at_k_and_an_eighth_of_that_at_4k(k, wider, monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance = sparse_data(64), torch.tensor(0.5)
    ours, twin = (SparseAutoencoder(D, N, MultiTopK(k)) for _ in range(2))
    training.forward(ours, x, variance, torch.zeros(N, dtype=torch.bool), CONFIG, 0.0).loss.backward()
    code = twin.pre_acts(x).relu()
    errors = [
        (x - twin.decode(code * (code >= code.topk(m).values[:, -1:]))).square().sum(1).mean() for m in (k, wider)
    ]
    ((errors[0] + errors[1] / 8) / variance).backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_schedules_by_hand():
    config = TrainConfig(tokens=1000, lr=2.0, decay=0.5, sparsity=4.0, sparsity_warmup=0.1)
    assert [config.lr_at(t) for t in (0, 500, 750, 1000)] == [2.0, 2.0, 1.0, 0.0]
    assert [config.sparsity_at(t) for t in (0, 50, 100, 900)] == [0.0, 2.0, 4.0, 4.0]
    assert TrainConfig(tokens=1000, lr=2.0, decay=0).lr_at(1000) == 2.0


def test_a_row_of_the_curve_is_the_mean_since_the_row_before(monkeypatch):
    seen, plain = [], training.forward
    monkeypatch.setattr(training, "forward", lambda *a: (seen.append(plain(*a)), seen[-1])[1])
    curve = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).record["curve"]
    first, second = (row["tokens"] // 256 for row in curve[1:3])
    for key in ("loss", "nmse", "l0"):
        values = [getattr(step, key).item() for step in seen[first:second]]
        assert curve[2][key] == pytest.approx(sum(values) / len(values), rel=1e-5) and second - first > 1


def test_remedy_is_paid_while_latents_are_dead():
    sae, x = SparseAutoencoder(D, N, TopK(3)), sparse_data(64)
    dead, variance, config = torch.zeros(N, dtype=torch.bool), x.var(0).sum(), TrainConfig(tokens=1)
    some = dead.clone().index_fill(0, torch.arange(9), True)
    nothing = training.forward(sae, x, variance, dead, config, 0.0)
    off = training.forward(sae, x, variance, some, dataclasses.replace(config, remedy=Remedy()), 0.0)
    on = training.forward(sae, x, variance, some, config, 0.0)
    assert nothing.loss == off.loss == nothing.nmse and on.loss > on.nmse


RESUMABLE = {
    "ReLU, through the switch": (lambda: ReLU(), dataclasses.replace(CONFIG, sparsity=0.15)),
    "TopK, EMA": (lambda: TopK(3), dataclasses.replace(CONFIG, ema=0.9, dead_after=0.02)),
    "BatchTopK": (lambda: BatchTopK(3), dataclasses.replace(CONFIG, remedy=Resample())),
    "JumpReLU": (lambda: JumpReLU(N, 0.2, 0.2), dataclasses.replace(CONFIG, sparsity=0.03)),
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_training_that_was_interrupted_ends_with_the_same_weights(name, tmp_path, monkeypatch):
    activation, config = RESUMABLE[name]
    monkeypatch.setattr(training, "_sparse_up_to", lambda x: 0.2)
    taken = paths_taken(monkeypatch)
    whole = train(SparseAutoencoder(D, N, activation()), batches(config), config)
    assert "switch" not in name or set(taken) == {False, True}

    def power_cut():
        for i, x in enumerate(batches(config)):
            if i == 70:
                raise KeyboardInterrupt
            yield x

    options = {"checkpoint": tmp_path / "t.safetensors", "save_every_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        train(SparseAutoencoder(D, N, activation()), power_cut(), config, **options)
    resumed = train(SparseAutoencoder(D, N, activation()), batches(config), config, **options)
    for (key, a), b in zip(whole.sae.state_dict().items(), resumed.sae.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert [row["nmse"] for row in whole.record["curve"]] == [row["nmse"] for row in resumed.record["curve"]]


KILLED = """
import sys, pathlib, torch
sys.path[:0] = sys.argv[2:]
from test_training import CONFIG, D, N, SparseAutoencoder, TopK, batches, train
train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=pathlib.Path(sys.argv[1]), save_every_minutes=0)
"""


@pytest.mark.parametrize("patience", [0.0, 0.05, 0.2])
def test_a_training_that_was_killed_ends_with_the_same_weights(patience, tmp_path):
    """kill -9 some time after the first checkpoint, while others are being written."""
    path = tmp_path / "t.safetensors"
    places = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), *places])
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(patience)
    process.kill()
    process.wait()
    assert 0 < load_state(path)[1]["tokens"]
    resumed = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path).sae
    whole = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).sae
    assert torch.equal(resumed.W_dec, whole.W_dec) and torch.equal(resumed.W_enc, whole.W_enc)


def test_a_finished_checkpoint_trains_no_more(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    first = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    monkeypatch.setattr(training.Training, "step", None)
    again = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec) and first.record == again.record


def test_checkpoints_of_another_training_and_cut_short_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    for sae, config in [
        (SparseAutoencoder(D, N, TopK(4)), CONFIG),
        (SparseAutoencoder(D, N, TopK(3)), dataclasses.replace(CONFIG, remedy=Remedy())),
    ]:
        with pytest.raises(ValueError, match="t.safetensors is of another training"):
            train(sae, batches(), config, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="t.safetensors is not a whole checkpoint"):
        train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)


def interrupted(path, saes=lambda: SparseAutoencoder(D, N, TopK(3))):
    """Train for 40 of 128 batches, and leave the checkpoint."""

    def power_cut():
        yield from batches()[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(saes(), power_cut(), CONFIG, checkpoint=path, save_every_minutes=0)


def swapped(x, *places):
    """The batches x with two of them, or two rows, or two columns of one, in the other's place."""
    x = torch.stack(x).clone()
    i, j = (torch.tensor(place) for place in places)
    x[tuple(i)], x[tuple(j)] = x[tuple(j)].clone(), x[tuple(i)].clone()
    return list(x)


OTHER_DATA = {
    "another order of batches": lambda x: swapped(x, [3], [7]),
    "another order of tokens": lambda x: swapped(x, [3, 5], [3, 9]),
    "other coordinates": lambda x: [part.flip(1) if i == 3 else part for i, part in enumerate(x)],
    "scaled": lambda x: [100 * part for part in x],
    "one value": lambda x: [*x[:5], x[5] + 1e-6 * torch.eye(len(x[5]), D), *x[6:]],
    "other batches": lambda x: batches(seed=1),
    "smaller batches": lambda x: batches(size=128),
    "larger batches, which jump over its end": lambda x: batches(size=300),
}


@pytest.mark.parametrize("change", OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_checkpoint_of_other_data_is_refused(change, tmp_path):
    interrupted(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="t.safetensors (has read other batches|is of another training)"):
        train(SparseAutoencoder(D, N, TopK(3)), change(batches()), CONFIG, checkpoint=tmp_path / "t.safetensors")


OTHER_STARTS = {
    "seed": (lambda: SparseAutoencoder(D, N, TopK(3)), lambda: SparseAutoencoder(D, N, TopK(3), seed=1)),
    "untied": (lambda: SparseAutoencoder(D, N, TopK(3)), lambda: SparseAutoencoder(D, N, TopK(3), tied_init=False)),
    "window": (
        lambda: SparseAutoencoder(D, N, JumpReLU(N, bandwidth=0.03)),
        lambda: SparseAutoencoder(D, N, JumpReLU(N, bandwidth=0.05)),
    ),
    "thresholds": (
        lambda: SparseAutoencoder(D, N, JumpReLU(N, threshold=0.03)),
        lambda: SparseAutoencoder(D, N, JumpReLU(N, threshold=0.05)),
    ),
}


@pytest.mark.parametrize("one, other", OTHER_STARTS.values(), ids=OTHER_STARTS)
def test_a_checkpoint_of_another_start_is_refused(one, other, tmp_path):
    interrupted(tmp_path / "t.safetensors", one)
    with pytest.raises(ValueError, match="t.safetensors is of another training"):
        train(other(), batches(), CONFIG, checkpoint=tmp_path / "t.safetensors")


def test_a_checkpoint_of_products_in_other_bits_is_refused(tmp_path, monkeypatch):
    interrupted(tmp_path / "t.safetensors")
    monkeypatch.setattr(products, "compute_dtype", lambda x: torch.float16)
    with pytest.raises(ValueError, match="t.safetensors is of another training"):
        train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=tmp_path / "t.safetensors")


def test_same_seed_same_weights():
    a, b = (train(SparseAutoencoder(D, N, TopK(3), seed=4), batches(), CONFIG).sae for _ in range(2))
    assert torch.equal(a.W_dec, b.W_dec) and torch.equal(a.W_enc, b.W_enc)


BAD = {
    "NaN or infinite": [torch.full((4, D), float("nan")), torch.tensor([[0.0, float("inf"), *[0.0] * (D - 2)]])],
    "a batch is empty": [torch.zeros(0, D)],
    "match d_model": [torch.zeros(4, D + 1)],
}


@pytest.mark.parametrize("place", [0, 5, 127])
@pytest.mark.parametrize("sentence, bad", [(sentence, x) for sentence, some in BAD.items() for x in some])
def test_an_unusable_batch_is_refused_wherever_it_comes(sentence, bad, place):
    x = list(batches())
    x[place] = bad
    with pytest.raises(ValueError, match=sentence):
        train(SparseAutoencoder(D, N, TopK(3)), x, CONFIG)


@pytest.mark.parametrize(
    "x, sentence",
    [
        ([], "nothing to train on"),
        ([torch.rand(4, D)], "batches ended after 4 of"),
        (torch.rand(CONFIG.tokens, D).split(1), "the first batch, of 1, has no variance"),
        ([torch.zeros(64, D), *batches()], "the first batch, of 64, has no variance"),
        ([torch.rand(D).expand(64, D), *batches()], "the first batch, of 64, has no variance"),
    ],
    ids=["none", "few", "one token each", "zeros first", "equal ones first"],
)
def test_unusable_streams_are_refused(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(SparseAutoencoder(D, N, TopK(3)), x, CONFIG)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("remedy", [Remedy(), AuxK(), AuxK(share=0.01), GhostGrads(), Resample()], ids=str)
@pytest.mark.parametrize("odd", [torch.rand(1, D), torch.rand(1, D).expand(9, D), torch.zeros(9, D)])
def test_a_later_batch_without_variance_does_no_harm(name, remedy, odd):
    activation, sparsity = ACTIVATIONS[name]
    x = [*batches()[:9], odd, *batches()[9:18], odd]
    config = TrainConfig(sum(map(len, x)), dead_after=0.02, sparsity=sparsity, remedy=remedy)
    sae, record = train(SparseAutoencoder(D, 4 * N if name == "TopK" else N, activation()), x, config)
    assert all(p.isfinite().all() for p in sae.parameters()) and max(row["loss"] for row in record["curve"]) < 100


@pytest.mark.parametrize("name", ["ReLU", "TopK", "BatchTopK"])
def test_training_that_diverges_says_so_and_files_nothing(name, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e30)
    path, options = tmp_path / "t.safetensors", {"checkpoint": tmp_path / "t.safetensors", "save_every_minutes": 0}
    with pytest.raises(ValueError, match="training diverged: after .* tokens .*; lower the learning rate"):
        train(SparseAutoencoder(D, N, ACTIVATIONS[name][0]()), batches(), config, **options)
    assert not path.exists() or all(x.isfinite().all() for x in load_state(path)[0].values() if x.is_floating_point())


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"lr": 0.0}, {"lr": math.nan}, {"ema": 1.0}, {"decay": -0.1}, {"sparsity_warmup": 2.0}]
)
def test_settings_that_divide_by_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(CONFIG, **wrong)


def test_a_trained_autoencoder_has_plain_gradients_again():
    sae = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).sae
    sae(sparse_data(8)).sum().backward()
    assert sae.W_enc.grad.any() and sae.W_dec.grad.any()


def test_latents_that_start_anew_are_not_dead(monkeypatch):
    monkeypatch.setattr(Resample, "renew", lambda *arguments: True)
    config = dataclasses.replace(CONFIG, remedy=Resample(), dead_after=1e-6)
    run = training.Training(SparseAutoencoder(D, N, TopK(3)), config, batches()[0])
    run.step(batches()[0])
    assert not run.dead.any()
