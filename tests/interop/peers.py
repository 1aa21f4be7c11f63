"""The side of the other libraries, run in their environment.

`peers.py write FOLDER` saves dictionaries as they save them, and what they make of some activations; `peers.py read
FOLDER` loads what the suite has written, and notes the same of it.
"""

import json
import sys
from pathlib import Path

import torch
from dictionary_learning import dictionary as dl
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

D, N, K = 24, 64, 5
X = 3 * torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 1


def shaken(module, seed=0):
    """Every parameter at random, so that nothing cancels; thresholds stay above zero for most latents."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=random, dtype=torch.float32)
        parameter.data = (values * (0.3 if parameter.ndim == 2 else 0.5)).to(parameter.dtype)
        if name == "threshold":
            parameter.data += 0.5
    return module


def sae_lens_cases():
    for apply in (True, False):
        for norm in ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"):
            switches = {"d_in": D, "d_sae": N, "apply_b_dec_to_input": apply, "normalize_activations": norm}
            name = f"{'centred' if apply else 'raw'}-{norm}"
            yield f"standard-{name}", StandardSAE(StandardSAEConfig(**switches))
            yield f"jumprelu-{name}", JumpReLUSAE(JumpReLUSAEConfig(**switches))
            yield f"gated-{name}", GatedSAE(GatedSAEConfig(**switches))
            for rescale in (True, False):
                config = TopKSAEConfig(**switches, k=K, rescale_acts_by_decoder_norm=rescale)
                yield f"topk-{rescale}-{name}", TopKSAE(config)


def trained_cases():
    """Training classes, as they are saved under way and for use."""
    yield "topk-training", TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K))
    yield "batchtopk-training", BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K))


def dictionary_learning_cases():
    yield dl.AutoEncoder(D, N)
    yield dl.AutoEncoderNew(D, N)
    yield dl.GatedAutoEncoder(D, N)
    yield dl.JumpReluAutoEncoder(D, N)
    yield AutoEncoderTopK(D, N, K)
    yield BatchTopKSAE(D, N, K)
    yield MatryoshkaBatchTopKSAE(D, N, K, [16, 48])


@torch.no_grad()
def write(folder):
    expected = {"x": X}

    def note(name, latents, x_hat):
        expected[f"{name}/latents"], expected[f"{name}/x_hat"] = latents.contiguous(), x_hat.contiguous()

    for name, sae in sae_lens_cases():
        shaken(sae).save_model(folder / name)
        latents = sae.encode(X)
        note(name, latents, sae.decode(latents))
    for name, sae in trained_cases():
        shaken(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.25)
        sae.save_model(folder / f"{name}-checkpoint")
        sae.save_inference_model(folder / f"{name}-inference")
        inference = SAE.load_from_disk(folder / f"{name}-inference")
        for kind in ("checkpoint", "inference"):
            latents = inference.encode(X)
            note(f"{name}-{kind}", latents, inference.decode(latents))
    for sae in dictionary_learning_cases():
        name = type(sae).__name__
        shaken(sae)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(1.25)
        (folder / name).mkdir(parents=True)
        torch.save(sae.state_dict(), folder / name / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K, "layer": 8, "lm_name": "gpt2"}
        (folder / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        latents = sae.encode(X)
        note(name, latents, sae.decode(latents))
    coder = shaken(SparseCoder(D, SparseCoderConfig(num_latents=N, k=K)))
    coder.save_to_disk(folder / "layers.3")
    top = coder.encode(X)
    latents = torch.zeros(len(X), N).scatter(1, top.top_indices, top.top_acts)
    note("layers.3", latents, coder.decode(top.top_acts, top.top_indices))
    save_file(expected, folder / "expected.safetensors")


@torch.no_grad()
def read(folder):
    x, found = load_file(folder / "x.safetensors")["x"], {}
    for place in sorted(path.parent for path in folder.glob("*/cfg.json")):
        sae = SAE.load_from_disk(place)
        latents = sae.encode(x)
        found |= {f"{place.name}/latents": latents.contiguous(), f"{place.name}/x_hat": sae.decode(latents)}
    save_file(found, folder / "found.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
