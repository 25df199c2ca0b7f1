"""Templates to the character, what is trained, the order of samples, and every way that data can be bad."""

import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
import zstandard

from accessory.cli import main
from accessory.data.loader import BatchPlan, collate
from accessory.data.mix import load_mix, mix_texts, tokenise_mix
from accessory.data.order import Part, Shuffled, permute
from accessory.data.packing import Rows
from accessory.data.store import CHUNK, Sample, cache, make_store
from accessory.data.tokenizer import Tokenizer, check_vocabulary, train_tokenizer
from accessory.errors import UserError
from accessory.settings import DataSection

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


def test_a_tokenizer_that_cannot_be_trained(tmp_path):
    """The sentence says how many pieces are possible, and so many are."""
    text, out = ["the list of tokens"], tmp_path / "new.model"
    for size, words in ((9999, r"9999 pieces .* enough for (\d+); set --vocab-size to at most"), (100, r"need (\d+); set")):
        with pytest.raises(UserError, match=words) as error:
            train_tokenizer(text, out, size)
        assert not list(tmp_path.iterdir()) and "\n" not in str(error.value) and ".cc" not in str(error.value)
        possible = int(re.search(words, str(error.value))[1])
        assert Tokenizer(train_tokenizer(text, out, possible)).n_words == possible
        out.unlink()
    with pytest.raises(UserError, match="no tokenizer of 300 pieces can be trained on this text: it is empty"):
        train_tokenizer([], out, 300)
    for size in (0, -5, 2**31):
        with pytest.raises(UserError, match=f"some thousands of pieces, or as many as its text allows; found {size}"):
            train_tokenizer(text, out, size)


def test_a_tokenizer_learns_what_the_templates_write(tmp_path):
    """With the columns of the mix; a chat template is the tokenizer's own, so its turns and tools stand alone."""
    call = {"function": {"name": "add", "arguments": "{}"}}
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [call]}]
    entries = [
        {"path": "a.jsonl", "columns": {"instruction": "question", "output": "answer"}},
        {"path": "b.jsonl", "template": "chat_template"},
        {"path": "c.jsonl", "template": "vicuna"},
    ]
    files = {"a_jsonl": lines({"question": "Why?", "answer": "So."}), "b_jsonl": lines({"messages": messages, "tools": []})}
    mix = write_mix(tmp_path, *entries, **files, c_jsonl=lines(GOOD))
    texts = list(mix_texts(mix))
    assert {"### Instruction:", "Why?", "### Response:So.", "1+1?", '{"name": "add", "arguments": {}}'} <= set(texts)
    assert texts[-1].endswith("USER: Why? ASSISTANT: Because.")
    (tmp_path / "c.jsonl").write_text(lines(GOOD | {"tools": [{"name": "f"}]}))
    with pytest.raises(UserError, match=r"c.jsonl:1: the template 'vicuna' has no place for a list of tools"):
        list(mix_texts(mix))


CUTS = [(1, 1), (3, 1), (2, 2), (1, 5)]  # batch size, accumulation
COUNT = 37


def numbered(count=COUNT):
    """Samples of several lengths that can be told apart by their second token."""
    rng = random.Random(1)
    lengths = [rng.randint(3, 11) for _ in range(count)]
    return [Sample([1, 100 + i] + [7] * (n - 2), [False] + [True] * (n - 1)) for i, n in enumerate(lengths)]


def order(count, seed):
    return permute(np.arange(count), count, seed)


def seen(plan, samples, order):
    """Per step, the numbers of the samples that this rank's micro-batches hold."""
    steps = []
    for micro_batches in plan.epoch(samples, Rows.alone(order)):
        assert len(micro_batches) == plan.accumulation
        assert all(batch.documents.count <= plan.batch_size for batch in micro_batches)
        starts = [(b, start) for b in micro_batches for start in b.documents.borders[: b.documents.count]]
        steps.append([int(b.tokens[start + 1]) - 100 for b, start in starts])
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


