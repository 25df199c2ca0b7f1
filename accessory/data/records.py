"""Records of training data, whatever their keys are called: conversations and documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from accessory.console import listed
from accessory.data.fields import Fields, RecordError, whole_text
from accessory.data.record_images import IMAGE, read_images, read_part
from accessory.data.tool_use import ToolCall, answered_call, parse_calls, read_calls, read_tools
from accessory.errors import UserError
from accessory.visual.images import Picture

Role = Literal["user", "assistant", "tool"]
Kind = Literal["conversations", "messages", "instruction", "text", "caption"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""A record is of the kind whose key it has; if it has several of these keys, the first in this order counts."""
_OF_INSTRUCTIONS = ("instruction", "input", "output", "history")

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLERS = ("function_call", "tool_call")
"""Roles whose text is a tool call, as JSON."""
_MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_QUESTIONS = ("question", "prompt", "problem", "query", "instruction", "input")
_ANSWERS = ("answer", "completion", "solution", "response", "output")
"""Other projects' names for questions and answers; an error message uses them to say how to read such a file."""


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str
    train: bool = True  # False: not trained, even if answers are
    context: str = ""  # an instruction's input, which the alpaca template sets apart
    calls: tuple[ToolCall, ...] = ()  # tool calls of an assistant, beside its text
    tool: str = ""  # in a tool's turn, the name of the tool
    call_id: str = ""  # in a tool's turn, the id of the call that it answers

    @property
    def question(self) -> str:
        """The text with its context."""
        return f"{self.text}\n\n{self.context}" if self.context else self.text


@dataclass(frozen=True)
class Conversation:
    """Alternating questions and answers, with tool turns between an answer and the next. A training record ends with an
    answer, a prompt with a question or a tool turn."""

    system: str | None
    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()  # in the order of the IMAGE marks, if the text has them
    tools: tuple[Mapping[str, Any], ...] = ()  # the tools that may be called, in OpenAI's form
    label: Any = None  # the target of a classifier
    is_instruction: bool = field(default=False, compare=False)  # whether the file has it as an instruction


@dataclass(frozen=True)
class Document:
    """A text to be learnt as it is. ``others``: further captions of the same images, each a sample of its own."""

    text: str
    images: tuple[Picture, ...] = ()
    label: Any = None
    others: tuple[str, ...] = ()


Record = Conversation | Document


@dataclass(frozen=True)
class Columns:
    """The names that a source's records use for the keys read here; null: the same name."""

    conversations: str | None = None
    messages: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    text: str | None = None
    caption: str | None = None
    system: str | None = None
    tools: str | None = None
    image: str | None = None
    images: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for key, column in self.given.items():
            if list(self.given.values()).count(column) > 1:
                raise UserError(f"{key}: '{column}' is named twice")

    @property
    def given(self) -> dict[str, str]:
        """The records' name for each key that is renamed."""
        return {key: column for key, column in vars(self).items() if column is not None}


@dataclass(frozen=True)
class RecordForm:
    """How a source's records are read.

    Attributes:
        kind: None: recognised from each record's keys. ignore: keys to leave out, at any level of a record.
    """

    kind: Kind | None = None
    columns: Columns = field(default_factory=Columns)
    ignore: tuple[str, ...] = ()


def read_record(raw: Any, form: RecordForm = RecordForm()) -> Record:
    """Check a record and convert it to a ``Conversation`` or ``Document``.

    Raises:
        RecordError: it is of no known kind, breaks the rules of its kind, or holds a key that nothing uses; the message
            names the turn.
    """
    record = Fields(raw, form.ignore, form.columns.given)
    _refuse_preferences(record)
    kind = form.kind or _recognise(record)
    if kind not in record.raw:
        raise RecordError(f"no {record.name(kind)} among its keys; it has {record.names()}")
    label = record.take("label")
    label = label if record.says("label") else None
    if kind == "text":
        found: Record = Document(_document(record), read_images(record), label)
    elif kind == "caption":
        captions = _captions(record)
        found = Document(captions[0], read_images(record, "url"), label, captions[1:])
    elif kind == "instruction":
        system = record.text("system") or None
        turns = _instruction(record)
        found = Conversation(system, turns, read_images(record), read_tools(record), label, is_instruction=True)
    else:
        system, turns = _conversation(record, kind)
        found = Conversation(system, turns, read_images(record), read_tools(record), label)
    if form.kind:  # the same record in other forms, which the mix entry did not choose
        for key in (*KINDS, *(_OF_INSTRUCTIONS if "instruction" in record.raw else ())):
            record.take(key)
    elif record.says("text") and all(text.strip() in str(record.raw["text"]) for text in record.texts):
        record.take("text")  # in Alpaca's files it is the whole record written in its template
    record.refuse_rest()
    return found


