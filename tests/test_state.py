"""A training state that is not what was saved is refused, whatever byte it is; settings that changed since are said."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from jobs import command
from models import TINY
from safetensors.torch import load_file
from test_commands import MODEL
from test_resume import home, refused  # noqa: F401 (home is a fixture)

from accessory.checkpoint import publish
from accessory.checkpoint.state import KINDS, TrainingState, drop_states
from accessory.errors import UserError
from accessory.model.logical import whole_region
from accessory.settings import DataSection, LoraSection, RunConfig, TrainSection, TuningSection
from accessory.train.state import number_settings

# ruff: noqa: F811 (home)

RANKS = 2
SHORT = ("train.max_steps=4",)
FILE = "consolidated.00-of-01.model.safetensors"


def finetune(home, out, *words):
    """Two ranks, each with one thread: on a busy machine that is faster than one with two."""
    return command("finetune", home / "run.yaml", f"out={out}", "train.accumulation=2", *words, ranks=RANKS)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A run of two ranks that each hold two experts, with a state in the middle and one at the end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, _, err = finetune(home, out, *SHORT)
    assert codes == [0, 0], err
    return out


@pytest.fixture(scope="module")
def begun(whole, tmp_path_factory):
    """Of its four steps two are done."""
    out = Path(shutil.copytree(whole, tmp_path_factory.mktemp("begun") / "run"))
    shutil.rmtree(out / "states/step4")
    return out


@pytest.fixture
def run(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def state(run):
    return run / "states/step2"


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def swap_two_boxes(state):
    """Of one tensor, in the files of two ranks: each would get the other's experts."""
    files = [state / f"part-00{rank}.json" for rank in (0, 1)]
    tables = [json.loads(file.read_text()) for file in files]
    (key, *_) = [
        key
        for key in sorted(tables[0].keys() & tables[1].keys())
        if "experts" in key and tables[0][key]["box"] != tables[1][key]["box"]
    ]
    boxes = [table[key]["box"] for table in tables]
    assert len({str([stop - start for start, stop in box]) for box in boxes}) == 1
    for file, table, box in zip(files, tables, reversed(boxes), strict=True):
        table[key]["box"] = box
        file.write_text(json.dumps(table, indent=2) + "\n")


def change_tensor(state):
    content = bytearray((state / "part-001.safetensors").read_bytes())
    content[-9] ^= 4
    (state / "part-001.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "change, named",
    [
        (swap_two_boxes, "part-000.json is not what was saved"),
        (lambda state: change_json(state / "state.json", lambda v: v.update(rows=4)), "state.json is not what was saved"),
        (lambda state: change_json(state / "config.json", lambda v: v.update(max_seq_len=9)), "config.json is not what was"),
        (change_tensor, "part-001.safetensors: exp_avg_sq/"),
    ],
    ids=["boxes", "rows", "config", "tensor"],
)
def test_what_was_changed_is_named_before_training_begins(home, run, state, change, named):
    change(state)
    before = (run / "metrics.jsonl").read_bytes()
    for ranks in (1, 2):
        sentence = refused(home, run, *SHORT, "resume=auto", f"train.accumulation={4 // ranks}", ranks=ranks)
        assert f"{state}/{named}" in sentence and "resume from another training state" in sentence, sentence
    assert (run / "metrics.jsonl").read_bytes() == before and os.listdir(run / "states") == ["step2"]


@pytest.mark.parametrize("damage", [change_tensor, lambda state: (state / "part-001.json").unlink()], ids=["bit", "part"])
def test_a_run_goes_on_from_the_newest_whole_state(home, whole, tmp_path, damage):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "epoch0-iter4")
    damage(run / "states/step4")
    codes, out, err = finetune(home, run, *SHORT, "resume=auto")
    assert codes == [0, 0], err
    (line,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert "states/step4/part-001" in line
    assert line.endswith("resume=auto does: it goes on from step2, and step4 is called step4.damaged now")
    assert f"resumed from {run}/states/step2, of 4 steps\n" in out
    assert sorted(os.listdir(run / "states")) == ["step2", "step4", "step4.damaged"]
    weights = [load_file(folder / "epoch0-iter4" / FILE) for folder in (whole, run)]
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items()) and len(weights[0]) > 10


