"""Any checkpoint in any format: transformers, an independent writer and a plain reference are the judges."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest
import torch
from models import TINY, build, evaluate, make_tokenizer, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint import rank_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from accessory.checkpoint.description import load_args
from accessory.checkpoint.open import Checkpoint
from accessory.cli import main
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.model.meta import MetaModel
from accessory.parallel.mesh import make_mesh

ARGS = replace(TINY, n_kv_heads=8, vocab_size=304)  # model-parallel size 8 divides it
TOKENS = [1, 9, 300, 63, 17, 2, 8, 30, 5, 77, 41]
FORMATS = ("hf", "mistral", "mixtral", "mixtral_sparse")


def cli(*words):
    """Run ``accessory words`` in this process; returns its exit code, or its message."""
    argv, sys.argv = sys.argv, ["accessory", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
    return 0


def converts(*words):
    assert cli("convert", *words) == 0


@functools.cache
def transformers_model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=ARGS.vocab_size,
        hidden_size=ARGS.dim,
        intermediate_size=ARGS.hidden_dim,
        num_hidden_layers=ARGS.n_layers,
        num_attention_heads=ARGS.n_heads,
        num_key_value_heads=ARGS.n_kv_heads,
        head_dim=ARGS.head_dim,
        rms_norm_eps=ARGS.norm_eps,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        sliding_window=ARGS.sliding_window,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=ARGS.max_seq_len,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """One model, in transformers' hands: saved by it in one file and in several, in fp32 and bf16, and fused by hand."""
    home = tmp_path_factory.mktemp("home")
    model = transformers_model()
    model.save_pretrained(home / "hf")
    model.save_pretrained(home / "sharded", max_shard_size="100KB")
    assert (home / "sharded/model.safetensors.index.json").is_file()
    MixtralForCausalLM.from_pretrained(home / "hf", dtype=torch.bfloat16).save_pretrained(home / "bf16")
    (home / "fused").mkdir()
    save_file(model.state_dict(), home / "fused/model.safetensors")
    (home / "fused/config.json").write_text((home / "hf/config.json").read_text())
    for directory in home.iterdir():
        (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return home


def hf_tensors(directory):
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@functools.cache
def expected_logits():
    with torch.no_grad():
        return transformers_model()(torch.tensor([TOKENS])).logits[0]


def load(paths, layout, size, tokens, strict=True):
    """Logits of a checkpoint in ``layout`` at model-parallel size ``size``."""
    mesh = make_mesh(size)
    source = Checkpoint(paths, strict=strict)
    return evaluate(build(source.args, layout or source.layout.name, source, mesh=mesh, dtype=torch.float32), tokens)


def load_all(paths, layouts, size):
    return {(path.name, layout): load(path, layout, size, TOKENS) for path in paths for layout in layouts}


@pytest.mark.parametrize("source", ["hf", "sharded", "bf16", "fused"])
def test_round_trip_is_byte_equal(source, home, tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    converts(home / source, a, "--to", "mixtral", "--mp", 4)
    converts(a, b, "--to", "mixtral_sparse", "--mp", 2, "--format", "pth")
    converts(b, c, "--to", "mistral")
    converts(c, d, "--to", "hf", "--shard-gb", 1e-4 if source == "sharded" else 5)
    same_bytes(hf_tensors(d), hf_tensors(home / ("hf" if source == "fused" else source)))
    assert (d / "model.safetensors.index.json").is_file() == (source == "sharded")
    assert all((directory / "tokenizer.model").is_file() for directory in (a, b, c, d))
    assert cli("verify", home / source, d) == 0


@pytest.mark.parametrize("layout", ["mixtral", "mixtral_sparse"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_cut_files_are_those_of_the_format(layout, suffix, size, home, tmp_path):
    """From transformers' weights, by way of the format's description alone."""
    converts(home / "hf", tmp_path / "out", "--to", layout, "--mp", size, "--format", suffix)
    w = logical(transformers_model().state_dict())
    for rank in range(size):
        path = tmp_path / f"out/consolidated.{rank:02d}-of-{size:02d}.model.{suffix}"
        ours = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)["model"]
        same_bytes(ours, rank_file(w, layout, rank, size, ARGS))
    back = tmp_path / "back"
    converts(tmp_path / "out", back, "--to", "hf")
    same_bytes(hf_tensors(back), hf_tensors(home / "hf"))
    assert json.loads((back / "config.json").read_text())["rope_scaling"]["factor"] == 2.0


def logical(state):
    """transformers' tensors under our names, by FORMATS' rules written out once more."""
    w = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    w["output.weight"] = state["lm_head.weight"]
    for n in range(ARGS.n_layers):
        theirs, ours = f"model.layers.{n}.", f"layers.{n}."
        for a, b in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"), ("wo", "o_proj")):
            x = state[f"{theirs}self_attn.{b}.weight"]
            if a in ("wq", "wk"):
                x = x.view(8, 2, ARGS.head_dim // 2, -1).transpose(1, 2).reshape(-1, ARGS.dim)
            w[f"{ours}attention.{a}.weight"] = x
        w[f"{ours}attention_norm.weight"] = state[f"{theirs}input_layernorm.weight"]
        w[f"{ours}ffn_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        w[f"{ours}feed_forward.gate.weight"] = state[f"{theirs}mlp.gate.weight"]
        gate_up = state[f"{theirs}mlp.experts.gate_up_proj"]
        w[f"{ours}feed_forward.experts.w1"], w[f"{ours}feed_forward.experts.w3"] = gate_up.chunk(2, 1)
        w[f"{ours}feed_forward.experts.w2"] = state[f"{theirs}mlp.experts.down_proj"]
    return w


def mistral_releases(home):
    """Mistral's file sets, written from their description: whole, in parts, shared out, merged experts."""
    w = logical(transformers_model().state_dict())
    flat = {key.removeprefix("llma."): tensor for key, tensor in rank_file(w, "mixtral", 0, 1).items()}
    merged = {key.removeprefix("llma."): tensor for key, tensor in rank_file(w, "mixtral_sparse", 0, 1).items()}
    merged = {key.replace("feed_forward", "block_sparse_moe"): tensor for key, tensor in merged.items()}
    for name in ("whole", "parts", "shared", "merged", "one"):
        (home / name).mkdir(parents=True)
        params = {k: v for k, v in vars(ARGS).items() if k not in ("moe", "max_batch_size", "load_balancing_weight")}
        params["moe"] = {"num_experts": 8, "num_experts_per_tok": 2}
        (home / name / "params.json").write_text(json.dumps(params))
    torch.save(flat, home / "whole/consolidated.00.pth")
    content = (home / "whole/consolidated.00.pth").read_bytes()
    for number in range(11):
        part = content[number * len(content) // 11 : (number + 1) * len(content) // 11]
        (home / f"parts/consolidated.00.pth-split{number:02d}.pth").write_bytes(part)
    for name, tensors in (("shared", flat), ("merged", merged)):
        for number in range(4):
            share = dict(list(tensors.items())[number::4])
            torch.save(share, home / name / f"consolidated.{number:02d}.pt")
    save_file(flat, home / "one/consolidated.safetensors")
    return home


@pytest.fixture(scope="module")
def everything(home, tmp_path_factory):
    """The same model in every format, and the logits of each in both layouts at sizes 1, 2 and 4."""
    made = mistral_releases(tmp_path_factory.mktemp("releases"))
    converts(home / "fused", made / "expert-8", "--to", "mixtral", "--mp", 8)
    converts(home / "fused", made / "sparse-8", "--to", "mixtral_sparse", "--mp", 8, "--format", "pth")
    return [home / "hf", home / "sharded", home / "fused", *sorted(made.iterdir())]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_format_gives_transformers_logits_in_every_partition(size, everything):
    for logits in run_ranks(size, load_all, everything, ("mixtral", "mixtral_sparse"), size):
        assert len(logits) == 2 * len(everything)
        for key, ours in logits.items():
            error = (ours - expected_logits()).abs().max() / expected_logits().abs().max()
            assert error <= 1e-5, (key, error)


def generate(paths, prompts):
    options = {"dtype": torch.float32, "device": "cpu", "max_seq_len": 64}
    return [MetaModel.from_pretrained(path, **options).generate(prompts, max_gen_len=8) for path in paths]


def test_the_same_prompt_gives_the_same_text(home, tmp_path):
    converts(home / "hf", tmp_path / "a", "--to", "mixtral", "--mp", 2)
    converts(home / "hf", tmp_path / "b", "--to", "mixtral_sparse", "--mp", 4)
    (texts,) = run_ranks(1, generate, [home / "hf", home / "fused", tmp_path / "a", tmp_path / "b"], ["the list of", "a"])
    assert texts[0][0] and all(text == texts[0] for text in texts)


def test_transformers_loads_what_is_exported(home, tokenizer, tmp_path):
    converts(home / "sharded", tmp_path / "a", "--to", "mixtral_sparse", "--mp", 2)
    converts(tmp_path / "a", tmp_path / "hf", "--to", "hf", "--shard-gb", 1e-4)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([TOKENS])).logits[0], expected_logits(), rtol=0, atol=0)
    text = "the list of  tokens, é\nand 👍"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text)
    assert theirs == Tokenizer(tokenizer).encode(text, bos=True, eos=False)


def test_tokenizer_json_encodes_as_the_tokenizer_model(tmp_path):
    """Mixtral's real tokenizer; random text that has every kind of character in it."""
    data = Path(mistral_common.__file__).parent / "data"
    source = data / "tokenizer.model.v1"
    with_symbols = data / "mistral_instruct_tokenizer_240323.model.v3"  # user-defined ones cannot be told exactly
    assert not write_tokenizer_json(with_symbols, tmp_path) and not list(tmp_path.iterdir())
    assert write_tokenizer_json(source, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(source)
    rng = random.Random(0)
    letters = "abc defgh  ijkl\n\t,.é👍中0123456789XYZ▁\x00\x01'\"<>[]/"
    texts = ["", " ", "  a", *("".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(500)), __doc__]
    texts += [" ".join(rng.choices(Path(__file__).read_text().split(), k=20)) for _ in range(100)]
    for text in texts:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids[1:]) == ours.decode(ids[1:]), text


def test_config_json_of_old_and_new_transformers(home, tmp_path):
    config = json.loads((home / "hf/config.json").read_text())
    old = config | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": None}
    del old["rope_parameters"]
    old["hidden_size"] = 64  # 8 heads of 8
    for name, content in (("old", old), ("new", config | {"hidden_size": 64, "head_dim": 8})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert (
        load_args(tmp_path / "old.json")
        == load_args(tmp_path / "new.json")
        == replace(ARGS, dim=64, rope_theta=1e4, load_balancing_weight=config["router_aux_loss_coef"])
    )


# lists of directories


def write_partial(directory, tensors, name="consolidated.00-of-01.model.pth"):
    directory.mkdir()
    torch.save({"model": {f"llma.{key}": tensor for key, tensor in tensors.items()}}, directory / name)
    (directory / "meta.json").write_text('{"llama_type": "mixtral"}')
    return directory


def test_a_list_replaces_then_adds(home, tmp_path):
    w = logical(transformers_model().state_dict())
    norm, gate = torch.rand(ARGS.dim), torch.rand(8, ARGS.dim)
    key = "layers.1.feed_forward.gate.weight"
    replaced = write_partial(tmp_path / "only", {"norm.weight": norm, key: gate})
    added = write_partial(tmp_path / "diff", {key: gate}, "consolidated.00-of-01.model-diff.pth")
    source = Checkpoint([home / "hf", replaced, added])
    whole = (slice(0, 8), slice(0, ARGS.dim))
    torch.testing.assert_close(source.read(key, whole), gate + gate, rtol=0, atol=0)
    assert torch.equal(source.read("norm.weight", whole[1:]), norm)
    other = "layers.0.feed_forward.gate.weight"
    assert torch.equal(source.read(other, whole), w[other])
    converts(home / "hf", replaced, added, tmp_path / "out", "--to", "hf")
    assert torch.equal(hf_tensors(tmp_path / "out")["model.layers.1.block_sparse_moe.gate.weight"], gate + gate)
    assert "before it" in cli("inspect", added)


def test_a_part_of_a_tensor_replaces_that_part(home, tmp_path):
    """One expert's matrix, in one rank's file of three... and what a bf16 base could not hold stays exact."""
    matrix = torch.rand(ARGS.dim, ARGS.hidden_dim)
    key = "layers.1.feed_forward.experts"
    part = write_partial(tmp_path / "part", {f"{key}.3.w2.weight": matrix})
    diff = write_partial(tmp_path / "diff", {f"{key}.5.w2.weight": matrix}, "consolidated.00-of-01.model-diff.pth")
    base = Checkpoint(home / "bf16")
    changed = Checkpoint([home / "bf16", part, diff])
    whole = (slice(0, 8), slice(0, ARGS.dim), slice(0, ARGS.hidden_dim))
    before, after = base.read(f"{key}.w2", whole).float(), changed.read(f"{key}.w2", whole)
    assert after.dtype == torch.float32 and torch.equal(after[3], matrix)
    torch.testing.assert_close(after[5], before[5] + matrix, rtol=0, atol=0)
    assert all(torch.equal(after[e], before[e]) for e in range(8) if e not in (3, 5))
    converts(home / "bf16", part, diff, tmp_path / "out", "--to", "mixtral_sparse", "--mp", 2)
    assert torch.equal(Checkpoint(tmp_path / "out").read(f"{key}.w2", whole), after)


def test_what_does_not_match_goes_on_if_the_user_says_so(home, tmp_path, capsys):
    directory = tmp_path / "lacking"
    converts(home / "hf", directory, "--to", "hf")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, directory / "model.safetensors")
    assert "lacks lm_head.weight" in cli("convert", directory, tmp_path / "out", "--to", "hf")
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    source = Checkpoint(directory, strict=False)
    said = capsys.readouterr().out
    assert "lm_head.weight" in said and "model.extra" in said
    assert source.read("output.weight", (slice(0, 304), slice(0, 32))).std() > 0
    assert "do not fit together" in cli("inspect", directory)


# verify and inspect


def test_verify_says_what_differs(home, tmp_path, capsys):
    assert cli("verify", home / "hf", home / "fused") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert cli("verify", home / "hf", home / "bf16") == 0
    assert "rounded" in capsys.readouterr().out
    changed = tmp_path / "changed"
    converts(home / "hf", changed, "--to", "mixtral", "--mp", 2)
    path = changed / "consolidated.01-of-02.model.safetensors"
    tensors = load_file(path)
    tensors["llma.layers.1.feed_forward.experts.5.w2.weight"][3, 4] += 1e-3
    save_file(tensors, path)
    assert "DIFFERENT: 1 of" in cli("verify", home / "hf", changed)
    assert "layers.1.feed_forward.experts.w2: largest difference 1.0" in capsys.readouterr().out
    assert cli("verify", home / "hf", changed, "--tolerance", 0.1) == 0
    (changed / "config.json").write_text(
        (changed / "config.json").read_text().replace('"norm_eps": 1e-05', '"norm_eps": 1e-06')
    )
    assert "DIFFERENT" in cli("verify", home / "hf", changed)
    assert "norm_eps: 1e-05 | 1e-06" in capsys.readouterr().out


def test_numbers_too_large_for_a_dtype_are_refused(home, tmp_path):
    """And a file that another program made so is not called the same model."""
    key = "model.layers.1.self_attn.q_proj.weight"
    for name in ("large", "halved"):
        converts(home / "hf", tmp_path / name, "--to", "hf", *(("--dtype", "fp16") if name == "halved" else ()))
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors[key][0, 0] = 1e6
        save_file(tensors, tmp_path / name / "model.safetensors")
    told = refused(tmp_path / "large", "--dtype", "fp16")
    assert "attention.wq.weight holds numbers too large for fp16, 1e+06: choose another --dtype" in told
    for pair in (("large", "halved"), ("halved", "large")):
        assert "DIFFERENT: 1 of" in cli("verify", *(tmp_path / name for name in pair))


def test_files_that_do_not_belong_together_are_told(home, tmp_path, capsys):
    converts(home / "hf", tmp_path / "out", "--to", "mixtral", "--mp", 2)
    path = tmp_path / "out/consolidated.01-of-02.model.safetensors"
    tensors = load_file(path)
    tensors["llma.norm.weight"] += 1
    save_file(tensors, path)
    assert cli("inspect", tmp_path / "out") == 0
    assert "do not agree about llma.norm.weight" in capsys.readouterr().out


def test_settings_survive_a_way_through_every_format(home, tmp_path):
    source = tmp_path / "source"
    converts(home / "hf", source, "--to", "hf")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 299, "router_aux_loss_coef": 0.5}
    (source / "config.json").write_text(json.dumps(config))
    converts(source, tmp_path / "mistral", "--to", "mistral")
    converts(tmp_path / "mistral", tmp_path / "hf", "--to", "hf")
    converts(tmp_path / "hf", tmp_path / "sparse", "--to", "mixtral_sparse")
    for directory in (home / "hf", source, *(tmp_path / name for name in ("mistral", "hf", "sparse"))):
        assert replace(Checkpoint(directory).args, load_balancing_weight=0.1) == ARGS, directory.name
    converts(source, tmp_path / "expert", "--to", "mixtral")
    converts(tmp_path / "expert", tmp_path / "back", "--to", "hf")
    for directory, weight in ((home / "hf", 0.001), (tmp_path / "expert", 0.5), (tmp_path / "back", 0.5)):
        assert Checkpoint(directory).args.load_balancing_weight == weight, directory.name
    assert MixtralConfig.from_pretrained(tmp_path / "back").router_aux_loss_coef == 0.5
    theirs = MixtralConfig.from_pretrained(tmp_path / "hf")
    assert (theirs.sliding_window, theirs.rope_parameters["factor"]) == (ARGS.sliding_window, 1 / ARGS.rope_scaling)
    converts(source, tmp_path / "again", "--to", "hf")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["eos_token_id"] == 299 and again["router_aux_loss_coef"] == 0.5


def test_a_model_that_holds_only_zeros_is_compared(home, tmp_path):
    converts(home / "hf", tmp_path / "zeros", "--to", "hf")
    tensors = load_file(tmp_path / "zeros/model.safetensors")
    save_file({key: torch.zeros_like(tensor) for key, tensor in tensors.items()}, tmp_path / "zeros/model.safetensors")
    assert "DIFFERENT" in cli("verify", tmp_path / "zeros", home / "hf")
    assert "DIFFERENT" in cli("verify", home / "hf", tmp_path / "zeros")


def test_inspect(home, capsys):
    assert cli("inspect", home / "bf16") == 0
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in transformers_model().parameters())
    assert "Hugging Face" in out and "bfloat16" in out and f"{parameters:,}" in out and "300 pieces" in out


@pytest.mark.parametrize("script, layout", [("split.py", "mixtral"), ("split_sparse.py", "mixtral_sparse")])
def test_the_scripts_users_know(script, layout, tmp_path, tokenizer):
    directory = mistral_releases(tmp_path) / "parts"
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    tool = Path(__file__).parents[1] / "tools" / script
    (directory / script).write_bytes(tool.read_bytes())
    subprocess.run([sys.executable, script], cwd=directory, check=True, timeout=60, capture_output=True)
    out = directory / ("converted" if layout == "mixtral" else "converted_sparse")
    assert len(list(out.glob("consolidated.*-of-08.model.safetensors"))) == 8
    assert json.loads((out / "meta.json").read_text())["llama_type"] == layout
    assert (out / "tokenizer.model").is_file() and cli("verify", tmp_path / "whole", out) == 0


# faults


def refused(directory, *words):
    """What ``inspect`` or a conversion says of a bad directory, which is one line."""
    message = cli("convert", directory, directory.with_name("never"), "--to", "mixtral", *words)
    assert isinstance(message, str) and "\n" not in message and "Traceback" not in message
    assert not directory.with_name("never").exists() and not directory.with_name(".never.partial").exists()
    return message


@pytest.fixture(params=["hf", "sharded", "mistral"])
def sound(request, home, tmp_path):
    """A copy, and one of its weight files."""
    directory = tmp_path / "sound"
    target = ["--to", "mistral"] if request.param == "mistral" else ["--to", "hf"]
    converts(home / "hf", directory, *target, "--shard-gb", 1e-4 if request.param == "sharded" else 5)
    return directory, sorted(directory.glob("*.safetensors"))[-1]


def test_a_truncated_file(sound):
    directory, file = sound
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file}: damaged" in refused(directory)


