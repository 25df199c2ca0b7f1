"""How the experts are computed on GPUs, and what of it is fused."""

from faults.fault import Fault

KERNELS = "accessory/model/moe/kernels"
FUSED, GROUPED, PRODUCTS = f"{KERNELS}/fused.py", f"{KERNELS}/grouped.py", f"{KERNELS}/triton_products.py"
SWIGLU, NORM, TRITON_NORM = f"{KERNELS}/triton_swiglu.py", "accessory/model/norm.py", "accessory/model/triton_norm.py"
MEGABLOCKS, MEGABLOCKS_OPS = f"{KERNELS}/megablocks.py", f"{KERNELS}/megablocks_ops.py"

EQUAL = "tests/test_kernels.py::test_kernel_equals_the_definition"
STRIDES = "tests/test_kernels.py::test_a_gradient_of_any_strides"
OF_PRODUCTS = "tests/test_triton.py::test_products"
OF_SWIGLU = "tests/test_triton.py::test_swiglu"
OF_NORM = "tests/test_triton.py::test_norm"
DIFFERENCES = "tests/test_triton.py::test_gradients_by_differences"
KEPT = "tests/test_kept.py::test_what_a_block_keeps_of_a_token"
LAYER = "tests/test_megablocks.py::test_a_layer_equals_the_definition"

FAULTS = (
    Fault(
        "an expert's second tile of rows is its first again",
        PRODUCTS,
        "tl.sum(tl.where(own, starts - (tiles_to - tiles_of) * ROWS, 0), 0) + tile * ROWS + tl.arange(0, ROWS)",
        "tl.sum(tl.where(own, starts, 0), 0) + tl.arange(0, ROWS)",
        OF_PRODUCTS,
    ),
    Fault(
        "a product takes rows in their order, wherever they lie",
        PRODUCTS,
        "source = tl.load(take + row, mask=real, other=0) if TAKE else row\n        total = tl.zeros((ROWS, COLUMNS), WIDE)",
        "source = row\n        total = tl.zeros((ROWS, COLUMNS), WIDE)",
        OF_PRODUCTS,
    ),
    Fault(
        "a product's last, short step in depth reads into the next row",
        PRODUCTS,
        "tl.load(x_row + deep[None, :], mask=real[:, None] & (deep < depth)[None, :], other=0.0)",
        "tl.load(x_row + tl.minimum(deep, depth - 1)[None, :], mask=real[:, None], other=0.0)",
        OF_PRODUCTS,
        (
            (
                PRODUCTS,
                "mask=(deep < depth)[:, None] & used[None, :], other=0.0)\n            total",
                "mask=used[None, :], other=0.0)\n            total",
            ),
            (
                PRODUCTS,
                "tl.load(w_column + deep[:, None] * depth_stride",
                "tl.load(w_column + tl.minimum(deep, depth - 1)[:, None] * depth_stride",
            ),
        ),
    ),
    Fault(
        "a weight's gradient has the next expert's first rows",
        PRODUCTS,
        "        real = row < end\n",
        "        real = row < end + 1\n",
        OF_PRODUCTS,
    ),
    Fault(
        "a product counts each step in depth twice",
        PRODUCTS,
        "            total = tl.dot(a, b, total,",
        "            total = tl.dot(a, b, total + total,",
        OF_PRODUCTS,
    ),
    Fault(
        "the fused activation's slope lacks a term",
        SWIGLU,
        "slope = sigmoid * (1.0 + g * (1.0 - sigmoid))",
        "slope = sigmoid * (1.0 + g)",
        OF_SWIGLU,
    ),
    Fault(
        "the routing weight's gradient is of the last columns alone",
        SWIGLU,
        "total += d * s * u",
        "total = d * s * u",
        OF_SWIGLU,
    ),
    Fault(
        "the fused activation forgets the routing weight",
        SWIGLU,
        "value = g * tl.sigmoid(g) * u * tl.load(weight + row).to(WIDE)",
        "value = g * tl.sigmoid(g) * u",
        OF_SWIGLU,
    ),
    Fault(
        "the fused norm's mean is over the block, not the row",
        TRITON_NORM,
        "(tl.sum(d * normed, 0) / dim)",
        "(tl.sum(d * normed, 0) / BLOCK)",
        OF_NORM,
    ),
    Fault(
        "the fused norm's weight misses the rows beyond the stripes",
        TRITON_NORM,
        "            total += d * normed",
        "            total = d * normed",
        OF_NORM,
    ),
    Fault(
        "the norm's gradient takes its statistics for constants",
        NORM,
        "return d_normed.addcmul_(normed, share, value=-1).mul_(scale).to(x.dtype), d_weight",
        "return (d_normed * scale).to(x.dtype), d_weight",
        DIFFERENCES,
    ),
    Fault(
        "the norm keeps what it was normalised in",
        NORM,
        "ctx.save_for_backward(x, weight, scale)",
        "ctx.save_for_backward(at_least_fp32(x), weight, scale)",
        KEPT,
    ),
    Fault(
        "w2's gradient is of rows without their routing weights",
        FUSED,
        "dw2 = None if h is None else operations.outer(dy, h, row_ends)",
        "dw2 = None if h is None else operations.outer(dy, h / weight, row_ends)",
        EQUAL,
    ),
    Fault(
        "the input's gradient is the gate's alone",
        FUSED,
        ".add_(operations.times_transposed(du, w3[:], row_ends))",
        "",
        EQUAL,
    ),
    Fault(
        "a gradient that does not lie contiguous is taken as if it did",
        FUSED,
        "        (w1, w2, w3), operations = ctx.matrices, ctx.operations\n        dy = dy.contiguous()\n",
        "        (w1, w2, w3), operations = ctx.matrices, ctx.operations\n",
        STRIDES,
    ),
    Fault(
        "the kernels keep what the down projection was given",
        FUSED,
        "return operations.times(operations.swiglu(gate, up, weight), w2[:], row_ends)",
        "h = operations.swiglu(gate, up, weight)\n        ctx.save_for_backward(*ctx.to_save, h)\n"
        "        return operations.times(h, w2[:], row_ends)",
        KEPT,
        (
            (
                FUSED,
                "x, weight, row_ends, gate, up, *trained = ctx.saved_tensors",
                "x, weight, row_ends, gate, up, *trained, _ = ctx.saved_tensors",
            ),
        ),
    ),
    Fault(
        "what an expert without rows has on Blackwell is not made zero",
        GROUPED,
        "return gradient.masked_fill_(without_rows[:, None, None], 0)",
        "return gradient",
        "tests/test_kernels.py::test_experts_without_rows_have_no_gradient_whatever_torch_leaves_there",
    ),
    Fault(
        "stk's blocks have int16 numbers",
        MEGABLOCKS,
        "column_indices = ops.topology(padded_ends_e, BLOCK, block_rows, columns).int()",
        "column_indices = ops.topology(padded_ends_e, BLOCK, block_rows, columns)",
        "tests/test_megablocks.py::test_blocks_beyond_the_255th",
    ),
    Fault(
        "stk's rows have the first experts' columns, whoever has rows",
        MEGABLOCKS_OPS,
        "expert = torch.searchsorted(padded_ends.long(), row, right=True)",
        "expert = torch.searchsorted(padded_ends.unique().long(), row, right=True)",
        LAYER,
    ),
    Fault(
        "the first row of an expert goes to megablocks as the expert's before",
        MEGABLOCKS,
        "expert = torch.searchsorted(row_ends, order, right=True, out_int32=True)",
        "expert = torch.searchsorted(row_ends, order, right=False, out_int32=True)",
        LAYER,
    ),
)
