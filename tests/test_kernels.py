"""Every experts kernel gives what the plain loop gives, and so do the rows' ways to the experts and back; cross-entropy in
chunks gives what plain torch gives."""

import re
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from accessory.errors import UserError
from accessory.model import quantised, triton_here
from accessory.model.codecs import get_codec
from accessory.model.moe.dispatch import make_plan, rows_of_tokens, tokens_of_rows
from accessory.model.moe.kernels import KERNELS, _say_picked, pick_kernel
from accessory.model.moe.kernels import rows as kernel_rows
from accessory.model.moe.kernels.reference import reference, reference_matmul
from accessory.model.moe.weights import AdaptedWeights, Added, PackedWeights, PlainWeights
from accessory.model.packed import packed
from accessory.model.quantised import QuantisedWeights
from accessory.parallel import cross_entropy
from accessory.parallel.cross_entropy import CHUNK, linear_cross_entropy, linear_cross_entropy_reference
from accessory.parallel.mesh import make_mesh
from accessory.parallel.regions import copy_to_model_parallel_region

DIM, HIDDEN = 16, 24
ROWS = {  # rows of each expert
    "ragged": [5, 1, 7, 3],
    "empty groups": [0, 4, 0, 6],
    "all in the last": [0, 0, 0, 9],
    "all in the first": [9, 0, 0, 0],
    "rows alone": [0, 1, 1, 0, 1],
    "no rows": [0, 0, 0, 0],
    "more than a block": [803, 0, 795, 8],
    "padded blocks": [80, 78, 5, 79, 78, 81],
}
WIDTHS = {"megablocks": (128, 256)}  # D and F; of the others DIM and HIDDEN
EXACT = [("looped", torch.float64, 1e-12), ("looped", torch.float32, 1e-5), ("grouped", torch.float32, 1e-5)]
INTERPRETED = [  # slowly: of the rows only SOME
    ("triton", torch.float64, 1e-12),
    ("triton", torch.float32, 1e-6),
    ("megablocks", torch.float32, 1e-5),
]
COARSE = [
    ("looped", torch.bfloat16, 0.05),
    ("grouped", torch.bfloat16, 0.05),
    ("reference", torch.bfloat16, 0.05),
    ("megablocks", torch.float16, 0.005),
]
SOME = ["empty groups", "rows alone", "no rows"]


def with_rows(*kernels):
    """A parameter for each kernel and each of the ROWS that it can do soon."""
    names = ("kernel", "dtype", "tolerance", "rows")
    slow = {kernel for kernel, *_ in INTERPRETED}
    pairs = [(case, name) for case in kernels for name in (SOME if case[0] in slow else ROWS)]
    ids = [f"{kernel}-{str(dtype).removeprefix('torch.')}-{name}" for (kernel, dtype, _), name in pairs]
    return pytest.mark.parametrize(names, [(*case, ROWS[name]) for case, name in pairs], ids=ids)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on several threads spin for a hundred times as long when another process wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Blocks of at most 200 rows in fp64, 800 in bf16."""
    monkeypatch.setattr(kernel_rows, "CACHE_BYTES", 200 * HIDDEN * 8)


def run(kernel, rows, dtype, widths, frozen=(), upstream=lambda gradient: gradient, device="cpu"):
    """Output and gradients of one kernel; ``upstream``: how the gradient comes back to it."""
    generator = torch.Generator().manual_seed(0)
    experts, n, (dim, hidden) = len(rows), sum(rows), widths
    shapes = {"x": (n, dim), "w1": (experts, hidden, dim), "w2": (experts, dim, hidden), "w3": (experts, hidden, dim)}
    inputs = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["weight"] = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    gradient = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(device, dtype)
    # values that every dtype holds exactly, so that only the kernels' own arithmetic differs
    inputs = {name: t.to(torch.bfloat16).to(device, dtype).requires_grad_(name not in frozen) for name, t in inputs.items()}
    matrices = (PlainWeights(inputs[name]) for name in ("w1", "w2", "w3"))
    out = KERNELS[kernel].swiglu(inputs["x"], *matrices, inputs["weight"], torch.tensor(rows, device=device).cumsum(0).int())
    out.backward(upstream(gradient))
    return {"y": out.detach().cpu()} | {name: t.grad.cpu() for name, t in inputs.items() if name not in frozen}


def assert_close(ours, expected, tolerance, what=""):
    """Same shape, and the largest error at most ``tolerance`` of the largest value."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        ours, expected.to(ours.dtype), rtol=0, atol=tolerance * largest, msg=lambda text: f"{what}: {text}"
    )


