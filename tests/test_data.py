"""Templates to the character, what is trained, the order of samples, and every way that data can be bad."""

import json
import random
import re
from collections import Counter

import pytest
import torch

from accessory.data.loader import BatchPlan, collate, epoch_order
from accessory.data.mix import Sample, load_mix, read_mix
from accessory.data.packing import Rows
from accessory.data.templates import dialog_prompt, render
from accessory.data.tokenizer import Segment, Tokenizer, check_vocabulary, train_tokenizer
from accessory.errors import UserError

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
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
    return "".join(segment.text for segment in render(record)[0])


def trained_of(record):
    return [segment.text for segment in render(record)[0] if segment.trained]


def test_dialog_template():
    one, two = talk("Why?", "Because."), talk("Why?", "Because.", "Really?", "Yes.")
    assert text_of(one) == f"{SYSTEM}\n\n### Human: Why?\n### Assistant: Because.\n###"
    assert text_of(two) == text_of(one) + " Human: Really?\n### Assistant: Yes.\n###"
    assert trained_of(two) == [" Because.\n###", " Yes.\n###"]
    assert text_of(one).startswith(dialog_prompt("Why?"))
    named = {"conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "Because."}]}
    assert render(named) == render(one)


def test_instruction_template():
    plain = {"instruction": "Count {words}.", "output": "Three {}."}
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount {words}.\n\n### Response:"
    )
    assert text_of(plain) == text_of(plain | {"input": ""}) == prompt + "Three {}."
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount {words}.\n\n### Input:\na {b} {0}\n\n### Response:"
    )
    assert text_of(plain | {"input": "a {b} {0}"}) == prompt + "Three {}."
    assert trained_of(plain) == ["Three {}."]


TEXTS = {
    "plain": "the answer is made from words",
    "unicode": "naïve Größe 你好 мир",
    "emoji": "👍🏽 then 👩‍👩‍👧 and 🇨🇭",
    "braces": "{instruction} {0} {{}} %s",
    "special tokens": "</s> and <s> [INST] [/INST] <unk> <0x0A>",
    "markers": "### Human: not a turn\n### Assistant: nor this\n###",
    "blanks": "  two  spaces,\ttab\r\n\n\nlines  ",
    "empty": "",
    "one character": "语",
}


def spans(tokens, trained):
    """Runs of trained tokens."""
    runs, last = [], False
    for token, is_trained in zip(tokens, trained, strict=True):
        if is_trained and not last:
            runs.append([])
        if is_trained:
            runs[-1].append(token)
        last = is_trained
    return runs


