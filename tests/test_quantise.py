"""Matrices in 8 and 4 bits: any cut of the quantised is the quantised cut, whoever made it, and says the same numbers."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import command
from models import TINY, build, evaluate, make_tokenizer, weights
from ranks import run_ranks
from safetensors.torch import load_file
from slips import make_home
from test_convert import hf_tensors
from test_expert_weights import ROWS, assert_close, inputs, swiglu_and_product

from accessory.certify import formats, reference
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.quantise import Dequantised, Quantising
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.codecs import get_codec
from accessory.model.logical import LogicalModel, allowed_sizes, held_dtype
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.moe.weights import PlainWeights
from accessory.model.quantised import QuantisedWeights, quantised_linear
from accessory.parallel.mesh import make_mesh
from accessory.settings import QuantiseSection

MIXTRAL = ModelArgs.load(Path(__file__).parents[1] / "configs/model/mixtral-8x7b.json")
ARGS = replace(TINY, hidden_dim=32, vocab_size=304)
WAYS = [QuantiseSection("nf4-8", "int4-8"), QuantiseSection("int3-8", "nf4-8"), QuantiseSection("int4-4", "int8")]
CODECS = ("nf4", "nf4-32", "int4", "int3", "int3-8", "int2", "int8")


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_nf4_is_that_of_bitsandbytes():
    """Digests of what bitsandbytes 0.50.2 makes of these weights: quantize_4bit(w, blocksize=64, quant_type="nf4"), which
    has the first of two codes in a byte's high half, its absmax, and dequantize_4bit of them in bf16 and fp32."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    codec = get_codec("nf4")
    parts = codec.encode(w)
    assert digest(parts["codes"] >> 4 | parts["codes"] << 4) == "0eb5d3b6386c6df2"
    assert digest(parts["scales"].view(torch.bfloat16).float()) == "da28f72066e5c8bc"
    assert digest(codec.decode(parts, torch.bfloat16)) == "a37b6ccf4a3372ea"
    assert digest(codec.decode(parts, torch.float32)) == "01a014cdc3aec459"


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_what_its_definition_says(name):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 40, 256, generator=generator) * torch.rand(3, 40, 1, generator=generator)
    w[0, 0], w[1, 1, 32:96] = 0, 0.25
    codec = get_codec(name)
    parts = codec.encode(w)
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == codec.shapes(w.shape)
    decoded = codec.decode(parts, torch.float64)
    assert torch.equal(decoded, reference.quantised(w, codec.name)) and not decoded[0, 0].any()
    assert torch.equal(codec.decode(parts, torch.float32).double(), decoded)
    assert torch.equal(codec.decode(parts, torch.bfloat16), decoded.float().bfloat16())
    for bad in (torch.nan, torch.inf):
        w[2, 3, 4] = bad
        with pytest.raises(ValueError, match="NaN"):
            codec.encode(w)


class Places:
    """Numbers of a model of any size, as a function of where they stand."""

    def __init__(self, logical):
        self.logical = logical

    def read(self, name, region):
        place = torch.zeros(())
        for axis, box in enumerate(region):
            steps = (
                torch.arange(box.start, box.stop, dtype=torch.float64) * (0.7548776662, 0.5698402909, 0.3819660113)[axis - 3]
            )
            place = place.unsqueeze(-1) + steps * (axis + 1)
        return (torch.sin(place * 40) * place.frac()).bfloat16()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cut_of_the_quantised_is_the_quantised_cut_at_mixtrals_sizes(layout, size):
    """Of each rank's region some rows of some experts, whole: rows are quantised one by one."""
    for names in (("nf4", "int3"), ("int4", "int8"), ("int8", "int4"), ("int3", "nf4"), ("int2", "int2")):
        logical = LogicalModel(replace(MIXTRAL, n_layers=1, quantise=QuantiseSection(*names)))
        cuts = logical.cuts(LAYOUTS[layout])
        for name, (matrix, part) in logical.parts.items():
            codec, seen = logical.codecs[matrix], 0
            for rank in (0, size - 1):
                region = list(cuts[name].region(rank, size))
                for axis in range(len(region) - 1):  # all of a row
                    start = region[axis].start + (region[axis].stop - region[axis].start) // 3
                    region[axis] = slice(start, min(start + 2, region[axis].stop))
                ours = Quantising(Places(logical), logical).read(name, tuple(region))
                *rows, columns = region
                whole = codec.encode(Places(logical).read(matrix, (*rows, slice(0, logical.dense[matrix][-1]))))[part]
                assert torch.equal(ours, whole[..., columns]), (name, rank)
                seen += columns.stop - columns.start
            assert seen > 0


