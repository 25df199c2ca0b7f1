"""Who goes where, and what the experts make of it."""

from faults.checks import EXPERT, ONE, SPARSE
from faults.fault import Fault

FILE, DISPATCH = "accessory/model/moe/experts.py", "accessory/model/moe/dispatch.py"
LAYOUTS, KERNELS = "accessory/model/moe/layouts.py", "accessory/model/moe/kernels"
LOOPED, FUSED, SWIGLU = f"{KERNELS}/looped.py", f"{KERNELS}/fused.py", f"{KERNELS}/swiglu.py"
KERNEL = "tests/test_kernels.py::test_kernel_equals_the_definition"
ROWS = "tests/test_kernels.py::test_rows_go_to_their_experts_and_come_back"
ADAPTED = "tests/test_kernels.py::test_adapters_are_as_if_folded_in"
MATMUL = "tests/test_kernels.py::test_matmul_equals_the_definition"
PACKED = "tests/test_expert_weights.py::test_packed_weights_give_what_their_dense_ones_give"
FEW_ROWS = "accessory/model/few_rows.c"
FEW = "tests/test_packed.py::test_an_answer_s_next_token_depends_on_no_other_answer_to_the_last_bit"
AS_BEFORE = "tests/test_packed.py::test_a_packed_model_gives_what_it_gave"
AGAIN = "tests/test_expert_weights.py::test_looped_asks_again_in_backward_and_announces_what_it_will_ask"

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
        "            box[dim] = slice(rank * each",
        "            rank = size - 1 - rank if dim == 2 else rank\n            box[dim] = slice(rank * each",
        SPARSE,
    ),
    Fault(
        "w1 and w3 have changed places",
        FILE,
        "return kernel.swiglu(x_nD, w1, w2, w3, weight_n1, ends_e)",
        "return kernel.swiglu(x_nD, w3, w2, w1, weight_n1, ends_e)",
        ONE,
    ),
    Fault(
        "the routing weight is applied before the activation",
        LOOPED,
        "h = F.silu(g).mul_(u)\n",
        "h = F.silu(g * block.pad(weight)).mul_(u)\n",
        KERNEL,
        ((LOOPED, "return y if rerun else y.mul_(weight)", "return y"),),
    ),
    Fault(
        "the gradient of w1 and w3 lacks the routing weight",
        LOOPED,
        "x if narrow_dy else x * weight, out=dw[e])",
        "x, out=dw[e])",
        KERNEL,
    ),
    Fault("the gradient of w3 lacks the activation", LOOPED, "du = s.mul_(dh)", "du = dh.clone()", KERNEL),
    Fault(
        "the gradient of the input lacks the routing weight",
        LOOPED,
        "return dx.mul_(weight), d_weight",
        "return dx, d_weight",
        KERNEL,
    ),
    Fault(
        "the gradient of experts without rows is left as it was found",
        LOOPED,
        "gradient[written : block.experts.start] = 0",
        "gradient[written : block.experts.start] = 1",
        KERNEL,
    ),
    Fault(
        "rows that pad an expert's own to an even number are not zero",
        LOOPED,
        "own[:count], own[count:] = rows, 0",
        "own[:count], own[count:] = rows, 1",
        KERNEL,
    ),
    Fault(
        "the looped kernel asks for experts without rows",
        LOOPED,
        "if rows.start == rows.stop:",
        "if False:",
        PACKED,
    ),
    Fault(
        "the looped kernel keeps packed weights' matrices for backward",
        LOOPED,
        "self.a, self.b, self.bias, self.scaling = added\n",
        "self.a, self.b, self.bias, self.scaling = added\n        self.w = PlainWeights(self.w[:])\n",
        AGAIN,
        (
            (
                LOOPED,
                "import NOTHING_ADDED, AdaptedWeights, ExpertWeights, MaybeAdapted",
                "import NOTHING_ADDED, AdaptedWeights, ExpertWeights, MaybeAdapted, PlainWeights",
            ),
        ),
    ),
    Fault(
        "the second block of experts has the first one's weights",
        LOOPED,
        "x_b, e = block.pad(x), block.experts",
        "x_b, e = block.pad(x), slice(0, len(block.row_counts))",
        KERNEL,
    ),
    Fault(
        "the grouped kernel activates the wrong product",
        FUSED,
        "operations.swiglu(gate, up, weight)",
        "operations.swiglu(up, gate, weight)",
        KERNEL,
    ),
    Fault(
        "the grouped kernel's gradient of the gate lacks the routing weight",
        SWIGLU,
        "ds.copy_(dh[rows]).mul_(weight[rows]).mul_(up[rows])",
        "ds.copy_(dh[rows]).mul_(up[rows])",
        KERNEL,
    ),
    Fault(
        "the looped product's gradient of its input takes the first experts' matrices",
        LOOPED,
        "block.fill(dx, partial(_product, dy_b, w[block.experts]))",
        "block.fill(dx, partial(_product, dy_b, w[: len(block.row_counts)]))",
        MATMUL,
    ),
    Fault(
        "an expert's rows are taken from the end of what is padded",
        LOOPED,
        "torch.cat([rows[:count] for rows, count",
        "torch.cat([rows[len(rows) - count :] for rows, count",
        KERNEL,
    ),
    Fault(
        "what an adapter gives back to its B is not scaled",
        LOOPED,
        "_product(dy, self.b[e]).mul_(self.scaling)",
        "_product(dy, self.b[e])",
        ADAPTED,
    ),
    Fault(
        "the gradient of an expert's A lacks the routing weight",
        LOOPED,
        "_product((low_dy * weight).mT, x, out=da[e])",
        "_product(low_dy.mT, x, out=da[e])",
        ADAPTED,
    ),
    Fault(
        "the gradient of an expert's B lacks the routing weight",
        LOOPED,
        "self._low(e, x).mul_(weight)",
        "self._low(e, x)",
        ADAPTED,
    ),
    Fault(
        "the gradient of an expert's bias counts every row alike",
        LOOPED,
        "_product(dy.mT, weight, out=",
        "_product(dy.mT, torch.ones_like(weight), out=",
        ADAPTED,
    ),
    Fault(
        "the gradient of the routing weight forgets w2's bias",
        LOOPED,
        "return total if self.bias is None else",
        "return total if self.w.trained is None or self.bias is None else",
        ADAPTED,
    ),
    Fault(
        "nothing comes back to an expert's input through its adapter",
        LOOPED,
        "return dx if low_dy is None or self.a is None else",
        "return dx if self.w.trained is None or self.a is None or low_dy is None else",
        ADAPTED,
    ),
    Fault(
        "experts' dropout is left out where nothing else is composed",
        FILE,
        "bool(adapter.members) or (adapter.dropout > 0 and tokens.dropout_draw is not None)",
        "bool(adapter.members)",
        "tests/test_tuning.py::test_dropout_does_not_depend_on_the_partition",
    ),
    Fault(
        "an expert's bias is added whatever the routing weight",
        FILE,
        "else products.bias_ne * weight_n1",
        "else products.bias_ne",
        "tests/test_expert_weights.py::test_layers_of_packed_experts",
    ),
    Fault(
        "few rows: what an expert counts is left out",
        FEW_ROWS,
        "+= gate[m][j] * weight[rows[r + m]];",
        "+= gate[m][j];",
        FEW,
    ),
    Fault(
        "few rows: other ranks' experts are run too",
        FEW_ROWS,
        "if (chosen[c] == first + e)",
        "if (chosen[c] % experts == e)",
        FEW,
    ),
    Fault(
        "few rows: an answer sees beyond its window",
        FEW_ROWS,
        "window && used[n] > window ? used[n] - window : 0",
        "0",
        FEW,
    ),
    Fault(
        "few rows: keys are kept as they stand before they turn",
        FEW_ROWS,
        "OF(narrow)(a * COS(i) - b * SIN(i));",
        "k[new + 2 * i];",
        FEW,
    ),
    Fault(
        "few rows: of six rows the last is left out",
        FEW_ROWS,
        "OF(sums)(panel, x, in, 6, s)",
        "OF(sums)(panel, x, in, 5, s)",
        FEW,
    ),
    Fault(
        "few rows: what is left of a row behind six is the first row's",
        FEW_ROWS,
        "matrix + begin * in, x + r * in",
        "matrix + begin * in, x",
        FEW,
    ),
    Fault("few rows: e^x without its third power", FEW_ROWS, "sum * rest + 1 / 6.0f", "sum * rest", FEW),
    Fault(
        "few rows: heads that share keys share scores",
        FEW_ROWS,
        "shown[b] * score[h * most * page + at]",
        "shown[b] * score[at]",
        FEW,
    ),
    Fault("few rows: the norm forgets its weight", FEW_ROWS, " * OF(wide)(weight[i]))", ")", FEW),
    Fault(
        "few rows: the bias of the choice is not added",
        FEW_ROWS,
        "(bias ? probs[e] + bias[e] : probs[e])",
        "probs[e]",
        FEW,
    ),
    Fault("few rows: one expert is chosen twice", FEW_ROWS, "if (!taken && (best", "if ((best", FEW),
    Fault("few rows: routing weights do not sum to 1", FEW_ROWS, "weight[k] /= sum;", "weight[k] /= 1;", FEW),
    Fault("few rows: values are made as keys are", FEW_ROWS, "(b->wv, normed, v,", "(b->wk, normed, v,", FEW),
    Fault(
        "few rows: a block leaves adapters out",
        "accessory/model/decoder.py",
        "if self.few_rows and singles and not any(map(adapters.reach, self.adapters)):",
        "if self.few_rows and singles:",
        FEW,
    ),
    Fault(
        "few rows: a block forgets what comes in", FEW_ROWS, "OF(narrow)(OF(wide)(x[i]) + OF(wide)(seen[i]))", "seen[i]", FEW
    ),
    Fault(
        "packed: gate and up change places",
        f"{KERNELS}/packed.py",
        "for w in (w1, w3))",
        "for w in (w3, w1))",
        AS_BEFORE,
    ),
    Fault(
        "packed: every row is multiplied by the first expert's matrix",
        f"{KERNELS}/packed.py",
        "y[rows] = product(x[some], _matrix(w, expert))",
        "y[rows] = product(x[some], _matrix(w, 0))",
        AS_BEFORE,
    ),
    Fault(
        "packed: the neighbours' rows, which make a number even, are taken for an expert's own",
        f"{KERNELS}/packed.py",
        "slice(rows.start - start, rows.stop - start)",
        "slice(0, rows.stop - rows.start)",
        "tests/test_kernels.py::test_packed_experts_equal_the_definition",
    ),
    Fault(
        "packed: a product leaves the bias out",
        "accessory/model/packed.py",
        "_linear_pointwise(x, matrix, bias,",
        "_linear_pointwise(x, matrix, None,",
        AS_BEFORE,
    ),
)
