"""A model in processes of its own, as the reference's class has it: MetaModel's answers, and never a hang."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from models import TINY, Tensors, build, make_tokenizer, weights
from ranks import run_ranks
from test_certify_processes import descendants

from accessory.errors import UserError
from accessory.infer import workers
from accessory.infer.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper
from accessory.train.save import save_model

ARGS = replace(TINY, vocab_size=300)
HOW = {"dtype": torch.float64, "device": "cpu", "max_seq_len": 256}
PROMPTS = ["the list of tokens", "a"]
EXAMPLES, CONTEXTS = ["the list of words", "a list"], ["the list", "a"]


def write_model(home):
    companions = {"tokenizer.model": make_tokenizer(home / "tokenizer.model")}
    model = build(ARGS, "mixtral", Tensors(weights(ARGS)))
    save_model(model, home / "model", companions, torch.float64, "safetensors")
    model = MetaModel.from_pretrained(home / "model", **HOW)
    return use(model)


def use(model):
    return {
        "texts": model.generate(PROMPTS, max_gen_len=8),
        "chat": model.chat(PROMPTS, max_gen_len=8),
        "steps": list(model.stream_generate(PROMPTS[0], max_gen_len=8)),
        "logits": [logits.clone() for logits in model.compute_logits(PROMPTS)],
        "scores": model.evaluate_examples(EXAMPLES, CONTEXTS)["log_likelihood"],
        "tokens": model.tokenizer.encode(PROMPTS[0], True, False),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("wrapped")


@pytest.fixture(scope="module")
def expected(home):
    return run_ranks(1, write_model, home)[0]


@pytest.fixture(scope="module")
def model(home, expected):
    with MultiGpuWrapper(home / "model", "mixtral_sparse", gpus=2, **HOW) as model:
        yield model
    with pytest.raises(UserError, match="closed: make another one"):
        model.generate(PROMPTS)


def test_it_answers_as_a_model_in_one_process(model, expected):
    found = use(model)
    for ours, theirs in zip(found.pop("logits"), expected["logits"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert found.pop("scores") == pytest.approx(expected["scores"], rel=1e-9)
    assert found == {name: value for name, value in expected.items() if name not in ("logits", "scores")}


def test_a_stream_that_is_left_and_a_call_that_is_wrong_disturb_nothing(model, expected):
    stream = model.stream_generate(PROMPTS[0], max_gen_len=8)
    assert next(stream) == expected["steps"][0]
    with pytest.raises(UserError, match=r"write \[prompt\]"):
        model.generate("the list")
    with pytest.raises(TypeError) as raised:
        model.generate(PROMPTS, max_len=8)
    assert "workers.py" in raised.value.__notes__[0]
    assert list(stream) == [] and model.generate(PROMPTS, max_gen_len=8) == expected["texts"]


def test_after_ctrl_c_a_call_gets_its_own_answer(model, expected, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "wait", interrupted)
        model.generate(PROMPTS[::-1], max_gen_len=8)
    assert model.generate(PROMPTS, max_gen_len=8) == expected["texts"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_process_that_dies_is_a_sentence(home, expected):
    before = descendants()
    model = MultiGpuWrapper(home / "model", gpus=2, **HOW)
    os.kill(model._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"process 1 of the 2 that hold the model is gone, .*it was killed"):
        model.generate(PROMPTS)
    assert not (descendants() - before) and not model._end.alive


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either gpus"),
        ({"gpus": 1, "gpu_ids": [0]}, "give either gpus"),
        ({"gpu_ids": []}, "cannot be held by GPUs"),
        ({"gpus": 3}, "model-parallel size 3 does not divide"),
    ],
)
def test_what_cannot_be(home, expected, options, sentence):
    before = descendants()
    with pytest.raises(UserError, match=sentence):
        MultiGpuWrapper(home / "model", **options, **HOW)
    assert not (descendants() - before)
