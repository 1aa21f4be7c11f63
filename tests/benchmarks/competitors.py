"""One training step of each library, as a function of a batch (batch, d_model) in float32.

A step is forward, the books of dead latents (none is dead), backward, the projected gradient, Adam and decoder rows
back to unit norm, as far as a library does these by itself.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its eager path; the other needs a GPU

Step = Callable[[Tensor], None]


def suite(d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
    from helpers.dictionaries.training import TrainConfig, Training

    return Training(SparseAutoencoder(d_model, n_latents, TopK(k)), TrainConfig(10**9), x).step


def sparsify(d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_model, SparseCoderConfig(num_latents=n_latents, k=k))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def dictionary_learning(d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"activation_dim": d_model, "dict_size": n_latents, "k": k}
    trainer = TopKTrainer(steps=10_000, **sizes, layer=0, lm_name="none", device="cpu", seed=0)
    return lambda x: trainer.update(1, x)


def saelens(d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=n_latents, k=k))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
    books = {"coefficients": {}, "n_training_steps": 0, "is_logging_step": False}
    dead = torch.zeros(n_latents, dtype=torch.bool)

    def step(x: Tensor) -> None:
        sae.training_forward_pass(TrainStepInput(sae_in=x, dead_neuron_mask=dead, **books)).loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def encoder_product(d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    """The product that no step can do without, alone, into a buffer that is used again."""
    from helpers.base.products import compute_dtype

    dtype = compute_dtype(x)
    weights, out = torch.randn(n_latents, d_model).to(dtype), torch.empty(len(x), n_latents, dtype=dtype)
    inputs = x.to(dtype)
    return lambda x: torch.mm(inputs, weights.T, out=out)


STEPS = {f.__name__: f for f in (suite, sparsify, dictionary_learning, saelens, encoder_product)}
