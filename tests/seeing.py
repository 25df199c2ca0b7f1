"""Small visual models, and samples with images."""

import json
import random
from dataclasses import replace

import torch
import yaml
from models import TINY, make_tokenizer, samples
from pictures import noise

from accessory.certify.problem import ENCODERS, SMALL
from accessory.data.loader import Batch, collate
from accessory.model.args import MoEArgs
from accessory.model.visual import Images, VisualArgs

MODEL = replace(
    SMALL,
    hidden_dim=32,
    head_dim=8,
    n_heads=4,
    vocab_size=300,
    sliding_window=None,
    max_seq_len=512,
    moe=MoEArgs(num_experts=4, num_experts_per_tok=2),
)
"""For runs."""


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


def write_run(home, args):
    """Records with and without images, a tokenizer, a model and a run file in ``home``, which is given back."""
    make_tokenizer(home / "tokenizer.model", args.vocab_size)
    records = []
    for number in range(12):
        talk = [{"from": "human", "value": f"what is made of {number}"}, {"from": "gpt", "value": "a list of tokens"}]
        record = {"conversations": talk}
        if number % 3:
            noise(30, 40, seed=number).save(home / f"{number}.png")
            record["image"] = f"{number}.png"
        records.append(record)
    (home / "data.json").write_text(json.dumps(records))
    (home / "mix.yaml").write_text(yaml.safe_dump({"META": [{"path": str(home / "data.json"), "root": str(home)}]}))
    (home / "model.json").write_text(json.dumps(args.to_dict()))
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 400, validation: 0.2}}
parallel: {{precision: fp32}}
optim: {{lr: 1e-2}}
train: {{max_steps: 3, batch_size: 2}}
save: {{state_every: null}}
log: {{every: 1}}
out: {home}/first
"""
    )
    return home


def saved_in(run):
    """The model that a run has saved."""
    (model,) = run.glob("epoch*")
    return model
