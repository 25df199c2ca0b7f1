"""lm-evaluation-harness: a model as its tasks ask it, and its tasks. Only imported where that package is installed."""

import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import datasets
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from accessory.config import from_mapping
from accessory.console import listed, progress, say
from accessory.data.records import read_question
from accessory.data.tokenizer import Segment
from accessory.errors import UserError
from accessory.infer.meta import MetaModel
from accessory.infer.sampling import Sampling
from accessory.infer.scoring import Score, score

MOST_TOKENS = 256
"""Of an answer, where a task does not say; as lm-eval's own models have it, like all that is counted and cut here."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks call the most tokens of an answer."""

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation."""


class EngineLM(TemplateLM):
    """A model for lm-eval's tasks, on the first of its ranks, whose engine the others follow; a context, for they are kept
    awake while it is not asked.

    Numbers are those of lm-eval's own ``hf`` model. Texts longer than ``max_length`` lose their beginning.
    """

    def __init__(self, model: MetaModel):
        super().__init__()
        self.model, self.engine = model, model.engine
        self.max_length = model.max_seq_len
        self._asked: dict[str, list[Segment]] = {}  # what the model's template has written, as text
        self._idle = ExitStack()

    def __enter__(self) -> "EngineLM":
        self._idle.enter_context(self.engine.kept_awake())
        return self

    def __exit__(self, *_: object) -> None:
        self._idle.close()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._idle.close()
        yield
        self._idle.enter_context(self.engine.kept_awake())

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.model.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.model.template.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if string in self._asked:
            return self.model.tokenizer.encode_segments(self._asked[string])[0]
        return self.model.tokenizer.encode(string, bos=add_special_tokens is not False, eos=False)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        if context not in self._asked:
            return super()._encode_pair(context, continuation)
        begin = self.tok_encode(context)
        whole = self.model.tokenizer.encode_segments([*self._asked[context], Segment(continuation, False)])[0]
        return begin, whole[len(begin) :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The question in the template that the model was trained with; its tokens are those of training."""
        segments = self.model.template.prompt(read_question(chat_history))
        text = "".join(segment.text for segment in segments)
        self._asked[text] = segments
        return text

    # ---- what tasks ask

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        for texts, _context, continuation in requests:
            if not continuation:
                raise UserError(
                    f"nothing of {texts[1]!r} is to be scored behind {texts[0][-80:]!r}: it makes no token there"
                )
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        pairs: list[Pair] = []
        sizes = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [make_disjoint_window(window) for window in windows]
            pairs += own
            sizes.append(len(own))
        scores = iter(self._scores(pairs))
        return [sum(next(scores).log_prob for _ in range(size)) for size in sizes]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        running, cut = [], 0
        with self._busy():
            for number, (context, wanted) in enumerate(request.args for request in requests):
                sampling = _sampling(wanted, number)
                if sampling.max_tokens >= self.max_length:
                    raise UserError(
                        f"a task wants answers of up to {sampling.max_tokens} tokens, and a prompt and its answer together "
                        f"have at most {self.max_length}: raise --max-seq-len, or lower max_gen_toks in the task's file"
                    )
                ids = self.tok_encode(context)
                kept = ids[-(self.max_length - sampling.max_tokens) :]
                cut += len(kept) < len(ids)
                stops = self.model.template.stop if context in self._asked else ()
                running.append(self.engine.submit(kept, sampling.stopping_at(stops)))
            self._tell_cut(cut)
            with progress(total=len(running), unit="answer") as bar:
                for step in self.engine.run():
                    bar.update(sum(said.request.finish_reason is not None for said in step))
        return [request.text for request in running]

    def _scores(self, pairs: Sequence[Pair]) -> list[Score]:
        """Of each continuation; of what is too long, the last tokens are seen."""
        fitting, cut = [], 0
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation to be scored has {len(continuation)} tokens, and the model sees {self.max_length}: "
                    "raise --max-seq-len"
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            cut += len(kept) < len(context)
            fitting.append((kept, continuation))
        self._tell_cut(cut)
        scores: list[Score | None] = [None] * len(fitting)
        with self._busy(), progress(total=len(fitting), unit="text") as bar:
            for number, found in score(fitting, self.engine.score):
                scores[number] = found
                bar.update()
        return [found for found in scores if found]

    def _tell_cut(self, count: int) -> None:
        if count:
            say(f"warning: texts of more than {self.max_length} tokens have lost their beginning: {count}")


def _sampling(wanted: dict[str, Any], number: int) -> Sampling:
    """What a task's generation_kwargs say; the n-th request draws as in any other evaluation."""
    kwargs = dict(wanted)
    until = kwargs.pop("until", None) or []
    lengths = [kwargs.pop(name) for name in LENGTHS if name in kwargs]
    temperature = float(kwargs.pop("temperature", 0.0))
    draws = kwargs.pop("do_sample", temperature > 0)
    values = {
        "max_tokens": int(lengths[0]) if lengths else MOST_TOKENS,
        "temperature": temperature if draws else 0.0,
        "stop": [until] if isinstance(until, str) else until,
        "seed": number,
    }
    return from_mapping(Sampling, kwargs | values, "a task's generation_kwargs")


def find_tasks(names: Sequence[str], include: str | None) -> TaskManager:
    """Where the tasks, groups and tags of these names are described: below ``include``, or among lm-eval's own.

    Raises:
        UserError: a name is nowhere.
    """
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)  # lm-eval's own are thousands, which takes seconds
    if missing := [name for name in names if name not in manager.all_tasks]:
        close = difflib.get_close_matches(missing[0], manager.all_tasks, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "; lm-eval ls tasks lists lm-eval's own"
        raise UserError(f"--tasks: '{missing[0]}' is no task; --include names a directory of YAML files with others{hint}")
    return manager


def run_tasks(
    model: MetaModel,
    names: Sequence[str],
    manager: TaskManager | None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` returns, on the first of the model's ranks; {} on the others.

    Args:
        manager: see ``find_tasks``; that of the first rank counts.

    Raises:
        UserError: a task's data cannot be had, or it asks for what cannot be done.
    """
    found: dict[str, Any] = {}

    def ask() -> None:
        with EngineLM(model) as asked, redirect_stdout(sys.stderr):  # lm-eval says there what it computes
            found.update(
                evaluator.simple_evaluate(
                    asked,
                    tasks=list(names),
                    task_manager=manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    apply_chat_template=apply_chat_template,
                    log_samples=log_samples,
                )
            )

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    evaluator.get_git_commit_hash = lambda: None  # git says that it is fatal where there is no repository
    try:
        model.engine.lead(ask)
    except OSError as error:
        raise UserError(
            f"the data of {listed(names)} cannot be had: {error}; lm-eval's own tasks load theirs from the Hugging Face Hub"
        ) from error
    return found
