"""What crosses ranks: regions of partial gradients, FSDP, the norm of the whole gradient."""

from faults.checks import DDP, EXPERT, FSDP
from faults.fault import Fault

TENSOR, FSDP_FILE = "accessory/parallel/tensor.py", "accessory/parallel/fsdp.py"
DISPATCH, STEP = "accessory/model/moe/dispatch.py", "accessory/train/step.py"

UNREDUCED = '''
class _OwnPart(DefaultReduceScatter):
    """What this rank's own part of the gradient is, before anything is summed."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()] / group.size())


def sync_gradients(model: nn.Module, now: bool, reduced: bool = True) -> None:
    """With the fault."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(DefaultReduceScatter() if reduced else _OwnPart())
'''

FAULTS = (
    Fault(
        "the gradients of all but the last micro-batch are not reduced over fsdp's ranks",
        STEP,
        'sync_gradients(model, last or data_parallel == "fsdp")',
        'sync_gradients(model, last or data_parallel == "fsdp", last or data_parallel != "fsdp")',
        FSDP,
        (
            (FSDP_FILE, "\ndef sync_gradients(model: nn.Module, now: bool) -> None:\n", UNREDUCED),
            (
                FSDP_FILE,
                "from torch.distributed.tensor import DTensor, Replicate\n",
                "from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter\n"
                "from torch.distributed.tensor import DTensor, Replicate\n",
            ),
        ),
    ),
    Fault(
        "the partial gradient of attention's input is not summed",
        "accessory/model/attention.py",
        "        x = copy_to_model_parallel_region(x)\n",
        "",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the experts' input is not summed",
        DISPATCH,
        "rows_of_tokens(copy_to_model_parallel_region(x_TD), plan)",
        "rows_of_tokens(x_TD, plan)",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the routing weights is not summed",
        DISPATCH,
        "copy_to_model_parallel_region(routing.weights.to(x_TD.dtype))",
        "routing.weights.to(x_TD.dtype)",
        EXPERT,
    ),
    Fault(
        "the partial gradient of the output layer's input is not summed",
        "accessory/model/head.py",
        "hidden = copy_to_model_parallel_region(norm(x))\n        low",
        "hidden = norm(x)\n        low",
        EXPERT,
    ),
    Fault(
        "the router's gradient, whole on every rank, is summed",
        "accessory/model/moe/__init__.py",
        "routing = self.gate(x_TD, draw_T)",
        "routing = self.gate(copy_to_model_parallel_region(x_TD), draw_T)",
        EXPERT,
        (
            (
                "accessory/model/moe/__init__.py",
                "from accessory.model.args import ModelArgs\n",
                "from accessory.model.args import ModelArgs\n"
                "from accessory.parallel.tensor import copy_to_model_parallel_region\n",
            ),
        ),
    ),
    Fault(
        "a gradient that others still read is summed in place",
        TENSOR,
        "out = x.clone(memory_format=torch.contiguous_format)",
        "out = x",
        "tests/test_tensor_parallel.py::test_copy_to_leaves_a_shared_gradient_alone",
    ),
    Fault(
        "what lies otherwise in another rank's memory is summed as it lies",
        TENSOR,
        "out = x.clone(memory_format=torch.contiguous_format)",
        "out = x.clone()",
        "tests/test_tensor_parallel.py::test_tensors_that_are_not_contiguous",
    ),
    Fault(
        "gathered columns stand in the wrong order",
        TENSOR,
        "return torch.cat(parts, dim=-1)",
        "return torch.cat(parts[::-1], dim=-1)",
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
        FSDP_FILE,
        "if (name in cut or first_mp) and (first_dp or not replicated):",
        "if first_dp or not replicated:",
        EXPERT,
    ),
    Fault(
        "what data-parallel ranks hold whole is counted by each of them in the norm",
        FSDP_FILE,
        "if (name in cut or first_mp) and (first_dp or not replicated):",
        "if name in cut or first_mp:",
        DDP,
    ),
    Fault(
        "the norm is that of one model-parallel rank's part",
        FSDP_FILE,
        "    dist.all_reduce(total)\n",
        "    dist.all_reduce(total, group=get_data_parallel_group())\n",
        EXPERT,
    ),
    Fault(
        "where FSDP's rows do not divide, a rank's first row is another",
        "accessory/model/build.py",
        "each = -(-parameter.shape[0] // parameter.device_mesh.size(axis))",
        "each = max(1, parameter.shape[0] // parameter.device_mesh.size(axis))",
        "certify --only world=2 dp=fsdp tuning=lora",
    ),
)
