"""What only a GPU can show; skipped where there is none. ``TRITON_INTERPRET=0 pytest -m gpu``."""

import dataclasses
import warnings

import pytest
import torch
import torch.distributed as dist
from test_kernels import ROWS, UPSTREAM, assert_close, run
from test_plan import MIXTRAL

from accessory.certify.serving import Numbers
from accessory.data.loader import Batch
from accessory.infer.decode_graph import can_record
from accessory.infer.engine import Engine
from accessory.infer.sampling import Sampling
from accessory.model.attention import attend, causal_attention, varlen_attention
from accessory.model.build import model_without_weights
from accessory.model.codecs import get_codec
from accessory.model.documents import Documents
from accessory.model.logical import LogicalModel
from accessory.model.moe.kernels import KERNELS
from accessory.model.moe.layouts import EXPERT
from accessory.model.triton_codes import times_codes
from accessory.parallel.mesh import ONE_RANK
from accessory.settings import OptimSection, ParallelSection, TuningSection
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.planned_step import PlannedRun
from accessory.train.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda", 0)
WIDTHS = (256, 384)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}


@pytest.fixture
def alone():
    """A process group of this rank."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=GPU)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [name for name, kernel in KERNELS.items() if kernel.trains])
def test_kernel_equals_the_definition(kernel, dtype, rows):
    """An expert without rows and a rank without any among them."""
    if not KERNELS[kernel].runs(torch.empty(1, WIDTHS[0], dtype=dtype, device=GPU), WIDTHS[1]):
        pytest.skip(f"the kernel {kernel} does not run in {dtype} on this GPU")
    KERNELS[kernel].load()
    tolerance = 0.01 if kernel == "megablocks" and dtype == torch.float32 else TOLERANCE[dtype]  # TF32
    ours, expected = run(kernel, rows, dtype, WIDTHS, device=GPU), run("reference", rows, torch.float64, WIDTHS)
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, tolerance, name)


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("kernel", ["grouped", "triton"])
def test_a_gradient_of_any_strides_beside_an_expert_without_rows(kernel, upstream):
    how = {"upstream": upstream, "dtype": torch.bfloat16, "widths": WIDTHS}
    ours, expected = run(kernel, [0, 4, 0, 6], **how, device=GPU), run("reference", [0, 4, 0, 6], **how)
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, 0.05, name)


@pytest.mark.parametrize("name", ["nf4", "int4", "int3", "int2", "int8"])
def test_products_by_codes_are_those_by_numbers(name):
    codec, (rows, wide, out) = get_codec(name), (19, 1024, 544)
    parts = codec.encode(torch.randn(2, out, wide, device=GPU) + 0.3)
    x, ends = torch.randn(rows, wide, device=GPU, dtype=torch.bfloat16), torch.tensor([2, rows], device=GPU).int()
    expected = torch.cat(
        [of @ w.T for of, w in zip(x.float().split([2, rows - 2]), codec.decode(parts, torch.float32), strict=True)]
    )
    assert_close(times_codes(x, codec, parts, ends).float(), expected, 0.01, name)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_over_documents_is_that_of_each(window):
    documents = Documents.of([300, 1, 77, 512]).to(GPU)
    shapes = [(sum(documents.lengths), heads, 128) for heads in (8, 2, 2)]
    ours, alone = ([torch.randn(shape, device=GPU, dtype=torch.bfloat16) for shape in shapes] for _ in range(2))
    for a, b in zip(ours, alone, strict=True):
        b.copy_(a)
    for x in (*ours, *alone):
        x.requires_grad_()
    out = varlen_attention(*ours, documents, window)
    parts = zip(*(x.split(list(documents.lengths)) for x in alone), strict=True)
    each = [causal_attention(*(x.transpose(0, 1)[None] for x in part), window)[0].transpose(0, 1) for part in parts]
    gradient = torch.randn_like(out)
    out.backward(gradient)
    torch.cat(each).backward(gradient)
    assert_close(out, torch.cat(each), 0.02)
    for a, b in zip(ours, alone, strict=True):
        assert_close(a.grad, b.grad, 0.03)


def test_fp32_keeps_no_scores():
    documents = Documents.of([4096]).to(GPU)
    q, k, v = (torch.randn(4096, heads, 128, device=GPU, requires_grad=True) for heads in (32, 8, 8))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, documents, None).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def small_step(recompute="block", layers=2):
    """A step of ``layers`` layers of full size, each time the same; what it gives, with gradients."""
    torch.manual_seed(0)
    args = dataclasses.replace(MIXTRAL, n_layers=layers)
    run = PlannedRun(args, TuningSection(), "mixtral", ParallelSection(recompute=recompute), 1, 1, 4096)
    model = run.model_without_weights("cuda")
    model.to_empty(device=GPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    optimizer = make_optimizer(model, OptimSection(lr=0.0))
    batch: Batch = run.batch().to(GPU)
    return lambda: train_step(model, optimizer, [batch], NextToken(), RouterLosses(), clip_grad=1.0)


def test_the_host_waits_once_a_step(alone):
    step = small_step()
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


def test_a_forward_is_the_same_every_time(alone):
    """Its gradients are within rounding: flash attention's backward adds in any order."""
    step = small_step()
    first, second = step(), step()
    assert torch.equal(first.loss_sum, second.loss_sum) and torch.equal(first.counts, second.counts)
    torch.testing.assert_close(first.grad_norm, second.grad_norm, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def answering():
    """Two layers of full size that only answer."""
    args = dataclasses.replace(MIXTRAL, n_layers=2)
    model = model_without_weights(LogicalModel(args), EXPERT, ONE_RANK, torch.bfloat16, trains=frozenset())
    model.to_empty(device=GPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    if not can_record(model):
        pytest.skip("CUDA graphs of single-token steps are not possible on this GPU")
    return model


def engine_of(model, **options):
    return Engine(model, Numbers(model.args.vocab_size), max_seq_len=1024, cache_tokens=2**17, **options)


def test_answers_of_replayed_steps(answering):
    """Whose tokens are given: what the model makes of them is within rounding, as steps have other numbers of rows."""
    told = []
    for graphs in (True, False):
        engine = engine_of(answering, graphs=graphs)
        how = Sampling(logit_bias={7: 100}, logprobs=0)
        asked = [
            ([n + 1] * length, dataclasses.replace(how, max_tokens=9 + 3 * n))
            for n, length in enumerate((1, 250, 2, 600, 30))
        ]
        requests = [engine.submit(*one) for one in asked]
        for _ in engine.run():
            pass
        assert engine.pool.free == engine.pool.count
        told.append([torch.tensor([choice.logprob for choice in request.choices]) for request in requests])
    for ours, plain in zip(*told, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0.05)


def test_graphs_of_all_sizes_take_little_memory(answering):
    engine = engine_of(answering)
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    for count in (1, 3, 8, 30, 100, 256):
        requests = [engine.submit([n + 1], Sampling(max_tokens=3)) for n in range(count)]
        for _ in engine.run():
            pass
        assert all(len(request.answer) == 3 for request in requests)
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 2**30
