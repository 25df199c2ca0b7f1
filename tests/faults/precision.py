"""What must not be rounded to bf16 where a model computes in it; in fp64 nothing of this can be seen."""

from faults.checks import LOW, LOW_FSDP
from faults.fault import Fault

ROUTER = "accessory/model/moe/router.py"
LOSS = "tests/test_kernels.py::test_cross_entropy_of_bf16_is_summed_in_fp32"

FAULTS = (
    Fault(
        "the router's product is in bf16",
        ROUTER,
        "return F.linear(at_least_fp32(x), at_least_fp32(weight))",
        "return at_least_fp32(F.linear(x, weight.to(x.dtype)))",
        LOW,
    ),
    Fault(
        "the router's softmax is in bf16",
        ROUTER,
        "probs = logits.softmax(-1)",
        "probs = logits.to(x.dtype).softmax(-1).to(logits.dtype)",
        LOW,
    ),
    Fault(
        "the router's weights are gathered in bf16",
        "accessory/parallel/fsdp.py",
        "replace(policy, param_dtype=at_least(compute))",
        "policy",
        LOW,
    ),
    Fault(
        "the router is saved in bf16",
        "accessory/model/logical.py",
        'return at_least(dtype) if ".feed_forward.gate." in name else dtype',
        "return at_least(dtype) if is_buffer(name) else dtype",
        "tests/test_checkpoint.py::test_saved_directories_are_those_of_the_format",
    ),
    Fault(
        "gradients are reduced in bf16",
        "accessory/parallel/fsdp.py",
        "reduce_dtype=at_least(compute)",
        "reduce_dtype=compute",
        LOW_FSDP,
    ),
    Fault("the norm's statistics are in bf16", "accessory/model/norm.py", "wide = at_least_fp32(x)", "wide = x", LOW),
    Fault(
        "positions are in bf16, which knows all of them up to 256",
        "accessory/model/rope.py",
        "angles = positions.to(torch.float64)",
        "angles = positions.to(dtype).to(torch.float64)",
        LOW,
    ),
    Fault(
        "angles are in bf16",
        "accessory/model/rope.py",
        "rotation = torch.polar(torch.ones_like(angles), angles)",
        "angles = angles.to(dtype).to(torch.float64)\n    rotation = torch.polar(torch.ones_like(angles), angles)",
        LOW,
    ),
    Fault(
        "AdamW's moments are in bf16",
        "accessory/train/optim.py",
        "    return AdamW([g for g in groups",
        "    optimizer = AdamW([g for g in groups",
        LOW,
        (
            (
                "accessory/train/optim.py",
                "eps=config.eps, fused=True)\n",
                "eps=config.eps, fused=True)\n\n"
                "    def rounded(*_: object) -> None:\n"
                "        for state in optimizer.state.values():\n"
                '            for kind in ("exp_avg", "exp_avg_sq"):\n'
                "                if state[kind].element_size() == 4:\n"
                "                    state[kind].copy_(state[kind].bfloat16())\n\n"
                "    optimizer.register_step_post_hook(rounded)\n"
                "    return optimizer\n",
            ),
        ),
    ),
    Fault(
        "the masters are in bf16",
        "accessory/train/model.py",
        "dtype=at_least(compute),",
        "dtype=compute,",
        "tests/test_run_state.py::test_masters_and_moments_are_not_rounded",
    ),
    Fault(
        "the score bias is in bf16",
        ROUTER,
        "torch.zeros(num_experts, dtype=torch.float32)",
        "torch.zeros(num_experts, dtype=torch.bfloat16)",
        "tests/test_balance.py::test_the_bias_is_saved_in_full_precision",
    ),
    Fault(
        "the loss is summed in bf16",
        "accessory/parallel/cross_entropy.py",
        "loss += (log_sum - target_logit).sum()",
        "loss += (log_sum - target_logit).to(tensors[0].dtype).sum()",
        LOSS,
    ),
    Fault(
        "the output layer's gradient is summed over chunks in bf16",
        "accessory/parallel/cross_entropy.py",
        "torch.zeros_like(w, dtype=at_least(w.dtype)) if need",
        "torch.zeros_like(w) if need",
        LOSS,
    ),
    Fault(
        "all parts of the vocabulary add to the gradient of the first",
        "accessory/parallel/cross_entropy.py",
        "part += d_columns.T @ x[rows]",
        "d_w[: len(part)] += d_columns.T @ x[rows]",
        LOSS,
    ),
    Fault(
        "an adapter is merged in its base's precision",
        "accessory/checkpoint/merge.py",
        "wide = value.to(torch.promote_types(at_least(value.dtype), a.dtype))",
        "wide = value",
        "tests/test_adapters.py::test_a_merge_rounds_once",
    ),
)
