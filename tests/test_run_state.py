"""What a training state holds, of a bf16 run whose epochs end with a step of fewer rows; and steps that go on from one."""

import json

import pytest
import torch
import torch.distributed as dist
from jobs import Job
from models import OPTIM, TINY, WORDS, Tensors, assemble, build, make_tokenizer, mesh_for, samples, weights
from ranks import run_ranks
from test_commands import MODEL

from accessory.certify import harness
from accessory.checkpoint.state import KINDS, StateNotes, TrainingState
from accessory.model.logical import Overlaid, whole_region
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.state import load_moments, save_state
from accessory.train.step import train_step

PAGES = """
import resource, torch
from accessory.train.loop import Trainer

run = Trainer.run

def then_take_memory(self):
    run(self)
    made = []
    for size in range(128, 60, -16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size * 2**20, dtype=torch.uint8)
        made.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    open("{file}", "w").write(repr(made))

Trainer.run = then_take_memory
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """After four steps of two rows, where an epoch has five: 2, 4, 5 | 2."""
    home = tmp_path_factory.mktemp("state")
    make_tokenizer(home / "tokenizer.model")
    (home / "model.json").write_text(json.dumps(MODEL | {"vocab_size": 300}))
    (home / "data.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS[n:])}) for n in range(5)))
    (home / "mix.yaml").write_text("META: [{path: data.jsonl}]\n")
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 64, validation: 0}}
parallel: {{precision: bf16}}
train: {{epochs: 2, batch_size: 1, accumulation: 2, max_steps: 4}}
log: {{tensorboard: false, probe_tokens: 0}}
save: {{state_every: 4}}
out: {home}/run
"""
    )
    with Job("finetune", home / "run.yaml", plant=PAGES.replace("{file}", str(home / "pages"))) as job:
        assert job.codes() == [0], job.err()
    return TrainingState(home / "run/states/step4")


def test_memory_that_is_freed_serves_again(state):
    """On a CPU: of a large block, where a larger one was freed before, no page is made anew, of 16384 at least."""
    _, *made = json.loads((state.directory.parents[2] / "pages").read_text())
    assert max(made) < 1000, made


def test_the_rows_that_were_seen(state):
    assert (state.notes.steps, state.notes.rows) == (4, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_and_moments_are_not_rounded(kind, state):
    for name, shape in state.names.items():
        tensor = state.read_kind(kind, name, whole_region(shape))
        assert tensor.dtype == torch.float32
        rounded = (tensor == tensor.bfloat16()).float().mean().item()  # of random numbers, one in 65536
        assert rounded < 0.9, f"{rounded:.1%} of {name} could be bf16"


BATCHES = [samples(4, seed) for seed in range(4)]
WAYS = [("mixtral", 2, "fsdp"), ("mixtral_sparse", 1, "fsdp"), ("mixtral_sparse", 2, "fsdp"), ("mixtral", 1, "ddp")]


def train(layout, mp, mode, batches, state=None):
    """A model and its optimiser after a step of each batch."""
    mesh = mesh_for(mp, mode)
    source = Tensors(weights())
    model = build(TINY, layout, Overlaid(source, state, state.names) if state else source, mesh=mesh, mode=mode)
    optimizer = make_optimizer(model, OPTIM)
    if state:
        load_moments(model, optimizer, state)
    for batch in batches:
        micro_batches = harness.micro_batches(batch, 1, mesh.dp.rank, mesh.dp.size)
        train_step(model, optimizer, micro_batches, NextToken(), RouterLosses("global"), clip_grad=0.5)
    return model, optimizer


def train_on(home):
    """The weights after all steps at a stretch, and with a change from one way to the next in the middle."""
    results = [harness.weights(train("mixtral", 1, "fsdp", BATCHES)[0])]
    for number, (before, after) in enumerate(zip(WAYS, WAYS[1:] + WAYS[:1], strict=True)):
        directory = home / f"{number}/step2"
        notes = StateNotes(dist.get_world_size(), steps=2, rows=8, of_steps=4, global_batch=4, data_digest="")
        save_state(*train(*before, BATCHES[:2]), directory, notes, keep=1)
        results.append(harness.weights(train(*after, BATCHES[2:], TrainingState(directory))[0]))
    return results


def test_steps_go_on_as_if_there_had_been_no_state(tmp_path):
    ranks = run_ranks(2, train_on, tmp_path)
    whole, *others = (assemble(list(parts)) for parts in zip(*ranks, strict=True))
    for full in others:
        for name, tensor in whole.items():
            assert (full[name] - tensor).abs().max() <= 1e-10 * tensor.abs().max(), name
