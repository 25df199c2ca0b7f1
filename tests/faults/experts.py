"""Who goes where, and what the experts make of it."""

from faults.checks import EXPERT, LORA, ONE, SPARSE
from faults.fault import Fault

FILE, DISPATCH = "accessory/model/moe/experts.py", "accessory/model/moe/dispatch.py"
LAYOUTS, KERNELS = "accessory/model/moe/layouts.py", "accessory/model/moe/kernels.py"
KERNEL = "tests/test_kernels.py::test_kernel_equals_the_definition"
ROWS = "tests/test_kernels.py::test_rows_go_to_their_experts_and_come_back"
MATMUL = "tests/test_kernels.py::test_matmul_equals_the_definition"

FAULTS = (
    Fault(
        "the third choice is dropped from a token's sum",
        DISPATCH,
        "for place_T in places[1:]:",
        "for place_T in places[1:2]:",
        ROWS,
    ),
    Fault(
        "a row takes another token",
        DISPATCH,
        "return DispatchPlan(order // top_k, order,",
        "return DispatchPlan(order % len(experts_TK), order,",
        ROWS,
    ),
    Fault(
        "the place of a choice is the choice at that place",
        DISPATCH,
        "place[order] = torch.arange(len(order), device=order.device)",
        "place = order.clone()",
        ROWS,
    ),
    Fault(
        "a choice of another rank's is looked for in this rank's last row",
        DISPATCH,
        "place = torch.where((place >= 0) & (place < stop - start), place, stop - start)",
        "place = place.clamp(0, max(0, stop - start - 1))",
        ROWS,
    ),
    Fault(
        "a row takes the weight of another choice",
        DISPATCH,
        "weight_n1 = weight_TK.flatten()[plan.choice_n].unsqueeze(1)",
        "weight_n1 = weight_TK.T.flatten()[plan.choice_n].unsqueeze(1)",
        ONE,
    ),
    Fault(
        "the expert layout computes another rank's experts",
        LAYOUTS,
        "return Replicated(range(mp.rank * each, (mp.rank + 1) * each), num_experts, mp)",
        "return Replicated(range(num_experts - (mp.rank + 1) * each, num_experts - mp.rank * each), num_experts, mp)",
        EXPERT,
    ),
    Fault(
        "the sparse layout's slice of w2 is another rank's",
        "accessory/model/logical.py",
        "            box[self.dim] = slice(rank * each",
        "            rank = size - 1 - rank if self.dim == 2 else rank\n            box[self.dim] = slice(rank * each",
        SPARSE,
    ),
    Fault(
        "w1 and w3 have changed places",
        FILE,
        "return KERNELS[kernel](x_nD, w1, w2, w3, weight_n1, ends_e)",
        "return KERNELS[kernel](x_nD, w3, w2, w1, weight_n1, ends_e)",
        ONE,
    ),
    Fault(
        "the routing weight is applied before the activation",
        KERNELS,
        "block.unpad(torch.bmm(F.silu(g).mul_(u), w2[e].mT), out=y)",
        "block.unpad(torch.bmm(F.silu(g * block.batch(weight)).mul_(u), w2[e].mT), out=y)",
        KERNEL,
        ((KERNELS, "return y.mul_(weight)", "return y"),),
    ),
    Fault(
        "the gradient of w1 and w3 lacks the routing weight",
        KERNELS,
        "weighted_x = block.batch(x) * weight_b",
        "weighted_x = block.batch(x)",
        KERNEL,
    ),
    Fault("the gradient of w3 lacks the activation", KERNELS, "du = s.mul_(dh)", "du = dh.clone()", KERNEL),
    Fault(
        "the gradient of the input lacks the routing weight",
        KERNELS,
        "return dx.mul_(weight), dw1",
        "return dx, dw1",
        KERNEL,
    ),
    Fault(
        "an expert without rows is skipped, and its gradient is left as it was found",
        KERNELS,
        "if start == stop and not weights_train:",
        "if start == stop:",
        KERNEL,
        (
            (
                KERNELS,
                "torch.empty_like(w) if need else None for w, need",
                "torch.ones_like(w) if need else None for w, need",
            ),
        ),
    ),
    Fault(
        "the second block of experts has the first one's weights",
        KERNELS,
        "x_b, e = block.batch(x), block.experts",
        "x_b, e = block.batch(x), slice(0, len(block.counts))",
        KERNEL,
    ),
    Fault(
        "the grouped kernel activates the wrong product",
        KERNELS,
        "F.grouped_mm(weighted_swiglu(gate, up, weight)",
        "F.grouped_mm(weighted_swiglu(up, gate, weight)",
        KERNEL,
    ),
    Fault(
        "the grouped kernel's gradient of the gate lacks the routing weight",
        KERNELS,
        "ds.copy_(dh[rows]).mul_(weight[rows]).mul_(up[rows])",
        "ds.copy_(dh[rows]).mul_(up[rows])",
        KERNEL,
    ),
    Fault(
        "the looped product's gradient of its input takes the first experts' matrices",
        KERNELS,
        "block.unpad(torch.bmm(dy_b, w[block.experts]), out=dx)",
        "block.unpad(torch.bmm(dy_b, w[: len(block.counts)]), out=dx)",
        MATMUL,
    ),
    Fault(
        "an expert's bias is added whatever the routing weight",
        FILE,
        "replace(products, bias_ne=products.bias_ne * weight_n1)",
        "products",
        LORA,
    ),
)