def test_if_no_state_is_whole_the_newest_is_named(home, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("step2", "step4"):
        change_tensor(run / "states" / name)
    sentence = refused(home, run, *SHORT, "resume=auto", ranks=2)
    assert f"{run}/states/step4/part-001.safetensors: exp_avg_sq/" in sentence
    assert sorted(os.listdir(run / "states")) == ["step2", "step4"], "nothing is renamed"


def test_states_at_multiples_stay(tmp_path):
    for steps in range(1, 10):
        (tmp_path / f"step{steps}").mkdir()
        (tmp_path / f"step{steps}/state.json").write_text("")
        drop_states(tmp_path, 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["step3", "step6", "step8", "step9"]
    drop_states(tmp_path, 1, None)
    assert os.listdir(tmp_path) == ["step9"]


def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(publish, "sync", lambda path: done.append(path))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append((path, to)))
    temporary = publish.prepare_directory(tmp_path / "saved")
    (temporary / "inner").mkdir()
    (temporary / "inner/file").write_text("")
    publish.publish_directory(tmp_path / "saved")
    assert done == [temporary / "inner", temporary / "inner/file", temporary, (temporary, tmp_path / "saved"), tmp_path]


def test_inspect_says_what_is_in_a_state(run, state):
    codes, out, _ = command("inspect", state)
    assert codes == [0] and "stands at   step 2 of 4, 8 rows of the data, 4 a step" in out
    for kind in KINDS:
        found = re.search(rf"^  {kind} +(\d+) +([\d,]+)  float64$", out, re.M)
        assert int(found[2].replace(",", "")) == sum(map(math.prod, TrainingState(state).names.values()))
    assert "optim.lr 0.01" in out


def test_verify_reads_every_byte_of_a_state(state):
    codes, out, _ = command("verify", state)
    assert codes == [0] and out.startswith("whole: step 2, 2 part(s)")
    change_tensor(state)
    codes, out, err = command("verify", state)
    assert codes == [1] and f"{state}/part-001.safetensors: exp_avg_sq/" in out and err.startswith("DAMAGED: 1 tensors")


def load(state):
    """As a run does: what does not read is refused, then what is not as its checksum says."""
    found = TrainingState(state)
    damaged = [key for part in range(found.notes.parts) for key in found.damaged(part)]
    if damaged:
        raise UserError(damaged[0])
    shapes = {name: whole_region(shape) for name, shape in found.names.items()}
    tensors = {
        (kind, name): found.read_kind(kind, name, box)
        for name, box in shapes.items()
        for kind in KINDS
        if f"{kind}/{name}" in found._reader.tiles
    }
    return found.notes, found.args, tensors


def test_a_changed_byte_is_refused_or_changes_nothing(state):
    """Any, in any file: bits are flipped, bytes taken out and put in."""
    notes, args, tensors = load(state)
    draw = random.Random(0)
    for path in sorted(state.iterdir()):
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
        places = [*range(min(16, end)), *(draw.randrange(end) for _ in range(30)), len(whole) - 9]
        for place in places:
            flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
            for content in (flipped, whole[:place] + whole[place + 1 :], whole[:place] + b"0" + whole[place:]):
                path.write_bytes(content)
                try:
                    seen = load(state)
                except UserError as error:
                    assert str(state) in str(error) and len(str(error).splitlines()) == 1
                    assert path.name == "SHA256SUMS" or path.stem in str(error), (path, place)
                else:
                    assert seen[:2] == (notes, args) and seen[2].keys() == tensors.keys(), (path, place)
                    assert all(torch.equal(seen[2][key], tensor) for key, tensor in tensors.items()), (path, place)
                    assert path.suffix in (".safetensors", ""), "of these any is seen"
        path.write_bytes(whole)
    load(state)


def test_a_file_that_is_missing_or_cut_off_is_named(begun, tmp_path):
    for path in (begun / "states/step2").iterdir():
        for damage in (os.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)):
            state = tmp_path / "state"
            shutil.rmtree(state, ignore_errors=True)
            shutil.copytree(path.parent, state)
            damage(state / path.name)
            with pytest.raises(UserError, match=re.escape(str(state))) as caught:
                TrainingState(state)
            assert path.name in str(caught.value)


def test_a_state_without_checksums_needs_a_word_of_trust(home, run, state):
    """As an earlier version saved it: without settings, too."""
    (state / "SHA256SUMS").unlink()
    change_json(state / "state.json", lambda values: values.pop("settings"))
    words = (*SHORT, "resume=auto")
    sentence = refused(home, run, *words)
    assert f"{state}/SHA256SUMS: no such file" in sentence and "an earlier version saved" in sentence
    shown = re.search(r"\((cd .* > SHA256SUMS)\)", sentence)[1]
    subprocess.run(shown, shell=True, check=True)
    codes, out, err = finetune(home, run, *words)
    assert codes == [0, 0], err
    assert f"resumed from {state}, of 4 steps; it does not say with which settings it was saved\n" in out


def test_the_checksums_are_those_of_sha256sum(state):
    listed = {line.split()[1] for line in (state / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in state.glob("*.json")} and len(listed) == 2 + RANKS
    subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=state, check=True, capture_output=True)


def said(out):
    (line,) = [line for line in out.splitlines() if line.startswith("resumed from")]
    return line


