"""Small files in the layouts of others, with random numbers that cancel nowhere, made for the tests."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, N = 6, 10
X = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(7)) + 1
PAIRS = 2 * torch.randn(50, 2, D, generator=torch.Generator().manual_seed(8)) + 1


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def put(folder: Path, name: str, tensors: dict, settings: dict | None = None, beside: str = "config.json") -> Path:
    """A file of weights in the format of its suffix, and its settings. The path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    match path.suffix:
        case ".npz":
            np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
        case ".safetensors":
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        case _:
            torch.save(tensors, path)
    if settings is not None:
        (folder / beside).write_text(json.dumps(settings), encoding="utf-8")
    return path


def openai(**more) -> dict:
    weights = {"encoder.weight": random(N, D), "decoder.weight": random(D, N)}
    stats = {"stats_last_nonzero": torch.zeros(N, dtype=torch.long), "latents_mean_square": torch.zeros(N)}
    return weights | {"pre_bias": random(D), "latent_bias": random(N, seed=1)} | stats | more


def lens(**more) -> dict:
    weights = {"W_enc": random(D, N), "W_dec": random(N, D), "b_dec": random(D), "b_enc": random(N, seed=1)}
    return weights | more


def scope(name=str.upper, **more) -> dict:
    """W_enc or w_enc; thresholds of both signs."""
    weights = {f"{name('w')}_enc": random(D, N), f"{name('w')}_dec": random(N, D)}
    return weights | {"b_enc": random(N), "b_dec": random(D), "threshold": random(N, seed=2)} | more


def pair(**more) -> dict:
    rows = random(2, N, D) * (random(2, N, 1) / 2).exp()  # of many lengths
    weights = {"encoder.weight": random(2, D, N) / 3, "decoder.weight": rows / 3}
    return weights | {"encoder.bias": random(N), "decoder.bias": random(2, D)} | more
