"""A device that is not there: its tensors live in the processor's memory, and refuse to meet those that say they do.

Real values come out, so that code whose path depends on data runs as it would on a GPU, and what mixes devices fails as
it would there. What a GPU has of its own, kernels, generators and memory, is not tried.
"""

import contextlib
import io
from pathlib import Path
from unittest import mock

import nbformat
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from helpers.subjects import subject

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
CPU = torch.device("cpu")
ANY_DEVICE = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEX = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor on the device, around one in memory."""

    @staticmethod
    def __new__(cls, inner):
        strides, offset = inner.stride(), inner.storage_offset()
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=strides, storage_offset=offset, dtype=inner.dtype, device=DEVICE
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, form):
        return self.cpu().__format__(form)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    _refuse_mixing(func, args, kwargs, tensors)
    target = kwargs.get("device")
    given = tree_map_only(Elsewhere, lambda t: t.inner, args), tree_map_only(Elsewhere, lambda t: t.inner, kwargs)
    if target is not None:
        given[1]["device"] = CPU
        there = torch.device(target).type == DEVICE.type
    out = func(*given[0], **given[1])
    if func in ANY_DEVICE and func is torch.ops.aten.copy_.default:
        return args[0]
    known = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}  # what is changed in place comes back itself
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else Elsewhere(t) if there else t, out)


def _refuse_mixing(func, args, kwargs, tensors):
    if func in ANY_DEVICE:
        return
    if func in INDEX:
        tensors = [args[0], *(args[2:3] if len(args) > 2 else [])]
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
    if here and any(isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"{func} got tensors on {DEVICE} and on the CPU: they must be on one device")


class _Generator(torch.Generator):
    """Random numbers come from the processor's generator, whatever device is asked for."""

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextlib.contextmanager
def device():
    """While it lasts, `DEVICE` can be named wherever torch takes a device."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) makes it here and sends it there
    try:
        with mock.patch.object(torch, "Generator", _Generator), _Device():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def run_notebook(path: Path) -> dict:
    """Run the code cells of a notebook here, at smoke scale, every model on the device; the names that they leave."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}
    with device() as there, mock.patch.object(subject, "default_device", lambda: there):
        for number, cell in enumerate(cells):
            source = cell.source.replace('scale = "laptop"', 'scale = "smoke"') if number == 0 else cell.source
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"{path.stem}, code cell {number}", "exec"), names)
    return names