def test_settings_that_changed_are_said_once(home, run):
    """The run goes on again and again; each state says with what it was saved."""
    (home / "heavier.json").write_text(json.dumps(MODEL | {"load_balancing_weight": 0.5}))
    reference = ("train.balance=microbatch", "train.reference_loss=true", f"model.config={home}/heavier.json")
    optim = "{lr: 0.005, min_lr: 1e-4, warmup_epochs: 0.5, weight_decay: 0, betas: [0.8, 0.9], eps: 1e-6, clip_grad: 1}"
    begun_at = 2
    for steps, words, clauses in (
        (4, (), []),
        (
            5,
            reference,
            [
                "train.max_steps 4 -> 5",
                "train.balance document -> microbatch",
                "train.reference_loss false -> true",
                "load_balancing_weight 0.1 -> 0.5",
            ],
        ),
        (
            6,
            (*reference, "train.batch_size=2", "train.accumulation=1"),
            ["train.max_steps 5 -> 6", "train.batch_size 1 -> 2", "train.accumulation 2 -> 1"],
        ),
        (
            7,
            (
                f"optim={optim}",
                "train.epochs=2",
                "train.balance=document",
                "train.bias_rate=0.1",
                "train.z_loss_weight=0.001",
                "train.balance_weight=0.2",
                "parallel.precision=fp32",
            ),
            [
                "optim.lr 0.01 -> 0.005",
                "optim.min_lr 0.0 -> 0.0001",
                "optim.warmup_epochs 0.03 -> 0.5",
                "optim.weight_decay 0.1 -> 0.0",
                "optim.betas [0.9, 0.95] -> [0.8, 0.9]",
                "optim.eps 1e-08 -> 1e-06",
                "optim.clip_grad 2.0 -> 1.0",
                "train.epochs 3 -> 2",
                "train.max_steps 6 -> 7",
                "train.balance microbatch -> document",
                "train.bias_rate 0.001 -> 0.1",
                "train.z_loss_weight 0.0 -> 0.001",
                "train.reference_loss true -> false",
                "load_balancing_weight 0.5 -> 0.2",
                "parallel.precision fp64 -> fp32",
            ],
        ),
    ):
        codes, out, err = finetune(home, run, "resume=auto", *words, f"train.max_steps={steps}")
        assert codes == [0, 0], err
        changed = f"; changed since: {', '.join(clauses)}" if clauses else ""
        of = max(steps - 1, 4)
        assert said(out) == f"resumed from {run}/states/step{begun_at}, of {of} steps{changed}"
        begun_at = steps


def test_settings_of_adapters_are_said(home, begun, tmp_path):
    base = ("model.config=null", f"model.checkpoint={begun}/epoch0-iter4")
    for steps, lora in ((1, "{rank: 2}"), (2, "{rank: 2, alpha: 4, rslora: true, dropout: 0.1}")):
        words = (*base, "resume=auto", f"tuning.lora={lora}", f"train.max_steps={steps}")
        codes, out, err = finetune(home, tmp_path / "run", *words)
        assert codes == [0, 0], err
    assert said(out).endswith(
        "; changed since: train.max_steps 1 -> 2, tuning.lora.alpha 2.0 -> 4.0, tuning.lora.rslora false -> true, "
        "tuning.lora.dropout 0.0 -> 0.1"
    )


REFUSED = {
    "model.checkpoint": "its fingerprint",
    "model.config": "what it says",
    "model.tokenizer": "the samples",
    "model.labels": "what it says",
    "data": "the samples",
    "train.seed": "their order",
    "tuning.lora.rank": "the adapters' shape",
    "tuning.lora.targets": "names",
    "tuning.bias": "names",
    "tuning.train": "names",
    "tuning.freeze": "names",
}
SAME_NUMBERS = ["model.layout", "model.strict", "model.kernel", "model.offload", "out", "log", "save", "resume"]
SAME_NUMBERS += [
    f"parallel.{name}" for name in ("model_parallel", "data_parallel", "shard_size", "recompute", "stall_timeout_s")
]


def test_every_setting_is_said_refused_or_of_no_matter():
    """A setting that is added to a run must find its place in one of these lists."""
    config = RunConfig(
        data=DataSection("mix.yaml"),
        out="out",
        tuning=TuningSection(lora=LoraSection()),
        train=TrainSection(balance="microbatch"),
        model=dataclasses.replace(RunConfig.__dataclass_fields__["model"].default_factory(), checkpoint="base"),
    )

    def names(values, above=""):
        for name, value in values.items():
            yield from names(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"]

    said = number_settings(config, TINY, 1).keys()
    assert "load_balancing_weight" in said
    elsewhere = [*said, "train.balance_weight", *REFUSED, *SAME_NUMBERS]
    for name in names(dataclasses.asdict(config)):
        assert any(name == known or name.startswith(f"{known}.") for known in elsewhere), name
