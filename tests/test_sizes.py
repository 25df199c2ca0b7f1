"""What a config.json does not say of a model's sizes, its tensors tell; what it says against them is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from jobs import command
from models import TINY, weights
from safetensors.torch import load_file, save_file
from slips import make_home

from accessory.certify import formats
from accessory.checkpoint.open import Checkpoint
from accessory.errors import UserError

ARGS = replace(TINY, vocab_size=304, head_dim=12, hidden_dim=40)
WRITTEN = [(format, size) for format in ("mixtral", "mixtral_sparse") for size in (1, 2, 4)]
WRITTEN += [("hf", 1), ("fused", 1), ("mistral", 1)]
HF = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_experts": "num_local_experts",
}
SIZES = ["dim", "hidden_dim", "head_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "num_experts"]


@pytest.fixture(scope="module", params=WRITTEN, ids=lambda written: f"{written[0]}-{written[1]}")
def directory(request, tmp_path_factory):
    """A model in each format, with its whole description, from the formats' descriptions alone."""
    format, size = request.param
    path = tmp_path_factory.mktemp("sizes") / format
    base = {"fused": "hf", "mistral": "mixtral"}.get(format, format)
    formats.write(path, weights(ARGS, scale=1.0), ARGS, base, size)
    if format == "mistral":
        tensors = load_file(path / "consolidated.00-of-01.model.safetensors")
        save_file({k.removeprefix("llma."): t for k, t in tensors.items()}, path / "consolidated.safetensors")
        (path / "consolidated.00-of-01.model.safetensors").unlink()
        (path / "config.json").rename(path / "params.json")
    if format == "fused":
        fuse(path / "model.safetensors")
    return path


def fuse(file):
    """The naming that transformers 5 holds in memory."""
    tensors = load_file(file)
    for n in range(ARGS.n_layers):
        moe = f"model.layers.{n}.block_sparse_moe."
        stacked = {
            w: torch.stack([tensors.pop(f"{moe}experts.{e}.{w}.weight") for e in range(ARGS.moe.num_experts)])
            for w in ("w1", "w2", "w3")
        }
        mlp = f"model.layers.{n}.mlp."
        tensors[f"{mlp}experts.gate_up_proj"] = torch.cat([stacked["w1"], stacked["w3"]], 1)
        tensors[f"{mlp}experts.down_proj"] = stacked["w2"]
        tensors[f"{mlp}gate.weight"] = tensors.pop(f"{moe}gate.weight")
    save_file(tensors, file)


def changed(directory, changes):
    """Its description with other sizes; None: without the key. Returns what it calls them."""
    file = next(f for f in (directory / "config.json", directory / "params.json") if f.is_file())
    config = json.loads(file.read_text())
    is_hf = "hidden_size" in config
    names = {name: HF.get(name, name) if is_hf else name for name in changes}
    for name, value in changes.items():
        group = config["moe"] if name.startswith("num_experts") and not is_hf else config
        if value is None:
            del group[names[name]]
        else:
            group[names[name]] = value
    return config, names


@pytest.mark.parametrize(
    "absent",
    [["vocab_size"], ["head_dim"], ["n_heads"], [name for name in SIZES if name not in ("n_heads", "dim")]],
    ids="-".join,
)
@pytest.mark.parametrize("how", [None, -1])
def test_what_is_not_said_is_read_off_the_tensors(directory, absent, how, tmp_path):
    config, _ = changed(directory, dict.fromkeys(absent, how))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if absent == ["n_heads"] and how is None and (directory / "model.safetensors").exists():
        with pytest.raises(
            UserError, match="num_attention_heads' is missing"
        ):  # transformers would take a number of its own
            Checkpoint(directory, tmp_path / "config.json")
        return
    assert Checkpoint(directory, tmp_path / "config.json").args == ARGS


@pytest.mark.parametrize("size", SIZES)
def test_a_description_that_contradicts_its_tensors(directory, size, tmp_path):
    right = ARGS.moe.num_experts if size == "num_experts" else getattr(ARGS, size)
    wrong = 2 * right
    config, names = changed(directory, {size: wrong})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refusal:
        Checkpoint(directory, tmp_path / "config.json")
    said = str(refusal.value)
    other = {"n_heads": ("head_dim", ARGS.head_dim, ARGS.head_dim // 2)}.get(size, (size, wrong, right))
    name = names.get(other[0], other[0])
    assert re.search(rf"config.json: (moe\.)?{name} is {other[1]}, but by .*\] it is {other[2]}: take", said), said
    assert str(directory) in said and "\n" not in said
    Checkpoint(directory, tmp_path / "config.json", strict=False)  # told, not refused


@pytest.mark.parametrize(
    ("absent", "asked"),
    [(["num_experts_per_tok"], "num_experts_per_tok"), (["n_heads", "head_dim"], "(head_dim|num_attention_heads)")],
)
def test_what_no_tensor_tells_is_asked_for(directory, absent, asked, tmp_path):
    config, _ = changed(directory, dict.fromkeys(absent))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{asked}' is missing"):
        Checkpoint(directory, tmp_path / "config.json")


def test_a_run_from_random_weights_takes_them_from_the_tokenizer(tmp_path):
    """As LLaMA2-Accessory: the vocabulary is the tokenizer's, and head_dim is dim / n_heads."""
    home = make_home(tmp_path)
    config = json.loads((home / "model.json").read_text())
    del config["head_dim"]
    (home / "model.json").write_text(json.dumps(config | {"vocab_size": -1}))
    codes, _, err = command("finetune", home / "run.yaml")
    assert codes == [0], err
    saved = json.loads((home / "run/epoch0-iter1/config.json").read_text())
    assert saved == config | {"vocab_size": 300, "head_dim": 4}


def test_fewer_kv_heads_than_files_are_whole_in_each(tmp_path):
    formats.write(tmp_path / "eight", weights(ARGS, scale=1.0), ARGS, "mixtral", 8)
    assert Checkpoint(tmp_path / "eight").args == ARGS
    config = json.loads((tmp_path / "eight/config.json").read_text())
    (tmp_path / "eight/config.json").write_text(json.dumps(config | {"n_kv_heads": 2}))
    with pytest.raises(UserError, match=r"n_kv_heads is 2, but by .* it is 4"):
        Checkpoint(tmp_path / "eight")