@with_rows(*EXACT, *INTERPRETED, *COARSE)
def test_kernel_equals_the_definition(kernel, dtype, tolerance, rows):
    widths = WIDTHS.get(kernel, (DIM, HIDDEN))
    ours, expected = run(kernel, rows, dtype, widths), run("reference", rows, torch.float64, widths)
    for name, tensor in expected.items():
        assert ours[name].dtype == dtype
        assert_close(ours[name], tensor, tolerance, name)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_experts_equal_the_definition(dtype, tolerance, rows):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(rows), DIM), (len(rows), HIDDEN, DIM), (len(rows), DIM, HIDDEN), (len(rows), HIDDEN, DIM), (sum(rows), 1)]
    x, *ws, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    ends, kernel = torch.tensor(rows).cumsum(0).int(), KERNELS["packed"]
    laid_out = [PackedWeights([packed(matrix.to(dtype)) for matrix in w]) for w in ws]
    with torch.no_grad():
        ours = kernel.swiglu(x.to(dtype), *laid_out, weight.to(dtype), ends), kernel.matmul(x.to(dtype), laid_out[0], ends)
    plain = [PlainWeights(w.double()) for w in ws]
    expected = reference(x.double(), *plain, weight.double(), ends), reference_matmul(x.double(), plain[0], ends)
    for what in zip(ours, expected, strict=True):
        assert_close(*what, tolerance)


@pytest.mark.parametrize("frozen", [("w1", "w2", "w3"), ("w2",), ("w1", "w3", "weight")], ids="-".join)
@with_rows(*EXACT, INTERPRETED[0])
def test_frozen_inputs_leave_the_other_gradients_as_they_are(kernel, dtype, tolerance, frozen, rows):
    widths = WIDTHS.get(kernel, (DIM, HIDDEN))
    ours, expected = run(kernel, rows, dtype, widths, frozen), run("reference", rows, torch.float64, widths)
    assert ours.keys() == expected.keys() - set(frozen)
    for name, gradient in ours.items():
        assert_close(gradient, expected[name], tolerance, name)


@pytest.mark.parametrize("frozen", [False, True], ids=["beside weights that train", "beside frozen ones"])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (1,), (2,)], ids=["all", "w2", "w3"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_adapters_are_as_if_folded_in(rows, adapted, frozen):
    """LoRA and biases that the looped kernel adds to some of w1, w2 and w3, in fp64."""
    generator = torch.Generator().manual_seed(0)
    n, e, rank = sum(rows), len(rows), 3

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, gradient = leaf(n, DIM), leaf(n, 1), leaf(n, DIM)
    ws = [leaf(e, out, inner) for out, inner in ((HIDDEN, DIM), (DIM, HIDDEN), (HIDDEN, DIM))]
    added = [Added(leaf(e, rank, w.shape[2]), leaf(e, w.shape[1], rank), leaf(e, w.shape[1]), 0.7) for w in ws]
    ws = [w.requires_grad_(not frozen) for w in ws]
    given = [AdaptedWeights(PlainWeights(w), added[i]) if i in adapted else PlainWeights(w) for i, w in enumerate(ws)]
    ours = KERNELS["looped"].adapted(x, *given, weight, torch.tensor(rows).cumsum(0).int())

    whole = [w + a.scaling * a.b @ a.a if i in adapted else w for i, (w, a) in enumerate(zip(ws, added, strict=True))]
    bias = [a.bias if i in adapted else torch.zeros_like(a.bias) for i, a in enumerate(added)]
    expected = []
    for expert, (x_e, weight_e) in enumerate(zip(x.split(rows), weight.split(rows), strict=True)):
        gate, up = (x_e @ whole[i][expert].T + bias[i][expert] for i in (0, 2))
        expected.append(weight_e * ((torch.nn.functional.silu(gate) * up) @ whole[1][expert].T + bias[1][expert]))
    expected = torch.cat(expected)
    leaves = [x, weight, *(t for i in adapted for t in added[i][:3]), *(() if frozen else ws)]
    for what in zip(*((y, *torch.autograd.grad(y, leaves, gradient)) for y in (ours, expected)), strict=True):
        assert_close(*what, 1e-12)


def test_experts_without_rows_have_no_gradient_whatever_torch_leaves_there(monkeypatch):
    """On Blackwell its kernel leaves what was in memory."""
    real = torch.nn.functional.grouped_mm

    def leaving(a, b, offs):
        result = real(a, b, offs=offs)
        if result.dim() == 3:
            result[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return result

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaving)
    for name, gradient in run("grouped", ROWS["empty groups"], torch.float32, (DIM, HIDDEN)).items():
        assert gradient.isfinite().all(), name


UPSTREAM = {
    "expanded": lambda gradient: gradient[:1, :1].expand(gradient.shape),  # as sum() hands it back
    "transposed": lambda gradient: gradient.T.contiguous().T,
    "strided": lambda gradient: gradient.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), EXACT + INTERPRETED)
