"""Directories of GPTQ, AWQ and compressed-tensors, by a plain reading of their formats: they load into both layouts as what
they stand for, and what is written is what it stands for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import command
from models import TINY, build, evaluate, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_expert_weights import assert_close
from test_quantise import digest

from accessory.certify import reference
from accessory.certify.formats import huggingface_tensors, settings
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.errors import UserError
from accessory.model.moe.layouts import LAYOUTS
from accessory.parallel.mesh import make_mesh
from accessory.settings import QuantiseSection

ARGS = replace(TINY, hidden_dim=48)
GROUP = 8
WRITERS = [("gptq", "hub"), ("gptq_v2", "gptqmodel"), ("awq", "hub"), ("compressed", "gptqmodel")]
WRITERS += [("compressed symmetric", "hub"), ("gptq 3", "hub"), ("gptq_v2 3", "gptqmodel"), ("gptq_v2 2", "hub")]
GPTQMODEL = {
    "block_sparse_moe.gate": "mlp.gate",
    "block_sparse_moe": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


def word(values, order=range(8)):
    """Eight values of four bits in one, the first of an order in its lowest bits, as int32."""
    values = [values[place] for place in order]
    return sum(int(value) << 4 * place for place, value in enumerate(values)) - (2**32 if values[7] >= 8 else 0)


def words(values, bits):
    """Numbers of so many bits, one after the other, in words as int32."""
    whole = sum(int(value) << bits * n for n, value in enumerate(values))
    unsigned = [whole >> 32 * n & 0xFFFFFFFF for n in range(len(values) * bits // 32)]
    return [each - (2**32 if each >= 2**31 else 0) for each in unsigned]


def bits_of(version):
    return int(version[-1]) if version[-2:] in (" 3", " 2") else 4


def args_of(version):
    """Of sizes that fill words."""
    return replace(ARGS, hidden_dim=64) if bits_of(version) < 4 else ARGS


def packed(w, version):
    """A matrix [out, in] rounded as GPTQ's files hold it: (what is stored, the numbers that it stands for)."""
    blocks = w.float().unflatten(1, (-1, GROUP))
    bits = bits_of(version)
    half = 2 ** (bits - 1)
    scale = (blocks.abs().amax(2) / (half - 1)).to(torch.bfloat16 if "compressed" in version else torch.float16)
    zero = torch.full(scale.shape, half)
    if version != "compressed symmetric":
        zero[::3] = half - 1
    codes = ((blocks / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 2 * half - 1).long()
    numbers = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1)
    codes, eights = codes.flatten(1), range(len(w) // 8)
    if "compressed" in version:
        of_codes = [[word(row[k : k + 8]) for k in range(0, len(row), 8)] for row in codes]
        parts = {"weight_packed": torch.tensor(of_codes, dtype=torch.int32), "weight_scale": scale}
        if "symmetric" not in version:
            of_zeros = [[word(zero[8 * n : 8 * n + 8, block]) for block in range(scale.shape[1])] for n in eights]
            parts["weight_zero_point"] = torch.tensor(of_zeros, dtype=torch.int32)
        return parts | {"weight_shape": torch.tensor(w.shape)}, numbers
    if version == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        qweight = [[word(codes[8 * n : 8 * n + 8, k], order) for n in eights] for k in range(w.shape[1])]
        qzeros = [[word(zero[8 * n : 8 * n + 8, block], order) for n in eights] for block in range(scale.shape[1])]
    else:
        stored = zero - (1 if version in ("gptq", "gptq 3") else 0)
        qweight = list(zip(*(words(row, bits) for row in codes), strict=True))
        qzeros = [words(of_block, bits) for of_block in stored.T]
    parts = {"qweight": torch.tensor(qweight, dtype=torch.int32), "qzeros": torch.tensor(qzeros, dtype=torch.int32)}
    parts["scales"] = scale.T.contiguous()
    if version != "awq":
        parts["g_idx"] = torch.arange(w.shape[1], dtype=torch.int32) // GROUP
    return parts, numbers


def write(directory, version, names):
    """A model's directory; returns what each of its matrices stands for, under Hugging Face's names."""
    tensors, numbers, args = {}, {}, args_of(version)
    for key, tensor in huggingface_tensors(weights(args, dtype=torch.float32), args).items():
        quantised = "_proj" in key or ".experts." in key
        parts, numbers[key] = packed(tensor, version) if quantised else ({"weight": tensor}, tensor)
        stem = key.removesuffix(".weight")
        for hub, theirs in GPTQMODEL.items() if names == "gptqmodel" else ():
            stem = stem.replace(hub, theirs)
        tensors |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    quantisation = {"quant_method": "gptq", "bits": bits_of(version), "group_size": GROUP, "desc_act": False}
    quantisation["checkpoint_format"] = version.split()[0]
    if version == "awq":
        quantisation = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    if "compressed" in version:
        weights_are = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights_are, "input_activations": None}}
        quantisation = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = settings(args, "hf")["config.json"] | {"quantization_config": quantisation}
    (directory / "config.json").write_text(json.dumps(config))
    return numbers