def test_batches_hold_others_every_epoch():
    samples = [Sample([1, 100 + i, 7], [False, True, True]) for i in range(400)]
    plan, part = BatchPlan(8, 1, 0, 1), Part(0, 400, 400, "0")
    first, second = ({frozenset(s) for s in seen(plan, samples, Shuffled([part], f"0/{epoch}"))} for epoch in (0, 1))
    assert len(first) == len(second) == 50 and not first & second


def test_order_is_the_same_on_every_machine():
    assert order(8, "0/0").tolist() == [6, 2, 5, 7, 0, 1, 3, 4]
    orders = [tuple(order(50, f"{seed}/{epoch}")) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert permute(np.array([0, 9_999_999]), 10_000_000, "0/0").tolist() == [8608222, 9204931]


@pytest.mark.parametrize("count", [*range(1, 30), 64, 65, 1000, 4096, 50_001])
def test_an_order_holds_every_number_once(count):
    assert sorted(order(count, "a").tolist()) == list(range(count))


def test_orders_are_random():
    """Every number is as likely at every place; all orders of four come up alike; neighbours are not alike."""
    orders = np.stack([order(10, str(seed)) for seed in range(5000)])
    counts = np.stack([np.bincount(column, minlength=10) for column in orders.T])
    assert ((counts - 500) ** 2 / 500).sum() < 140  # chi square of 81 degrees of freedom: exceeded once in 20,000
    fours = Counter(tuple(order(4, str(seed))) for seed in range(4800))
    assert len(fours) == 24 and sum((n - 200) ** 2 / 200 for n in fours.values()) < 60  # of 23: once in 30,000
    # all orders are as likely: of 6 each for itself; of 9 by parity and by where three of them stand
    sixes = Counter(tuple(order(6, str(seed))) for seed in range(14_400))
    assert len(sixes) == 720 and sum((n - 20) ** 2 / 20 for n in sixes.values()) < 880  # of 719: once in 20,000
    nines = [order(9, str(seed)) for seed in range(20_160)]
    places = Counter(tuple(nine[:3]) for nine in nines)
    assert len(places) == 504 and sum((n - 40) ** 2 / 40 for n in places.values()) < 640  # of 503: once in 20,000
    odd = sum(int(np.triu(nine[:, None] > nine).sum()) % 2 for nine in nines)
    assert abs(odd - 10_080) < 4 * 71  # standard deviations
    long = order(100_000, "0")
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.02 and abs(np.corrcoef(long, np.arange(100_000))[0, 1]) < 0.02


def test_a_stretch_of_an_epoch_is_that_of_the_whole():
    shuffled = Shuffled([Part(0, 700, 1600, "a"), Part(700, 30, 10, "b"), Part(730, 50, 50, "c")], "d")
    whole = shuffled[:]
    assert len(shuffled) == len(whole) == 1660
    assert Counter(whole[whole < 700].tolist()).total() == 1600
    assert set(Counter(whole[whole < 700].tolist()).values()) == {2, 3}
    assert len(set(whole[(whole >= 700) & (whole < 730)].tolist())) == 10
    assert sorted(whole[whole >= 730].tolist()) == list(range(730, 780))
    assert np.concatenate([shuffled[start : start + 100] for start in range(0, 1700, 100)]).tolist() == whole.tolist()


def test_a_batch_holds_what_its_samples_say():
    first, second = Sample([1, 5, 6, 7], [False, False, True, True]), Sample([1, 9], [False, True])
    batch = collate([first, second])
    assert batch.tokens.tolist() == [1, 5, 6, 7, 1, 9]
    assert batch.documents.document_of.tolist() == [1, 1, 1, 1, 2, 2]
    assert batch.targets.rows.tolist() == [1, 2, 4] and batch.targets.ids.tolist() == [6, 7, 9]
    assert (batch.real_tokens, batch.target_tokens) == (6, 3)
    empty = collate([])
    assert empty.documents.document_of.tolist() == [0] and empty.documents.count == len(empty.targets.rows) == 0
    assert empty.real_tokens == 0 and empty.tokens.dtype == torch.int64


def check(monkeypatch, capsys, mix, tokenizer, *words):
    """Run ``accessory data check``; its exit (None: all is well) and what it prints."""
    words = ["data", "check", mix, "--tokenizer", tokenizer.path, "--png", mix.with_name("lengths.png"), *words]
    monkeypatch.setattr(sys, "argv", ["accessory", *map(str, words)])
    try:
        main()
        code = None
    except SystemExit as end:
        code = str(end.code)
    return code, capsys.readouterr().out


def write_mix(folder, *entries, **files):
    """Files by name (``_`` for ``.``) and a mix of ``entries``."""
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(content)
    (folder / "mix.yaml").write_text(yaml.safe_dump({"META": list(entries)}))
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
    return [[data.training.where(i).rpartition("/")[2] for i in data.epoch(n)[:]] for n in range(count)]


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
    for start in (0, 4):  # four quarters are all records once; twice two and a half are all of them five times
        assert set(Counter(place for run in runs[start : start + 4] for place in of(run, "a")).values()) == {1}
    for start in (0, 2, 4, 6):
        assert set(Counter(of(runs[start], "b") + of(runs[start + 1], "b")).values()) == {5}


def test_what_does_not_go_into_the_records_wraps(forty, tokenizer):
    """30 of 40, and a share that has no divisor in common with the records (here 27 of 40)."""
    three = epochs(forty, tokenizer, {"path": "a.jsonl", "epochs": 0.75}, {"path": "b.jsonl"}, count=4)
    assert Counter(Counter(place for run in three for place in of(run, "a")).values()) == {3: 40}
    entries = {"path": "a.jsonl", "weight": 0.54}, {"path": "b.jsonl", "weight": 0.46}
    runs = epochs(forty, tokenizer, *entries, count=40)
    assert len(of(runs[0], "a")) == 27
    for last in range(1, 41):
        seen = Counter(place for run in runs[:last] for place in of(run, "a"))
        assert max(seen.values()) - min(seen[f"a.jsonl:{line}"] for line in range(1, 41)) <= 1
    assert set(seen.values()) == {27}


def test_weights_are_shares_of_the_epoch(forty, tokenizer):
    (run,) = epochs(forty, tokenizer, {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 3}, count=1)
    assert Counter(place[0] for place in run) == {"a": 12, "b": 38}
    with pytest.raises(UserError, match="either every training entry has a weight, or none"):
        epochs(forty, tokenizer, {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"})


def test_what_is_held_out_is_never_trained_on(forty, tokenizer):
    (forty / "mix.yaml").write_text(json.dumps({"META": [{"path": "*.jsonl", "epochs": 2}]}))
    data = load_mix(forty / "mix.yaml", tokenizer, 1000, 0, validation=0.1)
    held_out = {data.validation.where(i) for i in range(len(data.validation))}
    trained = {data.training.where(i) for n in range(3) for i in data.epoch(n)[:]}
    assert len(held_out) == 5 and len(trained) == 45 and not held_out & trained
    for samples in (data.training, data.validation):
        assert samples.lengths.tolist() == [len(sample.tokens) for sample in samples]
    entries = [{"path": "a.jsonl"}, {"path": "b.jsonl", "split": "validation"}]
    (forty / "mix.yaml").write_text(json.dumps({"META": entries}))
    data = load_mix(forty / "mix.yaml", tokenizer, 1000, 0, validation=0.1)
    assert len(data.validation) == 10 and len(data.training) == len(data.epoch(0)) == 40


def held_out(mix, tokenizer, seed, share, length=20):
    """Records that are held out, those that are trained on, and the share of samples held out."""
    data = load_mix(mix, tokenizer, length, seed, validation=share)
    out, rest = ([samples.where(i) for i in range(len(samples))] for samples in (data.validation, data.training))
    return set(out), set(rest), len(out) / (len(out) + len(rest))


def test_parts_of_a_document_are_held_out_together(tokenizer, tmp_path):
    """In several files, of which one numbers its records backwards and one has no sample."""
    rng = random.Random(0)
    texts = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 400)))} for _ in range(300)]
    dropped = lines(talk("on questions " * 300, "Because."))
    files = {"a_jsonl": lines(*texts[:150]), "b_jsonl": dropped, "c_json": json.dumps(texts[150:]), "d_txt": "a list"}
    mix = write_mix(tmp_path, *({"path": name.replace("_", ".")} for name in files), **files)
    chosen = [held_out(mix, tokenizer, seed, 0.1) for seed in (0, 1, 0)]
    for out, rest, share in chosen:
        assert len(out) > 10 and not out & rest and len(out | rest) == 301
        assert share == pytest.approx(0.1, abs=0.01)
    assert chosen[0] == chosen[2] and chosen[0][0] != chosen[1][0]
    often = Counter(place for seed in range(100) for place in held_out(mix, tokenizer, seed, 0.2)[0])
    assert len(often) == 301 and max(often.values()) < 45


