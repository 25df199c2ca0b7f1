"""The commands a user types, as processes: the main job in both layouts, and every kind of bad input."""

import json
import re
from pathlib import Path

import pytest
from jobs import command

from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json

MODEL = {
    "dim": 32,
    "hidden_dim": 48,
    "head_dim": 8,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 400,
    "max_seq_len": 512,
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, a tokenizer, a model description and a run file."""
    home = tmp_path_factory.mktemp("home")
    assert command("data", "stdlib", home / "data")[0] == [0]
    assert len((home / "data/dialog.jsonl").read_text().splitlines()) >= 5000
    lines = {name: (home / "data" / name).read_text().splitlines()[:60] for name in ("dialog.jsonl", "instruction.jsonl")}
    for name, some in lines.items():
        (home / "data" / name).write_text("\n".join(some))
    codes, out, _ = command("data", "tokenizer", home / "data/mix.yaml", home / "tokenizer.model", "--vocab-size", 400)
    assert codes == [0] and "400 pieces" in out
    (home / "model.json").write_text(json.dumps(MODEL))
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/data/mix.yaml, max_seq_len: 256, validation: 0.1}}
parallel: {{model_parallel: 2, precision: fp32}}
optim: {{lr: 1e-3}}
train: {{max_steps: 6, batch_size: 4, accumulation: 2}}
log: {{every: 2, wandb: offline}}
out: {home}/run
"""
    )
    return home


