"""A classifier: the numbers of transformers' MixtralForSequenceClassification; a run from labelled records to its use."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from jobs import command, run_each
from models import TINY, build, make_tokenizer, mesh_for, samples, weights
from ranks import run_ranks
from safetensors.torch import load_file
from test_transformers import by_logical_name
from transformers import AutoTokenizer, MixtralForSequenceClassification, pipeline
from transformers.models.mixtral import modeling_mixtral

from accessory.certify import formats
from accessory.certify.harness import Tensors, assemble, gradients
from accessory.certify.judge import distance, relative
from accessory.certify.parity import grid
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.description import load_args
from accessory.checkpoint.open import Checkpoint
from accessory.data.loader import collate
from accessory.data.mix import load_mix
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.infer.meta import MetaModel
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel
from accessory.train.objective import Classification

LABELS = ("no", "so", "yes")
ARGS = replace(TINY, rope_scaling=None, labels=LABELS)


def labelled(count, seed):
    """Samples that do not end with the padding, which is what transformers finds their end by."""
    found = enumerate(samples(count, seed))
    return [replace(s, tokens=[*s.tokens[:-1], 5], label=(7 * n + seed) % len(LABELS)) for n, s in found]


class InFp64:
    """torch, for transformers' Mixtral, which computes norms, routers and positions in fp32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def fp64(monkeypatch):
    monkeypatch.setattr(modeling_mixtral, "torch", InFp64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def write(directory, w, args=ARGS, format="mixtral_sparse", size=1):
    """The checkpoint of logical tensors."""
    formats.write(directory, w, args, format, size)
    return directory


def run_ours(layout, mp, w, batch):
    model = build(ARGS, layout, Tensors(w), mesh=mesh_for(mp))
    with torch.no_grad():
        logits, _ = model(batch.inputs(), Logits(batch.documents.ends))
    found = Classification().loss(model, batch)
    (found.loss_sum / Classification().targets(batch)).backward()
    return {"logits": logits, "loss": found.loss_sum.item() / batch.documents.count, "gradients": gradients(model)}


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("layout", ["mixtral", "mixtral_sparse"])
def test_logits_loss_and_gradients_are_those_of_transformers(layout, mp, tmp_path, fp64):
    """In fp64, the weights brought there by a conversion; documents of all lengths are padded there."""
    w, batch = weights(ARGS), collate(labelled(7, seed=5))
    ranks = run_ranks(mp, run_ours, layout, mp, w, batch)

    convert(Checkpoint(write(tmp_path / "ours", w)), tmp_path / "hf", Target("hf"))
    model = MixtralForSequenceClassification.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, experts_implementation="eager"
    )
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id["yes"] == 2
    tokens, _, real = grid(batch)
    padded = tokens.masked_fill(~real, model.config.pad_token_id)
    out = model(input_ids=padded, attention_mask=real.long(), labels=batch.labels)
    out.loss.backward()
    theirs = by_logical_name({name: p.grad for name, p in model.named_parameters()}, ARGS)
    ours, differ = assemble([rank["gradients"] for rank in ranks], LogicalModel(ARGS).shapes)
    assert not differ and "score.weight" in theirs
    assert distance(ours, theirs) < 1e-12
    for rank in ranks:
        assert distance({"": rank["logits"]}, {"": out.logits}) < 1e-12
        assert relative(rank["loss"], out.loss.item()) < 1e-12


def test_hugging_face_in_and_out(tmp_path):
    """What transformers saves comes back byte for byte through both layouts, with its labels."""
    torch.manual_seed(0)
    config = MixtralForSequenceClassification.config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        id2label={"2": "yes", "0": "no", "1": "so"},
        pad_token_id=9,
    )
    MixtralForSequenceClassification(config).save_pretrained(tmp_path / "a")
    convert(Checkpoint(tmp_path / "a"), tmp_path / "b", Target("mixtral_sparse", 2))
    convert(Checkpoint(tmp_path / "b"), tmp_path / "c", Target("mixtral", 4))
    convert(Checkpoint(tmp_path / "a"), tmp_path / "d", Target("hf"))
    convert(Checkpoint(tmp_path / "c"), tmp_path / "e", Target("hf"))
    assert {Checkpoint(tmp_path / name).args.labels for name in "abcde"} == {LABELS}
    assert (tmp_path / "d/model.safetensors").read_bytes() == (tmp_path / "e/model.safetensors").read_bytes()
    back = MixtralForSequenceClassification.from_pretrained(tmp_path / "d")
    assert (back.config.id2label, back.config.pad_token_id) == ({0: "no", 1: "so", 2: "yes"}, 9)
    first = MixtralForSequenceClassification.from_pretrained(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), back.parameters(), strict=True))
    code, out, _ = command("inspect", tmp_path / "c")
    assert code == [0] and "labels      no, so, yes" in out
    code, out, _ = command("verify", tmp_path / "c", tmp_path / "a")
    assert code == [0] and "bit for bit" in out