def test_the_last_record_is_never_held_out(tokenizer, tmp_path, capsys):
    long = {"text": "the list of tokens " * 50}
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(long, long))
    assert [len(part) for part in held_out(mix, tokenizer, 0, 0.02)[:2]] == [1, 1]
    assert [len(part) for part in held_out(mix, tokenizer, 0, 0.99)[:2]] == [1, 1]
    assert "nothing is held out" not in capsys.readouterr().out
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(long))
    assert [len(part) for part in held_out(mix, tokenizer, 0, 0.5)[:2]] == [0, 1]
    assert "mix.yaml: a single record; nothing is held out" in capsys.readouterr().out


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


def test_check_lists_every_bad_record(tmp_path, tokenizer, monkeypatch, capsys):
    records = [GOOD, *(bad for bad, _ in BAD_RECORDS.values()), GOOD]
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*records))
    code, out = check(monkeypatch, capsys, mix, tokenizer, "-n", 100)
    assert code == f"{len(BAD_RECORDS)} bad records"
    told = [line for line in out.splitlines() if line.startswith(f"{tmp_path}/a.jsonl:")]
    for line, (number, (_, message)) in zip(told, enumerate(BAD_RECORDS.values(), 2), strict=True):
        assert line.startswith(f"{tmp_path}/a.jsonl:{number}: ") and re.search(message, line)
    code, out = check(monkeypatch, capsys, mix, tokenizer, "-n", 2)
    assert f"... and {len(BAD_RECORDS) - 2} more: list them with -n {len(BAD_RECORDS)}" in out


