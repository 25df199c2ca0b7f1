"""A tokenizer's own chat template: what transformers makes of it, what of it is trained, and what cannot be used."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_tokenizer
from texts import MARKS, TEXTS, TWO, add_token, conversations, render, spans, talk, trained_texts, written
from transformers import AutoTokenizer

from accessory.data.fields import RecordError
from accessory.data.records import Conversation, Turn
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.errors import UserError

MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ ' [INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}"
)
CHATML = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + (m.content | trim) + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
FORGETFUL = (  # what was answered before is cut when the talk goes on
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """A folder with a small tokenizer of both kinds and a chat template."""

    def make(source, apart=False):
        home = tmp_path_factory.mktemp("chat")
        make_tokenizer(home / "tokenizer.model", 360)
        assert write_tokenizer_json(home / "tokenizer.model", home)
        for name in MARKS:
            add_token(home / "tokenizer.json", name)
        if apart:
            (home / "chat_template.jinja").write_text(source)
        else:
            config = json.loads((home / "tokenizer_config.json").read_text())
            (home / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": source}))
        return home

    return make


PLAIN_TEXTS = TEXTS.filter(lambda text: not any(mark in text for mark in ("<s>", "</s>", "<unk>", *MARKS)))


@pytest.mark.parametrize("source", [MIXTRAL, CHATML], ids=["mixtral", "chatml"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_chat_template_is_what_transformers_makes_of_it(source, apart, with_template):
    home = with_template(source, apart)
    tokenizer, theirs = Tokenizer(home / "tokenizer.json"), AutoTokenizer.from_pretrained(home)
    template = get_template("chat_template", tokenizer)
    assert template.stop == (("</s>",) if source is MIXTRAL else ("<|im_end|>",))
    assert ("chat_template.jinja" in tokenizer.files) == apart and "tokenizer_config.json" in tokenizer.files

    @given(st.lists(st.tuples(PLAIN_TEXTS, PLAIN_TEXTS.filter(str.strip)), min_size=1, max_size=3))
    @settings(max_examples=60, deadline=None)
    def holds(pairs):
        turns = tuple(t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a)))
        messages = [{"role": t.role, "content": t.text} for t in turns]
        tokens, trained = tokenizer.encode_segments(template.render(Conversation(None, turns)))
        assert tokens == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        asked = Conversation(None, turns[:-1])
        prompt = tokenizer.encode_segments(template.prompt(asked))[0]
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        assert prompt == theirs.apply_chat_template(messages[:-1], **options)
        found, end = spans(tokens, trained), tokenizer.eos_id if source is MIXTRAL else tokenizer.special["<|im_end|>"]
        assert len(found) == len(pairs)
        for (_, answer), run in zip(pairs, found, strict=True):
            expected = answer if source is MIXTRAL else answer.strip()
            text = tokenizer.decode(run)
            assert run[-1] == end and text.endswith(expected.removeprefix(" ")) and len(text) <= len(expected) + 1

    holds()


@pytest.mark.parametrize(
    ("source", "file"),
    [(MIXTRAL, "tokenizer.model"), (MIXTRAL, "tokenizer.json"), (CHATML, "tokenizer.json")],
    ids=["mixtral-model", "mixtral-json", "chatml-json"],
)
def test_text_never_becomes_a_special_token_of_a_chat_template(source, file, with_template):
    tokenizer = Tokenizer(with_template(source) / file)
    template = get_template("chat_template", tokenizer)
    special = set(tokenizer.special.values())

    @given(conversations(system=False), st.sampled_from(["answers", "last_answer", "all"]))
    @settings(max_examples=60, deadline=None)
    def holds(conversation, train_on):
        segments = template.render(conversation, train_on)
        text = written(s for s in segments if not s.special)
        for turn in conversation.turns:
            assert (turn.text if source is MIXTRAL else turn.text.strip()) in text
        harmless = tuple(replace(turn, text="a") for turn in conversation.turns)
        expected = [s.text for s in template.render(replace(conversation, turns=harmless)) if s.special]
        assert [s.text for s in segments if s.special] == expected
        tokens, trained = tokenizer.encode_segments(segments)
        assert [t for t in tokens if t in special] == [tokenizer.special[name] for name in expected]
        if train_on == "all":
            assert trained.count(False) == (source is MIXTRAL)
        else:
            assert len(spans(tokens, trained)) == (1 if train_on == "last_answer" else len(conversation.turns) // 2)

    holds()


def test_a_chat_template_that_forgets(with_template):
    template = get_template("chat_template", Tokenizer(with_template(FORGETFUL) / "tokenizer.json"))
    with pytest.raises(RecordError, match="writes turn 2 differently when other turns follow"):
        render(TWO, template)
    assert trained_texts(render(TWO, template, "last_answer")) == ["Yes.<|im_end|>"]
    assert trained_texts(render(talk("Why?", "Because."), template)) == ["Because.<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "the chat template refuses it: no system here"),
        ("{{ messages[0].content.__class__.__mro__ }}", "the chat template refuses it: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template refuses it: .*unsafe"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses it"),
        ("{{ 1 // 0 }}", "the chat template refuses it"),
        ("{{ messages[0].content }}", "tokenizer_config.json: the chat template writes no answers"),
        ("{% for m in %}", "tokenizer_config.json: the chat template is not valid Jinja"),
        ([{"name": "rag", "template": "a"}], "no chat_template"),
    ],
)
def test_a_chat_template_that_cannot_be_used(source, message, with_template):
    tokenizer = Tokenizer(with_template(source) / "tokenizer.json")
    with pytest.raises(UserError, match=message) as error:
        render(TWO, get_template("chat_template", tokenizer))
    assert "\n" not in str(error.value)


def test_a_chat_template_whose_tokens_the_tokenizer_lacks(with_template):
    home = with_template(CHATML)
    config = json.loads((home / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "7": {"content": MARKS[0], "special": True},
        "8": {"content": "word", "special": False},
    }
    (home / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": MARKS[1]}))
    assert get_template("chat_template", Tokenizer(home / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.model: lacks the special tokens <\|im_end\|>, <\|im_start\|>, which"):
        get_template("chat_template", Tokenizer(home / "tokenizer.model"))


def test_the_default_one_of_several_chat_templates(with_template):
    several = [{"name": "rag", "template": "a"}, {"name": "default", "template": MIXTRAL}]
    tokenizer = Tokenizer(with_template(several) / "tokenizer.json")
    assert "[INST] Why? [/INST]" in written(render(TWO, get_template("chat_template", tokenizer)))
