"""Templates to the token and what of them is trained, for both kinds of tokenizer, over texts of every sort."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from models import make_tokenizer
from texts import MARKS, TEXTS, TWO, add_token, conversations, render, spans, talk, trained_texts, written
from transformers import AutoTokenizer

from accessory.data.fields import RecordError
from accessory.data.records import Conversation, Document, RecordForm, Turn
from accessory.data.templates import TEMPLATES, get_template
from accessory.data.tokenizer import BOS, EOS, Segment, Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.data.tool_use import ToolCall
from accessory.errors import UserError

V1 = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
CHAT = [name for name in TEMPLATES if name != "plain"]
WITHOUT_SYSTEM = ("alpaca", "shortqa", "qg", "bare")


# tokenizers


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Mixtral's tokenizer as tokenizer.model and tokenizer.json (with ChatML's tokens), and one of another make."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tokenizer.model").write_bytes(V1.read_bytes())
    assert write_tokenizer_json(folder / "tokenizer.model", folder)
    for name in MARKS:
        add_token(folder / "tokenizer.json", name)
    bytewise = folder / "bytewise"
    bytewise.mkdir()
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([Path(__file__).read_text()], vocab_size=600, special_tokens=["<|end|>"])
    model.save(str(bytewise / "tokenizer.json"))
    for name in MARKS:
        add_token(bytewise / "tokenizer.json", name)
    (bytewise / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}, "bos_token": null}')
    return folder


@pytest.fixture(scope="session")
def mixtral():
    return Tokenizer(V1)


@pytest.fixture(scope="session")
def kinds(folder):
    """Tokenizers by kind, a small one of our own making among them."""
    small = make_tokenizer(folder / "small/tokenizer.model", 360)
    paths = {"model": V1, "json": folder / "tokenizer.json", "bytewise": folder / "bytewise/tokenizer.json", "small": small}
    return {name: Tokenizer(path) for name, path in paths.items()}


KINDS = ["model", "json", "bytewise", "small"]


# Mixtral Instruct


@pytest.fixture(scope="session")
def mistral():
    return MistralTokenizer.v1()


def theirs(conversation):
    """Mistral's own messages."""
    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    return [kinds[turn.role](content=turn.text) for turn in conversation.turns]


@given(conversations())
@settings(max_examples=300, deadline=None)
def test_mixtral_instruct_is_mistrals_own(mixtral, mistral, conversation):
    template, messages = TEMPLATES["mixtral-instruct"], theirs(conversation)
    tokens, trained = mixtral.encode_segments(template.render(conversation))
    request = InstructRequest(messages=messages, system_prompt=conversation.system)
    assert tokens == mistral.instruct_tokenizer.encode_instruct(request).tokens
    assert sum(trained) == sum(len(mixtral.encode(t.text, False, True)) for t in conversation.turns if t.role == "assistant")
    asked = replace(conversation, turns=conversation.turns[:-1])
    system = [SystemMessage(content=conversation.system)] if conversation.system else []
    request = ChatCompletionRequest(messages=system + messages[:-1])
    assert mixtral.encode_segments(template.prompt(asked))[0] == mistral.encode_chat_completion(request).tokens


def test_mixtral_instruct_as_published(mixtral):
    segments = render(talk("hi", "hello", "bye", "Bye."), TEMPLATES["mixtral-instruct"])
    tokens, trained = mixtral.encode_segments(segments)
    expected = [1, 733, 16289, 28793, 12014, 733, 28748, 16289, 28793, 6312, 28709, 2, 733, 16289, 28793, 486, 28706]
    assert tokens[: len(expected) + 4] == [*expected, 733, 28748, 16289, 28793]
    assert spans(tokens, trained)[0] == [6312, 28709, 2]
    later = Tokenizer(V1.with_name("mistral_instruct_tokenizer_240323.model.v3"))
    with pytest.raises(UserError, match=r"in this tokenizer \[INST\] is a special token"):
        get_template("mixtral-instruct", later)


# golden strings


