"""Templates by name: how a record is written for the tokenizer.

A template writes a conversation as segments of text and special tokens; the answers and what ends them are trained. For a
conversation that ends with a question it writes the model's prompt, which is the beginning of what the model is trained on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from accessory.config import nearest
from accessory.data.chat_template import chat_template, has_chat_template
from accessory.data.fields import RecordError
from accessory.data.records import Conversation, Document, Record
from accessory.data.tokenizer import BOS, EOS, Segment, Tokenizer
from accessory.errors import UserError
from accessory.visual.images import shortened

TrainOn = Literal["answers", "last_answer", "all"]
ToolPlaces = Literal["none", "results", "all"]


@dataclass(frozen=True)
class Template:
    """One way to write records.

    Attributes:
        write: the segments of a record; a turn's segments are trained if the turn is (``Turn.train``).
        stop: texts that end an answer, if not ``</s>``; generation stops there.
        documents: whether it writes documents rather than conversations.
        tools: which parts of tool use it has a place for: none, only the tools' results, or tools and calls as well.
        system: whether it has a place for a system prompt.
    """

    name: str
    write: Callable[[Any], Iterator[Segment]]
    stop: tuple[str, ...] = ()
    documents: bool = False
    tools: ToolPlaces = "none"
    system: bool = True

    def render(self, record: Record, train_on: TrainOn = "answers") -> list[Segment]:
        """The segments of a record to be trained on.

        Args:
            train_on: what to train: answers, the last answer, or questions and markup as well (``all``). Answers with
                ``train: false`` are never trained.

        Raises:
            RecordError: the template has no place for what the record holds.
        """
        if isinstance(record, Document) != self.documents:
            fits, found = ("documents", "a conversation") if self.documents else ("conversations", "a document")
            raise RecordError(f"the template '{self.name}' is for {fits}, and this is {found}")
        _refuse_images(record)
        if isinstance(record, Document):
            return list(self.write(record))
        self._check_places(record)
        last = max(number for number, turn in enumerate(record.turns) if turn.role == "assistant")
        turns = tuple(
            replace(turn, train=turn.train and (number == last or train_on != "last_answer"))
            if turn.role == "assistant"
            else replace(turn, train=train_on == "all")
            for number, turn in enumerate(record.turns)
        )
        return list(self.write(replace(record, turns=turns)))

    def prompt(self, asked: Record) -> list[Segment]:
        """The segments of a prompt: a conversation that ends with a question, or a text to continue."""
        _refuse_images(asked)
        if self.documents and isinstance(asked, Document):
            return [_begin(), Segment(asked.text, False)]
        if self.documents or isinstance(asked, Document):
            raise UserError(f"the template '{self.name}' is for documents, not for questions: continue the raw text instead")
        self._check_places(asked)
        return list(self.write(asked))

    def _check_places(self, conversation: Conversation) -> None:
        turns = conversation.turns
        if conversation.system and not self.system:
            raise RecordError(
                f"the template '{self.name}' has no place for a system prompt", ": name another one in the mix entry"
            )
        if self.tools != "all" and any(turn.calls for turn in turns):
            what = "a tool's call"
        elif self.tools != "all" and conversation.tools:
            what = "a list of tools"
        elif self.tools == "none" and any(turn.role == "tool" for turn in turns):
            what = "a tool's turn"
        else:
            return
        raise RecordError(
            f"the template '{self.name}' has no place for {what}",
            ": name the model's own in the mix entry, template: chat_template",
        )


def _refuse_images(record: Record) -> None:
    """A visual model's images have been taken out of the record before (``data/placement.py``)."""
    if record.images:
        raise RecordError(f"it has an image ({shortened(str(record.images[0]))}), and this model reads text only")


def default_template(record: Record) -> Template:
    """The template for a record if none is named."""
    if isinstance(record, Document):
        return TEMPLATES["plain"]
    return TEMPLATES["alpaca" if record.is_instruction else "dialog"]


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """A template by its name; ``chat_template`` is the tokenizer's own.

    Raises:
        UserError: there is no such template, or it is not for this tokenizer.
    """
    if name == "chat_template":
        if tokenizer is None:
            raise UserError("the template 'chat_template' is a tokenizer's own, and there is no tokenizer yet")
        return Template(name, *chat_template(tokenizer), tools="all")
    if name not in TEMPLATES:
        raise UserError(f"unknown template '{name}'{nearest(name, [*TEMPLATES, 'chat_template'])}")
    if name == "mixtral-instruct" and tokenizer and "[INST]" in tokenizer.special:
        raise UserError(f"{tokenizer.path}: in this tokenizer [INST] is a special token, in 'mixtral-instruct' it is text")
    return TEMPLATES[name]


def model_template(trained: str | None, tokenizer: Tokenizer) -> Template:
    """The default template for prompts to a model: that of its training, else its tokenizer's own, else ``dialog``."""
    own = "chat_template" if has_chat_template(tokenizer) else "dialog"
    return get_template(trained or own, tokenizer)


DIALOG_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOG_STOP = "\n###"