def test_what_is_dropped_is_named(tmp_path, tokenizer, monkeypatch, capsys):
    """An answer that begins beyond the context, and one that nobody wants to be learnt."""
    silent = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No.", "train": False}]}
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(GOOD, talk("on questions " * 300, "Because."), silent))
    code, out = check(monkeypatch, capsys, mix, tokenizer, "--max-seq-len", 200)
    assert code is None
    for line in (2, 3):
        assert f"{tmp_path}/a.jsonl:{line}: dropped: nothing to learn within 200 tokens" in out
    code, _ = check(monkeypatch, capsys, mix, tokenizer, "--max-seq-len", 5)
    assert "mix.yaml: no record with anything to train on within 5 tokens" in code


def test_check_cuts_samples_as_the_run_does(tmp_path, tokenizer, monkeypatch, capsys):
    """To data.max_seq_len, else to what the model's config.json has, wherever the run gets that from."""
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(GOOD))
    params = {"dim": 8, "hidden_dim": 8, "head_dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "vocab_size": 256}
    params |= {"max_seq_len": 300, "moe": {"num_experts": 2, "num_experts_per_tok": 1}}
    base, bare = tmp_path / "base", tmp_path / "bare"
    base.mkdir()
    bare.mkdir()
    (base / "config.json").write_text(json.dumps(params))
    (tmp_path / "other.json").write_text(json.dumps(params | {"max_seq_len": 200}))
    data, run = {"mix": str(mix)}, tmp_path / "run.yaml"

    def said(model, data, *words):
        run.write_text(json.dumps({"data": data, "model": model, "out": str(tmp_path / "out")}))
        code, out = check(monkeypatch, capsys, run, tokenizer, *words)
        return f"{code} {out}"

    model = {"checkpoint": [str(base), str(bare)]}
    assert "at most 300 tokens" in said(model, data)
    assert "at most 200 tokens" in said(model | {"config": str(tmp_path / "other.json")}, data)
    assert "at most 100 tokens" in said(model, data | {"max_seq_len": 100})
    assert "at most 50 tokens" in said(model, data, "--max-seq-len", 50)
    assert "neither config.json nor params.json" in (told := said({"checkpoint": str(bare)}, data)) and str(bare) in told
    assert "at most 4,096 tokens" in check(monkeypatch, capsys, mix, tokenizer)[1]


def test_a_sample_has_at_least_two_tokens(tmp_path, tokenizer, monkeypatch, capsys):
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines({"text": "the list of tokens"}))
    code, _ = check(monkeypatch, capsys, mix, tokenizer, "--max-seq-len", 1)
    assert "max_seq_len must be at least 2, for a token is learnt from those before it; found 1" in code
    for length in (0, 1):
        with pytest.raises(UserError, match=r"^max_seq_len must be at least 2"):
            DataSection(mix="a", max_seq_len=length)
    assert len(load_mix(mix, tokenizer, 2, 0).training) > 2


