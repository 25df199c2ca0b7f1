"""What a training state holds, of a run in bf16 whose epochs end with a step of fewer rows."""

import json

import pytest
import torch
from jobs import command
from models import WORDS, make_tokenizer
from test_commands import MODEL

from accessory.checkpoint.state import KINDS, TrainingState


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
    codes, _, err = command("finetune", home / "run.yaml")
    assert codes == [0], err
    return TrainingState(home / "run/states/step4")


def test_the_rows_that_were_seen(state):
    assert (state.notes.steps, state.notes.rows) == (4, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_and_moments_are_not_rounded(kind, state):
    for name, shape in state.names.items():
        tensor = state.read_kind(kind, name, tuple(slice(0, n) for n in shape))
        assert tensor.dtype == torch.float32
        rounded = (tensor == tensor.bfloat16()).float().mean().item()  # of random numbers, one in 65536
        assert rounded < 0.9, f"{rounded:.1%} of {name} could be bf16"