def test_unnamed_labels_and_other_problems(tmp_path):
    """transformers writes no id2label for LABEL_0 and LABEL_1, and lets a model have another problem."""
    w = weights(replace(ARGS, labels=("a", "b")), dtype=torch.float32)
    path = write(tmp_path / "a", w, replace(ARGS, labels=("a", "b")), "hf") / "config.json"
    settings = json.loads(path.read_text())

    def labels(**changes):
        path.write_text(json.dumps(settings | changes))
        return load_args(path).labels

    assert labels(id2label=None) == ("LABEL_0", "LABEL_1")
    assert labels(id2label=None, num_labels=3) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert labels(id2label={"1": "b", "0": "a"}) == ("a", "b"), "in the order of the numbers"
    for changes, told in (
        ({"problem_type": "regression"}, "problem_type is 'regression'; a document has one label here"),
        ({"id2label": {"0": "a", "2": "b"}}, "expected a label for each number from 0"),
        ({"id2label": {"0": "a", "1": "a"}}, "labels must be two or more, each named once; found a, a"),
    ):
        with pytest.raises(UserError, match=told):
            labels(**changes)


def corpus(home, count=96):
    """Texts whose mood is that of their last word, in two files under different keys, and the same to be held out."""
    make_tokenizer(home / "tokenizer.model")
    rng = random.Random(0)
    moods = {"list": "bad", "answer": "good", "tokens": "fine"}
    files = {"a": [], "b": [], "held": []}
    for number in range(count):
        last = rng.choice(list(moods))
        text = " ".join([*rng.choices(["the", "a", "is", "and"], k=rng.randint(1, 6)), last])
        name = ("a", "b", "held")[number % 3]
        label = moods[last] if name != "b" else ["bad", "good", "fine"].index(moods[last])
        files[name].append({"sentence": text, "mood": label} if name == "b" else {"text": text, "label": label})
    for name, records in files.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    columns = "columns: {text: sentence, label: mood}"
    entries = f"[{{path: a.jsonl}}, {{path: b.jsonl, {columns}}}, {{path: held.jsonl, split: validation}}]"
    (home / "mix.yaml").write_text(f"META: {entries}")
    args = replace(TINY, vocab_size=304, dim=16, n_heads=4, n_kv_heads=2, head_dim=4, rope_scaling=None, n_layers=1)
    (home / "model.json").write_text(json.dumps(args.to_dict()))
    (home / "run.yaml").write_text(RUN.format(home=home))
    return files["held"]


RUN = """
model: {{config: {home}/model.json, tokenizer: {home}/tokenizer.model, layout: mixtral, labels: [bad, good, fine]}}
data: {{mix: {home}/mix.yaml, max_seq_len: 64}}
parallel: {{precision: fp64, recompute: none}}
optim: {{lr: 2e-2, warmup_epochs: 0.1}}
train: {{epochs: 3, batch_size: 4, accumulation: 2}}
log: {{tensorboard: false, every: 4}}
save: {{every_epochs: 3}}
out: {home}/run
"""


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scores(pairs):
    """Accuracy and macro F1 of (right, said) pairs, by the definition."""
    f1 = []
    for label in {label for pair in pairs for label in pair}:
        hits = sum(right == said == label for right, said in pairs)
        precision = hits / max(1, sum(said == label for _, said in pairs))
        recall = hits / sum(right == label for right, _ in pairs) if any(r == label for r, _ in pairs) else 0.0
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return {"accuracy": sum(a == b for a, b in pairs) / len(pairs), "macro_f1": sum(f1) / len(f1)}


