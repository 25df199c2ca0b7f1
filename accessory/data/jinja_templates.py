"""The named templates as chat templates in Jinja, for transformers and the servers of its models.

Each writes, from messages, the text that its function in ``templates`` writes as segments. Tokenizers encode that text as a
whole. They differ in whether they put a space before a text that follows a special token, and they do not encode an answer
``apart``. The variables ``blank`` and ``apart`` are written in these places so that the tokens are those of training.
"""

from itertools import product

from accessory.data.chat_template import chat_template
from accessory.data.records import Conversation, Turn
from accessory.data.templates import ALPACA, ALPACA_CONTEXT, DIALOG_SYSTEM, PROMPTS, VICUNA_SYSTEM, Template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError

_BEGIN = r"""
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}
"""
_NO_SYSTEM = "{%- if system %}{{ raise_exception('this template has no place for a system prompt') }}{% endif -%}\n"
_SPEAKERS = r"""
{%- for turn in turns -%}
{%- if turn['role'] not in ['user', 'assistant'] %}{{ raise_exception('this template has no place for ' + turn['role']) }}
{%- elif turn['role'] == 'user' %}{{ <question> }}
{%- else %}{{ <answer> }}
{%- endif -%}
{%- endfor -%}
"""


def _of_two(user: str, assistant: str, before: str = "") -> str:
    """A template for questions and answers only."""
    return f"{{{{ bos_token }}}}{before}" + _SPEAKERS.replace("<question>", user).replace("<answer>", assistant)


_CHATML = r"""
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|im_start|>' + blank + message['role'] + '\n' + message['content'] + '<|im_end|>' + blank + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>' + blank + 'assistant\n' }}{% endif -%}
"""
_JINJA = {
    "mixtral-instruct": _of_two(
        r"blank + '[INST] ' + (system + '\n\n' if loop.first and system else '') + turn['content'] + ' [/INST]'",
        "apart + turn['content'] + eos_token",
    ),
    "dialog": _of_two(
        r"' Human: ' + turn['content'] + '\n### Assistant:'",
        r"' ' + turn['content'] + '\n###'",
        before=f"{{{{ blank + (system or {DIALOG_SYSTEM!r}) + '\\n\\n###' }}}}",
    ),
    "alpaca": _of_two(
        f"blank + (({ALPACA.format(context=ALPACA_CONTEXT)!r} if turn['input'] else {ALPACA.format(context='')!r}) "
        r"if loop.first else '\n\n') + '### Instruction:\n' + turn['content'] + '\n\n' "
        r"+ ('### Input:\n' + turn['input'] + '\n\n' if turn['input'] else '') + '### Response:'",
        "turn['content'] + eos_token",
    ),
    "bare": _of_two("blank + turn['content']", "apart + turn['content'] + eos_token"),
    "chatml": _CHATML,
    "vicuna": _of_two(
        "('' if loop.first else blank) + 'USER: ' + turn['content'] + ' ASSISTANT:'",
        "' ' + turn['content'] + eos_token",
        before=f"{{{{ blank + (system or {VICUNA_SYSTEM!r}) + ' ' }}}}",
    ),
    **{
        name: _of_two(
            rf"blank + ('' if loop.first else '\n\n') + {before!r} + turn['content'] + {behind!r}",
            "turn['content'] + eos_token",
        )
        for name, (before, behind) in PROMPTS.items()
    },
}

_TURNS = (Turn("user", "Why?"), Turn("assistant", "Because it is."), Turn("user", "And?"), Turn("assistant", "No."))
_EXAMPLES = (Conversation(None, _TURNS), Conversation("Be brief.", _TURNS), Conversation(None, _TURNS[:1]))


def as_chat_template(template: Template, trained: Tokenizer, read: Tokenizer) -> str | None:
    """A chat template that gives the same tokens as ``template``.

    Args:
        trained: the tokenizer of training. read: the same tokenizer as users of the chat template load it.

    Returns:
        None if there is none: the template is for documents, or ``read`` gives other tokens whichever way it is written.
    """
    begin = _BEGIN.lstrip() + ("" if template.system else _NO_SYSTEM)
    examples = [example for example in _EXAMPLES if template.system or not example.system]
    for blank, apart in product(("", " "), repeat=2) if template.name in _JINJA else ():
        text = f"{{%- set blank, apart = '{blank}', '{apart}' -%}}" + begin + _JINJA[template.name].lstrip()
        if all(_same(template, text, trained, read, example) for example in examples):
            return text
    return None


def _same(template: Template, text: str, trained: Tokenizer, read: Tokenizer, example: Conversation) -> bool:
    try:
        expected = trained.encode_segments(list(template.write(example)))[0]
        write, _ = chat_template(read, text)
        return read.encode_segments(list(write(example)))[0] == expected
    except UserError:  # a tokenizer lacks a special token
        return False
