"""The verbs ``generate`` and ``classify``."""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch.distributed as dist

from accessory.config import from_mapping, read_mapping
from accessory.console import listed, progress, say
from accessory.data.fields import RecordError
from accessory.data.record_images import IMAGE
from accessory.data.records import read_question
from accessory.data.templates import get_template
from accessory.errors import UserError
from accessory.files import check_file, check_writable, replacing
from accessory.infer.grammar import Grammar
from accessory.infer.meta import MetaModel
from accessory.infer.offload import tell_offload
from accessory.infer.prompts import encode_prompts
from accessory.infer.request import Running
from accessory.infer.sampling import Sampling
from accessory.parallel.launch import Launch, run_job, start_ranks
from accessory.settings import ParallelSection
from accessory.visual.images import Picture

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


def run_generate(arguments: argparse.Namespace) -> None:
    """The ``generate`` verb."""
    answer_job(generate, arguments)


def run_classify(arguments: argparse.Namespace) -> None:
    """The ``classify`` verb."""
    answer_job(classify, arguments)


def answer_job(body: Callable[[argparse.Namespace, Launch], None], arguments: argparse.Namespace) -> NoReturn:
    """Run a verb that prints what a model says, over the ranks that the command line asks for, and end the process."""
    start_ranks(arguments.mp)

    def until_read(launch: Launch) -> None:
        with suppress(BrokenPipeError):  # whoever read the output has seen enough
            body(arguments, launch)

    run_job(until_read, ParallelSection.stall_timeout_s)


def load(
    arguments: argparse.Namespace,
    launch: Launch,
    directories: Sequence[Path] = (),
    adapters: Mapping[str, Path] = MappingProxyType({}),
) -> MetaModel:
    """The model that the command line names, or that of other ``directories``, over all ranks of the job."""
    return MetaModel.from_pretrained(
        directories or [arguments.checkpoint, *arguments.adapter],
        arguments.layout,
        arguments.config,
        arguments.tokenizer,
        with_visual=False if arguments.text_only else None,
        max_seq_len=arguments.max_seq_len,
        mp_group=dist.group.WORLD,
        dtype=arguments.precision,
        device=launch.device,
        quant=arguments.quantise,
        offload=arguments.offload,
        adapters=adapters,
    )


def check_template(name: str | None) -> None:
    """A name that is none is told before the model is read."""
    if name not in (None, "chat_template"):
        get_template(name)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    values = {name: getattr(arguments, name) for name in names}
    return from_mapping(Sampling, values | {"max_tokens": arguments.max_gen_len}, "the command line")


def generate(arguments: argparse.Namespace, launch: Launch) -> None:
    """Answer every prompt on rank 0, all together; the other ranks follow."""
    check_template(arguments.template)
    prompts = [prompt for text in arguments.texts for prompt in (_read(text[1:]) if text.startswith("@") else [text])]
    if not prompts:
        raise UserError(f"{arguments.texts[0][1:]}: no prompt in it")
    sampling = sampling_of(arguments)
    if arguments.out:
        check_writable(Path(arguments.out))
    model = load(arguments, launch)
    model.engine.lead(lambda: _answer(model, prompts, sampling, arguments))