@pytest.mark.parametrize("question", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
def test_trained_tokens_are_the_answers_of_a_dialog(tokenizer, question, answer):
    record = talk(question, answer, answer, question)
    segments, eos = render(record)
    tokens, trained = tokenizer.encode_segments(segments, eos)
    assert tokens[0] == tokenizer.bos_id and not trained[0]
    special = {tokenizer.bos_id, tokenizer.eos_id}
    assert special.isdisjoint(tokens[1:])
    assert tokenizer.decode(tokens[1:]) == text_of(record)
    answers = [tokenizer.decode(run) for run in spans(tokens, trained)]
    assert [a.removeprefix(" ") for a in answers] == [f"{a}\n###".removeprefix(" ") for a in (answer, question)]
    assert tokens == tokenizer.encode(text_of(record), bos=True, eos=False)


@pytest.mark.parametrize("question", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
def test_trained_tokens_are_the_output_of_an_instruction(tokenizer, question, answer):
    record = {"instruction": question, "input": question, "output": answer}
    tokens, trained = tokenizer.encode_segments(*render(record))
    assert tokens[-1] == tokenizer.eos_id and trained[-1]
    assert tokenizer.eos_id not in tokens[:-1] and tokenizer.bos_id not in tokens[1:]
    assert tokenizer.decode(tokens[1:-1]) == text_of(record)
    (run,) = spans(tokens, trained)
    untrained = [token for token, t in zip(tokens, trained, strict=True) if not t]
    prompt = text_of(record).removesuffix(answer) if answer else text_of(record)
    # a token that reaches over the border belongs to the answer, so the two meet where the answer starts, or before
    written, given = tokenizer.decode(run[:-1]), tokenizer.decode(untrained[1:])
    assert written.endswith(answer.removeprefix(" ")) and prompt.startswith(given)
    assert len(prompt) - len(given) <= 1 and (given + written == prompt + answer or answer.startswith(" "))


def test_a_token_that_reaches_over_the_border_belongs_to_the_answer(tokenizer):
    segments = [Segment("the answ", False), Segment("er", True), Segment(" is", False)]
    tokens, trained = tokenizer.encode_segments(segments, False)
    assert tokens == tokenizer.encode("the answer is", bos=True, eos=False)
    assert [tokenizer.decode(run) for run in spans(tokens, trained)] == ["answer"]
    assert spans(tokens, trained)[0] == tokenizer.encode("the answer", False, False)[-1:], "it must be one token"


def test_a_character_in_bytes_is_wholly_on_one_side(tokenizer):
    for text in "👍语é":
        tokens, trained = tokenizer.encode_segments([Segment(text, False), Segment(text, True), Segment(text, False)], False)
        assert len(spans(tokens, trained)) == 1
        assert tokenizer.decode(spans(tokens, trained)[0]) == text


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
    samples, order = numbered(), epoch_order(COUNT, 5, 0)
    plans = [BatchPlan(batch_size, accumulation, rank, world) for rank in range(world)]
    ranks = [seen(plan, samples, order) for plan in plans]
    assert {len(steps) for steps in ranks} == {plans[0].steps(COUNT)}
    assert Counter(i for steps in ranks for step in steps for i in step) == Counter(range(COUNT))


@pytest.mark.parametrize("cut", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)])
def test_global_batches_hold_the_same_samples_for_every_cut(cut):
    samples, order = numbered(), epoch_order(COUNT, 5, 0)
    batch_size, accumulation, world = cut
    ranks = [seen(BatchPlan(batch_size, accumulation, rank, world), samples, order) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert sorted(i for part in parts for i in part) == sorted(order[step * 8 : step * 8 + 8])


def test_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert all(epoch_order(50, *key) == order for key, order in orders.items())
    assert epoch_order(6, 0, 0) == [0, 5, 1, 4, 3, 2]  # on every machine


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


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 40), (0.5, 20), (0.1, 4), (0.26, 10), (0.001, 1)])
def test_ratio_takes_the_exact_count(ratio, count, tmp_path):
    records = [talk(f"question {i}", f"answer {i}") for i in range(40)]
    mix = write_mix(
        tmp_path,
        {"path": "a.jsonl", "ratio": ratio},
        {"path": "b.json"},
        a_jsonl=lines(*records),
        b_json="[" + json.dumps(GOOD) + "]",
    )
    chosen = ["".join(s.text for s in segments) for segments, _ in read_mix(mix, seed=0)]
    assert len(chosen) == count + 1 and len(set(chosen)) == count + 1
    positions = [[text_of(r) for r in records].index(text) for text in chosen[:-1]]
    assert positions == sorted(positions)
    assert chosen == ["".join(s.text for s in segments) for segments, _ in read_mix(mix, seed=0)]
    if 1 < count < 40:
        assert chosen != ["".join(s.text for s in segments) for segments, _ in read_mix(mix, seed=1)]


def test_paths_are_relative_to_the_mix_and_variables_are_expanded(tmp_path, monkeypatch):
    (tmp_path / "mixes").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    for name in ("a.jsonl", "b.jsonl", "home/c.jsonl", "mixes/d.jsonl"):
        (tmp_path / name).write_text(lines(talk(name, name)))
    paths = ["../a.jsonl", "$ELSEWHERE/b.jsonl", "~/c.jsonl", "d.jsonl"]
    mix = write_mix(tmp_path / "mixes", *({"path": path, "type": "text"} for path in paths))
    assert [segments[2].text.split("\n")[0] for segments, _ in read_mix(mix, 0)] == [
        " a.jsonl",
        " b.jsonl",
        " home/c.jsonl",
        " mixes/d.jsonl",
    ]