def test_a_missing_shard(sound):
    directory, file = sound
    file.unlink()
    assert ("no such file" if "-of-" in file.name else "no checkpoint in it") in refused(directory)
    if "-of-" in file.name:  # without the index as well
        (directory / "model.safetensors.index.json").unlink()
        assert "no such file" in refused(directory)


@pytest.mark.parametrize("change", [("num_experts", 4), ("n_heads", 16), ("n_layers", 3)])
def test_a_config_of_another_model(sound, change):
    directory, _ = sound
    name, value = change
    path = next(p for p in (directory / "config.json", directory / "params.json") if p.is_file())
    config = json.loads(path.read_text())
    theirs = {"num_experts": "num_local_experts", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
    if path.name == "config.json":
        config[theirs[name]] = value
    elif name == "num_experts":
        config["moe"][name] = value
    else:
        config[name] = value
    path.write_text(json.dumps(config))
    message = refused(directory)
    assert f"is {value}, but by {directory}" in message or f"{path}: head_dim is" in message


def test_a_tokenizer_of_another_model(sound, tmp_path):
    directory, _ = sound
    make_tokenizer(directory / "tokenizer.model", 310)
    assert "310 pieces" in refused(directory) and "vocab_size is 304" in refused(directory)


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("model_type", "llama"),
        ("tie_word_embeddings", True),
    ],
)
def test_what_this_decoder_does_not_do(key, value, home, tmp_path):
    converts(home / "hf", tmp_path / "hf", "--to", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {key: value}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert key in refused(tmp_path / "hf")


def test_swapped_ranks(home, tmp_path):
    for suffix in ("safetensors", "pth"):
        directory = tmp_path / suffix
        converts(home / "hf", directory, "--to", "mixtral_sparse", "--mp", 2, "--format", suffix)
        first, second = sorted(directory.glob("consolidated*"))
        first.rename(directory / "x"), second.rename(first), (directory / "x").rename(second)
        message = refused(directory)
        assert "rank 0 of 2, but it was written as rank 1 of 2" in message


def test_a_wrong_size_in_the_names(home, tmp_path):
    directory = tmp_path / "wrong"
    converts(home / "hf", directory, "--to", "mixtral", "--mp", 4)
    for rank in (2, 3):
        (directory / f"consolidated.{rank:02d}-of-04.model.safetensors").unlink()
    for rank in (0, 1):
        (directory / f"consolidated.{rank:02d}-of-04.model.safetensors").rename(
            directory / f"consolidated.{rank:02d}-of-02.model.safetensors"
        )
    assert "rank 0 of 2, but it was written as rank 0 of 4" in refused(directory)


def warnings_of_load(*words):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        load(*words)
    return err.getvalue()


def test_not_a_number_is_told(home, tmp_path, capsys):
    tensors = load_file(home / "hf/model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0, 0] = torch.nan
    converts(home / "hf", tmp_path / "nan", "--to", "hf")
    save_file(tensors, tmp_path / "nan/model.safetensors")
    converts(tmp_path / "nan", tmp_path / "out", "--to", "mixtral")
    assert "NaN or infinite values: layers.1.feed_forward.experts.w2" in capsys.readouterr().out
    (warned,) = run_ranks(1, warnings_of_load, tmp_path / "out", "mixtral", 1, TOKENS)
    assert "layers.1.feed_forward.experts.w2 hold NaN" in warned


def test_an_index_says_where_a_tensor_is(home, tmp_path):
    """A stale copy in another shard is not taken; a file outside the directory is not followed."""
    directory = tmp_path / "sharded"
    converts(home / "hf", directory, "--to", "hf", "--shard-gb", 1e-4)
    last = sorted(directory.glob("model-*"))[-1]
    tensors = load_file(last)
    tensors["model.embed_tokens.weight"] = torch.zeros(ARGS.vocab_size, ARGS.dim)
    save_file(tensors, last)
    assert cli("verify", home / "hf", directory) == 0
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for value in ("../model.safetensors", 1, None):
        content["weight_map"]["lm_head.weight"] = value
        index.write_text(json.dumps(content))
        assert "weight_map" in refused(directory)


def test_one_file_beside_several(home, tmp_path):
    """Which of the two is meant cannot be known."""
    directory = tmp_path / "both"
    converts(home / "hf", directory, "--to", "hf", "--shard-gb", 1e-4)
    shutil.copy(home / "hf/model.safetensors", directory)
    assert "keep one set" in refused(directory)


@pytest.mark.parametrize("name", ["quantised", "old"])
def test_weights_of_another_kind(name, home, tmp_path):
    directory = tmp_path / "weights"
    converts(home / "hf", directory, "--to", "mixtral", "--format", "pth")
    file = directory / "consolidated.00-of-01.model.pth"
    tensors = torch.load(file, weights_only=True)["model"]
    if name == "quantised":
        tensors["llma.output.weight"] = tensors["llma.output.weight"].to(torch.int8)
    torch.save({"model": tensors}, file, _use_new_zipfile_serialization=name != "old")
    assert ("not quantised" if name == "quantised" else "save it anew") in refused(directory)


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "num_experts_per_tok", "rms_norm_eps"])
@pytest.mark.parametrize("value", [0, "x", -5])
def test_a_config_with_a_bad_value(key, value, home, tmp_path):
    converts(home / "hf", tmp_path / "hf", "--to", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {key: value}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert str(tmp_path / "hf") in refused(tmp_path / "hf")


def test_nothing_beside_the_destination_is_touched(home, tmp_path):
    """Not even a source that has the destination's name with an ending."""
    for name in ("m.old", "m.tmp"):
        converts(home / "hf", tmp_path / name, "--to", "hf")
    converts(tmp_path / "m.old", tmp_path / "m", "--to", "mixtral")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.old", "m.tmp"]
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    converts(tmp_path / "m.tmp", tmp_path / "link", "--to", "mixtral")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/config.json").is_file()


def test_sizes_and_places_that_do_not_fit(home, tmp_path):
    assert "use one of [1, 2, 4, 8]" in refused(home / "hf", "--mp", 3)
    assert "is not cut" in cli("convert", home / "hf", tmp_path / "out", "--to", "hf", "--mp", 2)
    converts(home / "hf", tmp_path / "there", "--to", "hf")
    assert "exists already" in cli("convert", home / "hf", tmp_path / "there", "--to", "hf")


@pytest.mark.parametrize(("spare", "message"), [(-8192, "the disk is too small"), (4096, "the disk is full")])
def test_a_full_disk(spare, message, home, tmp_path):
    """Too small for the weights, which is told before anything is written; or for what comes with them.

    The disk is mounted in a namespace of the command's own, which needs no root. Where a machine forbids even that, the
    command itself is told that its disk is as small.
    """
    small = tmp_path / "small"
    small.mkdir()
    size = -(-sum(tensor.nbytes for tensor in hf_tensors(home / "hf").values()) // 4096) * 4096 + spare
    convert = [sys.executable, "-c", MAIN, "convert", home / "hf", small / "out", "--to", "mixtral"]
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += [f'mount -t tmpfs -o size={size} none "$0" && "$@"; code=$?; ls -A "$0"; exit $code', small]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        mounted, convert[2] = [], SMALL_DISK.format(size=size) + MAIN
    done = subprocess.run([*mounted, *convert], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr, done
    assert "out" not in done.stdout and not list(small.iterdir()), "something was left behind"


MAIN = "from accessory.cli import main; main()"
SMALL_DISK = """
import errno, shutil, types
from accessory.checkpoint import convert
shutil.disk_usage = lambda path: types.SimpleNamespace(free={size})
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
shutil.copyfile = full
"""


def test_a_write_that_fails_leaves_nothing(home, tmp_path):
    """Wherever files may not grow so large: the system refuses in the middle of the weights."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)); "
    words = [sys.executable, "-c", limit + MAIN, "convert", home / "hf", tmp_path / "out", "--to", "mixtral"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "File too large; nothing was left behind" in done.stderr, done
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_nothing_under_the_name(tmp_path, tokenizer):
    """kill -9 while files are written; the next attempt starts cleanly."""
    args = replace(ARGS, hidden_dim=8192, dim=256, n_layers=4)
    source = tmp_path / "source"
    save_logical(source, args)
    command = [sys.executable, "-m", "accessory", "convert", source, tmp_path / "out", "--to", "mixtral_sparse", "--mp", "8"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".out.partial").glob("consolidated.01*")):
        assert process.poll() is None and time.monotonic() < deadline, "it was over before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    converts(source, tmp_path / "out", "--to", "mixtral_sparse", "--mp", 8)
    assert not (tmp_path / ".out.partial").exists() and cli("verify", source, tmp_path / "out") == 0


def save_logical(directory, args):
    """A directory of the expert layout."""
    directory.mkdir()
    w = weights(args, dtype=torch.bfloat16)
    tensors = {f"llma.{name}": x for name, x in w.items() if ".experts." not in name}
    for name, x in w.items():
        prefix, is_expert, matrix = name.partition(".experts.")
        if is_expert:
            tensors |= {f"llma.{prefix}.experts.{e}.{matrix}.weight": x[e].contiguous() for e in range(len(x))}
    save_file(tensors, directory / "consolidated.00-of-01.model.safetensors")
    (directory / "config.json").write_text(json.dumps(args.to_dict()))
    (directory / "meta.json").write_text('{"llama_type": "mixtral"}')