def _answer(model: MetaModel, prompts: Sequence[Prompt], sampling: Sampling, arguments: argparse.Namespace) -> None:
    sampling = replace(sampling, grammar=_grammar(model, arguments))
    images: list[Picture] = [*arguments.image]
    requests = []
    for prompt in prompts:
        stops: tuple[str, ...] = ()
        try:
            if arguments.raw:
                (asked,) = encode_prompts(model.tokenizer, [_text(prompt)], [images], model.llma.sight, bos=True, eos=False)
            else:
                asked, stops = model.asked(_showing(prompt, images), arguments.template)
            requests.append(model.engine.submit(asked.tokens, sampling.stopping_at(stops), None, asked.images))
        except UserError as error:
            if len(prompts) == 1:
                raise
            raise UserError(f"the prompt {textwrap.shorten(_text(prompt), 60)!r}: {error}") from error
    with progress(total=len(requests), unit="answer") as bar:
        for _ in model.engine.run():
            bar.update(sum(request.finish_reason is not None for request in requests) - bar.n)
    if arguments.out:
        with replacing(Path(arguments.out)) as unfinished:
            unfinished.write_text("".join(_line(prompt, request) for prompt, request in zip(prompts, requests, strict=True)))
        say(f"{arguments.out}: {len(requests)} answers")
    else:
        for prompt, request in zip(prompts, requests, strict=True):
            say(f"> {_text(prompt)}\n{_answered(request)}\n")
    tell_offload(model.llma)


def _showing(prompt: Prompt, images: Sequence[Picture]) -> Prompt:
    """A prompt whose first question shows images, too."""
    if not images:
        return prompt
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    first = next((number for number, turn in enumerate(messages) if turn.get("role") == "user"), None)
    if first is None:
        raise UserError("--image is shown with a question, and there is none")
    messages[first] = messages[first] | {"content": showing(messages[first].get("content"), images)}
    return messages


def showing(content: Any, images: Sequence[Picture]) -> list[dict[str, Any]]:
    """The content of a turn, with images before it."""
    said = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    return [*({"type": "image", "image": str(image)} for image in images), *said]


def _grammar(model: MetaModel, arguments: argparse.Namespace) -> Grammar | None:
    """The form that the command line asks answers to have."""
    if arguments.json_schema:
        return model.grammars_of(None).json_schema(read_mapping(arguments.json_schema))
    return model.grammars_of(None).regex(arguments.regex) if arguments.regex else None


def classify(arguments: argparse.Namespace, launch: Launch) -> None:
    """Load a classifier over all ranks of the job and print the labels of each text, the likeliest first."""
    for text, shares in zip(arguments.texts, load(arguments, launch).classify(arguments.texts), strict=True):
        say(f"> {text}\n{', '.join(f'{label} {share:.1%}' for label, share in shares.items())}\n")


def _read(path: str) -> Iterator[Prompt]:
    """The prompts of a file: lines of text, or of JSON with a ``prompt`` or ``messages``."""
    file = check_file(path, "a file of prompts")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at what else separates lines: a text may hold it
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _prompt(line, f"{file}, line {number}") if file.suffix == ".jsonl" else line


def _prompt(line: str, where: str) -> Prompt:
    record: Any = None
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
    said = [key for key in _SAID if key in record] if isinstance(record, dict) else []
    if said == ["prompt"] and isinstance(text := record["prompt"], str):
        return text
    if said == ["messages"] and isinstance(messages := record["messages"], list):
        try:
            read_question(messages)
        except RecordError as error:
            raise UserError(f"{where}: {error.problem}") from error
        return messages
    more = f", found {listed(said)}" if len(said) > 1 else ""
    raise UserError(f'{where}: expected {{"prompt": text}} or {{"messages": [...]}}{more}')


_SAID = ("prompt", "messages", "system", "tools", "image", "images")
"""What would change an answer, of which one is taken."""


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.get('role')}: {_said(turn)}" for turn in prompt)


def _said(turn: Mapping[str, Any]) -> str:
    """A turn's text, with a mark for each image."""
    content = turn.get("content") or ""  # of a call, beside which nothing is said, none
    return content if isinstance(content, str) else " ".join(part.get("text", IMAGE) for part in content)


def _answered(request: Running) -> str:
    """The text, without the blanks around it, unless its form asks for them."""
    return request.text if request.sampling.grammar else request.text.strip()


def _line(prompt: Prompt, request: Running) -> str:
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    told = {"answer": _answered(request), "finish_reason": request.finish_reason, "tokens": len(request.answer)}
    return json.dumps(asked | told, ensure_ascii=False) + "\n"
