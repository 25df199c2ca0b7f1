"""The command: the quick certificate, its files, what it refuses, and how it says that a cell fails."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from test_convert import cli

from accessory.certify import command, formats
from accessory.certify.judge import Judge, Verdict
from accessory.certify.matrix import training_cells
from accessory.certify.precision import BOUNDS
from accessory.certify.problem import OPTIM, SMALL, Problem
from accessory.certify.processes import Failure
from accessory.parallel.cross_entropy import CHUNK


def test_quick(tmp_path):
    """What ``make test`` certifies."""
    words = ["--quick", "--json", tmp_path / "c.json", "--html", tmp_path / "c.html"]
    done = subprocess.run(
        [sys.executable, "-m", "accessory", "certify", *words], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("PASS: ") and "allowed 1e-10" in lines[-1]
    certificate = json.loads((tmp_path / "c.json").read_text())
    assert certificate["passed"] and certificate["about"]["torch"] == torch.__version__
    training = [row for row in certificate["rows"] if "accumulation" in row["cell"]]
    assert len(lines) > len(certificate["rows"]) > len(training) > 10
    for row in training:
        compared = {"loss", "balance", "z-loss", "counts", "norm", "clipping", "gradients", "weights"}
        assert row["errors"].keys() == compared, row
        assert row["errors"]["counts"] == 0 and 0 < row["errors"]["gradients"] < 1e-10
    cells = [row["cell"] for row in training]
    assert {cell["world"] for cell in cells} == {1, 2}
    assert [cell["kernel"] for cell in cells if "kernel" in cell] == ["reference", "reference"]
    for first, second in combinations(("layout", "accumulation", "packing", "masks", "recompute", "tuning", "balance"), 2):
        met = {(cell[first], cell[second]) for cell in cells}
        assert len(met) == len(VALUES[first]) * len(VALUES[second]), (first, second)
    page = (tmp_path / "c.html").read_text()
    assert page.count('<tr class="pass">') == len(certificate["rows"]) and "http" not in page


def test_quick_in_bf16(tmp_path):
    assert cli("certify", "--quick", "--precision", "bf16", "--json", tmp_path / "c.json") == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["cell"]["kernel"] for row in rows if row["cell"]["kernel"] != "auto"] == ["grouped", "reference"]
    modes = {(row["cell"]["world"], row["cell"]["data_parallel"]) for row in rows}
    assert modes == {(1, "fsdp"), *product([2], ("fsdp", "sdp", "ddp"))}
    for row in rows:
        summed = {"reduced"} if row["cell"]["model_parallel"] == 1 else set()
        assert row["errors"].keys() == BOUNDS.keys() - {"reduced"} | summed
        assert row["errors"]["router"] < 1e-5 < row["errors"]["attention"] < 1e-2, "fp32 in the router, bf16 elsewhere"


MESHES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
VALUES = {
    "layout": ("mixtral", "mixtral_sparse"),
    "mode": ("fsdp", "sdp", "ddp", "hsdp"),
    "accumulation": (1, 3),
    "packing": (True, False),
    "masks": (True, False),
    "recompute": ("none", "norms_and_experts", "block"),
    "tuning": ("full", "lora"),
    "balance": ("global", "document"),
}


def tried(cells):
    """Of each cell its mesh and settings; no layout where a rank holds all of it, no mode where one holds all."""
    for cell in cells:
        settings = vars(cell) | {"mesh": (cell.world, cell.model_parallel), "mode": cell.data_parallel}
        if cell.model_parallel == 1:
            del settings["layout"]
        if cell.model_parallel == cell.world:
            del settings["mode"]
        yield settings


def lacking(cells, *names):
    """Combinations of settings that no cell tries."""
    wanted = set(product(*(MESHES if name == "mesh" else VALUES[name] for name in names)))
    if "layout" in names or "mesh" in names:  # copies of shards need four data-parallel ranks: all of them here
        wanted = {some for some in wanted if "hsdp" not in some or ("layout" not in names and (4, 1) in some)}
    return wanted - {tuple(cell[name] for name in names) for cell in tried(cells) if all(name in cell for name in names)}


@pytest.mark.parametrize("strength", [2, 3])
def test_all_settings_meet_where_they_act(strength):
    cells = training_cells([1, 2, 4], strength)
    for names in combinations(VALUES, strength):
        assert not lacking(cells, *names), names
    for names in combinations(VALUES, strength - 1):
        modes, layouts = "mode" in names, "layout" in names
        for mesh in {combination[0] for combination in lacking(cells, "mesh", *names)}:
            world, size = mesh
            assert (modes and size == world) or (layouts and size == 1), (mesh, names)
    everywhere = {((c.world, c.model_parallel), c.layout, c.tuning) for c in cells}
    assert len(everywhere) == len(MESHES) * 4
    assert {(c.data_parallel, c.accumulation) for c in cells if c.model_parallel < c.world} == set(
        product(VALUES["mode"], VALUES["accumulation"])
    )
    assert len(cells) < 80


def test_the_built_in_model_can_show_faults():
    """What is equal, or only one or two, cannot be exchanged, dropped or miscounted so that a number changes."""
    moe, batches = SMALL.moe, Problem().batches(masks=True)
    lengths = [[len(sample.tokens) for sample in batch] for batch in batches]
    assert moe.num_experts_per_tok == 3 and moe.num_experts > 8
    assert SMALL.head_dim * SMALL.n_heads != SMALL.dim and SMALL.n_kv_heads < SMALL.n_heads
    assert all(max(some) > 4 * SMALL.sliding_window for some in lengths)
    assert all(sum(sample.trained.sum() for sample in batch) > CHUNK["cpu"] for batch in batches[:-1])
    assert len({len(batch) for batch in batches}) > 1 and len(batches) > 3
    assert OPTIM.weight_decay and OPTIM.min_lr and 1 < OPTIM.warmup_epochs < len(batches) - 1


def test_only():
    cell = training_cells([1, 2], 2)[-1]
    words = [f"{name}={value}" for name, value in cell.settings().items()]
    assert cli("certify", "--quick", "--world", "1,2", "--only", *words) == 0
    assert "no cell of this certificate has that; settings: world, mp, dp" in cli("certify", "--only", "mp=3")


def config(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(replace(SMALL, **changes).to_dict()))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "2,x"], "expected numbers of processes"),
        (["--world", "0"], "expected numbers of processes"),
        (["--device", "cuda", "--world", "64"], "needs a GPU for each process"),
        (["--against", "hf", "--precision", "fp64"], "use --precision fp32"),
        (["--json", "nowhere/c.json"], "nowhere/c.json: cannot be written"),
        (["--html", "."], ".: cannot be written"),
        (["--model", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_refused(words, message):
    assert message in cli("certify", *words)


def test_a_model_that_a_size_does_not_divide(tmp_path):
    message = cli("certify", "--model", config(tmp_path, n_heads=12, n_kv_heads=6), "--world", "4")
    assert "config.json, --world 4" in message and "n_kv_heads 6: use one of [1, 2]" in message


def test_a_model_beyond_the_memory(tmp_path):
    message = cli("certify", "--model", config(tmp_path, n_layers=64, hidden_dim=2**30), "--world", "2")
    assert "config.json, --world 2: 3 copies" in message and "use a smaller n_layers" in message


def test_a_model_that_files_cannot_hold(tmp_path):
    message = cli("certify", "--model", config(tmp_path, moe=replace(SMALL.moe, score_bias=True)))
    assert "config.json: other programs' files cannot hold moe.score_bias" in message


def test_a_failing_cell(tmp_path, monkeypatch, capsys):
    """Every cell of another model: one fails by a number, one for another reason, the rest not at all."""
    seen = []

    def fake(world, device, body, jobs):
        seen.append((world, device, body.args[0]))
        for job in jobs:
            yield job, Failure("rank 1: <lost>")

    def verdict(self, cell, outcome):
        number = next(verdicts)
        errors = {"loss": 1e-12, "counts": 1.0 if number == 0 else 0.0, "gradients": float("nan") if number == 2 else 0.0}
        return Verdict(cell, errors, self.bounds, outcome.reason if number == 1 else None)

    verdicts = iter(range(1000))
    monkeypatch.setattr(command, "run_jobs", fake)
    monkeypatch.setattr(Judge, "row", verdict)
    model, files = (
        config(tmp_path, n_layers=1, load_balancing_weight=0.0),
        [f"--{kind}={tmp_path / kind}" for kind in ("json", "html")],
    )
    assert cli("certify", "--quick", "--precision", "fp32", "--model", model, *files) == 1
    problem = Problem(replace(SMALL, n_layers=1), torch.float32)
    assert problem.args.load_balancing_weight > 0  # without weight, a balance loss would not be certified
    assert seen == [(1, "cpu", problem), (2, "cpu", problem)]
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.partition("FAIL")[2] for line in lines if "FAIL" in line]
    assert verdicts[:3] == ["", " rank 1: <lost>", ""] and lines[-1].startswith("FAIL: 3 of ")
    certificate = json.loads((tmp_path / "json").read_text())
    assert not certificate["passed"] and certificate["rows"][1]["reason"] == "rank 1: <lost>"
    assert [row["passed"] for row in certificate["rows"]] == [False] * 3 + [True] * (len(certificate["rows"]) - 3)
    assert certificate["rows"][2]["errors"]["gradients"] is None
    page = (tmp_path / "html").read_text()
    assert page.count('<tr class="fail">') == 3 and page.count('class="n fail"') == 2 and "&lt;lost&gt;" in page


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers" in cli("certify", "--against", "hf")


def test_the_description_of_files_says_what_differs(tmp_path):
    w = Problem().weights()
    formats.write(tmp_path / "a", w, SMALL, "mixtral", 2)
    assert formats.difference(tmp_path / "a", formats.tensors(w, SMALL, "mixtral", 2)) == 0
    w["norm.weight"][0] += 0.5
    assert formats.difference(tmp_path / "a", formats.tensors(w, SMALL, "mixtral", 2)) == 0.5
    assert formats.difference(tmp_path / "a", formats.tensors(w, SMALL, "mixtral_sparse", 2)) == torch.inf
    formats.write(tmp_path / "b", w | {"norm.weight": w["norm.weight"] * torch.nan}, SMALL, "mixtral", 2)
    assert formats.difference(tmp_path / "b", formats.tensors(w, SMALL, "mixtral", 2)) == torch.inf


def test_what_cannot_be_judged_fails(monkeypatch, capsys):
    monkeypatch.setattr(command, "run_jobs", lambda world, device, body, jobs: ((job, [{}]) for job in jobs))
    words = [f"{name}={value}" for name, value in training_cells([1], 2)[0].settings().items()]
    assert cli("certify", "--quick", "--world", "1", "--only", *words) == 1
    assert "FAIL cannot be judged: KeyError: 'steps'" in capsys.readouterr().out