def test_a_gradient_of_any_strides(kernel, dtype, tolerance, upstream):
    """With an expert that has no rows: on GPUs that is where a wrong stride ends the process."""
    widths, rows = WIDTHS.get(kernel, (DIM, HIDDEN)), [5, 0, 7, 3]
    ours = run(kernel, rows, dtype, widths, upstream=upstream)
    expected = run("reference", rows, torch.float64, widths, upstream=upstream)
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, tolerance, name)


def run_matmul(kernel, rows, dtype, dim, width, frozen=()):
    """Output and gradients of one grouped product, [n, dim] x [e, width, dim], and what it kept for backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (sum(rows), dim), "w": (len(rows), width, dim)}
    inputs = {name: torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype) for name, shape in shapes.items()}
    inputs = {name: t.requires_grad_(name not in frozen) for name, t in inputs.items()}
    gradient = torch.randn(sum(rows), width, generator=generator).to(torch.bfloat16).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = KERNELS[kernel].matmul(inputs["x"], PlainWeights(inputs["w"]), torch.tensor(rows).cumsum(0).int())
    out.backward(gradient)
    result = {"y": out.detach()} | {name: t.grad for name, t in inputs.items() if name not in frozen}
    return result, {name for name, t in inputs.items() if t.numel() and t.data_ptr() in kept}


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "rank 3"])  # 3: strides that torch's kernel refuses
@with_rows(*EXACT, *INTERPRETED, *COARSE)
def test_matmul_equals_the_definition(kernel, dtype, tolerance, rows, narrow):
    dim, width = WIDTHS.get(kernel, (DIM, HIDDEN))
    width = 3 if narrow else width
    expected, _ = run_matmul("reference", rows, torch.float64, dim, width)
    for frozen in ((), ("x",), ("w",)):
        ours, kept = run_matmul(kernel, rows, dtype, dim, width, frozen)
        assert ours.keys() == expected.keys() - set(frozen)
        for name, tensor in ours.items():
            assert tensor.dtype == dtype
            assert_close(tensor, expected[name], tolerance, f"{name}, frozen {frozen}")
        if kernel not in ("reference", "megablocks") and frozen:  # autograd and stk keep what they multiply
            assert kept <= set(frozen), "kept for a gradient that nobody wants"


@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), EXACT)
def test_frozen_experts_do_not_keep_their_input(kernel, dtype, tolerance):
    rows, kept = ROWS["ragged"], []
    x, weight = torch.randn(sum(rows), DIM, dtype=dtype, requires_grad=True), torch.rand(sum(rows), 1, dtype=dtype)
    shapes = ((len(rows), HIDDEN, DIM), (len(rows), DIM, HIDDEN), (len(rows), HIDDEN, DIM))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        matrices = (PlainWeights(torch.randn(shape, dtype=dtype)) for shape in shapes)
        KERNELS[kernel].swiglu(x, *matrices, weight, torch.tensor(rows).cumsum(0).int())
    assert kept and x.data_ptr() not in kept


def test_experts_that_changed_before_backward_are_refused():
    rows = ROWS["ragged"]
    x, w = torch.randn(sum(rows), DIM, requires_grad=True), torch.randn(len(rows), HIDDEN, DIM, requires_grad=True)
    y = KERNELS["looped"].matmul(x, PlainWeights(w), torch.tensor(rows).cumsum(0).int())
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def rows_on(device, dtype, rows=5):
    """What a kernel is picked by, on a device that need not be there."""
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, shape=(rows, DIM), element_size=lambda: torch.finfo(dtype).bits // 8
    )


AMPERE, HOPPER, WORKSTATION = (8, 0), (9, 0), (12, 0)
EXPERTS = 6


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "hidden_dim", "rows", "picked"),
    [
        ("cpu", None, torch.float32, 24, 5, "looped"),
        ("cuda", HOPPER, torch.bfloat16, 24, 5, "grouped"),
        ("cuda", HOPPER, torch.bfloat16, 20, 5, "looped"),  # 40 bytes
        ("cuda", HOPPER, torch.float16, 24, 5, "triton"),
        ("cuda", HOPPER, torch.float64, 24, 5, "looped"),
        ("cuda", AMPERE, torch.bfloat16, 20, 5, "triton"),
        ("cuda", AMPERE, torch.bfloat16, 24, 2**15, "grouped"),
        ("cuda", AMPERE, torch.float32, 24, 5, "grouped"),
        ("cuda", WORKSTATION, torch.bfloat16, 24, 5, "triton"),
        ("mps", None, torch.float32, 24, 5, "looped"),
    ],
)
def test_auto_picks_by_device_dtype_width_and_rows(device, capability, dtype, hidden_dim, rows, picked, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton_here, "capability", lambda _: capability)
    _say_picked.cache_clear()
    for _ in range(2):
        assert pick_kernel("auto", rows_on(device, dtype, rows), hidden_dim).name == picked
    said = capsys.readouterr().out
    assert said.count(f"are computed by kernel '{picked}'") == (device != "cpu")


def test_auto_picks_by_how_weights_are_held(monkeypatch):
    """Of quantised ones on a GPU few rows go by codes, many to a kernel that makes the numbers of some experts at a time."""
    monkeypatch.setattr(quantised, "triton_compiles", lambda x: True)
    monkeypatch.setattr(triton_here, "capability", lambda _: HOPPER)
    codec = get_codec("int8")
    held = [QuantisedWeights(codec, codec.encode(torch.ones(EXPERTS, 24, DIM)), torch.bfloat16)] * 3
    with torch.no_grad():
        for rows, picked in ((32 * EXPERTS, "codes"), (32 * EXPERTS + 1, "looped")):
            assert pick_kernel("auto", rows_on("cuda", torch.bfloat16, rows), 24, held).name == picked
        laid_out = PackedWeights([packed(torch.ones(24, DIM))])
        assert pick_kernel("auto", rows_on("cpu", torch.float32), 24, [laid_out, *held[:2]]).name == "packed"
    assert pick_kernel("auto", rows_on("cuda", torch.bfloat16), 24, held).name == "looped", "gradients"


@pytest.mark.parametrize(
    ("name", "dtype", "hidden_dim", "sentence"),
    [
        ("groupd", torch.float32, 24, "unknown kernel 'groupd'; did you mean 'grouped'?"),
        (
            "fastest",
            torch.float32,
            24,
            "unknown kernel 'fastest'; known: auto, grouped, looped, megablocks, reference, triton",
        ),
        (
            "grouped",
            torch.float64,
            24,
            "cannot compute experts of 16 x 24 numbers in float64 on cpu: it needs fp32, bf16 or fp16",
        ),
        (
            "grouped",
            torch.float32,
            25,
            "on CPU or CUDA, and rows of a multiple of 16 bytes; 'looped' can",
        ),
    ],
)
def test_a_kernel_that_cannot_be_had_is_told_in_a_sentence(name, dtype, hidden_dim, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        pick_kernel(name, rows_on("cpu", dtype), hidden_dim)


# the experts of some rank, in either layout
LOCAL = [range(rank * EXPERTS // size, (rank + 1) * EXPERTS // size) for size in (1, 2, 3) for rank in range(size)]


@pytest.mark.parametrize("local", LOCAL, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, EXPERTS])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_rows_go_to_their_experts_and_come_back(tokens, top_k, local):
    generator = torch.Generator().manual_seed(tokens + top_k)
    experts = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k).indices
    x = torch.randn(tokens, DIM, dtype=torch.float64, generator=generator, requires_grad=True)
    by_hand = [(t, k) for e in local for t in range(tokens) for k in range(top_k) if experts[t, k] == e]
    plan = make_plan(experts, local, EXPERTS)
    counts = [sum(experts[t, k].item() == e for t, k in by_hand) for e in local]
    assert plan.ends_e.tolist() == torch.tensor(counts).cumsum(0).tolist() and plan.ends_e.dtype == torch.int32
    assert plan.token_n.tolist() == [t for t, _ in by_hand]
    assert plan.choice_n.tolist() == [t * top_k + k for t, k in by_hand]

    rows = rows_of_tokens(x, plan)
    gradient = torch.randn(rows.shape, dtype=torch.float64, generator=generator)
    expected, summed = torch.zeros_like(rows), torch.zeros(x.shape, dtype=torch.float64)
    for n, (t, _) in enumerate(by_hand):
        expected[n] = x[t]
        summed[t] += gradient[n]
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(rows, x, gradient)[0], summed, rtol=1e-14, atol=1e-14)

    y = gradient.clone().requires_grad_()
    out = tokens_of_rows(y, plan)
    torch.testing.assert_close(out, summed, rtol=1e-14, atol=1e-14)
    back = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    expected = torch.stack([back[t] for t, _ in by_hand]) if by_hand else torch.zeros_like(y)
    torch.testing.assert_close(torch.autograd.grad(out, y, back)[0], expected, rtol=0, atol=0)


VOCABULARY = 64
LENGTHS = [0, 1, 5, CHUNK["cpu"], 2 * CHUNK["cpu"] + 7]


def cross_entropy_inputs(rows, scale):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, DIM, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(VOCABULARY, (rows,), generator=generator)


def run_cross_entropy(world, dtype, frozen, scale, lengths=LENGTHS):
    """{rows: (loss, gradient of hidden, gradient of this rank's part of weight)} of three times the loss."""
    mp = make_mesh(world).mp
    part = slice(mp.rank * VOCABULARY // world, (mp.rank + 1) * VOCABULARY // world)
    results = {}
    for rows in lengths:
        hidden, weight, targets = cross_entropy_inputs(rows, scale)
        hidden = hidden.to(dtype).requires_grad_("hidden" not in frozen)
        weight = weight[part].to(dtype).requires_grad_("weight" not in frozen)
        loss = linear_cross_entropy([(copy_to_model_parallel_region(hidden, mp), weight)], targets, mp)
        (3 * loss).backward()
        results[rows] = loss.detach(), hidden.grad, weight.grad
    return results


def run_all_cross_entropies(world, cases):
    return [run_cross_entropy(world, *case) for case in cases]


def run_in_small_chunks(world, chunk, rows):
    cross_entropy.CHUNK["cpu"] = chunk
    cross_entropy.PART["cpu"] = 5
    return run_cross_entropy(world, torch.float64, (), 1.0, [rows])[rows], run_two_factors(world, rows)


CROSS_ENTROPY = [  # dtype, frozen, scale of the logits, tolerance
    (torch.float64, (), 1.0, 1e-12),
    (torch.float64, (), 1e4, 1e-12),  # exp() of such logits overflows
    (torch.float64, ("weight",), 1.0, 1e-12),
    (torch.float64, ("hidden",), 1.0, 1e-12),
    (torch.float32, (), 1.0, 1e-5),
    (torch.bfloat16, (), 1.0, 0.05),
]


def run_two_factors(world, rows):
    """Loss and gradients of an output layer with a low-rank factor beside it, which is cut like it."""
    mp = make_mesh(world).mp
    part = slice(mp.rank * VOCABULARY // world, (mp.rank + 1) * VOCABULARY // world)
    hidden, weight, targets = cross_entropy_inputs(rows, 1.0)
    low, b = hidden[:, :2].clone().requires_grad_(), weight[part, :2].clone().requires_grad_()
    loss = linear_cross_entropy([(hidden, weight[part]), (copy_to_model_parallel_region(low, mp), b)], targets, mp)
    loss.backward()
    return loss.detach(), low.grad, b.grad


@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("world", [1, 2])
def test_cross_entropy_in_many_chunks(world, chunk, rows=23):
    """One factor and two; the last chunk is not full."""
    hidden, weight, targets = cross_entropy_inputs(rows, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    low, b = (x.detach()[:, :2].clone().requires_grad_() for x in (hidden, weight))
    pair = torch.cat([hidden, low], 1), torch.cat([weight, b], 1)
    losses = [-(x @ w.T).log_softmax(-1)[range(rows), targets].sum() for x, w in ((hidden, weight), pair)]
    wanted = [*torch.autograd.grad(3 * losses[0], (hidden, weight)), *torch.autograd.grad(losses[1], (low, b))]
    ranks = run_ranks(world, run_in_small_chunks, world, chunk, rows)
    for (loss, d_hidden, _), (both, d_low, _) in ranks:
        assert_close(torch.stack([loss, both]), torch.stack(losses).detach(), 1e-13)
        assert_close(d_hidden, wanted[0], 1e-13)
        assert_close(d_low, wanted[2], 1e-13)
    assert_close(torch.cat([one[2] for one, _ in ranks]), wanted[1], 1e-13)
    assert_close(torch.cat([two[2] for _, two in ranks]), wanted[3], 1e-13)


def run_bf16_in_small_chunks(chunk, rows):
    cross_entropy.CHUNK["cpu"] = chunk
    cross_entropy.PART["cpu"] = 5
    return run_cross_entropy(1, torch.bfloat16, (), 1.0, [rows])[rows]


def test_cross_entropy_of_bf16_is_summed_in_fp32(chunk=4, rows=1200):
    """Given the logits, which are rounded to bf16, the loss is not; nor is the weight's gradient between two chunks."""
    hidden, weight, targets = cross_entropy_inputs(rows, 1.0)
    low, w = hidden.bfloat16(), weight.bfloat16()
    logits = torch.cat([part @ w.T for part in low.split(chunk)]).double()
    loss = -logits.log_softmax(-1)[range(rows), targets].sum()
    d_logits = logits.softmax(-1).index_put((torch.arange(rows), targets), torch.tensor(-1.0).double(), accumulate=True)
    d_weight = 3 * d_logits.T @ low.double()
    ((ours, _, d_ours),) = run_ranks(1, run_bf16_in_small_chunks, chunk, rows)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (d_ours.double() - d_weight).norm() < 5e-3 * d_weight.norm()


@pytest.mark.parametrize("world", [1, 2])
def test_cross_entropy_of_two_factors(world, rows=2 * CHUNK["cpu"] + 3):
    hidden, weight, targets = cross_entropy_inputs(rows, 1.0)
    low, b = hidden[:, :2].clone().requires_grad_(), weight[:, :2].clone().requires_grad_()
    expected = linear_cross_entropy_reference(torch.cat([hidden, low], 1), torch.cat([weight, b], 1), targets)
    expected.backward()
    parts = run_ranks(world, run_two_factors, world, rows)
    for loss, d_low, _ in parts:
        assert_close(loss, expected.detach(), 1e-12)
        assert_close(d_low, low.grad, 1e-12)
    assert_close(torch.cat([d_b for *_, d_b in parts]), b.grad, 1e-12)


@pytest.mark.parametrize("world", [1, 2])
def test_cross_entropy_equals_the_definition(world):
    ranks = run_ranks(world, run_all_cross_entropies, world, [case[:3] for case in CROSS_ENTROPY])
    for index, (dtype, frozen, scale, tolerance) in enumerate(CROSS_ENTROPY):
        for rows in LENGTHS:
            hidden, weight, targets = cross_entropy_inputs(rows, scale)
            hidden.requires_grad_(), weight.requires_grad_()
            expected = -(hidden @ weight.T).log_softmax(-1)[torch.arange(rows), targets].sum()
            (3 * expected).backward()
            plain = linear_cross_entropy_reference(hidden, weight, targets)
            assert plain.item() == pytest.approx(expected.item(), rel=1e-12)
            what = f"{dtype}, frozen {frozen}, scale {scale}, {rows} rows"
            parts = [rank[index][rows] for rank in ranks]
            for loss, d_hidden, _ in parts:
                assert loss.dtype == torch.promote_types(dtype, torch.float32)
                assert_close(loss, expected.detach(), tolerance, what)
                if "hidden" in frozen:
                    assert d_hidden is None
                else:
                    assert_close(d_hidden, hidden.grad, tolerance, what)
            if "weight" in frozen:
                assert all(d_weight is None for _, _, d_weight in parts)
            else:
                assert_close(torch.cat([d_weight for _, _, d_weight in parts]), weight.grad, tolerance, what)