def said_of(model, held):
    found = model.classify([record["text"] for record in held])
    return [(record["label"], next(iter(shares))) for record, shares in zip(held, found, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in each layout, on two model-parallel and on two data-parallel ranks; the records held out."""
    home = tmp_path_factory.mktemp("classify")
    held = corpus(home)
    for layout, mp, rows in (("mixtral", 2, 4), ("mixtral_sparse", 1, 2)):
        more = f"model.layout={layout}", f"parallel.model_parallel={mp}", f"train.batch_size={rows}", f"out={home}/{layout}"
        codes, out, err = command("finetune", home / "run.yaml", *more, ranks=2)
        assert codes == [0, 0], err
        assert "  accuracy 0." in out and "  macro f1 0." in out
    return home, held


def test_a_run_learns_and_says_how_well(runs):
    """In both layouts the same; accuracy and F1 of the validation are those of the saved model's own answers."""
    home, held = runs
    rows, others = rows_of(home / "mixtral"), rows_of(home / "mixtral_sparse")
    trained, validated = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    assert trained[-1]["loss"] < 0.5 * trained[0]["loss"] and "perplexity" not in trained[0]
    assert trained[0]["targets"] == 32, "a document is one target"
    assert validated[-1]["val_accuracy"] > 0.9
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() & {"loss", "balance", "grad_norm", "accuracy", "macro_f1", "val_loss", "val_macro_f1"}:
            assert row[key] == pytest.approx(other[key], rel=1e-9), key
    model = MetaModel.from_pretrained(home / "mixtral/epoch2", "mixtral_sparse", dtype=torch.float64)
    pairs = said_of(model, held)
    assert scores(pairs) == pytest.approx({key: validated[-1][f"val_{key}"] for key in ("accuracy", "macro_f1")})
    start = scores([(right, "good") for right, _ in pairs])
    assert 0 < start["macro_f1"] < start["accuracy"] < 1, "what would be said of a model that always says the same"
    code, out, _ = command("compare", home / "mixtral", home / "mixtral_sparse", "--png", home / "c.png")
    assert code == [0] and "validation accuracy" in out and "perplexity" not in out


def test_transformers_says_the_same_of_texts(runs, tmp_path):
    """With its own tokenizer, padding and pipeline."""
    home, held = runs
    assert command("convert", home / "mixtral/epoch2", tmp_path / "hf", "--to", "hf", "--dtype", "fp32")[0] == [0]
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert settings["pad_token_id"] not in (None, settings["eos_token_id"]), "an answer may end with the latter"
    texts = [record["text"] for record in held]
    ours = MetaModel.from_pretrained(tmp_path / "hf", dtype=torch.float32).classify(texts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", pad_token="<unk>")
    classify = pipeline("text-classification", str(tmp_path / "hf"), tokenizer=tokenizer, batch_size=8, top_k=None)
    for mine, theirs in zip(ours, classify(texts), strict=True):
        assert mine == pytest.approx({entry["label"]: entry["score"] for entry in theirs}, abs=1e-5)


@pytest.fixture(scope="module")
def adapted(runs):
    """A language model, and what a LoRA run makes of it, in the sparse layout on two ranks."""
    home, held = runs
    args = replace(load_args(home / "model.json"), labels=())
    write(home / "base", weights(args, scale=4.0), args, "mixtral")
    shutil.copy(home / "tokenizer.model", home / "base")
    more = ["model.config=null", "model.tokenizer=null", f"model.checkpoint={home}/base", f"out={home}/lora"]
    more += ["tuning.lora={rank: 4, targets: [attention]}", "model.layout=mixtral_sparse", "parallel.model_parallel=2"]
    codes, out, err = command("finetune", home / "run.yaml", *more, ranks=2)
    assert codes == [0, 0], err
    assert re.search(r"^output +48 ", out, re.M), "the score, which is new, trains whole"
    return home, held, more


def test_an_adapter_keeps_the_score(adapted, tmp_path):
    """It stands behind its base, is merged, and is gone on from; the fingerprint is that of the language model."""
    home, held, more = adapted
    both = home / "base", home / "lora/epoch2"
    assert Checkpoint(both).args.labels == ("bad", "good", "fine") and not Checkpoint(both[0]).args.labels
    assert "score.weight" in load_file(both[1] / "adapter.safetensors")
    assert command("merge", *both, tmp_path / "hf", "--to", "hf")[0] == [0]
    assert command("merge", *both, tmp_path / "own")[0] == [0]
    assert command("verify", tmp_path / "hf", tmp_path / "own")[0] == [0]
    beside, merged = (MetaModel.from_pretrained(where, dtype=torch.float64) for where in (both, tmp_path / "hf"))
    texts = [record["text"] for record in held]
    for ours, theirs in zip(beside.classify(texts), merged.classify(texts), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    (validated,) = [row for row in rows_of(home / "lora") if "val_loss" in row][-1:]
    assert scores(said_of(beside, held))["accuracy"] == pytest.approx(validated["val_accuracy"])
    on = [f"model.checkpoint=[{both[0]}, {both[1]}]", f"out={tmp_path}/on", "train.max_steps=1", "optim.lr=1e-12"]
    codes, _, err = command("finetune", home / "run.yaml", *more, *on, ranks=2)
    assert codes == [0, 0], err
    first = rows_of(tmp_path / "on")[0]
    assert first["val_loss"] == pytest.approx(validated["val_loss"], rel=1e-9), "the score goes on, it is not new again"
    assert command("inspect", *both)[1].count("labels      bad, good, fine") == 1
    codes, out, err = command("classify", both[0], "--adapter", both[1], texts[0], "--precision", "fp64", ranks=2)
    shares = ", ".join(f"{label} {share:.1%}" for label, share in beside.classify(texts[:1])[0].items())
    assert codes == [0, 0] and f"> {texts[0]}\n{shares}\n" in out, err


WRONG = {
    "label": (
        "finetune {run} data.mix={home}/mix_label.yaml",
        "a_label.jsonl:2: its label is 'awful', and the run's labels are",
    ),
    "none": (
        "finetune {run} data.mix={home}/mix_none.yaml",
        "a_none.jsonl:1: it has no label, and the run's labels are bad",
    ),
    "number": ("finetune {run} data.mix={home}/mix_number.yaml", "a_number.jsonl:1: its label is '3', and the run's labels"),
    "no classifier": ("finetune {run} model.labels=[]", "a.jsonl:1: it has a label ('"),
    "one": ("finetune {run} model.labels=bad", "labels must be two or more, each named once; found bad"),
    "adapted": (
        "finetune {run} tuning.lora.targets=[output] model.config=null model.checkpoint={home}/base",
        "'output' matches",
    ),
    "twice": ("finetune {run} model.labels=[bad,bad]", "labels must be two or more, each named once; found bad, bad"),
    "order": (
        "finetune {run} {start} model.labels=[good,bad,fine]",
        "classifies into bad, good, fine: name them in this order",
    ),
    "left out": ("finetune {run} {start} model.labels=[]", "classifies into bad, good, fine: name them in this order"),
    "reference": (
        "finetune {run} train.reference_loss=true train.balance=microbatch",
        "train.reference_loss gives LLaMA2-Accessory's numbers, and that trains no classifier",
    ),
    "generate": (
        "generate {home}/mixtral/epoch2 Why?",
        "this model is a classifier (bad, good, fine) and predicts no tokens",
    ),
    "mistral": ("convert {home}/mixtral/epoch2 {home}/m --to mistral", "the format 'mistral' is of language models"),
    "peft": ("convert {home}/base {home}/lora/epoch2 {home}/p --to peft", "no place for trained weights of the base: score"),
    "other": ("verify {home}/base {home}/mixtral/epoch2", "DIFFERENT: the models' settings are not the same"),
}


def test_what_is_wrong_is_told_in_a_sentence(adapted, tmp_path):
    home, _, _ = adapted
    odd = {"label": ["fine", "awful"], "none": [None], "number": [3]}
    for name, labels in odd.items():
        records = [{"text": "a list"} | ({} if label is None else {"label": label}) for label in labels]
        (home / f"a_{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        (home / f"mix_{name}.yaml").write_text(f"META: [{{path: a_{name}.jsonl}}]")
    start = f"model.checkpoint={home}/mixtral/epoch2 model.config=null model.tokenizer=null"
    places = {"home": home, "run": f"{home}/run.yaml out=wrong", "start": start}
    commands = [(line.format(**places).split(), "") for line, _ in WRONG.values()]
    for (code, _, err), (name, (_, told)) in zip(run_each(commands, tmp_path), WRONG.items(), strict=True):
        assert code == 1 and told in err and "Traceback" not in err, (name, err)
    model = MetaModel.from_pretrained(home / "base", dtype=torch.float64)
    with pytest.raises(UserError, match="this model predicts tokens and knows no labels: use generate"):
        model.classify(["a list"])
    classifier = MetaModel.from_pretrained(home / "mixtral/epoch2", dtype=torch.float64, max_seq_len=4)
    with pytest.raises(UserError, match="example 1 has 30 tokens; from 1 to max_seq_len 4 are read"):
        classifier.classify(["a", "a list of tokens is made from words"])
    for refused in (classifier.generate, classifier.compute_logits, classifier.evaluate_examples):
        with pytest.raises(UserError, match="is a classifier"):
            refused(["a list"])


def test_samples_have_their_labels(runs, tmp_path):
    """By name, by number, of an answer as well; what is too long is cut and counted; the order of the labels is known."""
    home, _ = runs
    tokenizer = Tokenizer(home / "tokenizer.model")
    turns = [{"from": "human", "value": "the list"}, {"from": "gpt", "value": "an answer"}]
    records = [
        {"text": "the list", "label": "b"},
        {"text": "the list", "label": 0},
        {"text": "the list " * 50, "label": "1"},
        {"conversations": turns, "label": "a"},
        {"instruction": "the list", "output": "an answer", "label": "b"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "mix.yaml").write_text("META: [{path: a.jsonl}]")
    data, turned = (load_mix(tmp_path / "mix.yaml", tokenizer, 200, 0, labels=labels) for labels in ("ab", "ba"))
    samples = list(data.training)
    assert [sample.label for sample in samples] == [1, 0, 1, 0, 1]
    assert [sample.label for sample in turned.training] == [0, 0, 1, 1, 0], "a name stands for another number"
    assert not any(sample.trained.any() for sample in samples)
    assert samples[0].tokens.tolist() == tokenizer.encode("the list", bos=True, eos=False)
    long = tokenizer.encode("the list " * 50, bos=True, eos=False)
    assert samples[2].tokens.tolist() == long[:200] and len(long) > 200 and data.count("truncated") == 1
    assert samples[4].tokens[-1] == tokenizer.eos_id, "an answer ends as its template ends it"
    batch = collate(samples[:2])
    assert batch.labels.tolist() == [1, 0] and batch.target_tokens == 0
    assert batch.documents.ends.tolist() == [len(samples[0].tokens) - 1, len(samples[0].tokens) * 2 - 1]
    run = tmp_path / "run.yaml"
    model = {"config": str(home / "model.json"), "tokenizer": str(home / "tokenizer.model"), "labels": ["a", "b"]}
    run.write_text(
        json.dumps({"model": model | {"layout": "mixtral"}, "data": {"mix": str(tmp_path / "mix.yaml")}, "out": "o"})
    )
    out = command("data", "show", run, "-n", 1)[1]
    assert f"{tmp_path}/a.jsonl:1: {len(samples[0].tokens)} tokens, b" in out
    codes, out, _ = command("data", "check", run, "--png", tmp_path / "lengths.png")
    columns, numbers = (line.split() for line in out.splitlines()[2:4])
    assert codes == [0] and dict(zip(["name", *columns], numbers, strict=True))["targets"] == "5"


def test_f1_counts_only_labels_that_occur():
    """In the records, or in the answers."""
    for pairs in ([(0, 0), (0, 1), (1, 1), (1, 1)], [(0, 0)], [(0, 1)], [(2, 1), (1, 1), (0, 2), (2, 2)]):
        confusion = torch.zeros(3, 3)
        for right, said in pairs:
            confusion[right, said] += 1
        assert Classification().metrics(0.0, confusion) == pytest.approx(scores(pairs)), pairs
    assert Classification().metrics(0.0, torch.zeros(3, 3)) == {"accuracy": 0.0, "macro_f1": 0.0}
