"""A tokenizer's own chat template, in Jinja, as Hugging Face's tokenizers carry it.

It comes from a downloaded file, so it runs in Jinja's sandbox. It does not say which part of its text is an answer: this is
found by rendering the beginnings of a conversation. Nor does it say what it leaves out: this is found by rendering the
conversation without each thing.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from accessory.data.fields import RecordError
from accessory.data.records import Conversation, Turn
from accessory.data.tokenizer import CHAT_TEMPLATES, Segment, Tokenizer
from accessory.data.tokenizer_models import special_names
from accessory.errors import UserError
from accessory.files import check_file

Write = Callable[[Conversation], Iterator[Segment]]
Message = dict[str, Any]
"""A turn in the form that templates expect: role, content, tool_calls, ..."""
Tools = list[dict[str, Any]] | None


def chat_template(tokenizer: Tokenizer, text: str | None = None) -> tuple[Write, tuple[str, ...]]:
    """The function that writes a conversation in the chat template of ``tokenizer``, and the special token that ends an
    answer, if there is one.

    Args:
        text: the text of another template, to use instead.

    Raises:
        UserError: there is no template, or it is not usable.
    """
    lacking = [name for name in special_names(tokenizer.settings).values() if name not in tokenizer.special]
    where, sources = ("", {"default": text}) if text else _sources(tokenizer)
    if lacking:  # the template would write them as text
        raise UserError(
            f"{tokenizer.path}: lacks the special tokens {', '.join(lacking)}, which tokenizer_config.json names; "
            "is there a tokenizer.json that has them?"
        )
    try:
        templates = {name: _environment().from_string(source) for name, source in sources.items()}
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template is not valid Jinja: {error}") from error
    write = _ChatTemplate(templates, tokenizer).write
    trained = [segment for segment in write(_EXAMPLE) if segment.trained]
    if not trained:
        raise UserError(f"{where}: the chat template writes no answers")
    return write, (trained[-1].text,) if trained[-1].special else ()


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether ``tokenizer`` has a chat template."""
    return CHAT_TEMPLATES["default"] in tokenizer.files or bool(tokenizer.settings.get("chat_template"))


_EXAMPLE = Conversation(None, (Turn("user", "Why?", train=False), Turn("assistant", "Because.")))