def read_question(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Convert messages in OpenAI's form to a conversation to be answered: the last one is a question or a tool's result.

    Raises:
        RecordError: they break the rules of a conversation, or hold a key that nothing uses; the message names the turn.
    """
    record = Fields({"messages": messages, "tools": tools})
    system, turns = _conversation(record, "messages", asks=True)
    return Conversation(system, turns, tuple(record.images), read_tools(record))


def as_document(question: Conversation) -> Document:
    """The text that a model trained on documents continues: that of a single question, without the line breaks after its
    images.

    Raises:
        RecordError: there is anything but one question.
    """
    if question.system or question.tools or len(question.turns) > 1:
        raise RecordError("the model was trained on texts, and goes on with one: it has no place for turns")
    return Document(question.turns[0].text.replace(f"{IMAGE}\n", IMAGE), question.images)


def _recognise(record: Fields) -> Kind:
    """The kind of a record, from its keys: the first whose key has a value, else the first whose key is there."""
    for kind in (*filter(record.says, KINDS), *KINDS):
        if kind in record.raw:
            return kind
    found = [next(filter(record.says, names), None) for names in (_QUESTIONS, _ANSWERS)]
    if all(found) and _is_verdict(record.raw.get("label")):
        raise RecordError(_KTO)
    hint = f"; read it with columns: {{instruction: {found[0]}, output: {found[1]}}} in the mix entry" if all(found) else ""
    raise RecordError(f"none of {', '.join(map(repr, KINDS))} among its keys; it has {record.names()}{hint}")


_KTO = "it is a KTO record (its label says whether the answer is good), and there is no such objective yet"


def label_number(record: Record, labels: Sequence[str]) -> int | None:
    """The index of a record's label in a classifier's ``labels``; None if ``labels`` is empty, for next-token prediction.

    A record gives its label by name, or by number if no name is a number.

    Raises:
        RecordError: the record has no label or an unknown one, or it has one and the run does not use labels.
    """
    if not labels:
        refuse_label(record)
        return None
    among = f"the run's labels are {listed(labels)}"
    if record.label is None:
        raise RecordError(
            f"it has no label, and {among}: name the key that says it in the mix entry, columns: {{label: KEY}}"
        )
    said = str(record.label).lower() if isinstance(record.label, bool) else str(record.label)
    if said in labels:
        return labels.index(said)
    if said.isdecimal() and int(said) < len(labels) and not any(map(str.isdecimal, labels)):
        return int(said)
    raise RecordError(f"its label is {said[:40]!r}, and {among}")


def refuse_label(record: Record) -> None:
    """Refuse a record with a label: the run trains next-token prediction."""
    if isinstance(record, Conversation) and _is_verdict(record.label):
        raise RecordError(f"{_KTO}: to learn every answer, good or bad, set ignore: [label] in the mix entry")
    if record.label is not None:
        raise RecordError(
            f"it has a label ({str(record.label)[:40]!r}), but the run trains next-token prediction: set model.labels to "
            "train a classifier, or ignore: [label] in the mix entry to do without the label"
        )


def _is_verdict(label: Any) -> bool:
    return isinstance(label, bool) or str(label).lower() in ("true", "false")


def _refuse_preferences(record: Fields) -> None:
    if record.says("kto_tag"):
        raise RecordError(_KTO)
    pair = list(filter(record.says, ("chosen", "rejected")))
    if pair:
        raise RecordError(
            f"it is a preference record ({' and '.join(map(repr, pair))}), and there is no such objective yet: to learn the "
            "chosen answer alone, name it under columns and 'rejected' under ignore in the mix entry"
        )


def _captions(record: Fields) -> tuple[str, ...]:
    """One caption, or several of the same image."""
    value, name = record.take("caption"), record.name("caption")
    captions = value if isinstance(value, list | tuple) else [value]
    if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise RecordError(f"{name} must be a text, or a list of texts, and none of them empty")
    return tuple(whole_text(text, name) for text in captions)


def _document(record: Fields) -> str:
    text = record.text("text", needed=True)
    if not text.strip():
        raise RecordError(f"{record.name('text')} is empty")
    return text


def _instruction(record: Fields) -> tuple[Turn, ...]:
    question, answer = record.text("instruction", needed=True), record.text("output", needed=True)
    if not answer.strip():
        raise RecordError(f"{record.name('output')} is empty: there is no answer to learn")
    turns = []
    history = record.take("history") or []
    for number, pair in enumerate(history if isinstance(history, list | tuple) else [history], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("'history' must be a list of earlier questions and answers: [[question, answer], ...]")
        earlier, said = (whole_text(text, f"history {number}") for text in pair)
        if not said.strip():
            raise RecordError(f"history {number} is without an answer")
        turns += [Turn("user", earlier), Turn("assistant", said)]
        record.texts += [earlier, said]
    return *turns, Turn("user", question, context=record.text("input")), Turn("assistant", answer)


def _conversation(record: Fields, kind: Kind, asks: bool = False) -> tuple[str | None, tuple[Turn, ...]]:
    """The system prompt and the turns, which end with an answer; if ``asks``, with a question or a tool's result."""
    items = record.take(kind)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise RecordError(f"{record.name(kind)} must be a list of turns with at least one question and answer")
    system = record.text("system")
    if not isinstance(items[0], Mapping) or _speaker(record.inside(items[0], "turn 1")) != "system":
        return system or None, _turns(record, items, 0, asks)
    if system:
        raise RecordError("turn 1 is from 'system', but there is a 'system' beside the turns too")
    turn = record.inside(items[0], "turn 1")
    _speaker(turn), _flag(turn)
    system = _content(turn)
    turn.refuse_rest()
    return system or None, _turns(record, items, 1, asks)


def _turns(record: Fields, items: Sequence[Any], start: int, asks: bool) -> tuple[Turn, ...]:
    """Read the turns from ``start`` on, and check their order."""
    turns: list[Turn] = []
    calls: list[ToolCall] = []
    waiting: list[ToolCall] = []  # calls that no tool turn has answered yet
    for number, item in enumerate(items[start:], start + 1):
        if not isinstance(item, Mapping):
            raise RecordError(f"turn {number}{_NO_TURN}")
        turn = record.inside(item, f"turn {number}")
        said = _speaker(turn)
        role, allowed = _ROLES.get(said), _MAY_FOLLOW[turns[-1].role if turns else None]
        if role is None or role not in allowed:
            names = {"user": "human", "assistant": "gpt"} if "from" in turn.raw else {}
            expected = names.get(allowed[0], allowed[0])
            raise RecordError(f"turn {number} is from '{said}', expected '{expected}': turns must alternate")
        if role == "assistant":
            text, made = _answer(turn, said, len(calls))
            calls += made
            waiting = list(made)
            turns.append(Turn(role, text, _flag(turn), calls=made))
        elif role == "tool":
            tool, call_id = answered_call(turn, waiting)
            turns.append(Turn(role, _content(turn), _flag(turn), tool=tool, call_id=call_id))
        else:
            turns.append(Turn(role, _content(turn), _flag(turn)))
        turn.refuse_rest()
    if not turns:
        raise RecordError("turn 1 is from 'system', and no question follows")
    if asks and turns[-1].role == "assistant":
        raise RecordError("the last turn is an answer: there is no question to answer")
    if not asks and turns[-1].role != "assistant":
        raise RecordError(f"the last turn is a {'question' if turns[-1].role == 'user' else 'tool turn'} without an answer")
    return tuple(turns)


_NO_TURN = " must be an object with the texts 'from' and 'value', or 'role' and 'content'"


def _speaker(turn: Fields) -> str:
    role = turn.take("from" if "from" in turn.raw else "role")
    if not isinstance(role, str):
        raise RecordError(f"{turn.where} must say who speaks: 'from' (or 'role') is {role!r}")
    return whole_text(role, f"{turn.where}: who speaks")


def _answer(turn: Fields, said: str, number: int) -> tuple[str, tuple[ToolCall, ...]]:
    """The text and the calls of an assistant's turn; ``number``: how many calls came before."""
    if said in _CALLERS:
        return "", parse_calls(_content(turn), turn, number)
    calls = read_calls(turn, number)
    text = _content(turn) if not calls or turn.says("value") or turn.says("content") else ""
    if not text.strip() and not calls:
        raise RecordError(f"{turn.where} is an empty answer")
    return text, calls


def _content(turn: Fields) -> str:
    """The text of a turn, which may be a list of parts as in OpenAI's form."""
    key = "value" if "value" in turn.raw else "content"
    value = turn.take(key)
    if isinstance(value, list | tuple):
        parts = [_part(turn, part, number) for number, part in enumerate(value, 1)]
        # an image stands on a line of its own, as in LLaVA's records
        return "".join(part + "\n" * (part == IMAGE and number < len(parts)) for number, part in enumerate(parts, 1))
    if not isinstance(value, str):
        raise RecordError(f"{turn.where}{_NO_TURN}")
    turn.texts.append(whole_text(value, turn.where))
    return value


def _part(turn: Fields, raw: Any, number: int) -> str:
    kind = raw.get("type") if isinstance(raw, Mapping) else type(raw).__name__
    if kind not in ("text", "image_url", "image"):
        raise RecordError(f"{turn.where} has a part of type {kind!r}; expected parts of type 'text' or 'image_url' only")
    part = turn.inside(raw, f"{turn.where}, part {number}")
    part.take("type")
    if kind == "text":
        text = part.text("text", needed=True)
        part.refuse_rest()
        return text
    read_part(part, kind)
    part.refuse_rest()
    return IMAGE


def _flag(turn: Fields) -> bool:
    """Whether a turn may be trained, by its ``train`` and ``weight``."""
    train, weight = turn.take("train"), turn.take("weight")
    if not isinstance(train, bool | None):
        raise RecordError(f"{turn.where}: 'train' must be true or false, found {train!r}")
    if weight not in (0, 1, None):
        raise RecordError(f"{turn.where}: 'weight' must be 0 or 1, found {weight!r}")
    return train is not False and weight != 0
