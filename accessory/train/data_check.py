"""``accessory data check`` and ``accessory data show``: what a mix holds, before a run spends hours on it."""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from accessory.checkpoint.description import Description, own_config
from accessory.config import from_mapping, read_mapping
from accessory.data.mix import Dataset, Tokenised, split_mix, tokenise_mix
from accessory.data.packing import Rows
from accessory.data.placement import PLACE
from accessory.data.store import Report, Sample
from accessory.data.tokenizer import TOKENIZERS, Tokenizer
from accessory.errors import UserError
from accessory.files import check_writable
from accessory.model.args import ModelArgs
from accessory.model.visual import VisualArgs
from accessory.parallel.launch import own_cores
from accessory.settings import RunConfig
from accessory.train.loggers import METRICS, read_metrics
from accessory.train.picture import picture
from accessory.visual.images import ImageError, open_image, shortened

DEFAULT_MAX_SEQ_LEN = 4096
"""Of a mix without a run."""
COLUMNS = ("records", "bad", "samples", "tokens", "targets", "truncated", "dropped", "duplicate", "p50", "p90", "p99", "max")


def check(arguments: argparse.Namespace) -> None:
    """Validate every record of a mix and print a table; exit code 1 if one is bad, or nothing is left to train on."""
    check_writable(arguments.png)
    run = run_of(arguments.mix)
    read = _what(arguments, run)
    mix, _, max_seq_len, _, visual = read
    sources = tokenise_mix(*read)
    print(f"samples of at most {max_seq_len:,} tokens\n")
    print(_table(sources))
    if visual:
        images, unseen = (
            sum(getattr(s.report, what) for one in sources for s in one.stores) for what in ("images", "unseen")
        )
        print(f"\n{images:,} images of {visual.words} words each; {unseen:,} samples dropped in which one does not fit")
    if any(len(source) for source in sources):
        _draw(sources, arguments.png)
        print(f"\nlengths: {arguments.png}")
    bad, dropped = (sum(getattr(s.report, what) for source in sources for s in source.stores) for what in ("bad", "dropped"))
    _list((line for source in sources for line in source.dropped()), dropped, arguments.n)
    _list((line for source in sources for line in source.bad()), bad, arguments.n)
    if any(len(source) for source in sources) or not bad:
        seed, validation = (run.train.seed, run.data.validation) if run else (0, 0.0)
        data = split_mix(mix, sources, max_seq_len, seed, validation)
        if run:
            print(_plan(run, data, max_seq_len, arguments))
    damaged = _damaged(sources) if arguments.images else []
    _list(iter(damaged), len(damaged), arguments.n)
    if bad or damaged:
        sys.exit(f"{bad} bad records" + f", {len(damaged)} in which an image is damaged" * bool(damaged))


def _damaged(sources: list[Tokenised]) -> list[str]:
    """The samples of which an image cannot be decoded to its end: file, line and reason."""
    found = []
    with ThreadPoolExecutor(own_cores()) as threads:
        for store in (store for source in sources for store in source.stores):
            samples = ((number, store.images(number)) for number in range(len(store)))
            for number, reason in threads.map(lambda sample: (sample[0], _problem(sample[1])), samples):
                found += [f"{store.where(number)}: {reason}"] if reason else []
    return found


def _problem(images: Sequence[str]) -> str:
    try:
        for name in images:
            open_image(name)
    except ImageError as error:
        return str(error)
    return ""


def _list(lines: Iterator[str], count: int, most: int) -> None:
    if count:
        print("\n".join(["", *itertools.islice(lines, most)]))
    if count > most:
        print(f"... and {count - most} more: list them with -n {count}")


def show(arguments: argparse.Namespace) -> None:
    """Print the first samples of each source, what is trained in colour (or between brackets where there is none)."""
    read = _what(arguments, run_of(arguments.mix))
    for source in tokenise_mix(*read):
        samples = ((store, number) for store in source.stores for number in range(len(store)))
        for _, (store, number) in zip(range(arguments.n), samples, strict=False):
            sample = store[number]
            learnt = f"{int(sample.trained.sum())} of them trained" if sample.label is None else read.labels[sample.label]
            print(f"== {store.where(number)}: {len(sample.tokens)} tokens, {learnt}")
            print(coloured(sample, read.tokenizer, sys.stdout.isatty()) + "\n")