DIALOG = "A chat between a curious human and an artificial intelligence assistant. " + (
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
VICUNA = "A chat between a curious user and an artificial intelligence assistant. " + (
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
KIND = TWO | {"system": "Be kind."}
GOLDEN = {  # name: (template, record, text, what is trained)
    "dialog": (
        "dialog",
        TWO,
        f"<bos>{DIALOG}\n\n### Human: Why?\n### Assistant: Because.\n### Human: Really?\n### Assistant: Yes.\n###",
        [" Because.\n###", " Yes.\n###"],
    ),
    "dialog, system": (
        "dialog",
        KIND,
        "<bos>Be kind.\n\n### Human: Why?\n### Assistant: Because.\n### Human: Really?\n### Assistant: Yes.\n###",
        [" Because.\n###", " Yes.\n###"],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Count {words}.", "input": None, "output": "Three {}."},
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount {words}.\n\n### Response:Three {}.<eos>",
        ["Three {}.<eos>"],
    ),
    "alpaca, input": (
        "alpaca",
        {"instruction": "Count.", "input": "a {b} {0}", "output": "Three."},
        "<bos>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Input:\na {b} {0}\n\n### Response:Three.<eos>",
        ["Three.<eos>"],
    ),
    "alpaca, history": (
        "alpaca",
        {"instruction": "And?", "input": "b", "output": "Two.", "history": [["Count.", "One."]]},
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Response:One.<eos>\n\n"
        "### Instruction:\nAnd?\n\n### Input:\nb\n\n### Response:Two.<eos>",
        ["One.<eos>", "Two.<eos>"],
    ),
    "mixtral-instruct": (
        "mixtral-instruct",
        KIND,
        "<bos>[INST] Be kind.\n\nWhy? [/INST]Because.<eos>[INST] Really? [/INST]Yes.<eos>",
        ["Because.<eos>", "Yes.<eos>"],
    ),
    "mixtral-instruct, input": (
        "mixtral-instruct",
        {"instruction": "Count.", "input": "a b", "output": "Two."},
        "<bos>[INST] Count.\n\na b [/INST]Two.<eos>",
        ["Two.<eos>"],
    ),
    "chatml": (
        "chatml",
        KIND,
        "<bos><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
        ["Because.<|im_end|>", "Yes.<|im_end|>"],
    ),
    "vicuna": (
        "vicuna",
        TWO,
        f"<bos>{VICUNA} USER: Why? ASSISTANT: Because.<eos>USER: Really? ASSISTANT: Yes.<eos>",
        [" Because.<eos>", " Yes.<eos>"],
    ),
    "shortqa": (
        "shortqa",
        {"instruction": "Which {word}?", "output": "Blue."},
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the request "
        "using a single word or phrase.\n\n### Instruction:\nWhich {word}?\n\n### Response:Blue.<eos>",
        ["Blue.<eos>"],
    ),
    "qg": (
        "qg",
        {"instruction": "Blue.", "output": "Which word?"},
        "<bos>Generate a question whose answer is:\nBlue.\n\nQuestion:\nWhich word?<eos>",
        ["Which word?<eos>"],
    ),
    "bare": ("bare", {"instruction": "Blue.", "output": "Which?"}, "<bos>Blue.Which?<eos>", ["Which?<eos>"]),
    "plain": ("plain", {"text": " A text. "}, "<bos> A text. <eos>", [" A text. <eos>"]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_exact_strings(name):
    template, record, text, trained = GOLDEN[name]
    segments = render(record, TEMPLATES[template])
    assert written(segments) == text
    assert trained_texts(segments) == trained


def test_default_templates():
    for name in ("dialog", "alpaca", "plain"):
        assert render(GOLDEN[name][1]) == render(GOLDEN[name][1], TEMPLATES[name])
    messages = [{"role": t["from"].replace("gpt", "assistant"), "content": t["value"]} for t in TWO["conversations"]]
    assert render({"messages": messages}) == render(TWO)
    assert written(render({"text": "a", "instruction": "b", "output": "c"}, form=RecordForm("text"))) == "<bos>a<eos>"


# what is trained


@pytest.mark.parametrize("name", CHAT)
def test_train_on(name):
    template = TEMPLATES[name]
    segments = render(TWO, template)
    answers, last = trained_texts(segments), trained_texts(render(TWO, template, "last_answer"))
    assert len(answers) == 2 and last == answers[-1:]
    everything = render(TWO, template, "all")
    assert [s.text for s in everything if not s.trained] == [BOS] and written(everything) == written(segments)


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_an_answer_can_be_left_out(name, flag):
    record = talk("Why?", "Because.", "Really?", "Yes.")
    record["conversations"][1] |= flag
    answers = trained_texts(render(TWO, TEMPLATES[name]))
    assert trained_texts(render(record, TEMPLATES[name])) == answers[1:]
    everything = render(record, TEMPLATES[name], "all")
    assert "Because." not in "".join(trained_texts(everything)) and "Really?" in "".join(trained_texts(everything))
    record["conversations"][3] |= flag
    assert trained_texts(render(record, TEMPLATES[name])) == []


def test_what_a_template_has_no_place_for():
    tool = talk("Why?", "f()", "and?", "Because.")
    tool["conversations"][2]["from"] = "tool"
    assert "<|im_start|>tool\nand?<|im_end|>" in written(render(tool, TEMPLATES["chatml"]))
    for name in ("alpaca", "dialog", "mixtral-instruct", "vicuna"):
        with pytest.raises(RecordError, match=f"'{name}' has no place for a tool's turn"):
            render(tool, TEMPLATES[name])
    call = ToolCall("f", {}, "call00001")
    for name in CHAT:
        for more, turn, what in (
            ((), Turn("assistant", "", calls=(call,)), "a tool's call"),
            (({},), Turn("user", "a"), "a list"),
        ):
            with pytest.raises(RecordError, match=f"'{name}' has no place for {what}.*template: chat_template"):
                TEMPLATES[name].prompt(Conversation(None, (Turn("user", "Why?"), turn), tools=more))
    with pytest.raises(RecordError, match="no place for a system prompt"):
        render(talk("a", "b", system="c"), TEMPLATES["alpaca"])
    with pytest.raises(RecordError, match="'plain' is for documents, and this is a conversation"):
        render(TWO, TEMPLATES["plain"])
    with pytest.raises(RecordError, match="'vicuna' is for conversations, and this is a document"):
        render({"text": "a"}, TEMPLATES["vicuna"])
    with pytest.raises(RecordError, match=r"an image \(cat.png\), and this model reads text only"):
        render(TWO | {"image": "cat.png"})
    with pytest.raises(UserError, match="'plain' is for documents, not for questions"):
        TEMPLATES["plain"].prompt(Conversation(None, (Turn("user", "Why?"),)))


def test_template_names(kinds):
    with pytest.raises(UserError, match="unknown template 'chatmil'; did you mean 'chatml'"):
        get_template("chatmil")
    with pytest.raises(UserError, match="there is no tokenizer yet"):
        get_template("chat_template")
    with pytest.raises(UserError, match="no chat_template"):
        get_template("chat_template", kinds["bytewise"])
    with pytest.raises(UserError, match=r"no special token <\|im_start\|>"):
        kinds["model"].encode_segments(render(TWO, TEMPLATES["chatml"]))


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in CHAT for k in (KINDS if n != "chatml" else ["json", "bytewise"])]
)
def test_trained_tokens_are_the_answers(name, kind, kinds):
    template, tokenizer = TEMPLATES[name], kinds[kind]

    @given(conversations(system=name not in WITHOUT_SYSTEM))
    @settings(max_examples=60, deadline=None)
    def holds(conversation):
        assume(name != "bare" or all(turn.question for turn in conversation.turns))  # else two answers are one run
        segments = template.render(conversation)
        tokens, trained = tokenizer.encode_segments(segments)
        ends = [s.text for s in segments if s.special and (s.text != BOS or tokenizer.bos_id >= 0)]
        names = tokenizer.special | {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
        assert [t for t in tokens if t in names.values()] == [names[end] for end in ends], "text is never a special token"
        answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
        found = spans(tokens, trained)
        assert len(found) == len(answers)
        for answer, run in zip(answers, found, strict=True):
            if template.stop == ("\n###",):
                expected = f"{answer}\n###"
            else:
                expected = answer
                assert run[-1] == names[template.stop[0] if template.stop else EOS]
            text = tokenizer.decode(run)
            if name == "mixtral-instruct":
                assert text == expected
            else:  # a template's blank before the answer, or the end of a token that reaches over the border
                assert text.endswith(expected.removeprefix(" ")) and len(text) <= len(expected) + 1
        # generation is given the beginning of that
        first = next(number for number, is_trained in enumerate(trained) if is_trained)
        prompt = tokenizer.encode_segments(template.prompt(replace(conversation, turns=conversation.turns[:1])))[0]
        if name in WITHOUT_SYSTEM or (
            name == "chatml" and answers[0][0].isspace()
        ):  # nothing parts the prompt from the answer
            assert tokens[:first] == prompt[:first] and len(prompt) <= first + 1
        else:
            assert tokens[:first] == prompt

    holds()


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_a_document_is_trained_whole(mixtral, text):
    tokens, trained = mixtral.encode_segments(TEMPLATES["plain"].render(Document(text)))
    assert tokens == mixtral.encode(text, bos=True, eos=True) and trained == [False] + [True] * (len(tokens) - 1)
    assert mixtral.decode(tokens[1:-1]) == text


# tokenizers


@pytest.mark.parametrize("legacy", [True, False])
def test_both_kinds_of_file_are_one_tokenizer(legacy, mixtral, tmp_path):
    """Also a tokenizer.json that puts SentencePiece's blank before the first text alone, as newer ones do."""
    (tmp_path / "tokenizer.model").write_bytes(V1.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    assert write_tokenizer_json(tmp_path / "tokenizer.model", tmp_path)
    other = Tokenizer(tmp_path / "tokenizer.json")
    assert other.encode("Why?", bos=True, eos=True) == mixtral.encode("Why?", bos=True, eos=True)

    @given(conversations(), TEXTS)
    @settings(max_examples=60, deadline=None)
    def holds(conversation, text):
        assert other.encode(text, bos=True, eos=True) == mixtral.encode(text, bos=True, eos=True)
        for name in ("dialog", "vicuna", "mixtral-instruct"):
            segments = TEMPLATES[name].render(conversation)
            assert other.encode_segments(segments) == mixtral.encode_segments(segments)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_gives_the_text_back(kind, kinds):
    tokenizer = kinds[kind]

    @given(TEXTS, st.lists(st.booleans(), min_size=1, max_size=9))
    @settings(max_examples=100, deadline=None)
    def holds(text, cuts):
        tokens = tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(tokens) == text
        assert not set(tokens) & set(tokenizer.special.values())
        parts = [text[len(text) * i // len(cuts) : len(text) * (i + 1) // len(cuts)] for i in range(len(cuts))]
        found, trained = tokenizer.encode_segments([Segment(*pair) for pair in zip(parts, cuts, strict=True)])
        assert found == tokens and len(trained) == len(tokens)
        if all(cuts) or not any(cuts):
            assert set(trained) <= {cuts[0]}

    holds()


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_both_kinds_of_file_give_the_same_tokens(kinds, first, second, third):
    a, b = kinds["model"], kinds["json"]
    segments = [Segment(BOS, False, True), Segment(first, False), Segment(second, True), Segment(EOS, True, True)]
    segments += [Segment(third, False), Segment(first, True, apart=True)]
    assert a.encode_segments(segments) == b.encode_segments(segments)


def test_a_token_that_reaches_over_the_border_belongs_to_the_answer(mixtral):
    segments = [Segment("the answ", False), Segment("er", True), Segment(" is", False)]
    tokens, trained = mixtral.encode_segments(segments)
    assert tokens == mixtral.encode("the answer is", bos=False, eos=False)
    assert [mixtral.decode(run) for run in spans(tokens, trained)] == ["answer"]
    assert len(spans(tokens, trained)[0]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_in_bytes_is_wholly_on_one_side(kind, kinds):
    for text in "👍𒀀é":
        tokens, trained = kinds[kind].encode_segments([Segment(text, False), Segment(text, True), Segment(text, False)])
        assert len(spans(tokens, trained)) == 1
        assert kinds[kind].decode(spans(tokens, trained)[0]) == text


def test_special_tokens_of_a_tokenizer_json(folder, tmp_path):
    """Marked special or only named as such; with blanks swallowed; not lost on the way to another process."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    add_token(tmp_path / "tokenizer.json", "<|named|>", special=False)
    add_token(tmp_path / "tokenizer.json", "<|word|>", special=False)
    add_token(tmp_path / "tokenizer.json", "<|wide|>", lstrip=True, rstrip=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": ["<|named|>"]}))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert "<|named|>" in tokenizer.special and "<|word|>" not in tokenizer.special and tokenizer.n_words == 32005
    special = set(tokenizer.special.values())
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        tokens = copy.encode("a<|named|>b</s><|wide|><|im_end|>", bos=False, eos=False)
        assert not special & set(tokens) and copy.decode(tokens) == "a<|named|>b</s><|wide|><|im_end|>"
        assert len(copy.encode("<|word|>", bos=False, eos=False)) == 1, "a word of the vocabulary, which is not special"
    wide = [Segment("a  ", False), Segment("<|wide|>", True, special=True), Segment("  b", False)]
    tokens, trained = tokenizer.encode_segments(wide)
    assert [t for t, is_trained in zip(tokens, trained, strict=True) if is_trained] == [tokenizer.special["<|wide|>"]]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("a  <|wide|>  b", add_special_tokens=False) == tokenizer.encode_segments(wide)[0]


def test_a_tokenizer_json_that_cannot_be_used(folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer(path)
    path.write_bytes((folder / "bytewise/tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="which token ends a text"):
        Tokenizer(path)
