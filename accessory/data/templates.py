"""How a record becomes tokens: templates by name.

A template writes a conversation as segments of text and special tokens, of which the answers (with what ends them) are
trained. What it writes for a conversation that ends with a question is what a model is given to answer it: the beginning
of what it is trained on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from accessory.config import nearest
from accessory.data.chat_template import chat_template
from accessory.data.records import (
    Conversation,
    Document,
    ImageError,
    Kind,
    Record,
    RecordError,
    Turn,
    read_record,
    recognise,
)
from accessory.data.tokenizer import BOS, EOS, Segment, Tokenizer
from accessory.errors import UserError

TrainOn = Literal["answers", "last_answer", "all"]


@dataclass(frozen=True)
class Template:
    """One way to write records.

    Attributes:
        write: the segments of a record; what belongs to a turn is trained if the turn is (``Turn.train``).
        stop: what ends an answer, if not ``</s>``; where generation stops.
        documents: whether it writes documents rather than conversations.
    """

    name: str
    write: Callable[[Any], Iterator[Segment]]
    stop: tuple[str, ...] = ()
    documents: bool = False

    def render(self, record: Record, train_on: TrainOn = "answers") -> list[Segment]:
        """The segments of a record to be trained on.

        Args:
            train_on: which answers; ``all``: questions and markup as well. Answers that say ``train: false`` never are.

        Raises:
            RecordError: the template has no place for what the record holds.
        """
        if isinstance(record, Document) != self.documents:
            fits, found = ("documents", "a conversation") if self.documents else ("conversations", "a document")
            raise RecordError(f"the template '{self.name}' is for {fits}, and this is {found}")
        if isinstance(record, Document):
            return list(self.write(record))
        if record.image:
            raise ImageError(record.image)
        last = max(number for number, turn in enumerate(record.turns) if turn.role == "assistant")
        turns = tuple(
            replace(turn, train=turn.train and (number == last or train_on != "last_answer"))
            if turn.role == "assistant"
            else replace(turn, train=train_on == "all")
            for number, turn in enumerate(record.turns)
        )
        return list(self.write(replace(record, turns=turns)))

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """What a model is given to answer a conversation that ends with a question."""
        if self.documents:
            raise UserError(f"the template '{self.name}' is for documents, not for questions: continue the raw text instead")
        return list(self.write(conversation))


def render(
    raw: Any, template: Template | None = None, train_on: TrainOn = "answers", kind: Kind | None = None
) -> list[Segment]:
    """The segments of a record as it stands in a file.

    Args:
        template: None: dialog for conversations, alpaca for instructions, plain for texts.
        kind: of the record; None: recognised by its keys.

    Raises:
        RecordError: it breaks the rules of its kind, or the template has no place for it.
    """
    kind = kind or recognise(raw)
    record = read_record(raw, kind)
    return (template or TEMPLATES[_DEFAULTS[kind]]).render(record, train_on)


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """A template by its name; ``chat_template`` is the tokenizer's own.

    Raises:
        UserError: there is no such template, or it is not for this tokenizer.
    """
    if name == "chat_template":
        if tokenizer is None:
            raise UserError("the template 'chat_template' is a tokenizer's own, and there is no tokenizer yet")
        return Template(name, *chat_template(tokenizer))
    if name not in TEMPLATES:
        raise UserError(f"unknown template '{name}'{nearest(name, [*TEMPLATES, 'chat_template'])}")
    if name == "mixtral-instruct" and tokenizer and "[INST]" in tokenizer.special:
        raise UserError(f"{tokenizer.path}: in this tokenizer [INST] is a special token, in 'mixtral-instruct' it is text")
    return TEMPLATES[name]


DIALOG_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOG_STOP = "\n###"


def _dialog(conversation: Conversation) -> Iterator[Segment]:
    """The reference project's: ``{system}\\n\\n### Human: {q}\\n### Assistant: {a}\\n###``, then `` Human: ...``."""
    yield _begin()
    yield Segment(f"{conversation.system or DIALOG_SYSTEM}\n\n###", conversation.turns[0].train)
    for turn in _without_tools(conversation, "dialog"):
        if turn.role == "user":
            yield Segment(f" Human: {turn.question}\n### Assistant:", turn.train)
        else:
            yield Segment(f" {turn.text}{DIALOG_STOP}", turn.train)


_ALPACA = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
_ALPACA_CONTEXT = ", paired with an input that provides further context"


def _alpaca(conversation: Conversation) -> Iterator[Segment]:
    """Stanford Alpaca's, as the reference project has it."""
    if conversation.system or len(conversation.turns) > 2:
        what = "a system prompt" if conversation.system else "more than one question and answer"
        raise RecordError(f"the template 'alpaca' has no place for {what}")
    question, *answers = conversation.turns
    yield _begin()
    prompt = _ALPACA.format(
        context=_ALPACA_CONTEXT if question.context else "",
        instruction=question.text,
        input=f"### Input:\n{question.context}\n\n" if question.context else "",
    )
    yield Segment(prompt, question.train)
    for answer in answers:
        yield Segment(answer.text, answer.train)
        yield Segment(EOS, answer.train, special=True)


def _mixtral_instruct(conversation: Conversation) -> Iterator[Segment]:
    """As Mixtral 8x7B Instruct was trained: ``<s> [INST] q [/INST] a</s> [INST] ...``, the system prompt before the first
    question. Questions and answers are encoded apart, as Mistral does it."""
    yield _begin()
    system = f"{conversation.system}\n\n" if conversation.system else ""
    for turn in _without_tools(conversation, "mixtral-instruct"):
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
    for turn in _without_tools(conversation, "vicuna"):
        if turn.role == "user":
            yield Segment(f"USER: {turn.question} ASSISTANT:", turn.train)
        else:
            yield Segment(f" {turn.text}", turn.train)
            yield Segment(EOS, turn.train, special=True)


def _plain(document: Document) -> Iterator[Segment]:
    yield _begin()
    yield Segment(document.text, True)
    yield Segment(EOS, True, special=True)


def _begin() -> Segment:
    return Segment(BOS, False, special=True)


def _without_tools(conversation: Conversation, name: str) -> tuple[Turn, ...]:
    if any(turn.role == "tool" for turn in conversation.turns):
        raise RecordError(f"the template '{name}' has no place for a tool's turn")
    return conversation.turns


TEMPLATES = {
    template.name: template
    for template in (
        Template("mixtral-instruct", _mixtral_instruct),
        Template("dialog", _dialog, (DIALOG_STOP,)),
        Template("alpaca", _alpaca),
        Template("chatml", _chatml, ("<|im_end|>",)),
        Template("vicuna", _vicuna),
        Template("plain", _plain, documents=True),
    )
}
_DEFAULTS: dict[Kind, str] = {"conversations": "dialog", "messages": "dialog", "instruction": "alpaca", "text": "plain"}
