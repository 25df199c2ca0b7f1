"""Texts of every sort, and conversations of them."""

import json

from hypothesis import strategies as st

from accessory.data.records import Conversation, RecordForm, Turn, read_record
from accessory.data.templates import default_template

MARKS = ["<|im_start|>", "<|im_end|>"]
"""The special tokens of ChatML."""

FRAGMENTS = [
    *("</s>", "<s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", " [/INST] ", "<|im_start|>", "<|im_end|>\n", "<bos>", "<eos>"),
    *("### Human: ", "### Assistant:", "\n###", "USER: ", " ASSISTANT:", "### Response:", "{instruction}", "{{}} %s {0}"),
    *(
        " ",
        "  ",
        "\n",
        "\r\n\n",
        "\t",
        "\0",
        "naïve",
        "Größe",
        "你好",
        "语",
        "👍🏽",
        "👩‍👩‍👧",
        "🇨🇭",
        "e\u0301",
        "\ue000",
        "\uffff",
        "\U0010ffff",
    ),
    *("The answer", "is", ": 42.", "x" * 20, "123,456", "'s"),
]
# SentencePiece has one token for a blank and for U+2581, and so cannot give the second one back
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(CHARACTERS, max_size=6), max_size=8).map("".join)
ANSWERS = TEXTS.filter(str.strip)


@st.composite
def conversations(draw, system=True):
    pairs = draw(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3))
    prompt = draw(st.none() | TEXTS.filter(bool)) if system else None
    return Conversation(prompt, tuple(t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))))


def render(raw, template=None, train_on="answers", form=None):
    """The segments of a record as it stands in a file, as a mix makes them."""
    record = read_record(raw, form or RecordForm())
    return (template or default_template(record)).render(record, train_on)


def written(segments):
    return "".join(segment.text for segment in segments)


def trained_texts(segments):
    """The stretches that are trained."""
    runs, last = [], False
    for segment in segments:
        if segment.trained:
            runs = runs if last else [*runs, ""]
            runs[-1] += segment.text
        last = segment.trained
    return runs


def spans(tokens, trained):
    """Runs of trained tokens."""
    runs, last = [], False
    for token, is_trained in zip(tokens, trained, strict=True):
        if is_trained:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = is_trained
    return runs


def add_token(path, name, **flags):
    content = json.loads(path.read_text())
    number = max(max(content["model"]["vocab"].values()), *(t["id"] for t in content["added_tokens"])) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": number, "content": name} | plain | flags)
    path.write_text(json.dumps(content))


def talk(*texts, **more):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]} | more


TWO = talk("Why?", "Because.", "Really?", "Yes.")
