"""Templates to the character, what is trained, the order of samples, and every way that data can be bad."""

import csv
import gzip
import json
import random
import re
from collections import Counter

import pyarrow.parquet
import pytest
import torch
import zstandard

from accessory.data.loader import BatchPlan, collate
from accessory.data.mix import load_mix, order
from accessory.data.packing import Rows
from accessory.data.store import CHUNK, Sample, cache
from accessory.data.templates import render
from accessory.data.tokenizer import Tokenizer, check_vocabulary, train_tokenizer
from accessory.errors import UserError

WORDS = [
    "the",
    "a",
    "list",
    "of",
    "tokens",
    "is",
    "made",
    "from",
    "words",
    "and",
    "then",
    "every",
    "answer",
    "not",
    "questions",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice(".?!") for _ in range(400)]
    lines += [f"### Human: {line}" for line in lines[:50]] + [f"### Assistant: {line}" for line in lines[50:100]]
    return Tokenizer(train_tokenizer(lines, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 420))


def talk(*texts):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


def text_of(record):
    return "".join(segment.text for segment in render(record))


def test_vocabulary_must_be_the_models(tokenizer, tmp_path):
    for size in (tokenizer.n_words, tokenizer.n_words + 255):
        check_vocabulary(tokenizer, size)
    for size in (tokenizer.n_words - 1, tokenizer.n_words + 256):
        with pytest.raises(UserError, match=f"{tokenizer.n_words} pieces .* {size}"):
            check_vocabulary(tokenizer, size)
    with pytest.raises(UserError, match="no such file"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")
    with pytest.raises(UserError, match="9999 pieces"):
        train_tokenizer(["too little"], tmp_path / "new.model", 9999)
    assert not list(tmp_path.glob("new*"))


CUTS = [(1, 1), (3, 1), (2, 2), (1, 5)]  # batch size, accumulation
COUNT = 37


def numbered(count=COUNT):
    """Samples of several lengths that can be told apart by their second token."""
    rng = random.Random(1)
    lengths = [rng.randint(3, 11) for _ in range(count)]
    return [Sample([1, 100 + i] + [7] * (n - 2), [False] + [True] * (n - 1)) for i, n in enumerate(lengths)]


def seen(plan, samples, order):
    """Per step, the numbers of the samples that this rank's micro-batches hold."""
    steps = []
    for micro_batches in plan.epoch(samples, Rows.alone(order)):
        assert len(micro_batches) == plan.accumulation
        assert all(len(batch.tokens) == plan.batch_size for batch in micro_batches)
        steps.append([int(row[1]) - 100 for b in micro_batches for row in b.tokens[: b.documents.count]])
    return steps


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("batch_size", "accumulation"), CUTS)
def test_every_sample_once_an_epoch(batch_size, accumulation, world):
    samples, everything = numbered(), order(COUNT, "5/0")
    plans = [BatchPlan(batch_size, accumulation, rank, world) for rank in range(world)]
    ranks = [seen(plan, samples, everything) for plan in plans]
    assert {len(steps) for steps in ranks} == {plans[0].steps(COUNT)}
    assert Counter(i for steps in ranks for step in steps for i in step) == Counter(range(COUNT))


