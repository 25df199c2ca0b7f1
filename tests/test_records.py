"""Records of every kind come into one form; each way that one can be bad is a sentence."""

import json
import re
from pathlib import Path

import pytest

from accessory.data.fields import METADATA, RecordError
from accessory.data.mix import mix_texts
from accessory.data.records import Columns, Conversation, Document, RecordForm, Turn, read_record, refuse_label
from accessory.data.tool_use import ToolCall

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
    "image": (said(("human", "Why?"), ("gpt", "Because."), image="a.png"), Conversation(None, ONE, ("a.png",))),
    "images among the text": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                        {"type": "text", "text": "Why?"},
                        {"type": "image", "image": {"path": "b.png", "bytes": None}},
                    ],
                },
                {"role": "assistant", "content": "Because."},
            ]
        },
        Conversation(None, (Turn("user", "<image>\nWhy?<image>"), Turn("assistant", "Because.")), ("a.png", "b.png")),
    ),
    "images that parts point to": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
                {"role": "assistant", "content": "Because."},
            ],
            "images": [{"bytes": b"abc", "path": "a.png"}],
        },
        Conversation(None, (Turn("user", "<image>\nWhy?"), ONE[1]), ("data:;base64,YWJj",)),
    ),
    "captions": ({"url": "a.png", "caption": ["A cat.", "Cats."]}, Document("A cat.", ("a.png",), others=("Cats.",))),
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
        {"instruction": "Why?", "input": "I ask.", "output": "Because.", "text": "### Why?\nI ask.\n### Because."},
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
    assert read_record(raw, RecordForm("text")) == Document("a")
    assert read_record(raw, RecordForm("instruction")) == Conversation(None, (Turn("user", "b"), Turn("assistant", "c")))


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


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def called(*calls, answer=None):
    """OpenAI's form: a question, calls, and what came of them."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None, "tool_calls": list(calls)}]
    return {"messages": turns + ([{"role": "tool", "content": "1"} | answer] if answer is not None else [])}


F = {"name": "f", "parameters": {"type": "object"}}
HISTORY = {"instruction": "Really?", "output": "Yes.", "history": [["Why?", "Because."]]}
Q, A = ("human", "Why?"), ("gpt", "Because.")
BAD = {  # name: (raw, what the message says)
    "a number": (17, "expected an object, found int"),
    "a list": ([], "expected an object, found list"),
    "no kind": ({"body": "a"}, "'instruction', 'text', 'caption' among its keys; it has 'body'"),
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
    "part is a video": (messages(("user", [{"type": "video_url"}])), "turn 1 has a part of type 'video_url'"),
    "part is an image without one": (
        messages(("user", [{"type": "image_url"}]), A),
        "turn 1, part 1: 'image_url' must be a text, or an object with the text 'url'",
    ),
    "an image says more": (
        messages(("user", [{"type": "image_url", "image_url": {"url": "a.png", "crop": 1}}]), A),
        "turn 1, part 1: nothing here uses 'crop'",
    ),
    "images among the text and beside it": (
        messages(("user", [{"type": "image_url", "image_url": "a.png"}]), A) | {"image": "b.png"},
        "some images stand among the text and others beside it",
    ),
    "a caption is a number": ({"caption": 3, "image": "a.png"}, "'caption' must be a text, or a list of texts"),
    "an empty caption": ({"caption": ["a", " "], "image": "a.png"}, "'caption' must be a text, or a list of texts"),
    "part is a text": (messages(("user", ["Why?"])), "turn 1 has a part of type 'str'"),
    "part without text": (messages(("user", [{"type": "text"}])), "turn 1, part 1: 'text' must be a text"),
    "an empty tool call": (called({}), "turn 2, call 1: expected an object, found NoneType"),
    "calls are a text": (
        {"messages": [called()["messages"][0], {"role": "assistant", "tool_calls": "f()"}]},
        "turn 2: 'tool_calls' must be a list",
    ),
    "a call of another type": (called({"type": "custom"}), "turn 2, call 1 is of type 'custom'; expected 'function'"),
    "a call without a name": (called({"function": {"arguments": "{}"}}), "turn 2, call 1: 'name' must be a text"),
    "arguments are no JSON": (called(call("f", "{x}")), "turn 2, call 1: 'arguments' must be JSON: Expecting property name"),
    "arguments are a list": (called(call("f", "[1]")), "turn 2, call 1: 'arguments' must be an object, or that as JSON"),
    "half a character in arguments": (called(call("f", {"x": "\ud83d"})), "'arguments' cannot be written as JSON"),
    "more in a call": (called(call("f", "{}") | {"why": "x"}), "turn 2, call 1: nothing here uses 'why'"),
    "a result of no call": (
        called(call("f", "{}", id="a"), answer={"tool_call_id": "b"}),
        "turn 3 answers the call 'b', but those that wait for an answer are: 'a' (f)",
    ),
    "a call that is no JSON": (said(Q, ("function_call", "f()")), "turn 2, a function call, must be JSON: Expecting value"),
    "a call that is a text": (said(Q, ("function_call", '"f"')), "turn 2, function call: expected an object, found str"),
    "tools are no JSON": (said(Q, A, tools="f(x)"), "'tools' must be JSON: Expecting value"),
    "tools are a number": (said(Q, A, tools=3), "'tools' must be a list of functions, or that as JSON"),
    "a tool without a name": (said(Q, A, tools=[F, {"function": {}}]), "tool 2 must be an object with the 'name' of a"),
    "tools of bytes": (said(Q, A, tools=[{"name": "f", "x": b""}]), "'tools' cannot be written as JSON"),
    "more in a record": (said(Q, A, score=2, rating="bad"), "nothing here uses 'score', 'rating': leave them out with"),
    "more in a turn": (turn(toxic=True), "turn 1: nothing here uses 'toxic': leave it out with ignore: [toxic] in the mix"),
    "more in a part": (messages(("user", [PART | {"bold": 1}])), "turn 1, part 1: nothing here uses 'bold'"),
    "a name of who asks": (turn(name="Ann"), "turn 1: nothing here uses 'name'"),
    "two forms": (messages(("user", "a"), ("assistant", "b"), instruction="c", output="d"), "uses 'instruction', 'output'"),
    "another text": ({"instruction": "a", "output": "b", "text": "c"}, "nothing here uses 'text'"),
    "history": (said(Q, A, history=[["a", "b"]]), "nothing here uses 'history'"),
    "history is a text": (HISTORY | {"history": "a"}, "'history' must be a list of earlier questions and answers"),
    "history without an answer": (HISTORY | {"history": [["a", ""]]}, "history 1 is without an answer"),
    "history of threes": (
        HISTORY | {"history": [["a", "b", "c"]]},
        "'history' must be a list of earlier questions and answers",
    ),
    "system of a text": ({"text": "a", "system": "S"}, "nothing here uses 'system'"),
    "video": (said(Q, A, video="a.mp4"), "nothing here uses 'video'"),
    "images are a text": (said(Q, A, images="a.png"), "'images' must be a list of paths"),
    "an image is no path": (said(Q, A, images=[{"bytes": "a"}]), "an image must be a path"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference record ('chosen' and 'rejected'), and"),
    "preference beside messages": (
        messages(("user", "a"), ("assistant", "b"), rejected=[{"role": "user", "content": "a"}]),
        "it is a preference record ('rejected'), and there is no such objective yet",
    ),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, "it is a KTO record (its label says whether the answer is"),
    "KTO of a table": ({"prompt": "a", "completion": "b", "label": "True"}, "it is a KTO record"),
    "KTO of LLaMA-Factory": (messages(("user", "a"), ("assistant", "b"), kto_tag=True), "it is a KTO record"),
    "question and answer": (
        {"question": "a", "answer": "b"},
        "it has 'question', 'answer'; read it with columns: {instruction: question, output: answer} in the mix entry",
    ),
    "train is a text": (turn(train="no"), "turn 1: 'train' must be true or false, found 'no'"),
    "weight is a half": (turn(weight=0.5), "turn 1: 'weight' must be 0 or 1, found 0.5"),
    "system is a number": (said(Q, A, system=0), "'system' must be a text"),
    "image is a list": (said(Q, A, image=["a.png"]), "'image' must be a path"),
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


def test_an_earlier_exchange_comes_first():
    assert read_record(HISTORY) == Conversation(None, TWO)
    assert read_record(HISTORY | {"history": []}) == Conversation(None, TWO[2:])


@pytest.mark.parametrize("key", sorted(METADATA))
def test_what_only_says_where_a_record_is_from_is_left_alone(key):
    raw = said(("human", "Why?"), ("gpt", "Because.")) | {key: "x"}
    raw["conversations"][0] |= {key: 1}
    assert read_record(raw) == Conversation(None, ONE)


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_key_that_says_nothing_is_left_alone(nothing):
    raw = said(("human", "Why?"), ("gpt", "Because."), score=nothing, chosen=nothing, label=nothing, history=nothing)
    assert read_record(raw) == Conversation(None, ONE)
    assert read_record({"messages": nothing, "text": "a"}) == Document("a"), (
        "as files with one column for all records have it"
    )


def test_what_says_the_same_again_is_left_alone():
    raw = messages(("system", "S"), ("user", "Why?"), ("assistant", "Because."), prompt="Why?", answer="Because.")
    assert read_record(raw) == Conversation("S", ONE)
    with pytest.raises(RecordError, match="nothing here uses 'prompt'"):
        read_record(raw | {"prompt": "Why? I ask."})


def test_what_is_to_be_ignored_is_ignored_wherever_it_stands():
    raw = said(("human", "Why?"), ("gpt", "Because."), tools=[F], rejected="c", label=False, score=1)
    raw["conversations"][1] |= {"score": 0, "train": False}
    form = RecordForm(ignore=("tools", "rejected", "label", "score", "train"))
    assert read_record(raw, form) == Conversation(None, ONE)


def test_columns_have_other_names():
    raw = {"question": "Why?", "answer": "Because.", "context": "I ask.", "persona": "S", "mood": 3, "instruction": "x"}
    columns = Columns(instruction="question", output="answer", input="context", system="persona", label="mood")
    expected = Conversation("S", (Turn("user", "Why?", context="I ask."), ONE[1]), label=3)
    assert read_record(raw, RecordForm(columns=columns, ignore=("instruction",))) == expected
    with pytest.raises(RecordError, match="'instruction' stands beside 'question', which is read as 'instruction'"):
        read_record(raw, RecordForm(columns=columns))
    with pytest.raises(RecordError, match=r"'answer' \(read as 'output'\) must be a text"):
        read_record({"question": "a"}, RecordForm(columns=columns))
    with pytest.raises(RecordError, match="among its keys; it has 'Question', 'answer'"):
        read_record({"Question": "a", "answer": "b"}, RecordForm(columns=columns))
    swapped = Columns(instruction="output", output="instruction")
    raw = {"output": "Why?", "instruction": "Because."}
    assert read_record(raw, RecordForm(columns=swapped)) == Conversation(None, ONE)
    chosen = {"prompt": "Why?", "chosen": said(*(("human", "Why?"), ("gpt", "Because.")))["conversations"], "rejected": "c"}
    form = RecordForm(columns=Columns(messages="chosen"), ignore=("rejected",))
    assert read_record(chosen, form) == Conversation(None, ONE)


PLACE = {"type": "function", "function": F}
CALLS = (
    Turn("user", "Why?"),
    Turn("assistant", "", calls=(ToolCall("f", {"x": 1}, "a"), ToolCall("g", {}, "b"))),
    Turn("tool", "1", tool="g", call_id="b"),
    Turn("tool", "2", tool="f", call_id="a"),
    Turn("assistant", "Because."),
)


def test_calls_of_openai():
    raw = called(call("f", '{"x": 1}', id="a"), call("g", {}, id="b"), answer={"tool_call_id": "b"})
    raw["messages"] += [{"role": "tool", "content": "2", "name": "f"}, {"role": "assistant", "content": "Because."}]
    for tools in ([PLACE], [F], json.dumps([F])):
        assert read_record(raw | {"tools": tools}) == Conversation(None, CALLS, tools=(PLACE,))
    raw["messages"][1]["content"] = "I look."
    assert read_record(raw).turns[1].text == "I look."
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    raw = {"messages": [{"role": "user", "content": "Why?"}, old, {"role": "function", "name": "f", "content": "2"}]}
    raw["messages"] += [{"role": "assistant", "content": "Because."}]
    made = ToolCall("f", {"x": 1}, "call00001")
    answered = Turn("tool", "2", tool="f", call_id="call00001")
    assert read_record(raw).turns == (CALLS[0], Turn("assistant", "", calls=(made,)), answered, CALLS[4])


def test_calls_of_sharegpt():
    """They have no ids: they are numbered, and answered in order."""
    one = ("function_call", '{"name": "f", "arguments": {"x": 1}}')
    two = ("function_call", '[{"name": "f", "arguments": "{}"}, {"name": "g"}]')
    raw = said(Q, one, ("observation", "1"), two, ("observation", "2"), ("observation", "3"), A, tools=json.dumps([F]))
    first, second, third = (f"call0000{number}" for number in (1, 2, 3))
    turns = (
        Turn("user", "Why?"),
        Turn("assistant", "", calls=(ToolCall("f", {"x": 1}, first),)),
        Turn("tool", "1", tool="f", call_id=first),
        Turn("assistant", "", calls=(ToolCall("f", {}, second), ToolCall("g", {}, third))),
        Turn("tool", "2", tool="f", call_id=second),
        Turn("tool", "3", tool="g", call_id=third),
        Turn("assistant", "Because."),
    )
    assert read_record(raw) == Conversation(None, turns, tools=(PLACE,))
    assert read_record(said(Q, one)).turns == turns[:2], "a call is an answer"


@pytest.mark.parametrize("label", [0, 1.5, "spam", False])
def test_a_label_is_left_to_the_objective(label):
    assert read_record({"text": "a", "label": label}) == Document("a", label=label)
    record = read_record(said(Q, A, label=label))
    assert record == Conversation(None, ONE, label=label)
    with pytest.raises(RecordError, match="KTO" if label is False else f"has a label .'{label}'.*next-token prediction"):
        refuse_label(record)


def test_a_record_is_not_of_the_stated_kind():
    with pytest.raises(RecordError, match="no 'messages' among its keys; it has 'text'"):
        read_record({"text": "a"}, RecordForm("messages"))
    with pytest.raises(RecordError, match="expected an object, found str"):
        read_record("a", RecordForm("text"))


def test_the_samples_are_good():
    for line in (SAMPLES / "tools.jsonl").read_text().splitlines():
        record = read_record(json.loads(line))
        assert record.tools and record.turns[1].calls
    assert len(list(mix_texts(SAMPLES / "mix.yaml"))) > 30