def _sources(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The template's file, and its texts: ``default``, and ``tool_use`` if there is a separate one for tools."""
    files = {name: tokenizer.files[file] for name, file in CHAT_TEMPLATES.items() if file in tokenizer.files}
    if "default" in files:
        return str(files["default"]), {name: _read(file) for name, file in files.items()}
    where = tokenizer.path.with_name("tokenizer_config.json")
    source = tokenizer.settings.get("chat_template")
    several = source if isinstance(source, list) else [{"name": "default", "template": source}]
    named = {entry.get("name"): entry.get("template") for entry in several}
    sources = {name: str(named[name]) for name in CHAT_TEMPLATES if isinstance(named.get(name), str)}
    if "default" not in sources:
        raise UserError(f"{where.parent}: no chat_template.jinja, nor a chat_template in tokenizer_config.json")
    return str(where), sources


def _read(file: Path) -> str:
    try:
        return check_file(file, "a chat template").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _environment() -> jinja2.Environment:
    """The sandbox in which templates run, with the functions and filters that transformers offers them."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    return environment


class _ChatTemplate:
    def __init__(self, templates: dict[str, jinja2.Template], tokenizer: Tokenizer):
        self._templates = templates
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        own = {key: name for key, number in ids.items() for name in tokenizer.special if tokenizer.special[name] == number}
        self._names = special_names(tokenizer.settings) if tokenizer.settings else own
        # a tokenizer.json itself says where spaces are put; for a tokenizer.model, Hugging Face's setting ``legacy`` does
        self._joined = tokenizer.path.suffix == ".json" or tokenizer.settings.get("legacy") is False
        known = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, known)))
        # names of special tokens in a record's text are replaced, until the template has been rendered, by names that no
        # text can hold and that JSON leaves unchanged
        secret = secrets.token_hex(8)
        self._escapes = {name: f"{secret}{number:06d}" for number, name in enumerate(known)}
        self._unescapes = {escape: name for name, escape in self._escapes.items()}
        self._escaped = re.compile(f"{secret}[0-9]{{6}}")

    def write(self, conversation: Conversation) -> Iterator[Segment]:
        turns = conversation.turns
        tools = self._escape(list(conversation.tools)) or None
        messages = [self._escape(_message(turn)) for turn in turns]
        system = [{"role": "system", "content": self._escape(conversation.system)}] if conversation.system else []
        whole = self._render(system + messages, tools, prompt=turns[-1].role != "assistant")
        self._check_complete(whole, system, messages, tools)
        markup = turns[0].train  # everything but answers is trained if the questions are
        written = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant" or turn.train == markup:
                continue
            before = self._render(system + messages[:number], tools, prompt=True)
            until = self._render(system + messages[: number + 1], tools)
            if not (whole.startswith(until) and until.startswith(before) and len(before) >= written):
                raise RecordError(
                    f"the chat template writes turn {number + 1} differently when other turns follow, so what the model "
                    "would see is not what it is trained on: use train_on: last_answer, or another template"
                )
            ends = [match.end() for match in self._special.finditer(until, len(before))]
            end = ends[-1] if ends else len(until)  # a line break may follow the token that ends a turn
            yield from self._segments(whole[written : len(before)], markup)
            yield from self._segments(whole[len(before) : end], turn.train)
            written = end
        yield from self._segments(whole[written:], markup)

    def _check_complete(self, whole: str, system: list[Message], messages: list[Message], tools: Tools) -> None:
        """Refuse a conversation if the template leaves out part of it, that is, writes the same text without that part."""
        without: list[tuple[str, list[Message], Tools]] = []
        if system:
            without.append(("the system prompt", messages, tools))
        if tools:
            without.append(("the list of tools", system + messages, None))
        for number, message in enumerate(messages):
            others: dict[str, Message] = {}
            if "tool_calls" in message:
                for key, what in (("tool_calls", "the calls"), ("content", "the text beside the calls")):
                    others[what] = {name: value for name, value in message.items() if name != key}
            elif message["role"] == "tool":  # which some would write as what the model said
                others["the tool"] = message | {"role": "assistant"}
            for what, other in others.items():
                if other != message:
                    said = [*system, *messages[:number], other, *messages[number + 1 :]]
                    without.append((f"{what} of turn {number + 1}", said, tools))
        for what, said, offered in without:
            try:
                rendered = self._render(said, offered, prompt=messages[-1]["role"] != "assistant")
            except RecordError:
                continue
            if rendered == whole:
                raise RecordError(f"the chat template has no place for {what}")

    def _render(self, messages: list[Message], tools: Tools, prompt: bool = False) -> str:
        template = self._templates.get("tool_use") if tools else None
        inputs = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return (template or self._templates["default"]).render(**self._names | inputs)
        except Exception as error:  # a template is a program and may raise anything
            raise RecordError(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def _escape(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda match: self._escapes[match.group()], value)
        if isinstance(value, Mapping):
            return {self._escape(key): self._escape(item) for key, item in value.items()}
        return [self._escape(item) for item in value] if isinstance(value, Sequence) else value

    def _segments(self, text: str, trained: bool) -> Iterator[Segment]:
        """The text and special tokens in a part of the rendered text."""
        start = 0
        for match in self._special.finditer(text):
            yield from self._text(text[start : match.start()], trained)
            yield Segment(match.group(), trained and match.group() != self._names.get("bos_token"), special=True)
            start = match.end()
        yield from self._text(text[start:], trained)

    def _text(self, text: str, trained: bool) -> Iterator[Segment]:
        if text:
            text = self._escaped.sub(lambda match: self._unescapes[match.group()], text)
            yield Segment(text, trained, joined=self._joined)


class _Generation(jinja2.ext.Extension):
    """Some templates mark answers with ``{% generation %}``; here the mark has no effect."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _message(turn: Turn) -> Message:
    message: Message = {"role": turn.role}
    if turn.text or not turn.calls:  # beside calls most records have null here, which transformers leaves out
        message["content"] = turn.question
    if turn.calls:
        functions = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in turn.calls]
        message["tool_calls"] = [{"id": id, "type": "function", "function": function} for id, function in functions]
    if turn.tool:
        message["name"] = turn.tool
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    return message


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The ``tojson`` of transformers, with its parameters; Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise RecordError(message)