@pytest.mark.parametrize("cut", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)])
def test_global_batches_hold_the_same_samples_for_every_cut(cut):
    samples, everything = numbered(), order(COUNT, "5/0")
    batch_size, accumulation, world = cut
    ranks = [seen(BatchPlan(batch_size, accumulation, rank, world), samples, everything) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert sorted(i for part in parts for i in part) == sorted(everything[step * 8 : step * 8 + 8])


def test_order_is_the_same_on_every_machine():
    assert order(8, "0/0").tolist() == [5, 3, 6, 7, 0, 1, 2, 4]
    orders = [tuple(order(50, f"{seed}/{epoch}")) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6 and all(sorted(numbers) == list(range(50)) for numbers in orders)


def test_a_batch_holds_what_its_samples_say():
    first, second = Sample([1, 5, 6, 7], [False, False, True, True]), Sample([1, 9], [False, True])
    batch = collate([[first], [second]], 3)
    assert batch.tokens.tolist() == [[1, 5, 6, 7], [1, 9, 0, 0], [0, 0, 0, 0]]
    assert batch.documents.number.tolist() == [[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.rows.tolist() == [1, 2, 4] and batch.targets.ids.tolist() == [6, 7, 9]
    assert (batch.real_tokens, batch.target_tokens) == (6, 3)
    empty = collate([], 2)
    assert (
        empty.documents.real.tolist() == [[False], [False]]
        and len(empty.targets.rows) == 0
        and empty.tokens.dtype == torch.int64
    )


def write_mix(folder, *entries, **files):
    """Files by name (``_`` for ``.``) and a mix of ``entries``."""
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(content)
    (folder / "mix.yaml").write_text(json.dumps({"META": list(entries)}))
    return folder / "mix.yaml"


def lines(*records):
    return "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)


GOOD = talk("Why?", "Because.")


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """Two files of 40 and 10 records."""
    folder = tmp_path_factory.mktemp("forty")
    for name, count in (("a", 40), ("b", 10)):
        (folder / f"{name}.jsonl").write_text(lines(*(talk(f"{name} {i}", f"answer {i}") for i in range(count))))
    return folder


def epochs(folder, tokenizer, *entries, count=3, seed=0, **options):
    """The places of the samples of each epoch, in order."""
    (folder / "mix.yaml").write_text(json.dumps({"META": list(entries)}))
    data = load_mix(folder / "mix.yaml", tokenizer, 1000, seed, **options)
    return [[data.training.where(i).rpartition("/")[2] for i in data.epoch(n)] for n in range(count)]


def of(epoch, name):
    return [place for place in epoch if place.startswith(f"{name}.")]


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 40), (0.5, 20), (0.1, 4), (0.26, 10), (0.001, 1)])
def test_a_ratio_is_exact_and_always_the_same_share(ratio, count, forty, tokenizer):
    first, second, third = epochs(forty, tokenizer, {"path": "a.jsonl", "ratio": ratio}, {"path": "b.jsonl"})
    assert len(of(first, "a")) == count == len(set(of(first, "a"))) and sorted(of(first, "b")) == sorted(of(second, "b"))
    assert set(first) == set(second) == set(third) and len({tuple(first), tuple(second), tuple(third)}) == 3
    (other,) = epochs(forty, tokenizer, {"path": "a.jsonl", "ratio": ratio}, {"path": "b.jsonl"}, count=1, seed=1)
    if 1 < count < 40:
        assert set(other) != set(first)


def test_epochs_repeat_and_take_other_records_for_the_rest(forty, tokenizer):
    runs = epochs(forty, tokenizer, {"path": "a.jsonl", "epochs": 0.25}, {"path": "b.jsonl", "epochs": 2.5}, count=8)
    for run in runs:
        assert len(of(run, "a")) == 10 and len(of(run, "b")) == 25
        assert set(Counter(of(run, "b")).values()) == {2, 3}
    assert len(set().union(*(of(run, "a") for run in runs))) > 30


def test_weights_are_shares_of_the_epoch(forty, tokenizer):
    (run,) = epochs(forty, tokenizer, {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 3}, count=1)
    assert Counter(place[0] for place in run) == {"a": 12, "b": 38}
    with pytest.raises(UserError, match="either every training entry has a weight, or none"):
        epochs(forty, tokenizer, {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"})


def test_what_is_held_out_is_never_trained_on(forty, tokenizer):
    (forty / "mix.yaml").write_text(json.dumps({"META": [{"path": "*.jsonl", "epochs": 2}]}))
    data = load_mix(forty / "mix.yaml", tokenizer, 1000, 0, validation=0.1)
    held_out = {data.validation.where(i) for i in range(len(data.validation))}
    trained = {data.training.where(i) for n in range(3) for i in data.epoch(n)}
    assert len(held_out) == 5 and len(trained) == 45 and not held_out & trained
    entries = [{"path": "a.jsonl"}, {"path": "b.jsonl", "split": "validation"}]
    (forty / "mix.yaml").write_text(json.dumps({"META": entries}))
    data = load_mix(forty / "mix.yaml", tokenizer, 1000, 0, validation=0.1)
    assert len(data.validation) == 10 and len(data.training) == len(data.epoch(0)) == 40


def test_bad_records_are_skipped_only_if_asked(forty, tokenizer, tmp_path, capsys):
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(GOOD, "{", GOOD, talk("Why?"), GOOD))
    with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON.*and 1 more bad record"):
        load_mix(mix, tokenizer, 1000, 0)
    data = load_mix(mix, tokenizer, 1000, 0, bad_records="skip")
    assert len(data.training) == 3 and "2 bad records are skipped" in capsys.readouterr().out
    assert [line.partition(": ")[0].rpartition("/")[2] for source in data.sources for line in source.bad()] == [
        "a.jsonl:2",
        "a.jsonl:4",
    ]


def test_every_kind_of_file_gives_the_same_samples(tokenizer, tmp_path):
    records = [{"instruction": f"Count to {n}, \u00e9\n please", "input": "", "output": f"ok, {n}"} for n in range(300)]
    table = pyarrow.Table.from_pylist([*records, {"instruction": "no input", "input": None, "output": "fine"}])
    plain = lines(*records, {"instruction": "no input", "output": "fine"}).encode()
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "b.json").write_text(json.dumps([json.loads(line) for line in plain.splitlines()]))
    (tmp_path / "c.json").write_bytes(plain)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(plain))
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    with pyarrow.OSFile(str(tmp_path / "g.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name, delimiter in (("i.csv", ","), ("j.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows([*records, {"instruction": "no input", "input": "", "output": "fine"}])
    samples = {}
    for file in sorted(tmp_path.iterdir()):
        mix = tmp_path / "mix.yaml"
        mix.write_text(json.dumps({"META": [{"path": file.name}]}))
        data = load_mix(mix, tokenizer, 1000, 0)
        samples[file.name] = [(s.tokens.tolist(), s.trained.tolist()) for s in data.training]
        mix.unlink()
    assert len(samples) == 10 and len(samples["a.jsonl"]) == 301
    for name, found in samples.items():
        assert found == samples["a.jsonl"], name


def test_many_records_by_many_processes_stay_in_order(tokenizer, tmp_path):
    """More than a chunk: several processes; and again, from the cache, without them."""
    records = [talk(f"question {n} " + "the list of tokens " * 40, f"answer {n}") for n in range(6000)]
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*records))
    assert (tmp_path / "a.jsonl").stat().st_size > 2 * CHUNK
    data = load_mix(mix, tokenizer, 400, 0)
    assert [data.training.where(i).rpartition(":")[2] for i in range(6000)] == [str(n + 1) for n in range(6000)]
    some = [0, 17, 2999, 5999]
    expected = write_mix(tmp_path, {"path": "b.jsonl"}, b_jsonl=lines(*(records[n] for n in some)))
    for number, sample in zip(some, load_mix(expected, tokenizer, 400, 0).training, strict=True):
        assert data.training[number].tokens.tolist() == sample.tokens.tolist()
    before = set(cache().iterdir())
    (tmp_path / "a.jsonl").rename(tmp_path / "renamed.jsonl")
    again = load_mix(write_mix(tmp_path, {"path": "renamed.jsonl"}), tokenizer, 400, 0)
    assert len(again.training) == 6000 and set(cache().iterdir()) == before


