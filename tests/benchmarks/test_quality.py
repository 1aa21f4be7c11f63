"""Speed counts only at equal quality: NMSE after the same tokens, beside a plain dense step in fp32."""

import time

import torch

from helpers.activations.stream import ActivationStream, Harvest
from helpers.dictionaries.adam import BETAS, EPS
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.training import TrainConfig, Training, train
from helpers.subjects.subject import load_subject
from helpers.text.documents import text_for

TOKENS, N_LATENTS, K, BATCH = 2_000_000, 8_192, 32, 4_096


def plainly(sae: SparseAutoencoder, batches, config: TrainConfig) -> SparseAutoencoder:
    """The same training by autograd on dense codes, torch.topk and torch.optim.Adam, all in fp32."""
    batches = list(batches)
    variance = Training(sae, config, batches[0]).variance
    adam, read = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=BETAS, eps=EPS, fused=True), 0
    for x in batches:
        values, latents = sae.pre_acts(x).topk(K)
        code = torch.zeros(len(x), N_LATENTS).scatter(1, latents, values.relu())
        ((sae.decode(code) - x).square().sum(1).mean() / variance).backward()
        with torch.no_grad():
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            adam.param_groups[0]["lr"] = config.lr_at(read)
            adam.step()
            adam.zero_grad()
            sae.normalise_decoder()
        read += len(x)
    return sae.eval()


def test_error_after_the_same_tokens(capsys):
    model = load_subject("docs-gpt2")
    text, test = (
        text_for("embedded", split, model.tokenizer, n) for split, n in (("train", 2_100_000), ("heldout", 30_000))
    )
    stream = ActivationStream(model, text.tokens, Harvest(), BATCH, memory_limit_gb=3, cache=True)
    heldout = ActivationStream(model, test.tokens, Harvest(), BATCH).take(16_384)
    config = TrainConfig(TOKENS, lr=2e-3, dead_after=1.1)  # nothing counts as dead: no AuxK in either
    found = {}
    for name, trained in (("suite", lambda *a: train(*a).sae), ("plain", plainly)):
        started = time.monotonic()
        sae = trained(SparseAutoencoder(model.d_model, N_LATENTS, TopK(K)), stream.batches(TOKENS), config)
        found[name] = evaluate(sae, heldout).nmse
        with capsys.disabled():
            print(f"\n{name}: NMSE {found[name]:.4f} after {TOKENS:,} tokens, {time.monotonic() - started:.0f} s")
    assert found["suite"] <= 1.005 * found["plain"]
