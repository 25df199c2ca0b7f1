"""Tensors of a GPU that is not there."""

import functools
import inspect
from collections import Counter
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from pretend_gpu.graphs import attend_by_document

FROM_BOTH = {"aten.copy_", "aten._to_copy", "aten.index", "aten.index_put_", "aten._index_put_impl_"}
"""Operators that take tensors of the GPU and of the CPU; others take numbers from there at most."""
WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal"}
waits = Counter()
"""How often the host has waited for the GPU, by operator."""


class OnGpu(Tensor):
    """A tensor of a GPU; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held, device):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=device, **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"{self.device} {self.held}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendGpu(TorchDispatchMode):
    """While it is entered, what is made on a GPU is an ``OnGpu``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does to its local part comes here then
        if any(issubclass(kind, OnGpu) for kind in types) or _is_gpu(kwargs.get("device")):
            return _run(func, args, kwargs)
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def _is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def _numbered(device):
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _run(func, args, kwargs):
    """An operator that takes tensors of a GPU, or makes them."""
    name = func._schema.name.replace("::", ".")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnGpu)]
    _check_places(name, args, tensors, there)
    if name in WAITS and there:
        waits[name] += 1
    if name == "aten.is_pinned":
        return False
    asked = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    plain_args, plain_kwargs = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
        kwargs["device"] = torch.device(asked)
    out = func(*plain_args, **plain_kwargs)
    if name == "aten._conj":
        out = out.resolve_conj()  # the tensor around it does not know that it is to be conjugated
    if name == "aten.copy_":
        return args[0]
    if not (_is_gpu(asked) if asked is not None else there):
        return out
    device, known = _numbered(asked) if asked is not None else there[0].device, {id(x.held): x for x in there}
    is_view = func.is_view and isinstance(args[0], OnGpu)
    with torch.inference_mode(args[0].is_inference()) if is_view else nullcontext():
        out = tree_map(lambda x: known[id(x)] if id(x) in known else OnGpu(x, device) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if is_view else out


def _check_places(name, args, tensors, there):
    """As a GPU would.

    Raises:
        RuntimeError: tensors of several places.
    """
    if len({x.device for x in there}) > 1 and name != "aten.copy_":
        raise RuntimeError(f"{name} takes tensors of several GPUs")
    here = [x for x in tensors if not isinstance(x, OnGpu) and x.device.type == "cpu"]
    takes_numbers = name not in ("aten.cat", "aten.stack")
    mixed = there and any(x.dim() or not takes_numbers for x in here) and not name.startswith("c10d.")
    written = name in ("aten.index_put_", "aten._index_put_impl_") and args[2].dim() and not isinstance(args[2], OnGpu)
    indexed = name.startswith("aten.index") and name in FROM_BOTH and there and not isinstance(args[0], OnGpu)
    if (mixed and name not in FROM_BOTH) or (there and written) or indexed:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{name} takes tensors of a GPU and of the CPU, those of the CPU of shapes {shapes}")


_tensor, _tolist, _getitem, _setitem = torch.tensor, Tensor.tolist, Tensor.__getitem__, Tensor.__setitem__


def tensor(data, *, dtype=None, device=None, requires_grad=False):
    """``torch.tensor``, which asks no mode."""
    data = data.item() if isinstance(data, OnGpu) else data
    made = _tensor(data, dtype=dtype)
    made = made if device is None else made.to(device)
    return made.requires_grad_() if requires_grad else made


def new_tensor(like, data, *, dtype=None, device=None):
    return tensor(data, dtype=dtype or like.dtype, device=device or like.device)


def getitem(self, index):
    return _getitem(self, _brought(index, self.device))


def setitem(self, index, value):
    _setitem(self, _brought(index, self.device), value)


def _brought(index, device):
    """Lists of places are brought to the GPU."""
    if type(index) is tuple:
        return tuple(_brought(one, device) for one in index)
    return tensor(index, device=device) if isinstance(index, list) else index


def tolist(self):
    if not isinstance(self, OnGpu):
        return _tolist(self)
    waits["tolist"] += 1
    return self.held.tolist()


@functools.wraps(varlen_attn)
def variable_length(*args, **kwargs):
    """``varlen_attn``, with what it asks of a GPU's tensors; over pages it knows no gradients."""
    bound = inspect.signature(varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    told = bound.arguments
    q, k, v, borders, *_ = told.values()
    table, (left, right) = told["block_table"], told["window_size"]
    assert right == 0 and (told["enable_gqa"] or q.shape[1] == k.shape[-2])
    assert q.dtype in (torch.bfloat16, torch.float16) and borders.dtype == torch.int32 and isinstance(borders, OnGpu)
    assert table is None or (k.shape[1] % 256 == 0 and table.dtype == told["seqused_k"].dtype == torch.int32)
    if table is not None:
        return varlen_attn(*args, **kwargs)
    ends = borders.held.tolist()
    return attend_by_document(q, [(k[rows], v[rows]) for rows in map(slice, ends, ends[1:])], ends, left)