def test_images_are_refused_by_a_model_of_texts(tmp_path, tokenizer):
    """Wherever they are: not even one that is the whole image makes a long sentence."""
    images = ["there.png", "data:image/png;base64," + "A" * 5000, "HTTPS://a.b/c.png", "x" * 5000]
    records = (GOOD | {"image": image} for image in images)
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*records, talk("image", "ok") | {"image": ""}))
    (source,) = tokenise_mix(mix, tokenizer, 1000)
    told = list(source.bad())
    for number, (image, line) in enumerate(zip(images, told, strict=True), 1):
        assert line.startswith(f"{tmp_path}/a.jsonl:{number}: it has an image ({image[:100]}") and len(line) < 200 + len(
            str(mix)
        )
        assert line.endswith("and this model reads text only")
    with pytest.raises(UserError, match=r"a.jsonl:1: it has an image"):
        load_mix(mix, tokenizer, 1000, 0)


def test_a_changed_setting_never_reads_an_old_store(tokenizer, tmp_path):
    """What a run gets after each change is what it gets from an empty cache."""
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    chat, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    tools = tmp_path / "additional_chat_templates/tool_use.jinja"
    tools.parent.mkdir()
    source = "{% for m in messages %}HERE {{ m.content }}{{ tools | tojson if tools }}{{ '</s>' }}{% endfor %}"
    record = talk("Why?", "Because.", "So?", "Yes.") | {"tools": [{"name": "f"}], "persona": "S", "text": "a text"}
    base = {"path": "a.jsonl", "ignore": ["text", "persona", "tools"]}
    seen = []
    changes = [
        ({}, {}),
        ({"train_on": "last_answer"}, {}),
        ({"train_on": "all"}, {}),
        ({"template": "vicuna"}, {}),
        ({"kind": "text", "ignore": ["persona", "tools"]}, {}),
        ({"ignore": ["text", "tools"], "columns": {"system": "persona"}}, {}),
        ({"template": "chat_template"}, {chat: source}),
        ({"template": "chat_template", "ignore": ["text", "persona"]}, {}),
        ({"template": "chat_template", "ignore": ["text", "persona"]}, {tools: source.replace("HERE", "THERE")}),
        ({"template": "chat_template", "ignore": ["text", "persona"]}, {tools: source.replace("HERE", "NOWHERE")}),
        ({"template": "chat_template"}, {chat: source.replace("HERE", "AGAIN")}),
        ({"template": "chat_template"}, {config: '{"legacy": false}'}),
    ]
    for entry, files in changes:
        for file, content in files.items():
            file.write_text(content)
        mix = write_mix(tmp_path, base | entry, a_jsonl=lines(record))
        (sample,) = load_mix(mix, Tokenizer(tmp_path / "tokenizer.model"), 300, 0).training
        seen.append((sample.tokens.tolist(), sample.trained.tolist()))
    assert all(seen.count(sample) == 1 for sample in seen)


