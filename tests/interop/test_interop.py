"""Files that other libraries write are read as they read them, and the other way round. `make interop` runs this: the
libraries are in an environment of their own, named by $PEERS."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, ReLU, SparseAutoencoder, TopK
from helpers.published.load import load_dictionary
from helpers.published.origin import Inputs, Origin, Published
from helpers.published.write import write_sae_lens

PEERS = Path(__file__).with_name("peers.py")
D, N = 24, 64
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def run_peers(action: str, folder: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"SPARSIFY_DISABLE_TRITON": "1"}
    done = subprocess.run([os.environ["PEERS"], PEERS, action, folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    run_peers("write", folder)
    return folder


def test_what_they_write_is_read_as_they_read_it(written):
    expected = load_file(written / "expected.safetensors")
    names, wrong = sorted({name.partition("/")[0] for name in expected} - {"x"}), []
    for name in names:
        published = load_dictionary(written / name)
        if published.origin.inputs.mode == "mean norm":  # which SAELens leaves to the caller
            published = Published(published.dictionary, published.origin.with_inputs(Inputs()))
        for what, found in {"latents": published.encode, "x_hat": published.reconstruct}.items():
            if not torch.allclose(found(expected["x"]), expected[f"{name}/{what}"], **CLOSE):
                difference = (found(expected["x"]) - expected[f"{name}/{what}"]).abs().max().item()
                wrong.append(f"{name}: {what} differ by {difference:.2g}")
    assert len(names) > 50 and wrong == []


def ours():
    x = torch.randn(512, D, generator=torch.Generator().manual_seed(2))
    for mode in ("none", "unit", "length", "mean norm"):
        for activation in (ReLU(), TopK(5), BatchTopK(5), JumpReLU(N, 0.2), Gated(N)):
            random = torch.Generator().manual_seed(3)
            sae = SparseAutoencoder(D, N, activation)
            for parameter in sae.parameters():
                if parameter.ndim == 1 and parameter is not getattr(activation, "log_threshold", None):
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
            sae.W_dec.data *= 0.5 + torch.rand(N, 1, generator=random)
            published = Published(sae, Origin("ours", "here", "float32", inputs=Inputs(mode)))
            if isinstance(activation, BatchTopK):
                inputs = x if mode == "mean norm" else published.prepare(x)[0]
                sae.calibrate([inputs])
            sae.eval()
            yield f"{type(activation).__name__}-{mode}", published


def test_what_we_write_is_read_by_sae_lens_as_by_us(tmp_path):
    x, wrong = 5 * torch.randn(200, D, generator=torch.Generator().manual_seed(4)) + 1, []
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name, published in ours():
        write_sae_lens(published, tmp_path / name)
    run_peers("read", tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for name, published in ours():
        mode = published.origin.inputs.mode
        inputs = (
            Inputs("unit", eps=1e-5 * (D - 1) ** 0.5) if mode == "unit" else Inputs("none" if "mean" in mode else mode)
        )
        published = Published(published.dictionary, published.origin.with_inputs(inputs))
        for what, value in {"latents": published.encode(x), "x_hat": published.reconstruct(x)}.items():
            if not torch.allclose(found[f"{name}/{what}"], value, **CLOSE):
                wrong.append(f"{name}: {what} differ by {(found[f'{name}/{what}'] - value).abs().max().item():.2g}")
        again = load_dictionary(tmp_path / name)
        torch.testing.assert_close(again.dictionary.W_dec, published.dictionary.W_dec)
    assert len(found) == 40 and wrong == []
