"""What backward makes again, and what a planned step counts."""

from faults.fault import Fault

RECOMPUTE, TRACE, PLANNER = "accessory/model/recompute.py", "accessory/train/trace.py", "accessory/train/planner.py"
BITS = "'tests/test_extremes.py::test_recompute_changes_no_bit[1]'"
KEPT, PROMISES = "tests/test_kept.py", "tests/test_plan.py::test_promises_at_full_size"
BY_HAND = "tests/test_plan.py::test_seconds_are_those_worked_by_hand"

FAULTS = (
    Fault(
        "a norm that is made again has no weight",
        "accessory/model/norm.py",
        "lambda x: rms_norm(x, self.weight, self.eps)[0]",
        "lambda x: rms_norm(x, torch.ones_like(self.weight), self.eps)[0]",
        "certify --only recompute=norms_and_experts world=1",  # its second step's weights are other than one
    ),
    Fault(
        "rows that are made again are in the tokens' order",
        "accessory/model/moe/dispatch.py",
        "lambda x_TD: x_TD.index_select(0, plan.token_n)",
        "lambda x_TD: x_TD.index_select(0, plan.token_n.sort().values)",
        BITS,
    ),
    Fault(
        "what goes into an adapted down projection is made again without the routing weight",
        "accessory/model/moe/experts.py",
        "made_again(weighted_swiglu(gate_nF, up_nF, weight_n1), swiglu, gate_nF, up_nF, weight_n1)",
        "made_again(weighted_swiglu(gate_nF, up_nF, weight_n1), swiglu, gate_nF, up_nF, torch.ones_like(weight_n1))",
        "tests/test_tuning.py::test_dropout_does_not_depend_on_the_partition",
    ),
    Fault(
        "what is made again is given for every tensor of its size",
        RECOMPUTE,
        "return tensor.untyped_storage()._cdata",
        "return tensor.numel()",
        BITS,
    ),
    Fault(
        "a block that runs again decides, and waits, again",
        RECOMPUTE,
        "    if not run.is_rerun:\n        run.decisions.append(decide())",
        "    run.decisions.append(decide())",
        PROMISES,
    ),
    Fault(
        "what can be made again is kept as well",
        RECOMPUTE,
        "        makers.clear()  # autograd keeps ``pack``\n",
        "",
        KEPT,
    ),
    Fault(
        "the down projection runs again",
        "accessory/model/moe/kernels/fused.py",
        "        if is_rerun():\n            return torch.empty_like(x)\n",
        "",
        PROMISES,
        (("accessory/model/moe/kernels/fused.py", "from accessory.model.recompute import is_rerun\n", ""),),
    ),
    Fault(
        "memory that FSDP frees is counted for ever",
        TRACE,
        "            if storage._cdata in self._storages:\n                self._follow(storage)\n",
        "",
        "tests/test_plan.py::test_what_is_told_at_once_is_near_what_is_counted",
    ),
    Fault(
        "an all-reduce sends each byte once",
        TRACE,
        '(2 if self.kind == "all-reduce" else 1)',
        "1",
        BY_HAND,
    ),
    Fault(
        "products of experts are counted as of one matrix",
        TRACE,
        "return 2.0 * x.shape[0] * x.shape[1] * w.shape[-1]",
        "return 2.0 * x.shape[0] * w.shape[-1]",
        "tests/test_plan.py::test_flops_are_those_of_the_model",
    ),
    Fault(
        "a ring leaves a node with every rank's bytes",
        PLANNER,
        "card.network * in_node",
        "card.network",
        BY_HAND,
    ),
    Fault(
        "what is sent once a step hides behind all of its micro-batches",
        PLANNER,
        "max((1 - HIDDEN) * times[False], times[False] - HIDDEN * beside)",
        "(1 - HIDDEN) * times[False]",
        BY_HAND,
    ),
    Fault(
        "more layers take what the first do",
        "accessory/train/planned_step.py",
        "share = (where - at) / (then - at)",
        "share = where / then",
        "tests/test_plan.py::test_a_deeper_model_is_no_surprise",
    ),
)