def test_the_same_bytes_are_something_else_under_another_name(tmp_path, tokenizer):
    text = json.dumps({"text": "the list of tokens"})
    mix = write_mix(tmp_path, {"path": "a.*"}, a_jsonl=text, a_txt=text)
    one, other = (sample.tokens.tolist() for sample in load_mix(mix, tokenizer, 1000, 0).training)
    assert len(one) < len(other)


def test_a_compressed_file_under_another_name_is_not_what_the_cache_has(tmp_path, tokenizer):
    """What was refused as a.jsonl is read once it is called a.jsonl.gz."""
    packed = gzip.compress(lines(GOOD, GOOD).encode())
    with pytest.raises(UserError, match=r"a\.jsonl:1: not valid UTF-8"):
        load_mix(write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=packed), tokenizer, 1000, 0)
    assert len(load_mix(write_mix(tmp_path, {"path": "a.jsonl.gz"}, a_jsonl_gz=packed), tokenizer, 1000, 0).training) == 2


def test_links_are_followed_and_never_in_circles(tmp_path, tokenizer):
    for name in ("data/deep", "elsewhere/more"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/deep/b.jsonl", "elsewhere/more/c.jsonl", "data/[x].jsonl"):
        (tmp_path / name).write_text(lines(GOOD))
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    for place in ("data", "data/deep", "elsewhere", "elsewhere/more"):
        (tmp_path / place / "circle").symlink_to(tmp_path / "data")
        (tmp_path / place / "other").symlink_to(tmp_path / "elsewhere")
    for path in ("data", "data/**/*.jsonl", "da*/**/*.jsonl", "**/data/**/*.jsonl"):
        data = load_mix(write_mix(tmp_path, {"path": path}), tokenizer, 1000, 0)
        assert sorted(file.resolve().name for store in data.sources for file in store.source.files) == [
            "[x].jsonl",
            "a.jsonl",
            "b.jsonl",
            "c.jsonl",
        ], path


def test_a_file_that_cannot_be_read(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text(lines(GOOD))
    (tmp_path / "data/gone.jsonl").symlink_to(tmp_path / "nowhere")
    for path in ("data", "data/*.jsonl", "**/*.jsonl"):
        with pytest.raises(UserError, match=r"gone.jsonl: no such file"):
            load_mix(write_mix(tmp_path, {"path": path}), tokenizer, 1000, 0)


def test_a_cache_that_cannot_be_written(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "file"))
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(talk("on a cache", "none")))
    with pytest.raises(UserError, match=r"file: cannot keep tokenised data: .*set ACCESSORY_CACHE"):
        load_mix(mix, tokenizer, 1000, 0)


def killed():
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda record: [Sample(np.array([1, 2]), np.array([False, True]))]


def test_a_killed_worker_is_told_and_nothing_hangs(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*(talk("the list " * 100, str(n)) for n in range(6000))))
    with pytest.raises(UserError, match=r"a.jsonl: a process that tokenised it was killed"):
        make_store(tmp_path / "a.jsonl", {"max_seq_len": 9}, killed, lambda count: None)
    assert not list(cache().glob("*.*"))


SCRIPT = """
import os, resource, sys
from accessory.data.mix import load_mix
from accessory.data.tokenizer import Tokenizer
{guard}
    {limit}
    load_mix(sys.argv[1], Tokenizer(sys.argv[2]), 1000, 0)
"""
FILES = "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 10, 4096))"


