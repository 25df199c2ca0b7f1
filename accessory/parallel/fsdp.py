"""FSDP2 over the data-parallel ranks, and the gradient norm of a model cut both ways."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from accessory.dtypes import at_least
from accessory.parallel.mesh import Axis, Mesh, local_part
from accessory.settings import DataParallel


def wrap(model: nn.Module, mesh: Mesh, mode: DataParallel, compute: torch.dtype, device_type: str) -> None:
    """Shard ``model`` (on the meta device) over ``mesh.dp_shard``, block by block, with copies over ``mesh.dp_replicate``.

    Args:
        mode: "fsdp" gathers each block's parameters for its forward and again for its backward; "sdp" and "ddp"
            keep them gathered until the step's last backward. ("ddp" is a matter of the mesh: shards over one rank.)
        compute: dtype of parameters and activations in forward and backward; at least fp32 in modules with ``needs_fp32``.
            Parameters, their reduced gradients and the optimiser state keep the parameters' own dtype, or at least fp32.
            Frozen parameters are sharded too. Where ranks have them whole they are left out of FSDP, which would copy them
            to themselves in every forward and backward.
    """
    if mesh.dp.size == 1 and all(p.dtype == compute or not p.is_floating_point() for p in model.parameters()):
        return
    as_they_are = _ready_to_use(model, compute) if mesh.dp_shard.size == 1 else set()
    devices = _device_mesh(mesh, device_type)
    model.data_parallel = mode  # type: ignore[assignment]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=at_least(compute), cast_forward_inputs=False)
    wide = [module for module in model.modules() if getattr(module, "needs_fp32", False)]
    shard = partial(fully_shard, mesh=devices, ignored_params=as_they_are)
    # small, so gathered together and once
    shard(wide, mp_policy=replace(policy, param_dtype=at_least(compute)), reshard_after_forward=False)
    blocks = [module for child in model.children() if isinstance(child, nn.ModuleList) for module in child]
    for block in blocks:
        shard(block, mp_policy=policy, reshard_after_forward=mode == "fsdp")
    shard(model, mp_policy=policy, reshard_after_forward=False)
    for block, after in pairwise(blocks):  # gathered before the host waits, as in a block of whole experts it does
        assert isinstance(block, FSDPModule) and isinstance(after, FSDPModule)
        block.set_modules_to_forward_prefetch([after])
    for module in model.modules():  # gradients are summed: a loss is already divided by what there is on all ranks
        if isinstance(module, FSDPModule):
            if mesh.dp.size > 1:  # a rank alone would divide what has no other summand, into another place
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.dp_shard.size == 1:
                module.set_custom_reduce_scatter(_OfOneRank())  # type: ignore[arg-type]


class _OfOneRank:
    """A reduce-scatter among one rank: the buffers to send from and to receive into are one, and nothing is copied.

    FSDP allocates both for each reduction, first the one to send from.
    """

    def __init__(self) -> None:
        self._sent: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._sent is None:
            self._sent = torch.empty(*size, dtype=dtype, device=device)
            return self._sent
        got, self._sent = self._sent, None
        return got

    def __call__(self, *args: Any, **options: Any) -> None:
        raise AssertionError("a rank alone sends nothing")


def _ready_to_use(model: nn.Module, compute: torch.dtype) -> set[nn.Parameter]:
    """The frozen parameters that are held in the dtype that they are computed in."""
    found = set()
    for module in model.modules():
        used_in = at_least(compute) if getattr(module, "needs_fp32", False) else compute
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and (parameter.dtype == used_in or not parameter.is_floating_point()):
                found.add(parameter)
    return found


def _device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """The data-parallel axes as FSDP takes them. It needs a process group also for an axis of one rank."""
    shard, replicate = (axis.group or _group_of_one() for axis in (mesh.dp_shard, mesh.dp_replicate))
    if mesh.dp_replicate.size == 1:
        return DeviceMesh.from_group(shard, device_type, mesh_dim_names=("shard",))
    ranks = torch.tensor(dist.get_process_group_ranks(mesh.dp.group)).view(-1, mesh.dp_shard.size)
    return DeviceMesh.from_group([replicate, shard], device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _group_of_one() -> dist.ProcessGroup:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Say whether the next backward is the ``last`` of a step, and so whether gradients are reduced or only accumulated.

    "fsdp" never holds whole gradients: it reduces them over the shards in every backward, and over the copies in the last.
    The other modes keep whole gradients and the gathered parameters, and communicate once a step.
    """
    if isinstance(model, FSDPModule):
        holds_whole = model.data_parallel != "fsdp"
        model.set_requires_gradient_sync(last or not holds_whole)
        model.set_reshard_after_backward(last or not holds_whole)
        model.set_requires_all_reduce(last)


def show_masters(model: nn.Module) -> None:
    """Make the parameters their sharded masters again: after a forward, some are still gathered, in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def global_grad_norm(model: nn.Module, is_owner: Mapping[str, bool], world: Axis) -> Tensor:
    """The 2-norm of the whole model's gradient, bitwise the same on every rank. One all-reduce over the world.

    Args:
        is_owner: whether this rank's part of a parameter's gradient counts, by name: each logical value must enter once.

    Returns:
        A scalar in at least fp32.
    """
    owned, total = [], None
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_owner[name]:
            owned.append(local_part(gradient))
        total = total if total is not None else local_part(gradient).new_zeros((), dtype=at_least(gradient.dtype))
    assert total is not None, "no parameter has a gradient"
    if owned:
        norms = torch.stack(torch._foreach_norm(owned, 2, dtype=total.dtype))
        total = norms.square().sum()
    return world.all_reduce(total).sqrt()
