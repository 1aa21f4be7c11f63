"""There and back: what is written is read again as the same dictionary. Other libraries read it in tests/interop."""

import json

import pytest
import torch
from published_files import PAIRS, D, N, X, random
from safetensors.torch import load_file

from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.designated import DeltaCrosscoder
from helpers.published.load import load_dictionary
from helpers.published.origin import Inputs, Origin, Published
from helpers.published.write import write_crosscoder, write_sae_lens

ORIGIN = Origin("ours", "here", "float32", "docs-gpt2", "blocks.4.hook_resid_post", 128, False)


def shaken(dictionary, x):
    """No bias is zero, no norm is one."""
    for seed, bias in enumerate((dictionary.b_enc, dictionary.b_dec)):
        bias.data = 0.1 * random(*bias.shape, seed=seed)
    dictionary.W_dec.data *= (random(N, 1) / 2).exp()
    if isinstance(dictionary.activation, Gated):
        dictionary.activation.log_scale.data, dictionary.activation.bias.data = random(N) / 5, random(N, seed=1) / 5
    if isinstance(dictionary.activation, BatchTopK):
        dictionary.calibrate(x.split(25))  # two batches: no value is the threshold itself
    return dictionary.eval()


@pytest.mark.parametrize("mode", ["none", "unit", "length", "mean norm"])
@pytest.mark.parametrize("activation", [ReLU(), TopK(3), MultiTopK(3), BatchTopK(3), JumpReLU(N, 0.3), Gated(N)])
def test_an_autoencoder_there_and_back(tmp_path, activation, mode):
    sae = shaken(SparseAutoencoder(D, N, activation), X)
    published = Published(sae, ORIGIN.with_inputs(Inputs(mode)))
    read = load_dictionary(write_sae_lens(published, tmp_path / "sae"))
    assert read.origin.inputs.mode == mode and 0 < (sae.encode(X) > 0).float().mean() < 1
    torch.testing.assert_close(read.dictionary.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.dictionary(X), sae(X), rtol=1e-5, atol=1e-5)
    origin = read.origin
    assert (origin.model, origin.hook, origin.context, origin.bos) == ("docs-gpt2", ORIGIN.hook, 128, False)


@pytest.mark.parametrize(
    ("kind", "activation", "switches"),
    [
        (Crosscoder, ReLU(), {}),
        (Crosscoder, BatchTopK(3), {"size": "sum"}),
        (Crosscoder, BatchTopK(3), {"size": "joint"}),
        (DecoupledCrosscoder, BatchTopK(3), {}),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_crosscoder_there_and_back(tmp_path, kind, activation, switches, scaled):
    crosscoder = shaken(kind(D, N, activation, **switches), PAIRS)
    norm = torch.tensor([[3.0], [0.2]])
    inputs = Inputs("fixed", mean=random(2, D), factor=1 / norm, norm=norm) if scaled else Inputs()
    read = load_dictionary(write_crosscoder(Published(crosscoder, ORIGIN.with_inputs(inputs)), tmp_path / "pair"))
    assert type(read.dictionary) is kind and read.dictionary.size == crosscoder.size
    torch.testing.assert_close(read.dictionary.encode(PAIRS), crosscoder.encode(PAIRS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.dictionary(PAIRS), crosscoder(PAIRS), rtol=1e-5, atol=1e-5)
    y, again = inputs.prepare(PAIRS)[0], read.prepare(PAIRS)[0]
    torch.testing.assert_close(again, y)
    assert torch.equal(read.dictionary.decoders, crosscoder.decoders)


def test_the_scale_of_activations_is_the_one_that_its_library_would_compute(tmp_path):
    norm = torch.tensor([[3.0], [0.2]])
    inputs = Inputs("fixed", mean=random(2, D), factor=1 / norm, norm=norm)
    published = Published(shaken(Crosscoder(D, N, ReLU()), PAIRS), ORIGIN.with_inputs(inputs))
    t = load_file(write_crosscoder(published, tmp_path) / "model.safetensors")
    expected = t["target_rms"] / t["activation_std"].square().sum(-1).sqrt()
    torch.testing.assert_close(t["activation_global_scale"], expected)


def test_interrupted_between_two_files_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    published = Published(shaken(SparseAutoencoder(D, N, TopK(3)), X), ORIGIN)
    write_sae_lens(published, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.published.write.write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        write_sae_lens(published, tmp_path)
    with pytest.raises(ValueError, match="in no layout known here .* may be missing beside it"):
        load_dictionary(tmp_path)


def test_settings_are_those_that_sae_lens_writes(tmp_path):
    published = Published(shaken(SparseAutoencoder(D, N, TopK(3)), X), ORIGIN.with_inputs(Inputs("unit")))
    settings = json.loads((write_sae_lens(published, tmp_path) / "cfg.json").read_text())
    assert (settings["architecture"], settings["k"], settings["d_in"], settings["d_sae"]) == ("topk", 3, D, N)
    assert settings["normalize_activations"] == "layer_norm" and settings["metadata"]["hook_name"] == ORIGIN.hook


def test_what_they_have_no_place_for_is_one_sentence(tmp_path):
    sae, pair = SparseAutoencoder(D, N, ReLU()), Crosscoder(D, N, TopK(2))
    two_places = DeltaCrosscoder(D, N, BatchTopK(2), delta=3, k_delta=1, weight=1.0)
    fixed = Inputs("fixed", torch.zeros(D), torch.ones(1), torch.ones(1))
    none_such = "crosscoder_learning has crosscoders of ReLU and of BatchTopK"
    for written, by, message in (
        (Published(pair, ORIGIN), write_sae_lens, "SAELens has no crosscoders: use write_crosscoder"),
        (Published(sae, ORIGIN.with_inputs(fixed)), write_sae_lens, "SAELens has no inputs 'fixed'"),
        (Published(SparseAutoencoder(D, N, BatchTopK(2)), ORIGIN), write_sae_lens, "BatchTopK has no threshold yet"),
        (Published(sae, ORIGIN), write_crosscoder, none_such),
        (Published(pair, ORIGIN), write_crosscoder, none_such),
        (Published(two_places, ORIGIN), write_crosscoder, none_such),
        (
            Published(Crosscoder(D, N, ReLU()), ORIGIN.with_inputs(Inputs("unit"))),
            write_crosscoder,
            "crosscoder_learning has no inputs 'unit'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            by(written, tmp_path / "written")
    assert not (tmp_path / "written").exists()