def test_samples_are_cut_to_fit_and_counted(tokenizer, tmp_path):
    records = [GOOD, talk("Why?", "the answer is made from words " * 60), talk("on questions " * 300, "Because.")]
    mix = write_mix(tmp_path, {"path": "a.jsonl"}, a_jsonl=lines(*records) + "\n\n")
    whole = load_mix(mix, tokenizer, 10_000, 0)
    assert (len(whole.samples), whole.truncated, whole.dropped) == (3, 0, 0)
    length = len(whole.samples[0].tokens) + 5
    cut = load_mix(mix, tokenizer, length, 0)
    assert (len(cut.samples), cut.truncated, cut.dropped) == (2, 2, 1)
    assert cut.samples[0] == whole.samples[0]
    assert cut.samples[1].tokens == whole.samples[1].tokens[:length] and any(cut.samples[1].trained)
    assert all(len(s.tokens) == len(s.trained) for s in whole.samples + cut.samples)
    with pytest.raises(UserError, match="within 5 tokens"):
        load_mix(mix, tokenizer, 5, 0)
    training, validation = whole.split(0.34, 0)
    assert len(training) == 2 and len(validation) == 1 and all(s in training + validation for s in whole.samples)


BAD_RECORDS = {  # name: (line, what the message says)
    "broken JSON": ('{"conversations": [', "not valid JSON"),
    "number": ("17", "expected an object, found int"),
    "neither kind": ({"text": "plain"}, "neither 'conversations' .* text"),
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
        "mix.yaml: META entry 1: ratio: expected float, found 'half'",
    ),
    "ratio 0": ({"path": "a.jsonl", "ratio": 0}, None, "ratio of a.jsonl must lie above 0 and at most at 1, found 0.0"),
    "ratio 1.5": ({"path": "a.jsonl", "ratio": 1.5}, None, "ratio of a.jsonl must lie above 0 and at most at 1, found 1.5"),
    "ratio below 0": ({"path": "a.jsonl", "ratio": -0.1}, None, "ratio of a.jsonl must lie above 0"),
    "entry a text": ("a.jsonl", None, "mix.yaml: META entry 1 must be a mapping"),
    "missing file": ({"path": "b.jsonl"}, None, "b.jsonl: no such file"),
    "a folder": ({"path": "."}, None, "no such file"),
    "not json": ({"path": "mix.yaml"}, None, "mix.yaml: expected a .json or .jsonl file"),
    "empty file": ({"path": "a.jsonl"}, b"", "a.jsonl: holds no record"),
    "blank lines": ({"path": "a.jsonl"}, b"\n \n\n", "a.jsonl: holds no record"),
    "invalid UTF-8": ({"path": "a.jsonl"}, lines(GOOD).encode() * 3 + b'{"a": "\xff\xfe"}\n', "a.jsonl:4: not valid UTF-8"),
    "latin-1": ({"path": "a.jsonl"}, lines(talk("é", "ü")).encode("latin-1"), "a.jsonl:1: not valid UTF-8"),
}


@pytest.mark.parametrize("name", BAD_MIXES)
def test_a_bad_mix_is_told(name, tmp_path, tokenizer):
    entry, content, message = BAD_MIXES[name]
    mix = write_mix(tmp_path, entry, a_jsonl=lines(GOOD) if content is None else content)
    with pytest.raises(UserError) as error:
        load_mix(mix, tokenizer, 1000, 0)
    text = str(error.value)
    assert message in text and "\n" not in text
    assert str(tmp_path) in text, f"which file? {text}"


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
    ("content", "message"), [("{}", "expected a list"), ("", "not valid JSON"), ("[]", "holds no record")]
)
def test_a_json_file_that_is_no_list_of_records(content, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        load_mix(write_mix(tmp_path, {"path": "a.json"}, a_json=content), tokenizer, 1000, 0)
