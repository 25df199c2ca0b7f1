"""Attention, its positions, and the norms."""

from faults.checks import ONE
from faults.fault import Fault

FILE, ROPE = "accessory/model/attention.py", "accessory/model/rope.py"
MASK = "tests/test_packing.py::test_attention_equals_one_under_a_mask"
WINDOWS = "tests/test_packing.py::test_attention_over_many_windows"
KERNEL = "tests/test_packing.py::test_what_the_gpu_kernel_is_asked_for"
LIES = "tests/test_packing.py::test_a_batch_says_where_its_documents_lie"

FAULTS = (
    Fault(
        "scores are divided by the head's size, not its root",
        FILE,
        "return F.scaled_dot_product_attention(q, k, v, is_causal=True,",
        "return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-1],",
        MASK,
    ),
    Fault("the window has one key more", FILE, "(distance < window)", "(distance <= window)", MASK),
    Fault(
        "the first key of a window is left out",
        FILE,
        "max(0, start - window + 1)",
        "max(0, start - window + 2)",
        MASK,
    ),
    Fault(
        "blocks beyond the third see only themselves",
        FILE,
        "max(0, start - window + 1)",
        "max(0, start - window + 1) if start < 3 * window else start",
        WINDOWS,
    ),
    Fault(
        "query heads share key heads in turn, not in groups",
        FILE,
        "    length = q.shape[2]\n",
        "    length = q.shape[2]\n    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))\n",
        MASK,
    ),
    Fault(
        "neighbours of one length are one document",
        "accessory/model/attention.py",
        "runs = [(length, len(list(same))) for length, same in groupby(documents.lengths)]",
        "runs = [(length * len(list(same)), 1) for length, same in groupby(documents.lengths)]",
        "tests/test_packing.py::test_attention_equals_one_under_a_mask",
    ),
    Fault(
        "the kernel on GPUs is asked for one key more",
        FILE,
        "span = (-1 if window is None else window - 1, 0)",
        "span = (-1 if window is None else window, 0)",
        KERNEL,
    ),
    Fault(
        "the kernel on GPUs sees what is ahead",
        FILE,
        "span = (-1 if window is None else window - 1, 0)",
        "span = (-1 if window is None else window - 1, -1)",
        KERNEL,
    ),
    Fault("keys are not rotated", FILE, "q, k = rotate(q, rotation), rotate(k, rotation)", "q = rotate(q, rotation)", ONE),
    Fault(
        "positions go on through a row",
        "accessory/model/documents.py",
        "np.arange(borders[-1]) - np.repeat(borders[:-1] - past, lengths)",
        "np.arange(borders[-1])",
        "tests/test_packing.py::test_a_batch_says_where_its_documents_lie",
    ),
    Fault(
        "positions are divided by the scaling",
        ROPE,
        "positions.to(torch.float64).unsqueeze(-1) * (scaling or 1.0)",
        "positions.to(torch.float64).unsqueeze(-1) / (scaling or 1.0)",
        ONE,
    ),
    Fault(
        "the slowest rotation stands still",
        ROPE,
        "dtype=torch.float64) / head_dim",
        "dtype=torch.float64) / (head_dim - 2)",
        ONE,
    ),
    Fault("rotary pairs are halves apart", ROPE, "unflatten(-1, (-1, 2)))", "unflatten(-1, (2, -1)).mT.contiguous())", ONE),
    Fault(
        "the norm takes the mean away",
        "accessory/model/norm.py",
        "wide.square().mean(-1, keepdim=True)",
        "wide.var(-1, unbiased=False, keepdim=True)",
        ONE,
    ),
    Fault(
        "the norm's epsilon is left out",
        "accessory/model/norm.py",
        "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)",
        "torch.rsqrt(wide.square().mean(-1, keepdim=True))",
        ONE,
    ),
)