@pytest.fixture(scope="module")
def runs(home):
    """The run directories of the same job in both layouts."""
    for layout in ("mixtral", "mixtral_sparse"):
        codes, out, err = command("finetune", home / "run.yaml", f"model.layout={layout}", f"out={home}/{layout}", ranks=2)
        assert codes == [0, 0], err
        assert "Traceback" not in err
        assert len(re.findall(r"^step +6/6 ", out, re.M)) == 1, "rank 0 alone speaks"
    return home / "mixtral", home / "mixtral_sparse"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_layouts_give_the_same_curves(runs):
    expert, sparse = (rows(run) for run in runs)
    assert [r["step"] for r in expert] == [0, 2, 4, 6, 6]
    for a, b in zip(expert, sparse, strict=True):
        for key in {"loss", "balance", "grad_norm", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
        assert a.get("loads") == b.get("loads")
    assert expert[-1]["val_loss"] < expert[0]["val_loss"]


def test_a_run_leaves_what_it_promises(runs):
    for run in runs:
        assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
        assert list(run.glob("wandb/offline-run-*")) and list(run.glob("tensorboard/events*"))
        assert (run / "config.yaml").is_file()
        saved = run / "epoch0-iter6"
        assert sorted(p.name for p in saved.iterdir()) == [
            "chat_template.jinja",
            "config.json",
            "consolidated.00-of-02.model.safetensors",
            "consolidated.01-of-02.model.safetensors",
            "meta.json",
            "tokenizer.model",
            "training.json",
        ]
        assert json.loads((saved / "meta.json").read_text()) == {"llama_type": run.name}


def test_compare_shows_both(runs, tmp_path):
    codes, out, _ = command("compare", *runs, "--png", tmp_path / "picture.png")
    assert codes == [0]
    assert "validation perplexity before" in out and "tokens/s" in out and "expert load of mixtral_sparse" in out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_compare_tells_runs_of_one_name_apart(tmp_path):
    places = [tmp_path / name / "model" for name in ("first", "second")]
    for step, place in enumerate(places, 1):
        place.mkdir(parents=True)
        row = {"step": step, "loss": 2.0, "tokens": 9, "seconds": 1.0, "loads": [[1, 2, 3, 4]]}
        (place / "metrics.jsonl").write_text(json.dumps(row))
    codes, out, err = command("compare", *places, "--png", tmp_path / "picture.png")
    assert codes == [0], err
    assert out.splitlines()[0].split() == ["step", *map(str, places), "difference"]
    assert "no step is in the logs of all of them" in out and f"expert load of {places[1]}," in out


def test_generate_gives_the_same_answer_in_any_layout_and_size(runs):
    answers = []
    for layout, ranks in (("mixtral", 1), ("mixtral_sparse", 2)):
        words = ("generate", runs[0] / "epoch0-iter6", "What is json?", "--precision", "fp32", "--max-gen-len", 8)
        codes, out, err = command(*words, "--layout", layout, ranks=ranks)
        assert codes == [0] * ranks, err
        answers.append(out)
    assert answers[0] == answers[1] and answers[0].startswith("> What is json?")


def test_a_tokenizer_json_goes_with_the_model(home, tmp_path):
    write_tokenizer_json(home / "tokenizer.model", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"})
    )
    words = [f"model.tokenizer={tmp_path}/tokenizer.json", "parallel.model_parallel=1", "train.max_steps=1", "log.wandb=off"]
    codes, _, err = command("finetune", home / "run.yaml", *words, f"out={tmp_path}/run")
    assert codes == [0], err
    saved = tmp_path / "run/epoch0-iter1"
    assert [path.name for path in sorted(saved.glob("token*"))] == ["tokenizer.json", "tokenizer_config.json"]
    for template in ("chat_template", "mixtral-instruct"):
        codes, out, err = command("generate", saved, "What is json?", "--template", template, "--max-gen-len", 2)
        assert codes == [0] and out.startswith("> What is json?"), err
    codes, _, err = command("generate", saved, "What is json?", "--template", "chatml")
    assert codes == [1] and "has no special token <|im_start|>" in err and "Traceback" not in err


def test_finetune_starts_from_a_checkpoint(runs, home):
    """What one layout saved at model parallel 2, the other continues alone, from the same loss."""
    words = [f"model.checkpoint={runs[0]}/epoch0-iter6", "model.config=null", "model.tokenizer=null"]
    words += ["model.layout=mixtral_sparse", "parallel.model_parallel=1", f"out={home}/more", "train.max_steps=1"]
    codes, _, err = command("finetune", home / "run.yaml", *words, "log.wandb=off")
    assert codes == [0], err
    assert rows(home / "more")[0]["val_loss"] == pytest.approx(rows(runs[0])[-1]["val_loss"], rel=1e-6)
    assert (home / "more/epoch0-iter1/consolidated.00-of-01.model.safetensors").is_file()


def test_adapters_train_alike_in_both_layouts(home, runs):
    base = next(runs[0].glob("epoch*"))
    tuning = ["tuning.lora.rank=4", "tuning.lora.dropout=0.1", "tuning.bias=true", "tuning.train=norms"]
    for layout in ("mixtral_peft", "mixtral_sparse"):
        words = [f"model.checkpoint={base}", f"model.layout={layout}", f"out={home}/lora_{layout}", "log.wandb=off"]
        codes, out, err = command("finetune", home / "run.yaml", *tuning, *words, ranks=2)
        assert codes == [0, 0], err
        table = out[out.index("what trains") : out.index("step ")]
        assert re.search(r"^experts LoRA +7,680 +\S+%  float32$", table, re.M), (
            table
        )  # 2 layers x 3 x 4 experts x 4 x (32 + 48)
        assert re.search(r"^frozen +[\d,]+ +\S+%  float32$", table, re.M), table
    expert, sparse = (rows(home / f"lora_{layout}") for layout in ("mixtral_peft", "mixtral_sparse"))
    for a, b in zip(expert, sparse, strict=True):
        for key in {"loss", "balance", "grad_norm", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    assert expert[-1]["val_loss"] < expert[0]["val_loss"]


def test_packed_runs_are_the_same_however_they_are_cut(home):
    curves = []
    cuts = {"wide": ["parallel.model_parallel=2"], "cut": ["parallel.model_parallel=1", "train.batch_size=2"]}
    for name, size in cuts.items():
        words = ["data.packing=true", "data.max_seq_len=512", *size, "train.max_steps=null", "train.epochs=2"]
        words += [f"out={home}/{name}", "log.wandb=off"]
        codes, out, err = command("finetune", home / "run.yaml", *words, ranks=2)
        assert codes == [0, 0], err
        counts = (r"^data: (\d+) samples", r"^packing: (\d+) rows")
        samples, packed = (int(re.search(count, out, re.M)[1]) for count in counts)
        assert packed < samples
        assert {path.name for path in (home / name).glob("epoch*")} == {"epoch0", "epoch1"}
        curves.append(rows(home / name))
    for a, b in zip(*curves, strict=True):
        for key in {"loss", "balance", "grad_norm", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
        assert a.get("tokens") == b.get("tokens")


BAD = {
    "tuning": (["tuning.freeze=[routers]"], "tuning.freeze: 'routers' matches none"),
    "missing file": (["data.mix=nowhere.yaml"], "nowhere.yaml: no such file"),
    "unknown key": (["optim.weight_deca=0.1"], "unknown key 'optim.weight_deca'; did you mean 'optim.weight_decay'?"),
    "wrong type": (["train.batch_size=many"], "batch_size: expected int, found 'many'"),
    "model parallel": (["model.layout=mixtral_sparse", "model.config={home}/odd.json"], "use one of [1]"),
    # before any data is read
    "kernel": (
        ["model.kernel=looptd", "data.mix=nowhere.yaml"],
        "model.kernel: unknown kernel 'looptd'; did you mean 'looped'?",
    ),
    "kernel's needs": (
        ["model.kernel=grouped", "parallel.precision=fp64", "data.mix=nowhere.yaml"],
        "'grouped' cannot compute experts of 32 x 48 numbers in float64 on cpu",
    ),
    "world": (["parallel.model_parallel=3"], "does not divide the 2 processes: use one of [1, 2]"),
    "vocabulary": (["model.config={home}/large.json"], "has 400 pieces but the model's vocab_size is 32000"),
    "record": (["data.mix={home}/broken.yaml"], "broken.jsonl:2: not valid JSON"),
    "not finite": (["optim.lr=1e25", "optim.warmup_epochs=0"], "not finite; no weight was changed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence(kind, home):
    (home / "odd.json").write_text(json.dumps(MODEL | {"hidden_dim": 49}))
    (home / "large.json").write_text(json.dumps(MODEL | {"vocab_size": 32000}))
    good = (home / "data/dialog.jsonl").read_text().splitlines()[0]
    (home / "broken.jsonl").write_text(f'{good}\n{{"conversations": [\n')
    (home / "broken.yaml").write_text("META: [{path: broken.jsonl}]")
    overrides, sentence = BAD[kind]
    out = home / "bad" / kind.replace(" ", "_")
    words = [word.format(home=home) for word in overrides]
    codes, _, err = command("finetune", home / "run.yaml", *words, f"out={out}", "log.wandb=off", ranks=2, timeout=60)
    assert codes == [1, 1]
    errors = [line for line in err.splitlines() if "accessory: error:" in line]
    assert len(errors) == 1 and sentence in errors[0], err
    assert "Traceback" not in err
    assert not list(Path(out).glob("epoch*")), "half-written checkpoint"


def test_data_check_and_show(home, tmp_path):
    """A run's file: a table, a picture, steps; bad records are listed with their lines and end it with 1."""
    codes, out, err = command(
        "data", "check", home / "run.yaml", "--world", 4, "--tokens-per-s", 100, "--png", tmp_path / "l.png"
    )
    assert codes == [0], err
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("dialog", "instruction", "all"))
    }
    assert [rows[name][0] for name in ("dialog.jsonl", "instruction.jsonl", "all")] == ["60", "60", "120"]
    assert (tmp_path / "l.png").stat().st_size > 1000
    # 4 processes of model parallel 2: 2 x 4 sequences x 2 micro-steps; 12 of 120 are held out
    assert "16 rows a step, 7 steps an epoch, 6 in all" in out and "at 100 tokens/s: 0:" in out
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n{\n')
    (tmp_path / "bad.yaml").write_text("META: [{path: bad.jsonl}]")
    words = [tmp_path / "bad.yaml", "--tokenizer", home / "tokenizer.model"]
    codes, out, err = command("data", "check", *words, "--png", tmp_path / "l.png")
    assert codes == [1] and "bad.jsonl:2: 'output' must be a text" in out and "bad.jsonl:3: not valid JSON" in out
    codes, out, err = command("data", "show", *words, "-n", 1)
    assert codes == [0] and "bad.jsonl:1: " in out and re.search(r"### Response:\[\[b</s>\]\]", out)


def test_pretrain_goes_through_every_token_of_the_texts(home, tmp_path):
    """Documents longer than a row are cut, not truncated; rows are packed; a warm start goes on."""
    texts = ["the list of tokens is made from words and then every answer is not " * n for n in (1, 3, 40, 2)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "mix.yaml").write_text("META: [{path: texts.jsonl}]")
    words = [
        f"data.mix={tmp_path}/mix.yaml",
        "data.max_seq_len=64",
        "data.validation=0",
        "train.max_steps=null",
        "log.every=1",
    ]
    words += ["optim.warmup_epochs=0", "log.wandb=off", "train.accumulation=1", "train.epochs=2"]
    codes, out, err = command("pretrain", home / "run.yaml", *words, f"out={tmp_path}/run", ranks=2)
    assert codes == [0, 0], err
    full = re.search(r"packing: (\d+) rows of 64 tokens, ([\d.]+)% full", out)
    assert full and float(full[2]) > 80 and "0 truncated" in out
    tokenizer = Tokenizer(home / "tokenizer.model")
    predicted = sum(len(tokenizer.encode(text, bos=True, eos=True)) - 1 for text in texts)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert sum(row["targets"] for row in steps) == 2 * predicted and steps[-1]["loss"] < steps[0]["loss"]
    warm = f"model.checkpoint={tmp_path}/run/epoch1"
    codes, _, err = command("pretrain", home / "run.yaml", *words, warm, f"out={tmp_path}/warm", ranks=2)
    assert codes == [0, 0], err
    assert rows(tmp_path / "warm")[0]["loss"] < steps[0]["loss"] - 0.3
