"""What crosses ranks: regions of partial gradients, FSDP, the norm of the whole gradient."""

from faults.checks import DDP, EXPERT, FSDP, HSDP, SHARED_HEADS
from faults.fault import Fault

REGIONS, FSDP_FILE = "accessory/parallel/regions.py", "accessory/parallel/fsdp.py"
MESH, HOLDINGS = "accessory/parallel/mesh.py", "accessory/model/holdings.py"
DISPATCH, STEP = "accessory/model/moe/dispatch.py", "accessory/train/step.py"

UNREDUCED = '''
class _OwnPart(DefaultReduceScatter):
    """What this rank's own part of the gradient is, before anything is summed."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()] / group.size())


def sync_gradients(model: nn.Module, last: bool) -> None:
    """With the fault."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(DefaultReduceScatter() if last else _OwnPart())
'''

FAULTS = (
    Fault(
        "the gradients of all but the last micro-batch are not reduced over fsdp's ranks",
        FSDP_FILE,
        "\ndef sync_gradients(model: nn.Module, last: bool) -> None:\n",
        UNREDUCED,
        FSDP,
        (
            (
                FSDP_FILE,
                "from torch.distributed.fsdp import FSDPModule,",
                "from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter\n"
                "from torch.distributed.fsdp import FSDPModule,",
            ),
        ),
    ),
    Fault(
        "sdp gathers the parameters again in each micro-step",
        FSDP_FILE,
        "model.set_reshard_after_backward(last or not holds_whole)",
        "model.set_reshard_after_backward(True)",
        "tests/test_plan.py::test_promises_at_full_size",
    ),
    Fault(
        "sdp reduces gradients in each micro-step",
        FSDP_FILE,
        "model.set_requires_gradient_sync(last or not holds_whole)",
        "model.set_requires_gradient_sync(True)",
        "tests/test_plan.py::test_promises_at_full_size",
    ),
    Fault(
        "gathered parameters stay for the next step",
        FSDP_FILE,
        "model.set_reshard_after_backward(last or not holds_whole)",
        "model.set_reshard_after_backward(not holds_whole)",
        "certify --only world=2 dp=sdp",
    ),
    Fault(
        "the gradients of a rank alone are reduced where the last micro-batch's still are",
        FSDP_FILE,
        "got, self._sent = self._sent, None",
        "got = self._sent",
        "tests/test_partition.py::test_a_rank_alone_adds_up_what_it_reduces_in_place",
    ),
    Fault(
        "the partial gradient of attention's input is not summed",
        "accessory/model/attention.py",
        "        x = copy_to_model_parallel_region(x, self.mp)\n",
        "",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the experts' input is not summed",
        DISPATCH,
        "rows_of_tokens(copy_to_model_parallel_region(x_TD, self.mp), plan)",
        "rows_of_tokens(x_TD, plan)",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the routing weights is not summed",
        DISPATCH,
        "copy_to_model_parallel_region(routing.weights.to(x_TD.dtype), self.mp)",
        "routing.weights.to(x_TD.dtype)",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the output layer's input is not summed",
        "accessory/model/head.py",
        "hidden = copy_to_model_parallel_region(norm(x), output.mp)\n        low",
        "hidden = norm(x)\n        low",
        EXPERT,
    ),
    Fault(
        "the router's gradient, whole on every rank, is summed",
        "accessory/model/moe/__init__.py",
        "routing = self.gate(x_TD, adapters)",
        "routing = self.gate(copy_to_model_parallel_region(x_TD, self.dispatcher.mp), adapters)",
        EXPERT,
        (
            (
                "accessory/model/moe/__init__.py",
                "from accessory.model.args import ModelArgs\n",
                "from accessory.model.args import ModelArgs\n"
                "from accessory.parallel.regions import copy_to_model_parallel_region\n",
            ),
        ),
    ),
    Fault(
        "a gradient that others still read is summed in place",
        REGIONS,
        "mp.all_reduce(x.clone(memory_format=torch.contiguous_format))",
        "mp.all_reduce(x)",
        "tests/test_tensor_parallel.py::test_copy_to_leaves_a_shared_gradient_alone",
    ),
    Fault(
        "what lies otherwise in another rank's memory is summed as it lies",
        REGIONS,
        "mp.all_reduce(x.clone(memory_format=torch.contiguous_format))",
        "mp.all_reduce(x.clone())",
        "tests/test_tensor_parallel.py::test_tensors_that_are_not_contiguous",
    ),
    Fault(
        "gathered columns stand in the wrong order",
        REGIONS,
        "return torch.cat(parts, -1)",
        "return torch.cat(parts[::-1], -1)",
        EXPERT,
    ),
    Fault(
        "FSDP takes the mean over ranks, not the sum",
        FSDP_FILE,
        "module.set_gradient_divide_factor(1.0)",
        "pass",
        FSDP,
        ((FSDP_FILE, "            module.set_force_sum_reduction_for_comms(True)\n", ""),),
    ),
    Fault(
        "what model-parallel ranks hold whole is counted by each of them in the norm",
        HOLDINGS,
        "is_first and (cut.dim_over(mesh.mp.size) is not None or mesh.mp.rank == 0)",
        "is_first",
        EXPERT,
    ),
    Fault(
        "what data-parallel ranks hold whole is counted by each of them in the norm",
        HOLDINGS,
        "is_first and (cut.dim_over(mesh.mp.size) is not None or mesh.mp.rank == 0)",
        "cut.dim_over(mesh.mp.size) is not None or mesh.mp.rank == 0",
        DDP,
    ),
    Fault(
        "the norm is that of one model-parallel rank's part",
        FSDP_FILE,
        "return world.all_reduce(total).sqrt()",
        "return model.mesh.dp.all_reduce(total).sqrt()",
        EXPERT,
    ),
    Fault(
        "where FSDP's rows do not divide, a rank's first row is another",
        HOLDINGS,
        "each, is_first = -(-rows // mesh.dp_shard.size)",
        "each, is_first = max(1, rows // mesh.dp_shard.size)",
        "certify --only world=2 dp=fsdp tuning=lora",
    ),
    Fault(
        "a shard's copies keep their own gradients",
        FSDP_FILE,
        "        model.set_requires_all_reduce(last)\n",
        "        model.set_requires_all_reduce(False)\n",
        HSDP,
    ),
    Fault(
        "what each copy of a shard holds is counted in the norm",
        HOLDINGS,
        "mesh.dp_replicate.rank == 0",
        "True",
        HSDP,
    ),
    Fault(
        "a copy's shards are numbered through all data-parallel ranks",
        HOLDINGS,
        "(mesh.dp_shard.rank, mesh.dp_shard.rank + 1)",
        "(mesh.dp.rank, mesh.dp.rank + 1)",
        HSDP,
    ),
    Fault(
        "the partial gradient of a key head that ranks share is not summed",
        "accessory/model/linear.py",
        "copy_to_model_parallel_region(parameter, self.mp)[self.own_rows]",
        "parameter[self.own_rows]",
        SHARED_HEADS,
    ),
    Fault(
        "a rank computes the key head of its neighbours' query heads",
        "accessory/model/linear.py",
        "part, height = mp.rank * parts // mp.size,",
        "part, height = mp.rank % parts,",
        SHARED_HEADS,
    ),
    Fault(
        "a key head that ranks share is taken to be cut",
        HOLDINGS,
        "cut.dim_over(mesh.mp.size) is not None",
        "cut.dim is not None",
        SHARED_HEADS,
    ),
    Fault(
        "a copy is shared out among ranks that lie apart",
        MESH,
        "first, place = dp.rank // shard_size * shard_size, dp.rank % shard_size",
        "first, place = 0, dp.rank % shard_size",
        "tests/test_tensor_parallel.py::test_a_mesh_is_replicas_of_shards_of_model_parallel_ranks",
    ),
)
