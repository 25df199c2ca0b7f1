"""Calls of tools in answers: parted from what is said however the text comes, and what OpenAI's client sees of them."""

import contextlib
import json
import re
from dataclasses import replace

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job
from models import TINY, Tensors, build, make_tokenizer, weights
from ranks import run_ranks
from test_tools import MISTRAL, TAGGED
from texts import MARKS, add_token

from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.infer.text import TextStream
from accessory.infer.tool_calls import FORMS, CallReader
from accessory.train.save import save_model

LISTED, TAGS = FORMS
PARAMETERS = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("look", "go")]
ASKED = {"model": "model", "messages": [{"role": "user", "content": "the list"}], "tools": TOOLS, "temperature": 0}


def call(name, x):
    return f'{{"name": "{name}", "arguments": {{"x": {x}}}}}'


ONE = [("look", {"x": 1})]
BOTH = [*ONE, ("go", {"x": 2})]
TEXTS = [
    (TAGS, "plain <b> text\n", "plain <b> text\n", []),
    (TAGS, f"\n<tool_call>\n{call('look', 1)}\n</tool_call>\n", "", ONE),
    (TAGS, f"so:\n\n<tool_call>{call('look', 1)}</tool_call>\n<tool_call>\n{call('go', 2)}</tool_call>", "so:", BOTH),
    (TAGS, f"<tool_call>{call('look', 1)}", "", ONE),  # the end was a token that stopped it
    (TAGS, "<tool_call>no</tool_call> <tool_call>{", "<tool_call>no</tool_call> <tool_call>{", []),
    (TAGS, f"a <tool_call> <tool_call>{call('look', 1)}</tool_call>", None, None),
    (LISTED, f"[TOOL_CALLS] [{call('look', 1)}, {call('go', 2)}]", "", BOTH),
    (LISTED, f"so[TOOL_CALLS][{call('look', 1)}, ", f"so[TOOL_CALLS][{call('look', 1)}, ", []),
    (LISTED, '[TOOL_CALLS] ["look"]', '[TOOL_CALLS] ["look"]', []),
]


@pytest.mark.parametrize(("form", "text", "said", "called"), TEXTS, ids=[text for _, text, *_ in TEXTS])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_calls_are_parted_from_what_is_said_however_the_text_comes(form, text, said, called, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    results = []
    for borders in ([0, len(text)], [0, *cuts, len(text)]):
        reader, heard, found = CallReader(form), "", []
        for begin, end in zip(borders, [*borders[1:], None], strict=True):
            piece, calls = reader.add(text[begin:end] if end else "", last=end is None)
            heard, found = heard + piece, found + calls
        assert [one["index"] for one in found] == list(range(len(found))) and len({one["id"] for one in found}) == len(found)
        results.append((heard, [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in found]))
    assert results[0] == results[1]
    assert said is None or results[0] == (said, called)


@pytest.mark.parametrize("form", FORMS, ids=[form.begin for form in FORMS])
def test_the_first_of_several_calls_is_the_only_one_where_one_is_wanted(form):
    """Behind tags the answer ends there; what a list holds beyond it is not called."""
    listed = f"[{call('look', 1)}, {call('go', 2)}]"
    reader = CallReader(form, single=True)
    said, calls = reader.add(f"so: {form.begin}{call('look', 1) if form.end else listed}", last=True)
    assert said == "so:" and [one["function"]["name"] for one in calls] == ["look"] and reader.count == 1
    most = form.schema(TOOLS, None, single=True).get("maxItems")
    assert most == (None if form.end else 1)


def test_a_special_token_is_written_where_it_is_shown(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TAGGED)
    ids = [*tokenizer.encode_within("the list"), tokenizer.special[MARKS[0]], *tokenizer.encode_within("of words")]
    for shown, between in (((), ""), ((MARKS[0],), MARKS[0])):
        stream = TextStream(tokenizer, (), shown)
        text = "".join(map(stream.add, ids)) + stream.finish()
        assert text.replace(" ", "") == f"thelist{between}ofwords"


def tokenizer_of(home, template):
    make_tokenizer(home / "tokenizer.model")
    assert write_tokenizer_json(home / "tokenizer.model", home)
    for name in [*MARKS, "[TOOL_CALLS]"]:
        add_token(home / "tokenizer.json", name)
    config = json.loads((home / "tokenizer_config.json").read_text())
    (home / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return Tokenizer(home / "tokenizer.json")


def write_model(home, template):
    tokenizer = tokenizer_of(home, template)
    args = replace(TINY, vocab_size=tokenizer.n_words, max_seq_len=4096, sliding_window=None)
    model = build(args, "mixtral", Tensors(weights(args)))
    save_model(model, home / "model", tokenizer.files, torch.float64, "safetensors")


@contextlib.contextmanager
def client_of(home, template):
    run_ranks(1, write_model, home, template)
    with Job("serve", home / "model", "--precision", "fp64", "--port", 0, "--template", "chat_template") as job:
        job.reach("Ctrl-C ends it.")
        address = re.search(r"http://[^/]+", job.out())[0]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("tagged"), TAGGED) as client:
        yield client


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("listed"), MISTRAL) as client:
        yield client