def test_paths_are_relative_to_the_mix_and_variables_are_expanded(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "mixes").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "folder/deep").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    for name in ("a.jsonl", "b.jsonl", "home/c.jsonl", "mixes/d.jsonl", "folder/deep/e.json", "folder/f.jsonl", "g1.jsonl"):
        (tmp_path / name).write_text(lines(talk(name, name)))
    (tmp_path / "folder/README.md").write_text("not data")
    (tmp_path / "folder/loop").symlink_to(tmp_path / "folder")
    paths = ["../a.jsonl", "$ELSEWHERE/b.jsonl", "~/c.jsonl", "d.jsonl", "../folder", "../g*.jsonl"]
    mix = write_mix(tmp_path / "mixes", *({"path": path, "type": "text"} for path in paths))
    data = load_mix(mix, tokenizer, 1000, 0)
    names = [data.training.where(i).rpartition("/")[2] for i in range(len(data.training))]
    assert names == [f"{name}:1" for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "e.json", "f.jsonl", "g1.jsonl")]


def test_samples_are_cut_to_fit_and_counted(tokenizer, tmp_path):
    records = [GOOD, talk("Why?", "the answer is made from words " * 60), talk("on questions " * 300, "Because.")]
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*records) + "\n\n")
    whole = load_mix(mix, tokenizer, 10_000, 0)
    assert (len(whole.training), whole.count("truncated"), whole.count("dropped")) == (3, 0, 0)
    length = len(whole.training[0].tokens) + 5
    cut = load_mix(mix, tokenizer, length, 0)
    assert (len(cut.training), cut.count("truncated"), cut.count("dropped")) == (2, 2, 1)
    assert cut.training[0].tokens.tolist() == whole.training[0].tokens.tolist()
    assert cut.training[1].tokens.tolist() == whole.training[1].tokens[:length].tolist() and any(cut.training[1].trained)
    assert cut.training.lengths.tolist() == [len(s.tokens) for s in cut.training]
    assert all(len(s.tokens) == len(s.trained) for s in [*whole.training, *cut.training])
    with pytest.raises(UserError, match="within 5 tokens"):
        load_mix(mix, tokenizer, 5, 0)


