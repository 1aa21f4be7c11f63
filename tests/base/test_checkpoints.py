import pytest
import safetensors.torch
import torch
from torch import nn

from helpers.base.checkpoints import (
    load_optimizer,
    load_state,
    optimizer_tensors,
    restore_training,
    save_state,
    training_tensors,
)


class Tiny(nn.Module):
    """An embedding that is also the head, and one matrix between."""

    def __init__(self, d_model: int = 4):
        super().__init__()
        self.embed = nn.Embedding(6, d_model)
        self.block = nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)).relu())


def a_training(seed: int) -> tuple[Tiny, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Tiny()
    muon = torch.optim.Muon([model.block.weight], lr=0.1, momentum=0.9)
    return model, [muon, torch.optim.AdamW([model.embed.weight, model.block.bias], lr=0.1, fused=True)]


def take_steps(model: Tiny, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        ids = torch.arange(6).roll(step)
        nn.functional.cross_entropy(model(ids), (ids * step) % 6).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    tensors = {
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "trained": nn.Parameter(torch.ones(2)),
    }
    metadata = {"step": 3, "curve": [{"loss": 0.1 + 0.2}], "name": "é✔", "nothing": None}
    save_state(tmp_path / "a" / "x.safetensors", tensors, **metadata)
    loaded, meta = load_state(tmp_path / "a" / "x.safetensors")
    assert meta == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_a_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    straight = a_training(0)
    take_steps(*straight, range(8))
    stopped = a_training(0)
    take_steps(*stopped, range(5))
    save_state(tmp_path / "x.safetensors", training_tensors(*stopped))
    resumed = a_training(1)
    restore_training(load_state(tmp_path / "x.safetensors")[0], *resumed)
    take_steps(*resumed, range(5, 8))
    expected = training_tensors(*straight)
    assert expected.keys() == {
        *("model.embed.weight", "model.block.weight", "model.block.bias", "optimizer0.0.momentum_buffer"),
        *(f"optimizer1.{i}.{entry}" for i in range(2) for entry in ("step", "exp_avg", "exp_avg_sq")),
    }
    for name, tensor in training_tensors(*resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_what_was_loaded_does_not_change_when_training_goes_on():
    stopped, resumed = a_training(0), a_training(1)
    take_steps(*stopped, range(5))
    tensors = {name: tensor.detach().clone() for name, tensor in training_tensors(*stopped).items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_training(tensors, *resumed)
    take_steps(*resumed, range(5, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_settings_stay_those_of_the_new_optimizer():
    weight = nn.Parameter(torch.ones(2))
    old, new = (torch.optim.AdamW([weight], lr=lr) for lr in (0.1, 0.2))
    weight.sum().backward()
    old.step()
    load_optimizer(new, optimizer_tensors(old, "x"), "x")
    assert (new.param_groups[0]["lr"], new.state[weight]["step"]) == (0.2, 1)


def test_the_state_of_one_optimizer_is_not_taken_for_that_of_another():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    tensors = {f"optimizer{i}.0.step": torch.tensor(float(i)) for i in (1, 10, 2)}
    load_optimizer(optimizer, tensors, "optimizer1")
    assert optimizer.state[weight] == {"step": 1.0}


def test_another_model_is_refused_and_left_alone(tmp_path):
    tensors = training_tensors(*a_training(0))
    other = Tiny(d_model=5)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match="of another model; build the same one, or move the checkpoint away"):
        restore_training(tensors, other, [])
    assert all(map(torch.equal, before, other.parameters()))
    with pytest.raises(ValueError, match="of another model"):
        restore_training(tensors | {"model.more": torch.ones(1)}, *a_training(0))


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(100)}, step=1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole checkpoint .*; delete it and run again"):
        load_state(path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole checkpoint"):
        load_state(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_state(tmp_path / "none.safetensors")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch, problem):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise problem

    save_state(tmp_path / "x.safetensors", {"a": torch.ones(1)}, step=1)
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(problem):
        save_state(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    tensors, meta = load_state(tmp_path / "x.safetensors")
    assert (tensors["a"].item(), meta) == (1.0, {"step": 1})


def test_metadata_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path / "x.safetensors", {}, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