def test_sizes_by_count():
    """Bytes of Mixtral 8x7B, and the sizes that leave blocks whole."""

    def gigabytes(name):
        logical = LogicalModel(replace(MIXTRAL, quantise=QuantiseSection(name, name)))
        assert sum(logical.sizes.values()) == 46_702_792_704
        held = ((torch.Size(shape).numel(), held_dtype(part, torch.bfloat16)) for part, shape in logical.shapes.items())
        return sum(count * dtype.itemsize for count, dtype in held) / 1e9

    assert gigabytes("nf4") < 25.3 and gigabytes("int4") < 25.0 and gigabytes("int8") < 47.0 and gigabytes("int3") < 20.2
    for layout in LAYOUTS.values():
        for name, most in (("nf4", 32), ("int4", 16), ("int3", 32), ("int8", 32)):
            sizes = allowed_sizes(replace(MIXTRAL, quantise=QuantiseSection(name, name)), layout)
            assert {1, 2, 4, 8} <= set(sizes) and (layout.name == "mixtral" or max(sizes) == most)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", ["nf4-8", "int4-4", "int3-8", "int8"])
def test_products_with_packed_weights(name, rows):
    """Output and gradients in fp32, and in fp64; what is kept for backward holds no matrix."""
    codec = get_codec(name)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        x, matrices, weight, gradient, row_ends = inputs(rows, dtype)
        parts = [codec.encode(w) for w in matrices]
        packed = [QuantisedWeights(codec, each, dtype) for each in parts]
        dense = [PlainWeights(codec.decode(each, dtype)) for each in parts]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ours = swiglu_and_product("looped", x, packed, weight, row_ends, gradient)
            y = quantised_linear(x, packed[0].rows(slice(8, 24)))
        assert all(t.dim() == 2 for t in kept)
        for result, expected in zip(
            ours, swiglu_and_product("reference", x, dense, weight, row_ends, gradient), strict=True
        ):
            assert_close(result, expected, tolerance)
        assert_close(y, x @ dense[0][:][0, 8:24].T, tolerance)
        assert_close(torch.autograd.grad(y.sum(), x)[0], (dense[0][:][0, 8:24].sum(0)).expand_as(x), tolerance)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base in bf16 as the Hub has it, with a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    formats.write(home / "hf", weights(ARGS, dtype=torch.bfloat16), ARGS, "hf", 1)
    make_tokenizer(home / "hf/tokenizer.model")
    return home


def accessory(*words, code=0):
    codes, out, err = command(*words)
    assert codes == [code], out + err
    return out + err


def answer(told):
    """What stands behind the question, without what a slow start says before."""
    assert "> the list\n" in told
    return told.partition("> the list\n")[2]


