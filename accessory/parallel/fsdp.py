"""FSDP2 over the data-parallel ranks, and the gradient norm of a model cut both ways."""

from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from accessory.dtypes import at_least
from accessory.parallel.tensor import get_data_parallel_group, get_model_parallel_rank

DataParallel = Literal["fsdp", "sdp", "ddp"]


def wrap(model: nn.Module, mode: DataParallel, compute: torch.dtype, device_type: str) -> None:
    """Shard ``model`` (on the meta device) over the data-parallel group, block by block.

    Args:
        mode: "fsdp" gathers each block's parameters for its forward and again for its backward; "sdp" keeps them
            gathered in between; "ddp" keeps parameters, gradients and optimiser state whole on every rank.
        compute: dtype of parameters and activations in forward and backward; modules that say ``needs_fp32`` get theirs in
            at least fp32. Parameters, their reduced gradients and the optimiser state keep the parameters' own dtype, or
            at least fp32. Frozen parameters are sharded too.
    """
    group = get_data_parallel_group()
    size = dist.get_world_size(group)
    if size == 1 and all(parameter.dtype == compute for parameter in model.parameters()):
        return
    if mode == "ddp":  # replicate over the group, shard over one rank
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        ranks = torch.tensor(dist.get_process_group_ranks(group)).unsqueeze(1)
        mesh = DeviceMesh.from_group([group, alone], device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = DeviceMesh.from_group(group, device_type, mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=at_least(compute), cast_forward_inputs=False)
    wide = [module for module in model.modules() if getattr(module, "needs_fp32", False)]
    fully_shard(  # small, so gathered together and once
        wide, mesh=mesh, mp_policy=replace(policy, param_dtype=at_least(compute)), reshard_after_forward=False
    )
    blocks = [module for child in model.children() if isinstance(child, nn.ModuleList) for module in child]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=mode == "fsdp")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():  # gradients are summed: a loss is already divided by what there is on all ranks
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over the data-parallel ranks, or only adds them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def show_masters(model: nn.Module) -> None:
    """Let the parameters be their sharded masters again: after a forward some are still gathered, in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of an FSDP-sharded tensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_grad_norm(parameters: dict[str, nn.Parameter], cut: set[str]) -> Tensor:
    """The 2-norm of the whole model's gradient, bitwise the same on every rank.

    Each logical parameter enters once: this rank adds its data-parallel shard; of what is whole on several ranks (a
    tensor that is not in ``cut`` over model-parallel ranks, or is replicated over data-parallel ones) only the first
    rank's copy counts. One all-reduce over the world.

    Args:
        parameters: by name; those without a gradient are left out.
        cut: names of the parameters that are cut over model-parallel ranks.

    Returns:
        A scalar in at least fp32.
    """
    first_mp, first_dp = get_model_parallel_rank() == 0, dist.get_rank(get_data_parallel_group()) == 0
    owned, total = [], None
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        replicated = isinstance(gradient, DTensor) and isinstance(gradient.placements[0], Replicate)
        if (name in cut or first_mp) and (first_dp or not replicated):
            owned.append(local_part(gradient))
        total = total if total is not None else local_part(gradient).new_zeros((), dtype=at_least(gradient.dtype))
    assert total is not None, "no parameter has a gradient"
    if owned:
        norms = torch.stack(torch._foreach_norm(owned, 2, dtype=total.dtype))
        total = norms.square().sum()
    dist.all_reduce(total)
    return total.sqrt()
