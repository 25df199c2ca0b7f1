"""Saves do not stop training, and no failure loses more than the steps since the last one."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jobs import Job
from models import TINY, Tensors, build, mesh_for, weights
from ranks import run_ranks
from safetensors.torch import load_file
from test_commands import rows
from test_resume import assert_same_run, home  # noqa: F401 (home is a fixture)
from transformers import AutoModelForCausalLM

from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.state import TrainingState, states_in
from accessory.train import save as saving
from accessory.train.saver import Saver

# ruff: noqa: F811 (home)

SLOW = """
from pathlib import Path
from accessory.train import saver
def steps():
    metrics = Path("{out}") / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.is_file() else 0
written = saver.write_now
def slowly(save, group):
    end = time.monotonic() + 20
    until = min(steps() + {more}, 15)
    while steps() < until and time.monotonic() < end:
        time.sleep(0.01)
    written(save, group)
saver.write_now = slowly
saver.WAIT_TOLD_S = 0.0
"""
"""A save is written only when so many steps more are logged."""


def finetune(home, out, *words, ranks=2, plant="", timeout=120):
    with Job("finetune", home / "run.yaml", f"out={out}", *words, ranks=ranks, plant=plant) as job:
        return job.codes(timeout=timeout), job.out(), job.err()


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    codes, _, err = finetune(home, out, "train.accumulation=2")
    assert codes == [0, 0], err
    return out


def tensors_of(state):
    return {path.name: load_file(path) for path in sorted(state.glob("*.safetensors"))}


def test_training_goes_on_while_a_state_is_written(home, undisturbed, tmp_path):
    """What is saved then is what was there when the save began."""
    out = tmp_path / "run"
    words = ["train.accumulation=2", "save.state_every=14"]
    codes, said, err = finetune(home, out, *words, "train.max_steps=15", plant=SLOW.format(out=out, more=1))
    assert codes == [0, 0], err
    lines = said.splitlines()
    (saved,) = [number for number, line in enumerate(lines) if "states/step14" in line and line.startswith("saved")]
    (step,) = [number for number, line in enumerate(lines) if line.startswith("step    15/15")]
    assert step < saved, "the step after it was logged before"
    assert re.search(r"^waited \d+ s until \S+states/step14 was written", said, re.M), "and the next save waited"
    theirs, ours = (tensors_of(run / "states/step14") for run in (undisturbed, out))
    assert theirs.keys() == ours.keys()
    for file, tensors in theirs.items():
        assert tensors.keys() == ours[file].keys() and all(torch.equal(ours[file][key], t) for key, t in tensors.items())


def ranges(home):
    """(bytes that this rank held and wrote, bytes of the whole model), for the model and for what trains."""
    model = build(TINY, "mixtral_sparse", Tensors(weights()), mesh=mesh_for(1))
    found = []
    write_pieces = saving.write_pieces

    def counted(path, pieces):
        found.append((sum(piece.values.untyped_storage().nbytes() for piece in pieces), path.stat().st_size))
        write_pieces(path, pieces)

    saving.write_pieces = counted
    saving.save_model(model, home / "model", {}, torch.float64, "safetensors")
    saving.save_trainable(model, home / "trained", {}, {"fingerprint": ""})
    return found


def test_every_rank_writes_its_own_bytes(tmp_path):
    for held in zip(*run_ranks(3, ranges, tmp_path), strict=True):
        sizes = [size for size, _ in held]
        whole = held[0][1]
        assert sum(sizes) == pytest.approx(whole, rel=0.1)
        assert max(sizes) < 1.05 * whole / 3


def fails_on_one(home):
    saver, said = Saver(), []

    def write(folder):
        (folder / "file").write_text("")
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")

    save = saving.Save(home / "saved", "", write, lambda *_: None)
    saver.begin([save])
    try:
        saver.wait()
    except ValueError as error:
        said.append(str(error))
    dist.barrier()
    return said, sorted(os.listdir(home))


def test_what_cannot_be_written_is_told_on_all_ranks_and_leaves_nothing(tmp_path):
    said = f"{tmp_path}/saved: cannot be written (No space left on device); what was saved before is whole"
    assert run_ranks(2, fails_on_one, tmp_path) == [([said], [])] * 2


def test_a_fault_behind_a_save_does_not_lose_it(home, tmp_path):
    """Training fails while a state is being written."""
    out = tmp_path / "run"
    plant = (
        SLOW.format(out=out, more=0).replace("def slowly(save, group):\n", "def slowly(save, group):\n    time.sleep(1)\n")
        + """
from accessory.train import loop
from accessory.errors import UserError
step = loop.train_step
def fails(*a, count=[0], **k):
    count[0] += 1
    if count[0] == 3:
        raise UserError("planted")
    return step(*a, **k)