def coloured(sample: Sample, tokenizer: Tokenizer, colours: bool) -> str:
    """A sample's text, with what is trained marked, and an image by its name."""
    on, off = ("\033[32m", "\033[0m") if colours else ("[[", "]]")
    ids, before, parts = [int(token) for token in sample.tokens], "", []
    names = iter(sample.images)
    words = ids.count(PLACE) // max(1, len(sample.images))  # of one image, behind which another may begin at once
    kinds = [(token == PLACE, bool(trained)) for token, trained in zip(ids, sample.trained, strict=True)]
    start = 0
    for (is_image, trained), run in itertools.groupby(kinds):
        stop = start + len(list(run))
        if is_image:
            parts += [f"<image {shortened(next(names))}>" for _ in range((stop - start) // words)]
        else:
            text = tokenizer.decode([token for token in ids[:stop] if token != PLACE])
            piece, before = text[len(before) :], text
            piece += "</s>" if ids[stop - 1] == tokenizer.eos_id else ""
            parts.append(f"{on}{piece}{off}" if trained else piece)
        start = stop
    return "".join(parts)


def run_of(path: Path) -> RunConfig | None:
    """The run file, if ``path`` is one rather than a mix."""
    return None if "META" in read_mapping(path) else RunConfig.load(path, [])


class Read(NamedTuple):
    """What a mix is tokenised with (see ``tokenise_mix``)."""

    mix: Path
    tokenizer: Tokenizer
    max_seq_len: int
    labels: tuple[str, ...]
    visual: VisualArgs | None


def _what(arguments: argparse.Namespace, run: RunConfig | None) -> Read:
    """Mix, tokenizer, longest sample, labels and sight: the run's, unless the command says otherwise."""
    tokenizer, max_seq_len, config = arguments.tokenizer, arguments.max_seq_len, arguments.config
    if run is not None:
        tokenizer = tokenizer or run.model.tokenizer
        if tokenizer is None:
            tokenizer = next((f for f in map(_checkpoint(run).joinpath, TOKENIZERS) if f.is_file()), None)
        config = config or run.model.config or own_config(_checkpoint(run))
        max_seq_len = max_seq_len or run.data.max_seq_len
    if tokenizer is None:
        raise UserError(f"{arguments.mix}: give --tokenizer, so that lengths are known")
    mix = Path(run.data.mix) if run is not None else arguments.mix
    labels = run.model.labels if run is not None else ()
    described = Description.read(config) if config else None
    if max_seq_len is None and described:
        max_seq_len = int(described.values.get("max_seq_len", ModelArgs.max_seq_len))
    visual = described.values.get("visual") if described else None
    sees = from_mapping(VisualArgs, visual, str(config), "visual.") if described and visual else None
    return Read(mix, Tokenizer(tokenizer), DEFAULT_MAX_SEQ_LEN if max_seq_len is None else max_seq_len, labels, sees)


def _checkpoint(run: RunConfig) -> Path:
    """The directory that the run starts from, or the first of several."""
    checkpoint = run.model.checkpoint
    assert checkpoint  # RunConfig has checked: else it names config.json and tokenizer
    return Path(checkpoint if isinstance(checkpoint, str) else checkpoint[0])


def _table(sources: list[Tokenised]) -> str:
    rows = [(source.source.name, _numbers([source])) for source in sources]
    if len(rows) > 1:
        rows.append(("all", _numbers(sources)))
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{number:>12,}" for number in numbers) for name, numbers in rows]
    return "\n".join(lines)


def _numbers(sources: list[Tokenised]) -> list[int]:
    stores = [store for source in sources for store in source.stores]
    lengths = np.concatenate([store.lengths() for store in stores] or [np.zeros(0, np.int32)])
    digests = np.concatenate([store.digests for store in stores] or [np.zeros(0, np.uint64)])
    total = Report()
    for store in stores:
        total.add(store.report)
    quantiles = np.quantile(lengths, (0.5, 0.9, 0.99, 1.0)) if len(lengths) else np.zeros(4)
    return [
        total.records,
        total.bad,
        len(lengths),
        int(lengths.sum()),
        total.targets,
        total.truncated,
        total.dropped,
        len(digests) - len(np.unique(digests)),
        *(int(quantile) for quantile in quantiles),
    ]


def _plan(run: RunConfig, data: Dataset, max_seq_len: int, arguments: argparse.Namespace) -> str:
    """Steps of an epoch, and how long a run takes if its speed is known."""
    order, lengths = data.epoch(0), data.training.lengths
    rows = Rows.packed(order, lengths, max_seq_len) if run.data.packing else Rows.alone(order)
    tokens = rows.tokens(lengths)
    batch = run.train.batch_size * run.train.accumulation * max(1, arguments.world // run.parallel.model_parallel)
    steps = math.ceil(len(rows) / batch)
    total = min(steps * run.train.epochs, run.train.max_steps or steps * run.train.epochs)
    text = (
        f"\non {arguments.world} processes: {len(order):,} samples and {tokens:,} tokens an epoch, {batch} rows a step, "
        f"{steps:,} steps an epoch, {total:,} in all"
    )
    rate = arguments.tokens_per_s or _measured_rate(Path(run.out) / METRICS)
    if rate:
        text += (
            f"\nat {rate:,.0f} tokens/s: {timedelta(seconds=round(tokens * total / steps / rate))} (hours:minutes:seconds)"
        )
    return text


def _measured_rate(metrics: Path) -> float | None:
    """The speed of an earlier run into the same directory."""
    if not metrics.is_file():
        return None
    rates = [row["tokens_per_s"] for row in read_metrics(metrics) if "tokens_per_s" in row]
    return rates[-1] if rates else None


def _draw(sources: list[Tokenised], path: Path) -> None:
    """How many samples of each source are how long; no bar is wider or narrower than others."""
    lengths = [np.concatenate([store.lengths() for store in source.stores]) for source in sources]
    longest = max(int(own.max()) for own in lengths if len(own))
    wide = math.ceil((longest + 1) / 60)
    edges = np.arange(0, longest + 1 + wide, wide)
    with picture(path, 8, 4 + 0.2 * len(sources), [source.source.name for source in sources]) as (figure, names):
        axis = figure.subplots()
        below = np.zeros(len(edges) - 1)
        for name, own in zip(names, lengths, strict=True):
            counts = np.histogram(own, edges)[0]
            axis.bar(edges[:-1], counts, wide, bottom=below, align="edge", label=f"{name}: {len(own):,}")
            below += counts
        axis.set(xlabel="tokens", ylabel="samples", title="length of samples")
        figure.legend(loc="outside lower left")
