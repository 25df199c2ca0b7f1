"""Records of every kind come into one form; each way that one can be bad is a sentence."""

import json
import re
from pathlib import Path

import pytest

from accessory.data.mix import mix_texts
from accessory.data.records import Conversation, Document, RecordError, Turn, read_record

SAMPLES = Path(__file__).parents[1] / "data/samples"


def said(*turns, **more):
    """ShareGPT's form."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns]} | more


def messages(*turns, **more):
    """OpenAI's form."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]} | more


ONE = (Turn("user", "Why?"), Turn("assistant", "Because."))
TWO = (*ONE, Turn("user", "Really?"), Turn("assistant", "Yes."))
CALLED = (ONE[0], Turn("assistant", "f()"), Turn("tool", "1"), Turn("tool", "2"), Turn("assistant", "Three."))
PART = {"type": "text", "text": "Wh"}
GOOD = {  # name: (raw, record)
    "ShareGPT": (said(("human", "Why?"), ("gpt", "Because.")), Conversation(None, ONE)),
    "other names": (said(("user", "Why?"), ("assistant", "Because.")), Conversation(None, ONE)),
    "system turn": (said(("system", "S"), ("human", "Why?"), ("gpt", "Because.")), Conversation("S", ONE)),
    "system key": (said(("human", "Why?"), ("gpt", "Because."), system="S"), Conversation("S", ONE)),
    "empty system": (said(("system", ""), ("human", "Why?"), ("gpt", "Because."), system=None), Conversation(None, ONE)),
    "image": (said(("human", "Why?"), ("gpt", "Because."), image="a.png"), Conversation(None, ONE, "a.png")),
    "no image": (said(("human", "Why?"), ("gpt", "Because."), image=None), Conversation(None, ONE)),
    "two answers": (
        said(("human", "Why?"), ("gpt", "Because."), ("human", "Really?"), ("gpt", "Yes.")),
        Conversation(None, TWO),
    ),
    "tools": (
        said(("human", "Why?"), ("gpt", "f()"), ("tool", "1"), ("tool", "2"), ("gpt", "Three.")),
        Conversation(None, CALLED),
    ),
    "OpenAI": (messages(("system", "S"), ("user", "Why?"), ("assistant", "Because.")), Conversation("S", ONE)),
    "OpenAI in parts": (
        messages(("user", [PART, {"type": "text", "text": "y?"}]), ("assistant", "Because.")),
        Conversation(None, ONE),
    ),
    "OpenAI's under ShareGPT's name": (
        {"conversations": messages(("user", "Why?"), ("assistant", "Because."))["messages"]},
        Conversation(None, ONE),
    ),
    "empty question": (messages(("user", ""), ("assistant", "Because.")), Conversation(None, (Turn("user", ""), ONE[1]))),
    "instruction": ({"instruction": "Why?", "output": "Because."}, Conversation(None, ONE)),
    "instruction, input": (
        {"instruction": "Why?", "input": "I ask.", "output": "Because.", "text": "all of it"},
        Conversation(None, (Turn("user", "Why?", context="I ask."), ONE[1])),
    ),
    "instruction, null": ({"instruction": "Why?", "input": None, "output": "Because."}, Conversation(None, ONE)),
    "instruction, system": ({"system": "S", "instruction": "Why?", "output": "Because."}, Conversation("S", ONE)),
    "text": ({"text": " a\n", "id": 3}, Document(" a\n")),
}


@pytest.mark.parametrize("name", GOOD)
def test_records_come_into_one_form(name):
    raw, record = GOOD[name]
    assert read_record(raw) == record


def test_a_kind_can_be_stated():
    raw = {"text": "a", "instruction": "b", "output": "c", "messages": 0}
    assert read_record(raw, "text") == Document("a")
    assert read_record(raw, "instruction") == Conversation(None, (Turn("user", "b"), Turn("assistant", "c")))


def test_a_question_with_its_context():
    assert Turn("user", "Why?").question == "Why?"
    assert Turn("user", "Why?", context="I ask.").question == "Why?\n\nI ask."


@pytest.mark.parametrize(
    ("flags", "train"), [({}, True), ({"train": False}, False), ({"weight": 0}, False), ({"train": True, "weight": 1}, True)]
)
def test_answers_can_be_left_out(flags, train):
    raw = messages(("user", "Why?"), ("assistant", "Because."))
    raw["messages"][1] |= flags
    assert read_record(raw).turns[1].train == train


def turn(**changes):
    return {"conversations": [{"from": "human", "value": "Why?"} | changes, {"from": "gpt", "value": "Because."}]}


