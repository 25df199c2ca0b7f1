"""Conversations with tools: what a tokenizer's own chat template makes of them, next to transformers and mistral-common."""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from models import make_tokenizer
from texts import ANSWERS, MARKS, TEXTS, add_token, render, spans, trained_texts, written
from transformers import AutoTokenizer

from accessory.data.fields import RecordError
from accessory.data.records import read_question
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json

V3 = Path(mistral_common.__file__).parent / "data/mistral_instruct_tokenizer_240323.model.v3"

# templates in the forms that are in use: ChatML with tags, Mistral's with its own tokens, and one whose answers are marked
TAGGED = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL = """{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('a call has an id of nine characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
MARKED = TAGGED.replace(
    "{%- if message.content %}{{- message.content }}{%- endif %}",
    "{%- generation %}{%- if message.content %}{{- message.content }}{%- endif %}",
).replace(
    "{%- endfor %}\n        {{- '<|im_end|>\\n' }}",
    "{%- endfor %}\n        {{- '<|im_end|>' }}{%- endgeneration %}\n        {{- '\\n' }}",
)
NAMED = [{"name": "default", "template": TAGGED.replace("if tools", "if none")}, {"name": "tool_use", "template": TAGGED}]

NAMES = ["f", "get_weather", "größe</s>"]
VALUES = st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS, max_size=2)
ARGUMENTS = st.dictionaries(TEXTS, VALUES, max_size=2)
FUNCTIONS = [
    {"name": name, "description": f"does {name} 你好", "parameters": {"type": "object", "properties": {"x": {"type": kind}}}}
    for name, kind in zip(NAMES, ["string", "integer", "</s>"], strict=True)
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


@st.composite
def tool_talks(draw, questions=2, results=TEXTS, system=True, names=NAMES, arguments=ARGUMENTS):
    """OpenAI's messages, arguments as objects: questions, each with some rounds of calls before the answer."""
    messages = [{"role": "system", "content": draw(ANSWERS)}] if system and draw(st.booleans()) else []
    count = 0
    for _ in range(draw(st.integers(1, questions))):
        messages.append({"role": "user", "content": draw(ANSWERS)})
        for _ in range(draw(st.integers(0, 2))):
            calls = []
            for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
                count += 1
                function = {"name": name, "arguments": draw(arguments)}
                calls.append({"id": f"call{count:05d}", "type": "function", "function": function})
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            for call in calls:
                name = call["function"]["name"]
                messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": draw(results)})
        messages.append({"role": "assistant", "content": draw(ANSWERS)})
    return messages


def record_of(messages, tools=TOOLS):
    """As a file has it: arguments are JSON in a text."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {"messages": messages, "tools": tools}


def sharegpt(messages):
    """The same in ShareGPT's form, which has no ids."""
    roles, turns = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}, []
    for message in messages:
        if "tool_calls" in message:
            calls = [call["function"] for call in message["tool_calls"]]
            turns.append({"from": "function_call", "value": json.dumps(calls if len(calls) > 1 else calls[0])})
        else:
            turns.append({"from": roles[message["role"]], "value": message["content"]})
    return {"conversations": turns, "tools": json.dumps(FUNCTIONS)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small tokenizer of our own making, with ChatML's tokens, and a chat template."""

    def make(source):
        home = tmp_path_factory.mktemp("tools")
        make_tokenizer(home / "tokenizer.model", 360)
        assert write_tokenizer_json(home / "tokenizer.model", home)
        for name in MARKS:
            add_token(home / "tokenizer.json", name)
        config = json.loads((home / "tokenizer_config.json").read_text())
        (home / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": source}))
        return home

    return make


def by_prefix(theirs, messages, tools, special):
    """The tokens of transformers, and which of them follow a prompt for an answer, up to what ends that."""
    options = {"tools": tools, "return_dict": False}
    tokens = theirs.apply_chat_template(messages, **options)
    trained = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = theirs.apply_chat_template(messages[:number], add_generation_prompt=True, **options)
            until = theirs.apply_chat_template(messages[: number + 1], **options)
            assert until[: len(before)] == before and tokens[: len(until)] == until
            end = max(place for place, token in enumerate(until) if token in special) + 1
            trained[len(before) : end] = [True] * (end - len(before))
    return tokens, trained


SPECIAL = ("<s>", "</s>", "<unk>", *MARKS)
"""What transformers would take for special tokens in a text; here it is text (see below)."""


def is_plain(messages):
    return not any(name in json.dumps(messages, ensure_ascii=False) for name in SPECIAL)


@pytest.mark.parametrize("source", [TAGGED, MARKED, NAMED], ids=["tagged", "marked", "named"])
def test_tool_conversations_are_what_transformers_makes_of_them(source, home):
    folder = home(source)
    tokenizer, theirs = Tokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)
    template = get_template("chat_template", tokenizer)
    special = [tokenizer.special["<|im_end|>"]]

    @given(tool_talks(names=NAMES[:2]).filter(is_plain), st.sampled_from([TOOLS[:1], TOOLS[:2]]))
    @settings(max_examples=100, deadline=None)
    def holds(messages, tools):
        tokens, trained = tokenizer.encode_segments(render(record_of(messages, tools), template))
        assert (tokens, trained) == by_prefix(theirs, messages, tools, special)
        if source is MARKED:
            marked = theirs.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True)
            assert trained == [bool(mask) for mask in marked["assistant_masks"]]
        assert len(spans(tokens, trained)) == sum(message["role"] == "assistant" for message in messages)
        asked = tokenizer.encode_segments(template.prompt(read_question(messages[:-1], tools)))[0]
        options = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        assert asked == theirs.apply_chat_template(messages[:-1], **options)
        if tools == TOOLS[:2]:
            shared = sharegpt(messages) | {"tools": FUNCTIONS[:2]}
            assert tokenizer.encode_segments(render(shared, template)) == (tokens, trained)

    holds()


