"""Small visual models, and samples with images."""

import random
from dataclasses import replace

import torch
from models import TINY, samples

from accessory.certify.problem import ENCODERS
from accessory.data.loader import Batch, collate
from accessory.model.visual import Images, VisualArgs


def visual(preset, **options):
    """A preset with the small encoders."""
    return VisualArgs(preset, tuple(ENCODERS[kind] for kind in VisualArgs(preset).kinds), **options)


def seeing(preset, args=TINY, **options):
    """``args``, which sees."""
    return replace(args, visual=visual(preset, **options))


def features(args, count, seed):
    """Of ``count`` images, as encoders could make them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(count, args.visual.views, tokens, width, dtype=torch.float64, generator=generator)
        for tokens, width in args.visual.groups
    )


def seen_batch(args, counts, seed):
    """A micro-batch of samples with ``counts`` of images each, and the same as (tokens, trained, seen) for the reference."""
    rng, rows, posed, documents = random.Random(seed), [], [], []
    made, start, words = features(args, sum(counts), seed), 0, args.visual.words
    image = 0
    for count in counts:
        (sample,) = samples(1, rng.randrange(1000), args)
        tokens, trained, seen = list(sample.tokens), list(sample.trained), []
        for _ in range(count):  # one behind the other, each behind a token of text
            place = (seen[-1][0] + words if seen else 0) + 1
            tokens[place:place], trained[place:place] = [0] * words, [False] * words
            seen.append((place, [group[image] for group in made]))
            rows += range(start + place, start + place + words)
            image += 1
        documents.append(replace(sample, tokens=tokens, trained=trained))
        posed.append((tokens, trained, seen))
        start += len(tokens)
    batch: Batch = collate(documents)
    return replace(batch, images=Images(torch.tensor(rows, dtype=torch.int64), features=made)), posed
