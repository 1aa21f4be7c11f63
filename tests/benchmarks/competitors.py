"""One training step of each method in each library, as a function of a batch (batch, d_model) in float32.

A step is forward, the books of dead latents (none is dead), backward, the projected gradient, Adam and decoder rows
back to unit norm, as far as a library does these by itself. The suite's biases or thresholds are set so that l0 latents
are on per token; the time of the others' dense steps does not depend on how many are.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its eager path; the other needs a GPU

Step = Callable[[Tensor], object]
PRICE = 1e-3
WITHIN = (
    2.4  # latents that are on or in the lower half of JumpReLU's window, for one that is on: as training leaves them
)


def suite(method: str, d_model: int, n_latents: int, l0: int, x: Tensor) -> Step:
    from helpers.dictionaries.autoencoders import SparseAutoencoder
    from helpers.dictionaries.crosscoders import Crosscoder
    from helpers.dictionaries.dead_latents import Remedy
    from helpers.dictionaries.sweeps import ACTIVATIONS
    from helpers.dictionaries.training import TrainConfig, Training

    crosscoder = method == "L1 crosscoder"
    activation = ACTIVATIONS["ReLU" if crosscoder else method](n_latents, l0)
    sae = (Crosscoder if crosscoder else SparseAutoencoder)(d_model, n_latents, activation)
    config = TrainConfig(10**9, lr=1e-9, sparsity=PRICE, remedy=Remedy())  # slow, so that L0 stays
    training = Training(sae, config, x)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x[:256]).flatten()
        threshold = pre_acts.topk(256 * l0).values.min()
        if method == "JumpReLU":
            floor = pre_acts.topk(round(WITHIN * 256 * l0)).values.min()
            scale = sae.activation.bandwidth / 2 / (threshold - floor)
            sae.W_enc *= scale
            sae.activation.log_threshold.fill_((scale * threshold).log())
        elif not method.endswith("TopK"):
            sae.b_enc -= threshold
    return training.step


def suite_fp32(*arguments) -> Step:
    from helpers.base import products

    products.has_fast_bf16 = lambda device_type="cpu": False  # in this process, which times nothing else
    return suite(*arguments)


def sparsify(method: str, d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
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


def dictionary_learning(method: str, d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, standard, top_k

    kind, own = {
        "TopK": (top_k.TopKTrainer, {"k": k}),
        "BatchTopK": (batch_top_k.BatchTopKTrainer, {"k": k}),
        "ReLU": (standard.StandardTrainer, {"l1_penalty": PRICE}),
        "Gated": (gdm.GatedSAETrainer, {"l1_penalty": PRICE}),
        "JumpReLU": (jumprelu.JumpReluTrainer, {"sparsity_penalty": PRICE}),
    }[method]
    sizes = {"activation_dim": d_model, "dict_size": n_latents}
    trainer = kind(steps=10_000, **sizes, **own, layer=0, lm_name="none", device="cpu", seed=0)
    return lambda x: trainer.update(1, x)


def saelens(method: str, d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, standard_sae, topk_sae
    from sae_lens.saes.sae import TrainStepInput

    kind, config, own = {
        "TopK": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, {"k": k}),
        "BatchTopK": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig, {"k": k}),
        "ReLU": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig, {}),
        "Gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig, {}),
        "JumpReLU": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig, {}),
    }[method]
    sae = kind(config(d_in=d_model, d_sae=n_latents, **own))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
    prices = {"l1": PRICE, "l0": PRICE}
    books = {"coefficients": prices, "n_training_steps": 0, "is_logging_step": False}
    dead = torch.zeros(n_latents, dtype=torch.bool)

    def step(x: Tensor) -> None:
        sae.training_forward_pass(TrainStepInput(sae_in=x, dead_neuron_mask=dead, **books)).loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def product(method: str, d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    """The encoder's product that no step can do without, alone, into a buffer that is used again."""
    from helpers.base.products import compute_dtype

    dtype = compute_dtype(x)
    weights, out = torch.randn(n_latents, x.shape[1]).to(dtype), torch.empty(len(x), n_latents, dtype=dtype)
    inputs = x.to(dtype)
    return lambda x: torch.mm(inputs, weights.T, out=out)


def product_fp32(method: str, d_model: int, n_latents: int, k: int, x: Tensor) -> Step:
    weights, out = torch.randn(n_latents, x.shape[1]), torch.empty(len(x), n_latents)
    return lambda x: torch.mm(x, weights.T, out=out)


OURS = (product, suite, product_fp32, suite_fp32)
PRICED = (*OURS, dictionary_learning, saelens)
METHODS = {
    "TopK": (*OURS, sparsify, dictionary_learning, saelens),
    "BatchTopK": PRICED,
    "ReLU": PRICED,
    "JumpReLU": PRICED,
    "Gated": PRICED,
    "L1 crosscoder": OURS,
}