@pytest.mark.parametrize(
    ("guard", "limit", "sentence"),
    [
        ("if True:", "pass", 'keep what that does under if __name__ == "__main__":'),
        ('if __name__ == "__main__":', FILES, "a process could not be started: Too many open files; allow more"),
        ('if __name__ == "__main__":', "pass", None),
    ],
    ids=["no guard", "no files", "good"],
)
def test_a_worker_that_cannot_start_says_why(guard, limit, sentence, tmp_path, tokenizer):
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*(talk("the list " * 100, str(n)) for n in range(6000))))
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard, limit=limit))
    words = [sys.executable, tmp_path / "script.py", mix, tokenizer.path]
    environment = os.environ | {"ACCESSORY_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    if sentence is None:
        assert ended.returncode == 0, ended.stderr
        return
    last = ended.stderr.strip().rpartition("\n")[2]
    assert ended.returncode == 1 and last.startswith("accessory.errors.UserError: ") and sentence in last, ended.stderr
    assert f"{tmp_path}/a.jsonl" in last and "memory" not in last and "kill" not in ended.stderr
    assert ended.stderr.count("errors.UserError: ") == 1, "the processes themselves are quiet"


def test_a_byte_order_mark_is_no_part_of_the_record(tmp_path, tokenizer):
    for name, content in {"a.jsonl": lines(GOOD, GOOD), "b.json": json.dumps([GOOD]), "c.json": lines(GOOD)}.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    data = load_mix(write_mix(tmp_path, {"path": "*.json*"}), tokenizer, 1000, 0)
    assert len(data.training) == 4
    for name, encoding in {"a.txt": "utf-8", "b.txt": "utf-8-sig"}.items():
        (tmp_path / name).write_text("the list of tokens", encoding=encoding)
    one, other = load_mix(write_mix(tmp_path, {"path": "*.txt"}), tokenizer, 1000, 0).training
    assert one.tokens.tolist() == other.tokens.tolist()


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
        "mix.yaml: META entry 1: type: 'image' is not one of 'text', 'image_text'",
    ),
    "ratio a text": (
        {"path": "a.jsonl", "ratio": "half"},
        None,
        "mix.yaml: META entry 1: ratio: expected float or null, found 'half'",
    ),
    "ratio 0": ({"path": "a.jsonl", "ratio": 0}, None, "ratio of a.jsonl must be above 0, and a number, found 0.0"),
    "ratio 1.5": ({"path": "a.jsonl", "ratio": 1.5}, None, "ratio of a.jsonl must be at most 1, found 1.5"),
    "ratio no number": ({"path": "a.jsonl", "ratio": math.nan}, None, "ratio of a.jsonl must be above 0, and a number"),
    "epochs for ever": ({"path": "a.jsonl", "epochs": math.inf}, None, "epochs of a.jsonl must be above 0, and a number"),
    "root": ({"path": "a.jsonl", "root": "nowhere"}, None, "META entry 1: root "),
    "template": ({"path": "a.jsonl", "template": "vicunna"}, None, "unknown template 'vicunna'; did you mean 'vicuna'?"),
    "train_on": ({"path": "a.jsonl", "train_on": "answer"}, None, "train_on: 'answer' is not one of 'answers'"),
    "kind": ({"path": "a.jsonl", "kind": "chat"}, None, "kind: 'chat' is not one of 'conversations'"),
    "split": ({"path": "a.jsonl", "split": "test"}, None, "split: 'test' is not one of 'train'"),
    "only validation": ({"path": "a.jsonl", "split": "validation"}, None, "mix.yaml: no record with anything to train on"),
    "ratio below 0": ({"path": "a.jsonl", "ratio": -0.1}, None, "ratio of a.jsonl must be above 0"),
    "entry a text": ("a.jsonl", None, "mix.yaml: META entry 1 must be a mapping"),
    "missing file": ({"path": "b.jsonl"}, None, "b.jsonl: no such file"),
    "an empty folder": ({"path": "empty"}, None, "META entry 1: empty: no file there"),
    "no match": ({"path": "*.parquet"}, None, "META entry 1: *.parquet: no file there"),
    "not json": ({"path": "mix.yaml"}, None, "mix.yaml: expected .jsonl, .json"),
    "ratio and epochs": ({"path": "a.jsonl", "ratio": 0.5, "epochs": 2}, None, "ratio and epochs say the same"),
    "prompt_type": ({"path": "a.jsonl", "root": "/", "prompt_type": "shikra"}, None, "prompt_type 'shikra' is not known"),
    "prompt_type None": ({"path": "a.jsonl", "prompt_type": "None"}, None, "set template: bare instead"),
    "validation's ratio": (
        {"path": "a.jsonl", "split": "validation", "ratio": 0.5},
        None,
        "a.jsonl: ratio says how much is trained on, and split: validation that nothing is; keep one",
    ),
    "validation's epochs": ({"path": "a.jsonl", "split": "validation", "epochs": 2}, None, "a.jsonl: epochs says how much"),
    "validation's weight": ({"path": "a.jsonl", "split": "validation", "weight": 1}, None, "a.jsonl: weight says how much"),
    "no variable": ({"path": "$NOWHERE/a.jsonl"}, None, "the variable is not set"),
    "a record of 20 MB": ({"path": "a.jsonl"}, lines(talk("x" * 20_000_000, "a")).encode(), "a.jsonl:1: a record of 20 MB"),
    "nested too deeply": ({"path": "a.jsonl"}, b"[" * 100000, "nested too deeply"),
    "empty file": ({"path": "a.jsonl"}, b"", "a.jsonl: holds no record"),
    "blank lines": ({"path": "a.jsonl"}, b"\n \n\n", "a.jsonl: holds no record"),
    "invalid UTF-8": ({"path": "a.jsonl"}, lines(GOOD).encode() * 3 + b'{"a": "\xff\xfe"}\n', "a.jsonl:4: not valid UTF-8"),
    "latin-1": ({"path": "a.jsonl"}, lines(talk("é", "ü")).encode("latin-1"), "a.jsonl:1: not valid UTF-8"),
}


