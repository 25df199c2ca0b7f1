"""A model whose matrices are packed gives what it gave before: tokens, scores, adapters side by side, in both layouts."""

import ctypes
import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import TINY, weights
from ranks import run_ranks

from accessory.certify import formats
from accessory.certify.problem import SERVED, Problem
from accessory.certify.serving import SEVERAL, ServingCell, served_model
from accessory.checkpoint.open import Checkpoint
from accessory.model import few_rows
from accessory.model.build import build_model
from accessory.model.codecs import get_codec
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits, Predictions, Targets
from accessory.model.huge_pages import HUGE, into_huge_pages
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.packed import PackedCodes, packed, plain
from accessory.parallel.mesh import make_mesh
from accessory.settings import QuantiseSection

LENGTHS = [1, 40, 1, 7]  # single tokens, as answers have them, beside prompts
CPU = torch.device("cpu")


@torch.inference_mode()
def before_and_after(world, layout, tuning, dtype):
    problem = replace(Problem(), dtype=dtype)
    model = served_model(problem, ServingCell(world, layout, tuning), CPU)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(problem.args.vocab_size, (sum(LENGTHS),), generator=generator)
    members = torch.arange(len(LENGTHS)) % (len(SERVED) + 1) if tuning == SEVERAL else None
    targets = Targets(torch.arange(len(tokens) - 1), tokens[1:])

    def results():
        for member in (members, None):
            inputs = Inputs(tokens, Documents.of(LENGTHS), members=member)
            yield model(inputs, Logits())[0].double()
            yield model(inputs, Predictions(targets))[0][0].double()

    plain = list(results())
    model.pack()
    return plain, list(results()), sorted(name for name, tensor in model.named_parameters() if tensor.is_mkldnn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "layout", "tuning"),
    [
        (1, "mixtral", SEVERAL),
        (2, "mixtral_sparse", SEVERAL),
        (2, "mixtral", "lora"),  # with biases
        (4, "mixtral_sparse", "full"),  # more ranks than heads of keys
    ],
)
def test_a_packed_model_gives_what_it_gave(world, layout, tuning, dtype):
    for before, after, names in run_ranks(world, before_and_after, world, layout, tuning, dtype):
        assert {"output.weight", "layers.0.attention.wq.weight", "layers.1.attention.wo.weight"} <= set(names)
        for ours, expected in zip(after, before, strict=True):
            error = (ours - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2), f"{error:.1e}"


def quantised_before_and_after(home, layout, size):
    """Logits of prompts and single tokens, and how many matrices are still multiplied by their numbers."""
    source = Checkpoint(home / "base", quantise=QuantiseSection("int8", "int4-32"))
    other = Checkpoint(home / "base", quantise=QuantiseSection("int4-32", "int8"))
    for checkpoint in (source, other):
        options = {"mesh": make_mesh(size), "dtype": torch.bfloat16, "device": CPU, "trains": frozenset()}
        model = build_model(checkpoint.logical, LAYOUTS[layout], checkpoint, **options)
        inputs = Inputs(torch.arange(sum(LENGTHS)), Documents.of(LENGTHS))
        with torch.inference_mode():
            before = model(inputs, Logits())[0].double()
            model.pack()
            after = model(inputs, Logits())[0].double()
        yield before, after, sum(name.endswith("codes") for name, _ in model.named_parameters())


def all_of(*arguments):
    return list(quantised_before_and_after(*arguments))


def test_quantised_matrices_are_multiplied_by_their_codes(tmp_path):
    args = replace(TINY, hidden_dim=128, vocab_size=304)
    formats.write(tmp_path / "base", weights(args, scale=2.0, dtype=torch.bfloat16), args, "hf", 1)
    for size in (1, 2):
        for layout in LAYOUTS:
            for rank in run_ranks(size, all_of, tmp_path, layout, size):
                for before, after, left in rank:
                    assert left == 0 and not torch.equal(before, after)
                    error = (after - before).norm() / before.norm()
                    assert error < 3e-2, f"{error:.1e}"