Q, A = ("human", "Why?"), ("gpt", "Because.")
BAD = {  # name: (raw, what the message says)
    "a number": (17, "expected an object, found int"),
    "a list": ([], "expected an object, found list"),
    "no kind": ({"body": "a"}, "none of 'conversations', 'messages', 'instruction', 'text' among its keys; it has 'body'"),
    "nothing": ({}, "among its keys; it has none"),
    "no turns": (said(), "'conversations' must be a list of turns with at least one question and answer"),
    "turns are a text": ({"messages": "Why?"}, "'messages' must be a list"),
    "turns are null": ({"conversations": None}, "must be a list"),
    "turn is a text": ({"conversations": ["Why?", "Because."]}, "turn 1 must be an object"),
    "later turn is a text": ({"messages": [*messages(("user", "a"))["messages"], "b"]}, "turn 2 must be an object"),
    "answer first": (said(A), "turn 1 is from 'gpt', expected 'human'"),
    "two questions": (said(Q, Q), "turn 2 is from 'human', expected 'gpt'"),
    "two answers": (said(Q, A, A), "turn 3 is from 'gpt', expected 'human'"),
    "two messages": (messages(("user", "a"), ("user", "b")), "turn 2 is from 'user', expected 'assistant'"),
    "tool first": (said(("tool", "1"), Q, A), "turn 1 is from 'tool', expected 'human'"),
    "question after a tool": (said(Q, A, ("tool", "1"), Q), "turn 4 is from 'human', expected 'gpt'"),
    "late system": (said(Q, A, ("system", "S"), Q, A), "turn 3 is from 'system', expected 'human'"),
    "system alone": (said(("system", "S")), "turn 1 is from 'system', and no question follows"),
    "two systems": (said(("system", "S"), Q, A, system="T"), "but there is a 'system' beside the turns too"),
    "unknown role": (said(("narrator", "a"), A), "turn 1 is from 'narrator', expected 'human'"),
    "no answer": (said(Q), "the last turn is a question without an answer"),
    "no answer at the end": (said(Q, A, Q), "the last turn is a question without an answer"),
    "tool at the end": (said(Q, A, ("tool", "1")), "the last turn is a tool turn without an answer"),
    "empty answer": (said(Q, ("gpt", "")), "turn 2 is an empty answer"),
    "blank answer": (messages(("user", "a"), ("assistant", " \n")), "turn 2 is an empty answer"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 must be an object with the texts 'from' and 'value'"),
    "value is a number": (turn(value=3), "turn 1 must be an object with the texts"),
    "value is null": (said(Q, ("gpt", None)), "turn 2 must be an object with the texts"),
    "no role": ({"conversations": [{"value": "Why?"}]}, "turn 1 must say who speaks: 'from' (or 'role') is None"),
    "role is a list": (turn(**{"from": ["human"]}), "turn 1 must say who speaks"),
    "part is an image": (messages(("user", [{"type": "image_url"}])), "turn 1 has a part of type 'image_url'"),
    "part is a text": (messages(("user", ["Why?"])), "turn 1 has a part of type 'str'"),
    "part without text": (messages(("user", [{"type": "text"}])), "turn 1: a part's 'text' must be a text"),
    "tool calls": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]},
        "'tool_calls'",
    ),
    "train is a text": (turn(train="no"), "turn 1: 'train' must be true or false, found 'no'"),
    "weight is a half": (turn(weight=0.5), "turn 1: 'weight' must be 0 or 1, found 0.5"),
    "system is a number": (said(Q, A, system=0), "'system' must be a text"),
    "image is a list": (said(Q, A, image=[]), "'image' must be a path"),
    "no output": ({"instruction": "a"}, "'output' must be a text"),
    "output is null": ({"instruction": "a", "output": None}, "'output' must be a text"),
    "output is empty": ({"instruction": "a", "output": " "}, "'output' is empty"),
    "instruction is a list": ({"instruction": ["a"], "output": "b"}, "'instruction' must be a text"),
    "input is a number": ({"instruction": "a", "input": 0, "output": "b"}, "'input' must be a text"),
    "text is a list": ({"text": ["a"]}, "'text' must be a text"),
    "text is empty": ({"text": "\n"}, "'text' is empty"),
    "half a character": ({"text": "\ud83d"}, "'text' holds half a character (a lone surrogate)"),
    "half a character in an answer": (said(Q, ("gpt", "\ude00")), "turn 2 holds half a character (a lone surrogate)"),
    "half a character in a role": (said(("\ud83d", "Why?"), A), "turn 1: who speaks holds half a character"),
    "half a character in an image": (said(Q, A, image="\ud83d.png"), "'image' holds half a character"),
    "half a character in a system": (said(Q, A, system="\ude00"), "'system' holds half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_sentence(name):
    raw, message = BAD[name]
    with pytest.raises(RecordError, match=re.escape(message)) as error:
        read_record(raw)
    assert "\n" not in str(error.value)


def test_a_record_is_not_of_the_stated_kind():
    with pytest.raises(RecordError, match="no 'messages' among its keys; it has 'text'"):
        read_record({"text": "a"}, "messages")
    with pytest.raises(RecordError, match="expected an object, found str"):
        read_record("a", "text")


def test_the_samples_are_good():
    for path in SAMPLES.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            read_record(json.loads(line))
    assert len(list(mix_texts(SAMPLES / "mix.yaml"))) > 20
