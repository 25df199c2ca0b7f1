"""A run that was stopped goes on as if it had not been: in any layout, at any parallel size, on exactly the rows left."""

import json
import shutil

import pytest
import torch
from jobs import Job, command
from models import WORDS, make_tokenizer
from safetensors.torch import load_file
from test_commands import MODEL, rows

from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.publish import claimed
from accessory.checkpoint.state import states_in
from accessory.data.loader import BatchPlan
from accessory.data.mix import Sample
from accessory.data.packing import Rows
from accessory.train.plan import Plan, Position

RECORDS = 22


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("resume")
    make_tokenizer(home / "tokenizer.model")
    (home / "model.json").write_text(json.dumps(MODEL))
    with open(home / "data.jsonl", "w") as file:
        for n in range(RECORDS):
            record = {"instruction": " ".join(WORDS[n % 7 :][:3]), "input": "", "output": " ".join(WORDS[n % 11 :] * 2)}
            file.write(json.dumps(record) + "\n")
    (home / "mix.yaml").write_text("META: [{path: data.jsonl, type: text}]\n")
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 320, validation: 0.1}}
parallel: {{precision: fp64}}
optim: {{lr: 1e-2, weight_decay: 0.1}}
train: {{epochs: 3, batch_size: 1, accumulation: 4}}
log: {{every: 1, tensorboard: false}}
save: {{state_every: 2}}
out: {home}/run
"""
    )
    return home


@pytest.fixture(scope="module")
def whole(home):
    """The run without interruption: 20 rows, 4 a step, 3 epochs."""
    codes, _, err = command("finetune", home / "run.yaml", f"out={home}/whole")
    assert codes == [0], err
    return home / "whole"


def finetune(home, out, *overrides, ranks=1):
    return command("finetune", home / "run.yaml", f"out={out}", *overrides, ranks=ranks)


def model(run):
    """Every logical tensor of the model that a run saved at its end."""
    checkpoint = Checkpoint(run / "epoch2")
    reader = checkpoint.readers[0]
    return {name: checkpoint.read(name, box(reader.tiles[name])) for name in reader.tiles}


def box(tiles):
    first = tiles[0].region
    return tuple(slice(0, max(t.region[axis].stop for t in tiles)) for axis in range(len(first)))


def assert_same_run(a, b, load=model, rel=1e-9):
    """The same losses at the same steps, and at the end the same tensors."""
    one, other = rows(a), rows(b)
    assert [r["step"] for r in one] == [r["step"] for r in other]
    for x, y in zip(one, other, strict=True):
        for key in {"loss", "val_loss", "balance", "z_loss", "grad_norm", "lr", "targets"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=rel), (x["step"], key)
    left, right = load(a), load(b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rel, atol=rel)


def stop_behind(home, out, steps, *overrides, ranks):
    """Start a run, and kill all of its processes once it has logged ``steps`` steps."""
    metrics = out / "metrics.jsonl"
    with Job("finetune", home / "run.yaml", f"out={out}", *overrides, ranks=ranks) as job:
        job.wait_for(lambda: metrics.is_file() and metrics.read_text().count('"loss"') >= steps)
        job.kill()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # layout, processes, model parallel, accumulation (4 rows a step in all), data parallel
        (("mixtral", 1, 1, 4, "fsdp"), ("mixtral_sparse", 4, 2, 2, "fsdp")),
        (("mixtral_sparse", 4, 2, 2, "fsdp"), ("mixtral", 2, 1, 2, "ddp")),
        (("mixtral", 2, 1, 2, "ddp"), ("mixtral_sparse", 1, 1, 4, "sdp")),
    ],
)
def test_a_killed_run_goes_on_in_another_partition(home, whole, tmp_path, before, after):
    def overrides(partition):
        layout, ranks, mp, accumulation, mode = partition
        given = {"model.layout": layout, "parallel.model_parallel": mp, "parallel.data_parallel": mode}
        return ranks, [f"{key}={value}" for key, value in (given | {"train.accumulation": accumulation}).items()]

    run = tmp_path / "run"
    ranks, words = overrides(before)
    stop_behind(home, run, 7, *words, ranks=ranks)
    state = states_in(run / "states")[-1]
    assert 6 <= int(state.name.removeprefix("step")) < 15
    ranks, words = overrides(after)
    codes, out, err = finetune(home, run, "resume=auto", *words, ranks=ranks)
    assert codes == [0] * ranks, err
    assert f"resumed from {state}, of 15 steps\n" in out, "and nothing is said to have changed"
    assert_same_run(whole, run)
    assert sorted(path.name for path in (run / "states").iterdir()) == ["step14", "step15"], "two are kept"


@pytest.mark.parametrize("packed", [False, True])
def test_another_global_batch_goes_through_exactly_the_rows_that_are_left(packed):
    samples = [Sample([1] * (2 + n % 7), [True] * (2 + n % 7)) for n in range(50)]
    lengths = torch.tensor([len(s.tokens) for s in samples]).numpy()
    orders = [torch.randperm(50, generator=torch.Generator().manual_seed(epoch)).numpy() for epoch in range(3)]
    epochs = [Rows.packed(order, lengths, 20) if packed else Rows.alone(order) for order in orders]
    counts = tuple(len(rows) for rows in epochs)
    seen, done = [[], [], []], Position()
    stops = [(1, 3, 2), (4, 1, 5), (2, 2, 3), (3, 1, None)]  # data-parallel ranks, rows of each, and steps until it stops
    for world, size, steps in stops:
        plan = Plan(counts, world * size, None, done)
        assert plan.end.rows == sum(counts)
        for number, step in enumerate(plan.steps()):
            if number == steps:
                break
            for rank in range(world):
                for batch in BatchPlan(size, 1, rank, world).step(samples, epochs[step.epoch], step.start, step.epoch):
                    seen[step.epoch] += [key - 50 * step.epoch for key in batch.sample_keys.tolist()]
            done = step.after
    assert done == plan.end
    for epoch in range(3):
        assert sorted(seen[epoch]) == list(range(50)), "every sample once"


@pytest.mark.parametrize("quantise", ["null", "{experts: nf4-8, attention: int8}"])
def test_adapters_go_on_from_a_state_that_holds_only_them(home, whole, tmp_path, quantise):
    words = [f"model.checkpoint={whole}/epoch2", "model.config=null", "tuning={lora: {rank: 2, dropout: 0.1}, bias: true}"]
    words.append(f"model.quantise={quantise}")
    codes, _, err = finetune(home, tmp_path / "whole", *words)
    assert codes == [0], err
    stop_behind(home, tmp_path / "run", 7, *words, ranks=1)
    codes, _, err = finetune(
        home, tmp_path / "run", *words, "resume=auto", "model.layout=mixtral_sparse", "parallel.model_parallel=2", ranks=2
    )
    assert codes == [0, 0], err
    assert_same_run(tmp_path / "whole", tmp_path / "run", lambda run: load_file(run / "epoch2/adapter.safetensors"))
    sizes = [
        sum(file.stat().st_size for file in run.glob("states/step15/part*.safetensors")) for run in (tmp_path / "run", whole)
    ]
    assert sizes[0] < 0.5 * sizes[1]


def refused(home, out, *overrides, ranks=1):
    codes, _, err = finetune(home, out, *overrides, ranks=ranks)
    assert codes == [1] * ranks and "Traceback" not in err
    (sentence,) = [line for line in err.splitlines() if line.startswith("accessory: error")]
    return sentence


def test_what_does_not_fit_is_refused(home, whole, tmp_path):
    assert "an earlier run left its training state here; resume=auto goes on" in refused(home, whole)
    state = f"resume={whole}/states/step15"
    assert "was saved with other samples" in refused(home, tmp_path, state, "train.seed=1")
    assert "was saved with other samples" in refused(home, tmp_path, state, "data.packing=true")
    assert "holds layers.0.attention.wk.weight: resume with the tuning" in refused(
        home, tmp_path, state, "tuning.train=[experts]"
    )
    (home / "other.json").write_text(json.dumps(MODEL | {"hidden_dim": 40}))
    assert "has shape [4, 48, 32], this model's has [4, 40, 32]" in refused(
        home, tmp_path, state, f"model.config={home}/other.json"
    )
    assert "no such directory; expected a training state" in refused(home, tmp_path, f"resume={tmp_path}/nothing")
    codes, out, _ = finetune(home, whole, "resume=auto")
    assert codes == [0] and "this run is over" in out


def test_the_models_of_another_run_are_not_written_over(home, whole, tmp_path):
    """Where no states are kept, either; the same run makes the same again, in any partition."""
    run = tmp_path / "run"
    short = ("train.max_steps=1", "save.state_every=null")
    assert finetune(home, run, *short)[0] == [0]
    before = (run / "epoch0-iter1/consolidated.00-of-01.model.safetensors").read_bytes()
    for changed in (["optim.lr=1e-3"], ["optim.lr=1e-3", "resume=auto"], ["optim.lr=1e-3", f"resume={whole}/states/step15"]):
        said = refused(home, run, *short, *changed)
        assert "epoch0-iter1: the model of a run with another optim.lr, which this run would write over: set another" in said
    assert "epoch0-iter1: the model" in refused(home, run, *short, "tuning.train=[norms]", "--dry-run")
    assert finetune(home, run, *short, "parallel.data_parallel=ddp", "log.every=2")[0] == [0]
    assert (run / "epoch0-iter1/consolidated.00-of-01.model.safetensors").read_bytes() == before


def test_a_state_belongs_to_its_data_and_its_model(home, whole, tmp_path):
    state = f"resume={whole}/states/step15"
    other = home / "other"
    other.mkdir()
    (other / "mix.yaml").write_text("META: [{path: ../data.jsonl, type: text, train_on: all}]\n")
    assert "was saved with other samples" in refused(home, tmp_path, state, f"data.mix={other}/mix.yaml")
    (other / "model.json").write_text(json.dumps(MODEL | {"rope_theta": 500.0}))
    words = (state, f"model.config={other}/model.json")
    assert "was saved with rope_theta 1000000.0 in config.json, this model has 500.0" in refused(home, tmp_path, *words)


def test_going_back_needs_the_later_states_out_of_the_way(home, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.copytree(run / "states/step15", run / "states/step6")
    shutil.copytree(run / "states/step15", run / "states/step6.kept")
    sentence = refused(home, run, f"resume={run}/states/step6")
    assert f"{run}/states/step15 is of more steps" in sentence and "remove it to go on from here" in sentence
    codes, out, err = finetune(home, run, "resume=auto", "train.max_steps=10")
    assert codes == [0] and "this run is over" in out, err


def test_a_run_directory_belongs_to_one_job(home, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with claimed(run):
        assert "another job is writing into it" in refused(home, run)
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refused(home, tmp_path / "file" / "run")


def test_an_interrupted_save_does_not_count(home, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "states/.step99.partial").mkdir()
    codes, out, _ = finetune(home, run, "resume=auto")
    assert codes == [0] and f"{run}/states/step15: this run is over" in out


def test_a_torn_last_line_of_the_metrics_is_forgotten(home, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "lo')
    codes, _, err = command("compare", run, whole, "--png", tmp_path / "picture.png")
    assert codes == [0], err
    codes, _, err = finetune(home, run, "resume=auto", "train.max_steps=16", "train.epochs=4")
    assert codes == [0], err
    assert [row["step"] for row in rows(run)][-2:] == [16, 16]