@pytest.mark.parametrize("source", [TAGGED, NAMED], ids=["tagged", "named"])
def test_nothing_of_a_tool_conversation_becomes_a_special_token(source, home):
    """Not in names, arguments, results or descriptions, though they are written as JSON."""
    tokenizer = Tokenizer(home(source) / "tokenizer.json")
    template = get_template("chat_template", tokenizer)

    @given(tool_talks(), st.sampled_from(["answers", "last_answer", "all"]))
    @settings(max_examples=100, deadline=None)
    def holds(messages, train_on):
        segments = render(record_of(messages), template, train_on)
        text = written(segments)
        for function in FUNCTIONS:
            assert json.dumps(function, ensure_ascii=False) in text
        for message in messages:
            for call in message.get("tool_calls", ()):
                assert json.dumps(call["function"]["arguments"], ensure_ascii=False) in text
            assert (message["content"] or "") in text
        bare = [m["role"] for n, m in enumerate(messages) if m["role"] != "tool" or messages[n - 1]["role"] != "tool"]
        expected = MARKS * (len(bare) + (bare[0] != "system"))
        assert [segment.text for segment in segments if segment.special] == expected
        tokens, trained = tokenizer.encode_segments(segments)
        assert [t for t in tokens if t in tokenizer.special.values()] == [tokenizer.special[name] for name in expected]
        assert all(trained) == (train_on == "all")

    holds()


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """Mistral's third tokenizer as tokenizer.model, and as transformers' tokenizer.json."""
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copyfile(V3, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False, "chat_template": MISTRAL}))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "json")
    return folder


def theirs_of(messages):
    """mistral-common's own messages."""
    kinds = {"user": UserMessage, "assistant": AssistantMessage, "tool": ToolMessage}
    made = []
    for message in messages:
        values = {key: value for key, value in message.items() if key != "role" and value is not None}
        if "tool_calls" in values:
            functions = [(call["id"], call["function"]) for call in values["tool_calls"]]
            values["tool_calls"] = [
                ToolCall(id=id, function=FunctionCall(name=function["name"], arguments=json.dumps(function["arguments"])))
                for id, function in functions
            ]
        made.append(kinds[message["role"]](**values))
    return made


RESULTS = st.recursive(st.integers() | TEXTS, lambda inner: st.dictionaries(TEXTS, inner, max_size=2), max_leaves=3)
MISTRAL_TALKS = tool_talks(1, RESULTS.map(lambda value: json.dumps(value, ensure_ascii=False)), False, NAMES[:2])


def test_mistrals_template_gives_the_tokens_of_mistrals_own_library(mistral):
    tokenizer, oracle = Tokenizer(mistral / "tokenizer.model"), MistralTokenizer.v3()
    template = get_template("chat_template", tokenizer)
    tools = [Tool(function=Function(**function)) for function in FUNCTIONS[:2]]

    @given(MISTRAL_TALKS)
    @settings(max_examples=100, deadline=None)
    def holds(messages):
        messages[-1]["content"] = messages[-1]["content"].rstrip(" ")  # as the library does
        raw = record_of(messages, TOOLS[:2])
        for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
            segments = render(raw | {"messages": raw["messages"][: number + 1]}, template)
            tokens, trained = tokenizer.encode_segments(segments)
            request = InstructRequest(messages=theirs_of(messages[: number + 1]), available_tools=tools)
            assert tokens == oracle.instruct_tokenizer.encode_instruct(request).tokens
            asked = ChatCompletionRequest(messages=theirs_of(messages[:number]), tools=tools)
            prompt = oracle.encode_chat_completion(asked).tokens
            assert tokens[: len(prompt)] == prompt and all(trained[len(prompt) :]) and not trained[len(prompt) - 1]

    holds()


