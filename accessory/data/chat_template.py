"""A tokenizer's own chat template: Jinja, as Hugging Face's tokenizers carry it.

It comes from a downloaded file, so it runs in Jinja's sandbox. It tells nothing of which part of its text is an answer:
that is found by rendering the beginnings of a conversation.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from accessory.data.records import Conversation, RecordError, Turn
from accessory.data.tokenizer import Segment, Tokenizer
from accessory.data.tokenizer_models import special_names
from accessory.errors import UserError

Write = Callable[[Conversation], Iterator[Segment]]


def chat_template(tokenizer: Tokenizer) -> tuple[Write, tuple[str, ...]]:
    """What writes a conversation as the template beside ``tokenizer`` says, and the special token that ends an answer.

    Raises:
        UserError: there is none, or it is of no use.
    """
    where, source = _source(tokenizer)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    lacking = [name for name in special_names(tokenizer.settings).values() if name not in tokenizer.special]
    if lacking:  # the template would write them as text
        raise UserError(
            f"{tokenizer.path}: lacks the special tokens {', '.join(lacking)}, which tokenizer_config.json names; "
            "is there a tokenizer.json that has them?"
        )
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template is not valid Jinja: {error}") from error
    write = _ChatTemplate(template, tokenizer).write
    trained = [segment for segment in write(_EXAMPLE) if segment.trained]
    if not trained:
        raise UserError(f"{where}: the chat template writes no answers")
    return write, (trained[-1].text,) if trained[-1].special else ()


_EXAMPLE = Conversation(None, (Turn("user", "Why?", train=False), Turn("assistant", "Because.")))


def _source(tokenizer: Tokenizer) -> tuple[str, str]:
    """Where the template stands, and its text."""
    file = tokenizer.path.with_name("chat_template.jinja")
    if file.is_file():
        return str(file), file.read_text(encoding="utf-8")
    where = tokenizer.path.with_name("tokenizer_config.json")
    source = tokenizer.settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(f"{where.parent}: no chat_template.jinja, nor a chat_template in tokenizer_config.json")
    return str(where), source


class _ChatTemplate:
    def __init__(self, template: jinja2.Template, tokenizer: Tokenizer):
        self._template = template
        self._names = special_names(tokenizer.settings)
        known = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, known)))
        # special tokens in what a user wrote stand under names that no text can hold, until the template has been rendered
        secret = secrets.token_hex(8)
        self._escapes = {name: f"\0{secret}{number}\0" for number, name in enumerate(known)}
        self._unescapes = {escape: name for name, escape in self._escapes.items()}
        self._escaped = re.compile(f"\0{secret}[0-9]+\0")

    def write(self, conversation: Conversation) -> Iterator[Segment]:
        turns = conversation.turns
        messages = [{"role": turn.role, "content": self._escape(turn.question)} for turn in turns]
        system = [{"role": "system", "content": self._escape(conversation.system)}] if conversation.system else []
        whole = self._render(system + messages, prompt=turns[-1].role != "assistant")
        markup = turns[0].train  # what is no answer is trained with the questions, or not at all
        written = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant" or turn.train == markup:
                continue
            before = self._render(system + messages[:number], prompt=True)
            until = self._render(system + messages[: number + 1], prompt=False)
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

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._names)
        except Exception as error:  # it is somebody's program, and may raise anything
            raise RecordError(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def _escape(self, text: str) -> str:
        return self._special.sub(lambda match: self._escapes[match.group()], text)

    def _segments(self, text: str, trained: bool) -> Iterator[Segment]:
        """Text and special tokens of a stretch of what was rendered."""
        start = 0
        for match in self._special.finditer(text):
            yield from self._text(text[start : match.start()], trained)
            yield Segment(match.group(), trained and match.group() != self._names.get("bos_token"), special=True)
            start = match.end()
        yield from self._text(text[start:], trained)

    def _text(self, text: str, trained: bool) -> Iterator[Segment]:
        if text:
            yield Segment(self._escaped.sub(lambda match: self._unescapes[match.group()], text), trained)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks answers in some templates; here it is only passed over."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise RecordError(message)