def called(choice):
    return [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls or []]


def test_what_the_model_calls_comes_as_calls_whole_or_in_pieces(tagged):
    written = "so:\n" + "".join(f"<tool_call>\n{call(name, found['x'])}\n</tool_call>\n" for name, found in BOTH)
    body = ASKED | {"extra_body": {"structured_outputs": {"regex": re.escape(written)}}}  # the model writes what it must
    (choice,) = tagged.chat.completions.create(**body).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "so:" and called(choice) == BOTH
    with tagged.chat.completions.stream(**body) as stream:
        (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls" and streamed.message.content == "so:" and called(streamed) == BOTH
    (alone,) = tagged.chat.completions.create(**body, parallel_tool_calls=False).choices
    with tagged.chat.completions.stream(**body, parallel_tool_calls=False) as stream:
        (streamed,) = stream.get_final_completion().choices
    for one in (alone, streamed):
        assert one.finish_reason == "tool_calls" and one.message.content == "so:" and called(one) == ONE
    history = [*ASKED["messages"], choice.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": one.id, "content": "12"} for one in choice.message.tool_calls]
    assert tagged.chat.completions.create(**ASKED | {"messages": history, "max_tokens": 3}).choices[0].message.content


def test_a_call_can_be_asked_for(tagged, listed, tmp_path):
    # what stands before calls is a token of its own here: read as well, and said where no call follows
    token = tokenizer_of(tmp_path, MISTRAL).special[LISTED.begin]
    (choice,) = listed.chat.completions.create(**ASKED, max_tokens=1, logit_bias={str(token): 100}).choices
    assert choice.message.content == LISTED.begin
    go = {"type": "function", "function": {"name": "go"}}
    for client in (tagged, listed):
        first, *chunks = (chunk.choices[0] for chunk in client.chat.completions.create(**ASKED, tool_choice=go, stream=True))
        assert first.delta.role == "assistant" and all(one.delta.tool_calls or one.finish_reason for one in chunks)
        (choice,) = client.chat.completions.create(**ASKED, tool_choice=go).choices
        ((name, arguments),) = called(choice)
        assert (
            choice.finish_reason == "tool_calls" and name == "go" and arguments["x"] in (1, 2) and not choice.message.content
        )
    (choice,) = tagged.chat.completions.create(**ASKED, tool_choice="required").choices
    assert called(choice)[0][0] in ("look", "go")
    (choice,) = tagged.chat.completions.create(**ASKED, tool_choice="required", max_tokens=2).choices
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    for choice, sentence in (
        ("none", None),
        ("any", 'tool_choice must be "auto"'),
        (go | {"type": 1}, "tool_choice must be"),
    ):
        with contextlib.nullcontext() if sentence is None else pytest.raises(openai.BadRequestError, match=sentence):
            assert (
                not tagged.chat.completions.create(**ASKED, tool_choice=choice, max_tokens=2).choices[0].message.tool_calls
            )
    nobody = {"type": "function", "function": {"name": "nobody"}}
    with pytest.raises(openai.BadRequestError, match="there is no tool 'nobody'"):
        tagged.chat.completions.create(**ASKED, tool_choice=nobody)