def held(home, layout, size, way):
    """Logits of the base quantised as it is read, and what this rank holds, cut into ``size``; and of what was saved."""
    mesh, results = make_mesh(size), []
    for source in (Checkpoint(home / "hf", quantise=way), Checkpoint(home / "saved")):
        model = build(source.args, layout, source, mesh=mesh, dtype=torch.float64)
        results.append((evaluate(model, range(20)), {name: t.detach().clone() for name, t in model.named_parameters()}))
    return results


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_files_load_into_any_partition_without_being_quantised_again(way, home, tmp_path):
    (tmp_path / "hf").symlink_to(home / "hf")
    accessory("quantise", home / "hf", tmp_path / "saved", "--experts", way.experts, "--attention", way.attention)
    logical = LogicalModel(replace(ARGS, quantise=way))
    source = Quantising(Checkpoint(home / "hf"), logical)
    numbers = {n: Dequantised(source, logical).read(n, logical_whole).double() for n, logical_whole in whole_dense(logical)}
    expected = reference.forward(numbers, ARGS, torch.arange(20))[0]
    for size in (1, 2):
        for layout in LAYOUTS:
            for rank in run_ranks(size, held, tmp_path, layout, size, way):
                for logits, parameters in rank:
                    assert_close(logits, expected, 1e-10)
                    assert parameters.keys() == rank[0][1].keys()
                    assert all(torch.equal(parameters[name], rank[0][1][name]) for name in parameters)
    accessory("convert", tmp_path / "saved", tmp_path / "sparse", "--to", "mixtral_sparse", "--mp", "2")
    cut = load_file(tmp_path / "sparse/consolidated.00-of-02.model.safetensors")
    assert {len(t) for key, t in cut.items() if "w2.codes" in key} == {ARGS.moe.num_experts * ARGS.dim}  # as they multiply
    accessory("convert", tmp_path / "sparse", tmp_path / "back", "--to", "mixtral")
    ours, theirs = (load_file(tmp_path / name / "consolidated.00-of-01.model.safetensors") for name in ("back", "saved"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "the same model" in accessory("verify", tmp_path / "sparse", tmp_path / "saved")
    accessory("convert", tmp_path / "sparse", tmp_path / "numbers", "--to", "hf", "--dtype", "fp32")
    stored = hf_tensors(tmp_path / "numbers")["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert torch.equal(stored.double(), numbers["layers.1.feed_forward.experts.w2"][3])


def whole_dense(logical):
    plain = LogicalModel(replace(logical.args, quantise=None))
    return [(name, plain.whole(name)) for name in plain.shapes]


def test_commands(home, tmp_path):
    """What quantises as it reads answers as what was saved; the table says bits; what cannot be is a sentence."""
    accessory("quantise", home / "hf", tmp_path / "saved", "--experts", "nf4-8")
    told = accessory("inspect", tmp_path / "saved")
    assert "6.000" in told and "nf4-8" in told and told.count("bfloat16") >= 4
    ask = ("the list", "--max-gen-len", "6", "--precision", "fp32")
    fits = accessory("inspect", home / "hf", "--fit", "0.001").splitlines()
    assert [line.split()[0] for line in fits if "quantised" in line or "whole" in line] == [
        "whole",
        *("quantised",) * 3,
        *("whole", "quantised"),  # with experts offloaded
    ]
    answers = [
        accessory("generate", home / "hf", *ask, "--quantise", "experts=nf4-8"),
        accessory("generate", tmp_path / "saved", *ask),
        accessory("generate", tmp_path / "saved", *ask, "--layout", "mixtral_sparse", "--mp", "2"),
    ]
    assert len(set(map(answer, answers))) == 1
    refusals = {
        "is quantised (experts nf4-8) already": ("generate", tmp_path / "saved", "x", "--quantise", "int8"),
        "no matrix can be held as 'nf5'": ("generate", home / "hf", "x", "--quantise", "nf5"),
        "dim 32 is no multiple of a block of 64": ("quantise", home / "hf", tmp_path / "d", "--experts", "nf4"),
        "the blocks of nf4-16 in a row of w2, 2: use one of [1, 2]": (
            *("quantise", home / "hf", tmp_path / "d", "--experts", "nf4-16", "--to", "mixtral_sparse", "--mp", "4"),
        ),
        "name --experts, --attention or both": ("quantise", home / "hf", tmp_path / "d"),
    }
    for sentence, words in refusals.items():
        assert sentence in accessory(*words, code=1), sentence
        assert not (tmp_path / "d").exists()


def test_what_cannot_be_read_or_quantised(home, tmp_path):
    tensors = weights(ARGS, dtype=torch.bfloat16)
    tensors["layers.1.feed_forward.experts.w2"][3, 4, 5] = torch.nan
    formats.write(tmp_path / "nan", tensors, ARGS, "hf", 1)
    source = Checkpoint(tmp_path / "nan", quantise=WAYS[0])
    with pytest.raises(UserError, match=r"layers.1.feed_forward.experts.w2 holds NaN"):
        build(source.args, "mixtral", source)
    accessory("quantise", home / "hf", tmp_path / "saved", "--experts", "int8", "--attention", "int8")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    del config["quantise"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks"):
        Checkpoint(tmp_path / "saved")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base with data, and adapters trained beside it quantised as it is read ("q"), and whole ("lora")."""
    home = make_home(tmp_path_factory.mktemp("trained"))
    words = [f"model.checkpoint={home}/hf", "model.layout=null", "tuning.lora.rank=2", "optim.lr=0.1"]
    for name, quantise in (("q", "{experts: nf4-8, attention: int8}"), ("lora", "null")):
        accessory("finetune", home / "run.yaml", *words, f"out={home}/{name}", f"model.quantise={quantise}")
    accessory("quantise", home / "hf", home / "saved", "--experts", "nf4-8", "--attention", "int8", "--to", "mixtral_sparse")
    return home


def test_adapters_stand_behind_their_base_however_it_is_held(trained, tmp_path):
    """Where it is held otherwise than in training, that is said."""
    q, lora = trained / "q/epoch0-iter1", trained / "lora/epoch0-iter1"
    ask = ("the list", "--max-gen-len", "4", "--precision", "fp32")
    way = ("--quantise", "experts=nf4-8,attention=int8")
    as_trained = [
        accessory("generate", trained / "hf", *ask, *way, "--adapter", q),
        accessory("generate", trained / "saved", *ask, "--adapter", q),
        accessory("generate", trained / "saved", *ask, "--adapter", q, "--layout", "mixtral", "--mp", "2"),
    ]
    assert len(set(map(answer, as_trained))) == 1 and "warning" not in as_trained[0]
    assert "beside this base quantised (experts nf4-8, attention int8); here it is whole" in accessory(
        *("generate", trained / "hf", *ask, "--adapter", q)
    )
    for where in ((trained / "hf", *way), (trained / "saved",)):
        told = accessory("generate", *where, *ask, "--adapter", lora)
        assert "beside this base whole; here it is quantised (experts nf4-8, attention int8)" in told
    accessory("quantise", trained / "hf", tmp_path / "other", "--experts", "int4-8")
    assert "belongs to another base" in accessory("generate", tmp_path / "other", "x", "--adapter", q, code=1)


def test_merging_takes_the_base_that_is_named(trained, tmp_path):
    """The original, or the numbers that the quantised one stands for: what training saw."""
    q, merged = trained / "q/epoch0-iter1", {}
    for name in ("hf", "saved"):
        told = accessory("merge", trained / name, q, tmp_path / name, "--to", "hf", "--dtype", "fp32")
        assert ("was trained beside" in told) == (name == "hf") and ("writing the numbers" in told) == (name == "saved")
        merged[name] = hf_tensors(tmp_path / name)
    original = hf_tensors(trained / "hf")
    for key, way in (("block_sparse_moe.experts.2.w2", "nf4-8"), ("self_attn.o_proj", "int8"), ("input_layernorm", None)):
        w = original[f"model.layers.1.{key}.weight"]
        lost = (reference.quantised(w, way) - w).float() if way else torch.zeros_like(w)
        assert bool(lost.any()) == (way is not None)
        assert_close(
            (merged["saved"][f"model.layers.1.{key}.weight"] - merged["hf"][f"model.layers.1.{key}.weight"]), lost, 1e-4
        )
        assert (key == "input_layernorm") == torch.equal(merged["hf"][f"model.layers.1.{key}.weight"], w)


def test_what_is_quantised_does_not_train(trained, tmp_path):
    quantised = (f"model.checkpoint={trained}/saved", "model.config=null", "model.layout=null", f"out={tmp_path}/run")
    for tuning in ("tuning={}", "tuning.train=[norms, experts]"):
        told = accessory("finetune", trained / "run.yaml", *quantised, tuning, code=1)
        assert "held quantised: train adapters on them (tuning.lora)" in told
    accessory("finetune", trained / "run.yaml", *quantised, "tuning.train=[router]")  # saves a whole model
    assert "nf4-8" in accessory("inspect", tmp_path / "run/epoch0-iter1")


def test_what_a_person_writes():
    read = QuantiseSection.read
    assert read(True) == read("nf4") == QuantiseSection("nf4", "nf4") and read(False) is read(None) is read("") is None
    assert (
        read("experts=nf4,attention=int8") == read({"experts": "nf4", "attention": "int8"}) == QuantiseSection("nf4", "int8")
    )
    assert read("attention=int4") == read(read("attention=int4")) == QuantiseSection(attention="int4")
    with pytest.raises(UserError, match="did you mean 'experts'"):
        read("expert=nf4")
