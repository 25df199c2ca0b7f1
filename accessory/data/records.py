"""What files of training data hold, whatever their keys are called: conversations and documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accessory.errors import UserError

Role = Literal["user", "assistant", "tool"]
Kind = Literal["conversations", "messages", "instruction", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Each is told by the key of its name; of several, the first one counts."""

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool"}
_MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class RecordError(UserError):
    """A record that cannot be used; the message says why."""


def shortened(image: str) -> str:
    """An image's name for a message: some are the whole image, as a data: URL."""
    return image if len(image) <= 100 else f"{image[:100]}..."


class ImageError(RecordError):
    """A record with an image, which no model here can see yet.

    Attributes:
        image: its path, as the record has it.
    """

    def __init__(self, image: str):
        super().__init__(f"it has an image ({shortened(image)}), and this model reads text only")
        self.image = image


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str
    train: bool = True  # False: not to be learnt, even if answers are
    context: str = ""  # an instruction's input, which the alpaca template sets apart

    @property
    def question(self) -> str:
        """The text with its context."""
        return f"{self.text}\n\n{self.context}" if self.context else self.text


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn; tool turns stand between an answer and the next. Ends with an answer to be trained on,
    with a question to be answered."""

    system: str | None
    turns: tuple[Turn, ...]
    image: str | None = None


@dataclass(frozen=True)
class Document:
    """A text to be learnt as it is."""

    text: str


Record = Conversation | Document


def recognise(raw: Any) -> Kind:
    """The kind of a record, by its keys."""
    for kind in KINDS:
        if kind in _object(raw):
            return kind
    raise RecordError(f"none of {', '.join(map(repr, KINDS))} among its keys; it has {_keys(raw)}")


def read_record(raw: Any, kind: Kind | None = None) -> Record:
    """Check a record and bring it into one form.

    Args:
        kind: None: recognised.

    Raises:
        RecordError: it is of no known kind, or breaks the rules of its kind; says in which turn.
    """
    kind = kind or recognise(raw)
    if kind not in _object(raw):
        raise RecordError(f"no '{kind}' among its keys; it has {_keys(raw)}")
    if kind == "text":
        document = Document(_text(raw["text"], "'text'"))
        if not document.text.strip():
            raise RecordError("'text' is empty")
        return document
    image = raw.get("image")
    if image is not None:
        _text(image, "'image'", "path")
    system = _text_or_nothing(raw, "system") or None
    if kind == "instruction":
        return Conversation(system, _instruction(raw), image or None)
    items = raw[kind]
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise RecordError(f"'{kind}' must be a list of turns with at least one question and answer")
    if isinstance(items[0], Mapping) and _role(items[0], 1) == "system":
        if system:
            raise RecordError("turn 1 is from 'system', but there is a 'system' beside the turns too")
        return Conversation(_content(items[0], 1) or None, _turns(items, 1), image or None)
    return Conversation(system, _turns(items, 0), image or None)


def _instruction(raw: Mapping[str, Any]) -> tuple[Turn, ...]:
    question, answer = _text(raw["instruction"], "'instruction'"), _text(raw.get("output"), "'output'")
    if not answer.strip():
        raise RecordError("'output' is empty: there is no answer to learn")
    return Turn("user", question, context=_text_or_nothing(raw, "input")), Turn("assistant", answer)


def _turns(items: Sequence[Any], start: int) -> tuple[Turn, ...]:
    """The turns from ``start`` on, whose order is checked."""
    turns: list[Turn] = []
    for number, item in enumerate(items[start:], start + 1):
        if not isinstance(item, Mapping):
            raise RecordError(f"turn {number} must be an object with the texts 'from' and 'value', or 'role' and 'content'")
        said = _role(item, number)
        role = _ROLES.get(said)
        allowed = _MAY_FOLLOW[turns[-1].role if turns else None]
        if role not in allowed:
            names = {"user": "human", "assistant": "gpt"} if "from" in item else {}
            expected = names.get(allowed[0], allowed[0])
            raise RecordError(f"turn {number} is from '{said}', expected '{expected}': turns must alternate")
        text = _content(item, number)
        if role == "assistant" and not text.strip():
            raise RecordError(f"turn {number} is an empty answer")
        turns.append(Turn(role, text, _flag(item, number)))
    if not turns:
        raise RecordError("turn 1 is from 'system', and no question follows")
    if turns[-1].role != "assistant":
        raise RecordError(f"the last turn is a {'question' if turns[-1].role == 'user' else 'tool turn'} without an answer")
    return tuple(turns)


def _role(turn: Mapping[str, Any], number: int) -> str:
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str):
        raise RecordError(f"turn {number} must say who speaks: 'from' (or 'role') is {role!r}")
    return _text(role, f"turn {number}: who speaks")


def _content(turn: Mapping[str, Any], number: int) -> str:
    """The text of a turn; OpenAI's may come in parts."""
    if turn.get("tool_calls"):
        raise RecordError(f"turn {number} has 'tool_calls': write the call into its text, as the model should write it")
    value = turn.get("value", turn.get("content"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RecordError(f"turn {number} has a part of type {kind!r}; expected parts of type 'text' only")
        return "".join(_text(part.get("text"), f"turn {number}: a part's 'text'") for part in value)
    if not isinstance(value, str):
        raise RecordError(f"turn {number} must be an object with the texts 'from' and 'value', or 'role' and 'content'")
    return _text(value, f"turn {number}")


def _flag(turn: Mapping[str, Any], number: int) -> bool:
    train, weight = turn.get("train", True), turn.get("weight", 1)
    if not isinstance(train, bool):
        raise RecordError(f"turn {number}: 'train' must be true or false, found {train!r}")
    if weight not in (0, 1):
        raise RecordError(f"turn {number}: 'weight' must be 0 or 1, found {weight!r}")
    return train and bool(weight)


def _object(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecordError(f"expected an object, found {type(raw).__name__}")
    return raw


def _keys(raw: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, raw)) or "none"


def _text_or_nothing(raw: Mapping[str, Any], key: str) -> str:
    return "" if raw.get(key) is None else _text(raw[key], f"'{key}'")


def _text(value: Any, what: str, kind: str = "text") -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} must be a {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} holds half a character (a lone surrogate)") from error
    return value