def _dialog(conversation: Conversation) -> Iterator[Segment]:
    """The reference project's: ``{system}\\n\\n### Human: {q}\\n### Assistant: {a}\\n###``, then `` Human: ...``."""
    yield _begin()
    yield Segment(f"{conversation.system or DIALOG_SYSTEM}\n\n###", conversation.turns[0].train)
    for turn in conversation.turns:
        if turn.role == "user":
            yield Segment(f" Human: {turn.question}\n### Assistant:", turn.train)
        else:
            yield Segment(f" {turn.text}{DIALOG_STOP}", turn.train)


ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request.\n\n"
)
ALPACA_CONTEXT = ", paired with an input that provides further context"


def _alpaca(conversation: Conversation) -> Iterator[Segment]:
    """Stanford Alpaca's, as in the reference project; a question after an answer begins with a blank line."""
    first = conversation.turns[0]
    yield _begin()
    before = ALPACA.format(context=ALPACA_CONTEXT if first.context else "")
    for turn in conversation.turns:
        if turn.role == "user":
            given = f"### Input:\n{turn.context}\n\n" if turn.context else ""
            yield Segment(f"{before}### Instruction:\n{turn.text}\n\n{given}### Response:", turn.train)
            before = "\n\n"
        else:
            yield Segment(turn.text, turn.train)
            yield Segment(EOS, turn.train, special=True)


PROMPTS = {
    "shortqa": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request using a "
        "single word or phrase.\n\n### Instruction:\n",
        "\n\n### Response:",
    ),
    "qg": ("Generate a question whose answer is:\n", "\n\nQuestion:\n"),
}
"""The text before and after a question in other prompt types of the reference project."""


def _prompted(name: str, conversation: Conversation) -> Iterator[Segment]:
    """One of PROMPTS; a question after an answer begins with a blank line."""
    before, behind = PROMPTS[name]
    yield _begin()
    for number, turn in enumerate(conversation.turns):
        if turn.role == "user":
            yield Segment("\n\n" * (number > 0) + before + turn.question + behind, turn.train)
        else:
            yield Segment(turn.text, turn.train)
            yield Segment(EOS, turn.train, special=True)


def _bare(conversation: Conversation) -> Iterator[Segment]:
    """Questions and answers without markup. They are encoded apart, since no space says where the answer begins."""
    yield _begin()
    for turn in conversation.turns:
        yield Segment(turn.question, turn.train, apart=turn.role == "assistant")
        if turn.role == "assistant":
            yield Segment(EOS, turn.train, special=True)


def _mixtral_instruct(conversation: Conversation) -> Iterator[Segment]:
    """The format of Mixtral 8x7B Instruct: ``<s> [INST] q [/INST] a</s> [INST] ...``, with the system prompt before the
    first question. Questions and answers are encoded apart, as Mistral does it."""
    yield _begin()
    system = f"{conversation.system}\n\n" if conversation.system else ""
    for turn in conversation.turns:
        if turn.role == "user":
            yield Segment(f"[INST] {system}{turn.question} [/INST]", turn.train)
            system = ""
        else:
            yield Segment(turn.text, turn.train, apart=True)
            yield Segment(EOS, turn.train, special=True)


def _chatml(conversation: Conversation) -> Iterator[Segment]:
    """``<|im_start|>user\\n{q}<|im_end|>\\n<|im_start|>assistant\\n{a}<|im_end|>\\n``; a system turn if there is one."""
    yield _begin()
    markup = conversation.turns[0].train
    said: list[tuple[str, str, bool]] = [(turn.role, turn.question, turn.train) for turn in conversation.turns]
    if conversation.system:
        said.insert(0, ("system", conversation.system, markup))
    for role, text, train in said:
        yield Segment("<|im_start|>", markup, special=True)
        yield Segment(f"{role}\n", markup)
        yield Segment(text, train)
        yield Segment("<|im_end|>", train, special=True)
        yield Segment("\n", markup)
    if said[-1][0] != "assistant":
        yield Segment("<|im_start|>", markup, special=True)
        yield Segment("assistant\n", markup)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _vicuna(conversation: Conversation) -> Iterator[Segment]:
    """Vicuna 1.1's: ``{system} USER: {q} ASSISTANT: {a}</s>USER: ...``."""
    yield _begin()
    yield Segment(f"{conversation.system or VICUNA_SYSTEM} ", conversation.turns[0].train)
    for turn in conversation.turns:
        if turn.role == "user":
            yield Segment(f"USER: {turn.question} ASSISTANT:", turn.train)
        else:
            yield Segment(f" {turn.text}", turn.train)
            yield Segment(EOS, turn.train, special=True)


def _plain(document: Document) -> Iterator[Segment]:
    yield _begin()
    yield Segment(document.text, True)
    if document.label is None:  # a text to classify has no </s>, as Hugging Face's tokenizers write it
        yield Segment(EOS, True, special=True)


def _begin() -> Segment:
    return Segment(BOS, False, special=True)


TEMPLATES = {
    template.name: template
    for template in (
        Template("mixtral-instruct", _mixtral_instruct),
        Template("dialog", _dialog, (DIALOG_STOP,)),
        Template("alpaca", _alpaca, system=False),
        Template("chatml", _chatml, ("<|im_end|>",), tools="results"),
        Template("vicuna", _vicuna),
        *(Template(name, partial(_prompted, name), system=False) for name in PROMPTS),
        Template("bare", _bare, system=False),
        Template("plain", _plain, documents=True),
    )
}