loop.train_step = fails
"""
    )
    codes, said, err = finetune(home, out, "train.accumulation=2", plant=plant)
    assert codes == [1, 1] and "planted" in err
    assert "states/step2 (to resume from" in said and TrainingState(out / "states/step2").notes.steps == 2


KILLS = int(os.environ.get("ACCESSORY_KILLS", "6"))
PARTITIONS = (("mixtral", 1), ("mixtral_sparse", 2))  # layout and model-parallel size, over two ranks
WHERE_STATES_ARE = ["save.state_every=1", "train.epochs=3"]


def test_kill_9_at_any_moment_loses_nothing(home, undisturbed, tmp_path):
    """Of a rank or of both, while they train or save; every other time the run goes on in another layout and size."""
    draw, out, killed, steps = random.Random(0), tmp_path / "run", 0, []
    metrics = out / "metrics.jsonl"
    while killed < KILLS:
        layout, mp = PARTITIONS[killed // 2 % 2]
        words = [f"model.layout={layout}", f"parallel.model_parallel={mp}", f"train.accumulation={2 * mp}", "resume=auto"]
        with Job("finetune", home / "run.yaml", f"out={out}", *words, *WHERE_STATES_ARE, ranks=2) as job:
            done, wanted = (states_in(out / "states") or [None])[-1], draw.randrange(1, 3)
            begun = int(done.name.removeprefix("step")) if done else 0
            steps.append(begun)
            if begun >= 13:  # near the end it starts anew
                job.kill()
                shutil.rmtree(out)
                continue
            job.wait_for(lambda: metrics.is_file() and f'"step": {begun + wanted}' in metrics.read_text())  # noqa: B023
            time.sleep(draw.random() * 0.05)
            job.send(9, *draw.choice([(0,), (1,), (0, 1)]))
            job.kill()
            killed += 1
        newest = (states_in(out / "states") or [None])[-1]
        after = int(newest.name.removeprefix("step")) if newest else 0
        assert after >= begun, "the position is never lost"
        if newest:
            state = TrainingState(newest)
            assert not [place for part in range(state.notes.parts) for place in state.damaged(part)], "no half state"
    codes, _, err = finetune(home, out, "train.accumulation=2", "resume=auto", *WHERE_STATES_ARE)
    assert codes == [0, 0], err
    assert_same_run(undisturbed, out, rel=1e-10)
    assert len(set(steps)) > 2 or KILLS < 4


def test_torchrun_starts_the_ranks_anew_and_they_go_on(home, undisturbed, tmp_path):
    """Bitwise, as it is the same partition."""
    out, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    words = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=2", "-m", "accessory"]
    words += ["finetune", home / "run.yaml", f"out={out}", "train.accumulation=2", "resume=auto"]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as torchrun:
        try:
            deadline = time.monotonic() + 120
            while not (metrics.is_file() and metrics.read_text().count('"loss"') >= 5):
                assert torchrun.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(ranks[-1]), 9)
            said, _ = torchrun.communicate(timeout=120)
        finally:
            torchrun.terminate()
    assert torchrun.returncode == 0 and said.count("resumed from") == 1, said
    file = "epoch2/consolidated.00-of-01.model.safetensors"
    ours, theirs = load_file(out / file), load_file(undisturbed / file)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_the_best_model_stays_when_a_run_goes_on(home, tmp_path):
    """As the same run of wandb."""
    out = tmp_path / "run"
    words = ["model.layout=mixtral_sparse", "parallel.model_parallel=2", "save.format=hf", "save.best=true"]
    words += ["log.validate_every=1", "log.wandb=offline"]
    codes, said, err = finetune(
        home, out, *words, "train.epochs=1", "optim.lr=0.05", "save.state_every=1", "save.keep_every=1"
    )
    assert codes == [0, 0], err
    assert re.search(r" [\d:]+ left$", said, re.M), "the time that is left"
    losses = {row["step"]: row["val_loss"] for row in rows(out) if row["step"] and "val_loss" in row}
    lowest = min(losses, key=losses.__getitem__)
    best, state = Checkpoint(out / "best"), TrainingState(out / f"states/step{lowest}")
    for name in best.logical.shapes:
        region = best.logical.whole(name)
        assert torch.equal(best.read(name, region), state.read_kind("weight", name, region)), name
    kept = best.read(name, region).clone()
    codes, _, err = finetune(home, out, *words, "train.epochs=2", "resume=auto", "optim.lr=10")
    assert codes == [0, 0], err
    later = [row["val_loss"] for row in rows(out) if row["step"] > max(losses) and "val_loss" in row]
    assert later and min(later) > losses[lowest], "else this shows nothing"
    assert torch.equal(Checkpoint(out / "best").read(name, region), kept)
    assert len({path.name.split("-")[-1] for path in out.glob("wandb/offline-run-*")}) == 1
    assert len(list(out.glob("wandb/offline-run-*"))) == 2


def test_hugging_face_files_are_those_of_convert(home, undisturbed, tmp_path):
    out, converted = tmp_path / "run", tmp_path / "converted"
    words = ["model.layout=mixtral_sparse", "parallel.model_parallel=2", "save.format=hf"]
    codes, _, err = finetune(home, out, *words)
    assert codes == [0, 0], err
    with Job("convert", undisturbed / "epoch2", converted, "--to", "hf") as job:
        assert job.codes() == [0], job.err()
    assert sorted(os.listdir(out / "epoch2")) == sorted(os.listdir(converted))
    for path in converted.iterdir():
        if path.suffix == ".json":
            assert (out / "epoch2" / path.name).read_text() == path.read_text(), path.name
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out / "epoch2", converted))
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-9, atol=1e-9)
    model = AutoModelForCausalLM.from_pretrained(out / "epoch2", dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


LATE = """
import torch.distributed as dist
from accessory.train import save
write_pieces = save.write_pieces
def late(path, pieces):
    if dist.get_rank() == 1:
        time.sleep({seconds})
    write_pieces(path, pieces)
save.write_pieces = late
"""


def test_one_that_is_late_to_write_holds_up_nothing(home, undisturbed, tmp_path):
    """The steps go on, and the end waits for it; a clock that is set back in the meantime changes nothing."""
    out, seconds = tmp_path / "run", float(os.environ.get("ACCESSORY_LATE", "3"))
    clock = "import time\nnow, started = time.time, time.time()\ntime.time = lambda: 2 * started - now()\n"
    codes, said, err = finetune(home, out, "train.accumulation=2", plant=clock + LATE.format(seconds=seconds))
    assert codes == [0, 0], err
    assert_same_run(undisturbed, out)
    assert re.search(r"^waited \d+ s until \S+/epoch0", said, re.M)