BAD_RECORDS = {  # name: (line, what the message says)
    "broken JSON": ('{"conversations": [', "not valid JSON"),
    "number": ("17", "expected an object, found int"),
    "no kind": ({"body": "plain"}, "none of 'conversations', .*; it has 'body'"),
    "answer first": ({"conversations": [{"from": "gpt", "value": "Because."}]}, "turn 1 is from 'gpt', expected 'human'"),
    "two questions": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "human", "value": "Why?"}]},
        "turn 2 is from 'human', expected 'gpt'",
    ),
    "unknown role": ({"conversations": [{"from": "system", "value": "Be kind."}]}, "turn 1 is from 'system'"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 must be an object"),
    "no role": ({"conversations": [{"value": "Why?"}]}, "turn 1"),
    "value is a number": ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 must be"),
    "role is a list": ({"conversations": [{"from": ["human"], "value": "Why?"}]}, "turn 1"),
    "turn is a text": ({"conversations": ["Why?", "Because."]}, "turn 1 must be"),
    "no answer": (talk("Why?"), "question without an answer"),
    "no answer at the end": (talk("Why?", "Because.", "Why?"), "question without an answer"),
    "no turns": ({"conversations": []}, "at least one question"),
    "turns are a text": ({"conversations": "Why?"}, "must be a list"),
    "turns are null": ({"conversations": None}, "must be a list"),
    "no output": ({"instruction": "Count."}, "'output' must be a text"),
    "output is null": ({"instruction": "Count.", "output": None}, "'output' must be a text"),
    "instruction is a list": ({"instruction": ["Count."], "output": "3"}, "'instruction' must be a text"),
    "input is a number": ({"instruction": "Count.", "input": 3, "output": "3"}, "'input' must be a text"),
    "half a character": ('{"instruction": "\\ud83d", "output": "a"}', "surrogate|not valid|UTF-8|character"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_bad_record_is_named_by_file_and_place(name, kind, tmp_path, tokenizer):
    bad, message = BAD_RECORDS[name]
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    good = json.dumps(GOOD)
    if kind == "jsonl":
        content, place = lines(GOOD, GOOD, "", bad, GOOD), "a.jsonl:4: "
    else:
        content = f"[\n{good},\n{good},\n{bad},\n{good}\n]"
        place = "a.json:4: " if name == "broken JSON" else "a.json[2]: "
    mix = write_mix(tmp_path, {"path": f"a.{kind}"}, **{f"a_{kind}": content})
    with pytest.raises(UserError) as error:
        load_mix(mix, tokenizer, 1000, 0)
    text = str(error.value)
    assert f"{tmp_path}/{place}" in text and re.search(message, text) and "\n" not in text


BAD_MIXES = {  # name: (entry, contents of a.jsonl, what the message says)
    "unknown key": (
        {"path": "a.jsonl", "ration": 0.5},
        None,
        "mix.yaml: META entry 1: unknown key 'ration'; did you mean 'ratio'",
    ),
    "no path": ({"ratio": 0.5}, None, "mix.yaml: META entry 1: the key 'path' is missing"),
    "unknown type": (
        {"path": "a.jsonl", "type": "image"},
        None,
        "mix.yaml: META entry 1: type: 'image' is not one of 'text'",
    ),
    "ratio a text": (
        {"path": "a.jsonl", "ratio": "half"},
        None,
        "mix.yaml: META entry 1: ratio: expected float or null, found 'half'",
    ),
    "ratio 0": ({"path": "a.jsonl", "ratio": 0}, None, "ratio of a.jsonl must be above 0, found 0.0"),
    "ratio 1.5": ({"path": "a.jsonl", "ratio": 1.5}, None, "ratio of a.jsonl must be at most 1, found 1.5"),
    "ratio below 0": ({"path": "a.jsonl", "ratio": -0.1}, None, "ratio of a.jsonl must be above 0"),
    "entry a text": ("a.jsonl", None, "mix.yaml: META entry 1 must be a mapping"),
    "missing file": ({"path": "b.jsonl"}, None, "b.jsonl: no such file"),
    "an empty folder": ({"path": "empty"}, None, "META entry 1: empty: no file there"),
    "no match": ({"path": "*.parquet"}, None, "META entry 1: *.parquet: no file there"),
    "not json": ({"path": "mix.yaml"}, None, "mix.yaml: expected .jsonl, .json"),
    "ratio and epochs": ({"path": "a.jsonl", "ratio": 0.5, "epochs": 2}, None, "ratio and epochs say the same"),
    "prompt_type": ({"path": "a.jsonl", "root": "/", "prompt_type": "shikra"}, None, "prompt_type 'shikra' is not known"),
    "no variable": ({"path": "$NOWHERE/a.jsonl"}, None, "the variable is not set"),
    "a record of 20 MB": ({"path": "a.jsonl"}, lines(talk("x" * 20_000_000, "a")).encode(), "a.jsonl:1: a record of 20 MB"),
    "nested too deeply": ({"path": "a.jsonl"}, b"[" * 100000, "nested too deeply"),
    "empty file": ({"path": "a.jsonl"}, b"", "a.jsonl: holds no record"),
    "blank lines": ({"path": "a.jsonl"}, b"\n \n\n", "a.jsonl: holds no record"),
    "invalid UTF-8": ({"path": "a.jsonl"}, lines(GOOD).encode() * 3 + b'{"a": "\xff\xfe"}\n', "a.jsonl:4: not valid UTF-8"),
    "latin-1": ({"path": "a.jsonl"}, lines(talk("é", "ü")).encode("latin-1"), "a.jsonl:1: not valid UTF-8"),
}


@pytest.mark.parametrize("name", BAD_MIXES)
def test_a_bad_mix_is_told(name, tmp_path, tokenizer):
    entry, content, message = BAD_MIXES[name]
    (tmp_path / "empty").mkdir()
    mix = write_mix(tmp_path, entry, a_jsonl=lines(GOOD) if content is None else content)
    with pytest.raises(UserError) as error:
        load_mix(mix, tokenizer, 1000, 0)
    text = str(error.value)
    assert message in text and "\n" not in text
    assert str(tmp_path) in text, f"which file? {text}"


def test_a_file_named_twice(tmp_path, tokenizer):
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, {"path": "*.jsonl"}, a_jsonl=lines(GOOD))
    with pytest.raises(UserError, match=r"META entry 2: .*a.jsonl is in entry 1 already"):
        load_mix(mix, tokenizer, 1000, 0)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.csv"])
def test_files_that_are_not_what_their_name_says(name, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(b'instruction,output\na,b,c\n"')
    mix = write_mix(tmp_path, {"path": name})
    with pytest.raises(UserError, match=f"{name}.*(damaged|columns)"):
        load_mix(mix, tokenizer, 1000, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a mapping"),
        ("META:\n", "one key META"),
        ("META: []\n", "one key META"),
        ("META: {path: a.jsonl}\n", "one key META"),
        ("META:\n  - path: a.jsonl\nOTHER: 1\n", "one key META"),
        ("META:\n  - path: a.jsonl\n    path: b.jsonl\n", "'path' stands twice"),
        ("META: [", "not valid YAML"),
    ],
)
def test_a_mix_that_is_none(content, message, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(lines(GOOD))
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_mix(tmp_path / "mix.yaml", tokenizer, 1000, 0)
    assert str(tmp_path / "mix.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "none of 'conversations'"), ("", "holds no record"), ("[]", "holds no record"), ("[1", ":1: not valid JSON")],
)
def test_a_json_file_that_is_no_list_of_records(content, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        load_mix(write_mix(tmp_path, {"path": "a.json"}, a_json=content), tokenizer, 1000, 0)