def logits_of(home, layout, size):
    """Of what was converted, and of the directory itself."""
    mesh, sources = make_mesh(size), [Checkpoint(home / "own"), Checkpoint(home / "gptq")]
    models = [build(source.args, layout, source, mesh=mesh, dtype=torch.float64) for source in sources]
    return [evaluate(model, range(20)) for model in models]


@pytest.mark.parametrize(("version", "names"), WRITERS)
def test_a_directory_of_gptq(version, names, tmp_path):
    numbers = write(tmp_path / "gptq", version, names)
    save_file(numbers, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings(args_of(version), "hf")["config.json"]))
    whole = Checkpoint(tmp_path)
    w = {name: whole.read(name, whole.logical.whole(name)).double() for name in whole.logical.shapes}
    expected = reference.forward(w, args_of(version), torch.arange(20))[0]
    convert(Checkpoint(tmp_path / "gptq"), tmp_path / "own", Target("mixtral_sparse", 2))
    for size in (1, 2):
        for layout in LAYOUTS:
            for ours, theirs in run_ranks(size, logits_of, tmp_path, layout, size):
                assert_close(theirs, expected, 1e-10)
                assert torch.equal(ours, theirs)


def test_what_gptq_cannot_be(tmp_path):
    write(tmp_path / "gptq", "gptq", "hub")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    for key, value, told in (
        ("desc_act", True, "desc_act"),
        ("bits", 8, "in 8 bits"),
        ("group_size", -1, "group_size is -1"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | {key: value}}
        (tmp_path / "gptq/config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=told):
            Checkpoint(tmp_path / "gptq")
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "gptq/model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.2.w2.g_idx"
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, tmp_path / "gptq/model.safetensors")
    with pytest.raises(UserError, match=r"experts\.2\.w2\.g_idx orders inputs"):
        Checkpoint(tmp_path / "gptq")


def test_what_compressed_tensors_cannot_be(tmp_path):
    write(tmp_path / "gptq", "compressed", "hub")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    for key, value, told in (
        ("format", "float-quantized", "'pack-quantized' is read"),
        ("config_groups", {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "group"}}}, "of 4 bits"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | {key: value}}
        (tmp_path / "gptq/config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=told):
            Checkpoint(tmp_path / "gptq")
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    whole, key = load_file(tmp_path / "gptq/model.safetensors"), "model.layers.1.block_sparse_moe.experts.2.w2"
    for more, told in (
        ({f"{key}.weight_g_idx": torch.zeros(48, dtype=torch.int32)}, r"weight_g_idx orders inputs"),
        ({f"{key}.weight_scale": whole[f"{key}.weight_scale"] * 1e-9}, r"weight_scale holds scales that fp16"),
    ):
        save_file(whole | more, tmp_path / "gptq/model.safetensors")
        with pytest.raises(UserError, match=told):
            source = Checkpoint(tmp_path / "gptq")
            source.read("layers.1.feed_forward.experts.w2", source.logical.whole("layers.1.feed_forward.experts.w2_codes"))


def of_words(stored, order=range(8)):
    """What eight places of each word of [n, words] hold, [n, 8 * words]."""
    numbers = torch.empty(*stored.shape, 8, dtype=torch.long)
    for place, which in enumerate(order):
        numbers[..., which] = stored.long() >> 4 * place & 15
    return numbers.flatten(1)


def in_words(stored, bits):
    """What ``words`` made each row of [n, words] of."""
    rows = [sum((each % 2**32) << 32 * n for n, each in enumerate(row)) for row in stored.tolist()]
    return torch.tensor([[row >> bits * n & 2**bits - 1 for n in range(stored.shape[1] * 32 // bits)] for row in rows])


def decoded(tensors, config):
    """The matrices [out, in] of a directory, by a plain reading of its format; the rest as it is."""
    quantisation, numbers = config["quantization_config"], {}
    for key, tensor in tensors.items():
        stem, _, suffix = key.rpartition(".")
        if suffix == "qweight":
            if quantisation["quant_method"] == "awq":
                order, blocks = (0, 2, 4, 6, 1, 3, 5, 7), torch.arange(len(tensor)) // quantisation["group_size"]
                codes, zeros = of_words(tensor, order), of_words(tensors[f"{stem}.qzeros"], order)
            else:
                codes, blocks = in_words(tensor.T, quantisation["bits"]).T, tensors[f"{stem}.g_idx"].long()
                zeros = in_words(tensors[f"{stem}.qzeros"], quantisation["bits"])
                zeros += quantisation["checkpoint_format"] != "gptq_v2"
            numbers[f"{stem}.weight"] = ((codes - zeros[blocks]) * tensors[f"{stem}.scales"].float()[blocks]).T
        elif suffix == "weight":
            numbers[key] = tensor
    return numbers


def contents(directory):
    """What each file holds: what json says, and bytes."""
    read = {".json": json.loads}
    return {path.name: read.get(path.suffix, bytes)(path.read_bytes()) for path in directory.iterdir()}


def all_tensors(directory):
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with blocks whose zeros are the least and the largest code."""
    directory = tmp_path_factory.mktemp("whole")
    args = replace(ARGS, hidden_dim=64)
    tensors = huggingface_tensors(weights(args, dtype=torch.bfloat16), args)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor[0], tensor[1] = tensor[0].abs(), -tensor[1].abs()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings(args, "hf")["config.json"]))
    return directory


@pytest.mark.parametrize(("format", "codec"), [("gptq", "int4-8"), ("awq", "int4-8"), ("gptq", "int3-8")])
def test_a_directory_is_written_and_read_back_byte_for_byte(format, codec, whole, tmp_path):
    quantised = Checkpoint(whole, quantise=QuantiseSection(codec, codec))
    convert(quantised, tmp_path / "numbers", Target("hf", dtype=torch.float32))
    command("quantise", whole, tmp_path / format, "--experts", codec, "--attention", codec, "--to", format)
    files = contents(tmp_path / format)
    config, tensors = files["config.json"], all_tensors(tmp_path / format)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.int32", "torch.float16", "torch.bfloat16"}
    numbers, expected = decoded(tensors, config), all_tensors(tmp_path / "numbers")
    assert numbers.keys() == expected.keys()
    assert all(torch.equal(numbers[key].float(), expected[key]) for key in expected)
    for layout in LAYOUTS:
        for size in (1, 2):
            own, back = tmp_path / f"{layout}{size}", tmp_path / f"{layout}{size}-back"
            convert(quantised, own, Target(layout, size))
            convert(Checkpoint(own), tmp_path / f"{layout}{size}-{format}", Target(format))
            assert contents(tmp_path / f"{layout}{size}-{format}") == files
            convert(Checkpoint(tmp_path / f"{layout}{size}-{format}"), back, Target(layout, size))
            assert contents(back).items() >= contents(own).items()


def test_what_cannot_be_written_so():
    for quantise, told in (
        (None, "these are whole: run accessory quantise"),
        (QuantiseSection("int4-8"), "in blocks of one size"),
        (QuantiseSection("int4-8", "int4-4"), "in blocks of one size"),
        (QuantiseSection("nf4-8", "nf4-8"), "in blocks of one size"),
        (QuantiseSection("int4-4", "int4-4"), r"feed_forward\.experts\.w1 is of 44 x"),
    ):
        args = replace(ARGS, hidden_dim=44 if "44" in told else 48, quantise=quantise)
        with pytest.raises(UserError, match=told):
            Target("gptq").check(args)


MADE = Path(__file__).parent / "made_by_gptqmodel"
"""What GPTQModel 7.7.0 made of a small Mixtral with random weights, on 32 samples of random tokens: QuantizeConfig(bits=4,
group_size=16, desc_act=False), quantize, save. expected.json is what it says of its own directory, loaded in fp16
(backend GPTQ_TORCH): digests of dequantize_weight() of each matrix [out, in], and the logits that follow tokens 5 to 24."""


def logits_of_made(layout, size):
    source = Checkpoint(MADE)
    return evaluate(build(source.args, layout, source, mesh=make_mesh(size), dtype=torch.float64), range(5, 25))


def test_a_directory_that_gptqmodel_made(tmp_path):
    expected = json.loads((MADE / "expected.json").read_text())
    convert(Checkpoint(MADE), tmp_path / "numbers", Target("hf", dtype=torch.float16))
    numbers = {}
    for key, tensor in all_tensors(tmp_path / "numbers").items():
        stem = key.removesuffix(".weight")
        for hub, theirs in GPTQMODEL.items():
            stem = stem.replace(hub, theirs)
        numbers[stem] = digest(tensor)
    assert len(expected["weights"]) == 32 and expected["weights"].items() <= numbers.items()
    for layout in LAYOUTS:
        for logits in run_ranks(2, logits_of_made, layout, 2):
            assert_close(logits[-1], torch.tensor(expected["logits"], dtype=torch.float64), 2e-3)
