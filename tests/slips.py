"""The files that bad inputs are made of: a small model with its data, and all that can lie in a file's place."""

import json
import random
import shutil

import torch
from models import WORDS, make_tokenizer

from accessory.certify import formats
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.build import RandomWeights
from accessory.model.logical import LogicalModel

ARGS = ModelArgs(
    dim=16,
    hidden_dim=24,
    head_dim=4,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=304,
    max_seq_len=256,
    moe=MoEArgs(4, num_experts_per_tok=2),
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4949453792\n"
PAGE = "<!DOCTYPE html>\n<html><title>Hugging Face</title>Access to this model is restricted.</html>\n"
RUN = """
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 192, validation: 0.1}}
parallel: {{precision: fp32}}
train: {{max_steps: 1, batch_size: 4}}
log: {{tensorboard: false, probe_tokens: 64}}
out: {home}/run
"""


def make_home(home):
    """What a good command needs."""
    make_tokenizer(home / "tokenizer.model")
    rng = random.Random(0)
    talks = [[" ".join(rng.choices(WORDS, k=5)) for _ in range(2)] for _ in range(24)]
    records = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in talks]
    (home / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    (home / "mix.yaml").write_text("META: [{path: talks.jsonl}]")
    (home / "model.json").write_text(json.dumps(ARGS.to_dict()))
    (home / "run.yaml").write_text(RUN.format(home=home))
    logical = LogicalModel(ARGS)
    source = RandomWeights(logical, 0)
    weights = {name: source.read(name, logical.whole(name)) for name in logical.shapes}
    for name, format in (("ckpt", "mixtral"), ("hf", "hf")):
        formats.write(home / name, weights, ARGS, format, 1)
        shutil.copy(home / "tokenizer.model", home / name / "tokenizer.model")
    row = {"step": 1, "loss": 2.0, "tokens": 9, "seconds": 1.0, "loads": [[1, 2, 3, 4]] * 2}
    (home / "logged").mkdir()
    (home / "logged/metrics.jsonl").write_text(json.dumps(row))
    return home


def make_odd(home):
    """What stands in the place of good files; names say what."""
    odd = home / "odd"
    odd.mkdir()
    texts = {
        "pointer.yaml": POINTER,
        "page.yaml": PAGE,
        "list.yaml": "[1, 2]",
        "empty.yaml": "",
        "twice.yaml": "out: a\nout: b\n",
        "tabs.yaml": "out:\n\t- a",
        "date.yaml": "out: 2020-99-99",
        "python.yaml": "out: !!python/object/apply:os.getcwd []",
        "number.yaml": "1: 2",
        "cut.json": '{"dim": 16,',
        "page.json": PAGE,
        "deep.json": "[" * 100_000,
        "pointer.model": POINTER,
        "page.model": PAGE,
        "empty.model": "",
        "words.txt": "a few words\n",
    }
    for name, text in texts.items():
        (odd / name).write_text(text)
    (odd / "bytes.yaml").write_bytes(bytes(range(256)))
    (odd / "latin1.json").write_bytes('{"größe": 1}'.encode("latin1"))
    (odd / "nothing").mkdir()
    for name, text in {"pointer": POINTER, "page": PAGE, "words": "a few words, and no weights", "nothing": ""}.items():
        for base, file in (("ckpt", "consolidated.00-of-01.model.safetensors"), ("hf", "model.safetensors")):
            shutil.copytree(home / base, odd / f"{base}_{name}")
            (odd / f"{base}_{name}" / file).write_text(text)
    for number, file in enumerate(STAND_INS):
        shutil.copytree(home / file.partition("/")[0], odd / f"beside_{number}")
        (odd / f"beside_{number}" / file.partition("/")[2]).write_text(POINTER if number % 2 else PAGE)
    shutil.copytree(home / "ckpt", odd / "pickle")
    (odd / "pickle/consolidated.00-of-01.model.safetensors").unlink()
    torch.save({"model": {"a": print}}, odd / "pickle/consolidated.00-of-01.model.pth")
    shutil.copytree(home / "ckpt", odd / "bare")
    (odd / "bare/config.json").unlink()
    (odd / "bare/tokenizer.model").unlink()
    for name, text in {"rubbish": "not json\n{}", "loss": '{"step": 1, "loss": 2.0}', "none": ""}.items():
        (odd / f"logged_{name}").mkdir()
        (odd / f"logged_{name}/metrics.jsonl").write_text(text)
    (odd / "logged_page").mkdir()
    (odd / "logged_page/metrics.jsonl").write_text(PAGE)
    mixes = {
        "none": "META: []",
        "word": "META: talks.jsonl",
        "other": "DATA: [{path: a}]",
        "path": "META: [{name: a}]",
        "key": f"META: [{{path: {home}/talks.jsonl, templat: dialog}}]",
        "template": f"META: [{{path: {home}/talks.jsonl, template: none}}]",
        "ratio": f"META: [{{path: {home}/talks.jsonl, ratio: 2}}]",
        "nan": f"META: [{{path: {home}/talks.jsonl, weight: .nan}}]",
        "suffix": f"META: [{{path: {home}/tokenizer.model}}]",
        "gone": "META: [{path: gone.jsonl}]",
        "variable": "META: [{path: $NO_SUCH_VARIABLE/a.jsonl}]",
        "words": "META: [{path: words.jsonl}]",
        "pointer": "META: [{path: pointer.jsonl}]",
        "page": "META: [{path: page.jsonl}]",
    }
    for name, text in mixes.items():
        (odd / f"mix_{name}.yaml").write_text(text)
    for name, text in {"words": "a few words", "pointer": POINTER, "page": PAGE}.items():
        (odd / f"{name}.jsonl").write_text(text)
    for name, change in CONFIGS.items():
        (odd / f"config_{name}.json").write_text(json.dumps(ARGS.to_dict() | change))
    return odd


STAND_INS = [
    *("ckpt/config.json", "ckpt/meta.json", "ckpt/tokenizer.model", "ckpt/training.json", "hf/config.json"),
    *("hf/tokenizer.json", "hf/tokenizer_config.json", "hf/chat_template.jinja", "hf/generation_config.json"),
]
"""Files beside the weights in whose place a page or a pointer lies, by the model."""
CONFIGS = {
    "layers": {"n_layers": 10**9},
    "no_layers": {"n_layers": 0},
    "float_layers": {"n_layers": 1e9},
    "vocabulary": {"vocab_size": 10**12},
    "width": {"dim": 10**9, "hidden_dim": 10**9},
    "negative": {"hidden_dim": -1},
    "narrow": {"hidden_dim": 12},
    "odd_head": {"head_dim": 5},
    "heads": {"n_kv_heads": 3},
    "nan": {"norm_eps": float("nan")},
    "infinity": {"rope_theta": float("inf")},
    "nan_dim": {"dim": float("nan")},
    "text": {"dim": "16"},
    "null": {"dim": None},
    "truth": {"dim": True},
    "list": {"dim": [16]},
    "experts": {"moe": {"num_experts": 0}},
    "many_experts": {"moe": {"num_experts": 10**9}},
    "choices": {"moe": {"num_experts": 4, "num_experts_per_tok": 5}},
    "no_choice": {"moe": {"num_experts": 4, "num_experts_per_tok": 0}},
    "moe": {"moe": 4},
    "weight": {"load_balancing_weight": -1},
    "window": {"sliding_window": 0},
    "rope": {"rope_scaling": -2.0},
    "length": {"max_seq_len": 0},
    "unknown": {"n_layer": 2},
}
"""Changes to the good config.json, each of which makes it one that cannot be."""
