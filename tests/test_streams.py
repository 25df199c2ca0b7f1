"""A model that several ask at a time, as a notebook's cells do, and that goes on after what it refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from jobs import command
from models import TINY, make_tokenizer, weights
from ranks import run_ranks

from accessory.certify import formats
from accessory.errors import UserError
from accessory.infer.meta import MetaModel

ARGS = replace(TINY, vocab_size=300)
LONG, SHORT, TOO_LONG = "the list of tokens", "a", "the answer is made from words " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("streams") / "model"
    formats.write(directory, weights(ARGS), ARGS, "mixtral")
    shutil.copy(make_tokenizer(directory.parent / "tokenizer.model"), directory / "tokenizer.model")
    return directory


def load(home):
    where = {"dtype": torch.float64, "device": "cpu", "max_seq_len": 256}
    return MetaModel.from_pretrained(home, "mixtral_sparse", mp_group=dist.group.WORLD, **where)


def ask_across(home):
    """Two streams by turns, and a call between; then a list that is refused for its second text."""
    model = load(home)
    lengths = {LONG: 12, SHORT: 5}
    alone = {prompt: list(model.stream_generate(prompt, max_gen_len=length))[-1] for prompt, length in lengths.items()}
    streams = {prompt: model.stream_generate(prompt, max_gen_len=length) for prompt, length in lengths.items()}
    for stream in [*streams.values(), *streams.values()]:
        next(stream)
    between = model.generate([SHORT], max_gen_len=5)
    rest = {prompt: list(stream)[-1] for prompt, stream in streams.items()}
    with pytest.raises(UserError, match=r"prompt 1: .* leaves no room"):
        model.generate([SHORT, TOO_LONG])
    return alone, rest, between, len(model.engine.waiting)


@pytest.mark.parametrize("world", [1, 2])
def test_streams_beside_one_another_end_as_alone(home, world):
    for alone, rest, between, left in run_ranks(world, ask_across, home):
        assert rest == alone and between == [alone[SHORT]["text"]]
        assert not left, "what was refused with a whole list is answered all the same"


def use_wrongly(home):
    model = load(home)
    calls = {
        "one at least": [lambda: model.generate([]), lambda: model.compute_logits(torch.tensor([[1, 5]]))],
        "a list of texts": [lambda: model.generate([b"a list"]), lambda: model.generate(np.array([[1, 5]]))],
        "example 1 has tokens from 0 to 299": [
            lambda: model.compute_logits([[1, 5], [1, 300]]),
            lambda: model.compute_logits([[1, 5], [1, -3]]),
            lambda: model.evaluate_examples([[1, 5], [1, 300, 2]]),
        ],
        "example 0 must have at least one token": [lambda: model.compute_logits([""], bos=False)],
        "max_seq_len: expected a number of tokens": [
            lambda length=length: MetaModel.from_pretrained(home, max_seq_len=length) for length in (0, -5, "64")
        ],
    }
    for expected, each in calls.items():
        for call in each:
            with pytest.raises(UserError, match=expected):
                call()
    return model.generate([SHORT], max_gen_len=5) == model.generate([SHORT], max_gen_len=5)


def test_what_is_no_prompt_is_told_in_a_sentence(home):
    assert run_ranks(1, use_wrongly, home) == [True]


def test_the_prompt_of_a_file_that_cannot_be_answered_is_named(home, tmp_path):
    records = [{"prompt": "a list"}, {"prompt": TOO_LONG}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for raw in ([], ["--raw"]):
        codes, _, err = command("generate", home, f"@{tmp_path / 'asked.jsonl'}", "--max-seq-len", 256, *raw)
        assert codes == [1] and "the prompt 'the answer is made from words" in err and "leaves no room" in err