def test_mistrals_template_is_what_transformers_makes_of_it(mistral):
    tokenizer, theirs = Tokenizer(mistral / "json/tokenizer.json"), AutoTokenizer.from_pretrained(mistral / "json")
    template = get_template("chat_template", tokenizer)
    names = [name for name in tokenizer.special if name.startswith(("[INST", "[/INST", "<"))]

    @given(MISTRAL_TALKS.filter(lambda messages: not any(name in json.dumps(messages) for name in names)))
    @settings(max_examples=100, deadline=None)
    def holds(messages):
        segments = render(record_of(messages, TOOLS[:2]), template)
        expected = by_prefix(theirs, messages, TOOLS[:2], [tokenizer.eos_id])
        assert tokenizer.encode_segments(segments) == expected

    holds()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_chat_template_has_the_same_tokens_from_both_kinds_of_file(legacy, tmp_path):
    """The tokenizer.json is the one that is written for transformers; ``legacy`` is Hugging Face's word, in its config."""
    shutil.copyfile(V3.with_name("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    source = "{{ bos_token }}{% for m in messages %}{{ ' ' + m.content + eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "chat_template": source}))
    assert write_tokenizer_json(tmp_path / "tokenizer.model", tmp_path)
    tokenizers = [Tokenizer(tmp_path / name) for name in ("tokenizer.model", "tokenizer.json")]
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    @given(TEXTS, ANSWERS)
    @settings(max_examples=100, deadline=None)
    def holds(question, answer):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        first, second = (
            t.encode_segments(render({"messages": messages}, get_template("chat_template", t))) for t in tokenizers
        )
        assert first == second
        if is_plain(messages):
            assert first[0] == theirs.apply_chat_template(messages, return_dict=False)

    holds()


def test_mistrals_template_shows_tools_before_the_last_question_alone(mistral):
    """So an earlier answer is not trained as it would be asked for; the last one is."""
    template = get_template("chat_template", Tokenizer(mistral / "tokenizer.model"))
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    with pytest.raises(RecordError, match="writes turn 2 differently when other turns follow"):
        render(record_of(messages), template)
    assert trained_texts(render(record_of(messages), template, "last_answer")) == [" d</s>"]
    assert len(trained_texts(render({"messages": messages}, template))) == 2


CALL = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
SIMPLE = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    CALL,
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{%- if tools %}", "{%- if none %}", "has no place for the list of tools"),
        ("message.tool_calls or []", "[]", "has no place for the calls of turn 2"),
        ("message.role == 'assistant'", "message.role != 'user'", "has no place for the tool of turn 3"),
        ("messages[0].role == 'system'", "none", "has no place for the system prompt"),
        ("if message.content", "if message.content and not message.tool_calls", "for the text beside the calls of turn 2"),
        ("call.function.name", "call.name.x", "the chat template refuses it"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(old, new, message, home):
    template = get_template("chat_template", Tokenizer(home(TAGGED.replace(old, new)) / "tokenizer.json"))
    with pytest.raises(RecordError, match=message):
        render({"messages": SIMPLE, "tools": TOOLS}, template)
    whole = get_template("chat_template", Tokenizer(home(TAGGED) / "tokenizer.json"))
    assert trained_texts(render({"messages": SIMPLE, "tools": TOOLS}, whole))[1] == "a<|im_end|>"


def test_the_template_for_tools_lies_in_a_folder_of_its_own(home):
    """As transformers 5 writes several templates."""
    folder = home(NAMED)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder / "saved")
    tokenizer = Tokenizer(folder / "saved/tokenizer.json")
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= tokenizer.files.keys()
    template = get_template("chat_template", tokenizer)
    expected = get_template("chat_template", Tokenizer(folder / "tokenizer.json"))
    for record in ({"messages": SIMPLE, "tools": TOOLS}, {"messages": SIMPLE}):
        assert render(record, template) == render(record, expected)
    assert "<tools>" in written(render({"messages": SIMPLE, "tools": TOOLS}, template))