@pytest.mark.parametrize("name", BAD_MIXES)
def test_a_bad_mix_is_told(name, tmp_path, tokenizer, monkeypatch, capsys):
    entry, content, message = BAD_MIXES[name]
    (tmp_path / "empty").mkdir()
    mix = write_mix(tmp_path, entry, a_jsonl=lines(GOOD) if content is None else content)
    with pytest.raises(UserError) as error:
        load_mix(mix, tokenizer, 1000, 0)
    text = str(error.value)
    assert message in text and "\n" not in text
    assert str(tmp_path) in text, f"which file? {text}"
    code, out = check(monkeypatch, capsys, mix, tokenizer)
    assert message in f"{code} {out}", "the command says it too"


def test_a_file_named_twice(tmp_path, tokenizer):
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, {"path": "*.jsonl"}, a_jsonl=lines(GOOD))
    with pytest.raises(UserError, match=r"META entry 2: .*a.jsonl is in entry 1 already"):
        load_mix(mix, tokenizer, 1000, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"instruction,output\na,b\nc,\xff\n", "a.csv: damaged after line "),
        ("a.csv", b"instruction\na\nb\n", r"a.csv:2: 'output' must be a text"),
        ("a.csv", b"question,answer\na,b\n", "a.csv:2: none of .*; it has 'question', 'answer'"),
        ("a.csv", b'instruction,output\na,"' + b"x" * 20_000_000 + b'"', "a.csv: damaged after line .*field larger"),
        ("a.json", b"[" * 100000, "a.json: not valid JSON: nested too deeply"),
        ("a.json", b'[{"text": "a"},\n\xff]', "a.json:2: not valid UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": "' + b"x" * 20_000_000 + b'"}]', r"a.json\[1\]: a record of 20 MB"),
        ("a.jsonl", b'\n{"text": "a", "text": "b"}', "a.jsonl:2: the key 'text' stands twice"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "a.json: the key 'text' stands twice"),
        ("a.csv", b"instruction,output,output\na,b,c\n", "a.csv: several columns are called 'output'"),
        ("a.txt", b"", r"a.txt:1: 'text' is empty"),
        ("a.txt", b"\xff", "a.txt: not valid UTF-8"),
    ],
)
def test_other_files_are_told_too(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_mix(write_mix(tmp_path, {"path": name}), tokenizer, 1000, 0)


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


def test_records_in_the_place_of_a_mix(tmp_path, tokenizer):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(GOOD).encode()))
    with pytest.raises(UserError, match=r"a.jsonl.gz: records, where a YAML mix .*, as META: \[{path: a.jsonl.gz}\]"):
        load_mix(tmp_path / "a.jsonl.gz", tokenizer, 1000, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "none of 'conversations'"), ("", "holds no record"), ("[]", "holds no record"), ("[1", ":1: not valid JSON")],
)
def test_a_json_file_that_is_no_list_of_records(content, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        load_mix(write_mix(tmp_path, {"path": "a.json"}, a_json=content), tokenizer, 1000, 0)