@pytest.mark.parametrize("name", ["int8", "int4-32", "int4-128"])
def test_products_by_codes_are_those_by_numbers(name):
    """As near to the exact ones as products by numbers in bf16 are, but for a third."""
    codec, generator = get_codec(name), torch.Generator().manual_seed(0)
    parts = codec.encode(torch.randn(48, 256, generator=generator) + 0.3)
    numbers, codes = codec.decode(parts, torch.float32), PackedCodes(codec, parts)
    for rows in (1, 7, 40):
        x = torch.randn(rows, 256, generator=generator).bfloat16()
        exact = x.float() @ numbers.T
        ours, plain = ((y.float() - exact).norm() for y in (codes.product(x), x @ numbers.bfloat16().T))
        assert ours < 4 / 3 * plain, (rows, ours / plain)


@torch.inference_mode()
def answered(world, layout, tuning, dtype, window):
    """Logits of sixteen tokens behind prompts of different lengths: by a model as it is, packed, and packed each alone."""
    problem = replace(Problem(), dtype=dtype)
    moe = replace(problem.args.moe, score_bias=window is None)
    problem = replace(problem, args=replace(problem.args, sliding_window=window, moe=moe))
    cell = ServingCell(world, layout, tuning)
    pasts, page = [0, 1, 5, 16, 37, 70, *range(10, 20)], 16
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(problem.args.vocab_size, (past + 1,), generator=generator) for past in pasts]

    def run(model, cache, pages, past, tokens):
        documents = Documents.of([len(some) for some in tokens], past)
        members = torch.tensor([own[0] % (len(SERVED) + 1) for own in pages]) if tuning == SEVERAL else None
        inputs = Inputs(torch.cat(tokens), documents, cache.at(documents, pages), members=members)
        return model(inputs, Logits(documents.ends.long()))[0]

    def results(model, together):
        cache = model.make_cache(5 * len(pasts), page)
        pages = [list(range(5 * n + 1, 5 * n + 6)) for n in range(len(pasts))]
        for own, prompt in zip(pages, prompts, strict=True):
            if len(prompt) > 1:
                run(model, cache, [own], [0], [prompt[:-1]])
        last = [prompt[-1:] for prompt in prompts]
        if together:
            return run(model, cache, pages, pasts, last)
        return torch.cat([run(model, cache, [pages[n]], [pasts[n]], [last[n]]) for n in range(len(pasts))])

    model = served_model(problem, cell, CPU)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) + 0.5)
    for _, bias in model.named_buffers():
        bias.copy_(torch.arange(len(bias)).flip(0) / 10)
    plain = results(model, together=True)
    model.pack()
    return plain.double(), results(model, together=True), results(model, together=False)


@pytest.mark.skipif(not few_rows.runs(torch.float32), reason="no C compiler is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "layout", "tuning", "window"),
    [
        (1, "mixtral", "full", None),
        (1, "mixtral_sparse", "full", 8),
        (2, "mixtral", "full", 8),
        (2, "mixtral_sparse", "full", 8),
        (1, "mixtral", SEVERAL, None),
    ],
)
def test_an_answer_s_next_token_depends_on_no_other_answer_to_the_last_bit(world, layout, tuning, window, dtype):
    for expected, together, alone in run_ranks(world, answered, world, layout, tuning, dtype, window):
        assert torch.equal(together, alone) or tuning == SEVERAL  # adapters' products are torch's
        for logits in (together, alone):
            error = (logits.double() - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2), f"{error:.1e}"


def test_a_packed_matrix_lies_in_huge_pages():
    """What a model reads for each token: with pages of 4 KiB a core on a virtual machine takes up to twice the time."""
    probe = mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe.write(bytes(2 * HUGE))
    start = ctypes.addressof(ctypes.c_char.from_buffer(probe))
    into_huge_pages(start, 2 * HUGE)
    if not in_huge_pages(start, 2 * HUGE):
        pytest.skip("this system collapses no pages")
    matrix = packed(torch.ones(4096, 2048))
    nbytes = torch.ops.mkldnn._nbytes(matrix)
    assert in_huge_pages(torch.ops.mkldnn.data_ptr(matrix), nbytes) > nbytes / 2
    assert torch.equal(plain(matrix), torch.ones(4096, 2048))


def in_huge_pages(start, nbytes):
    """Bytes in huge pages of the mappings that hold this memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) < start + nbytes and int(match[2], 16) > start
        elif inside and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found
