"""Router health: figures of a plain process from every partition, alarms that ring when they should, and the run's files."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import command
from matplotlib.figure import Figure
from models import OPTIM, TINY, WORDS, Tensors, build, make_tokenizer, mesh_for, samples, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_commands import MODEL

from accessory.certify import reference
from accessory.data.loader import BatchPlan, sample_lengths
from accessory.data.packing import Rows
from accessory.errors import UserError
from accessory.settings import AlarmSection, RunConfig
from accessory.train.balance import RouterLosses
from accessory.train.health import Alarms, RouterHealth, RoutingProbe, probe_documents
from accessory.train.metrics import Window
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.picture import picture
from accessory.train.report import History, plot
from accessory.train.step import train_step

STEPS = [
    samples(13, seed=1),
    samples(4, seed=2),
    samples(9, seed=3),
]  # as uneven as can be: a mean of means is another number
WIDTH = 28
PROBE = samples(11, seed=4)
LAYOUTS = ("mixtral", "mixtral_sparse")
# world: (model parallel, data-parallel mode, rows of WIDTH tokens or one sample each)
PARTITIONS = {
    1: [(1, "fsdp", False)],
    2: [(2, "fsdp", True), (1, "ddp", False)],
    4: [(2, "fsdp", True), (1, "fsdp", False)],
}


def moved():
    """A model whose routing is partly another."""
    return {
        name: base + 0.3 * other for (name, base), other in zip(weights().items(), weights(seed=9).values(), strict=True)
    }


def plan_of(count, accumulation, dp):
    return BatchPlan(-(-count // (accumulation * dp.size)), accumulation, dp.rank, dp.size)


def rows_of(some, packed):
    lengths = sample_lengths(some)
    return Rows.packed(np.arange(len(some)), lengths, WIDTH) if packed else Rows.alone(range(len(some)))


def run_partition(layout, mp, mode, packed):
    """A window's figures over STEPS without learning, and the probe's change from the base to ``moved``."""
    mesh = mesh_for(mp, mode)
    model = build(TINY, layout, Tensors(weights()), mesh=mesh, mode=mode, recompute="block" if packed else "none")
    optimizer = make_optimizer(model, dataclasses.replace(OPTIM, lr=0.0))
    window = Window(NextToken())
    for batch in STEPS:
        rows = rows_of(batch, packed)
        (micro_batches,) = plan_of(len(rows), 2, mesh.dp).epoch(batch, rows)
        window.add(train_step(model, optimizer, micro_batches, window.objective, RouterLosses("global"), clip_grad=1.0))
    values, _, health = window.reduce(mesh.dp)
    rows = rows_of(PROBE, packed)
    plan = dataclasses.replace(plan_of(len(rows), 1, mesh.dp), batch_size=2)
    batches = [batch for (batch,) in plan.epoch(PROBE, rows)]
    probe = RoutingProbe(np.arange(len(PROBE))[::-1].copy(), sample_lengths(PROBE), batches, torch.device("cpu"))
    probe.record(model)
    still = probe.change(model)
    change = probe.change(build(TINY, layout, Tensors(moved()), mesh=mesh, mode=mode))
    return {"values": values, "metrics": health.metrics(), "still": still, "change": change, "base": probe.base}


def run_partitions(world):
    return {(layout, *cut): run_partition(layout, *cut) for cut in PARTITIONS[world] for layout in LAYOUTS}


@pytest.fixture(scope="module")
def expected():
    """The same from the plain reference: per layer and by hand."""
    w, after = weights(), moved()
    experts, layers = TINY.moe.num_experts, TINY.n_layers
    loads, entropy, tokens = [[0] * experts for _ in range(layers)], [0.0] * layers, 0
    for sample in (sample for batch in STEPS for sample in batch):
        _, routers, chosen = reference.forward(w, TINY, torch.tensor(sample.tokens))
        tokens += len(sample.tokens)
        for layer in range(layers):
            for expert in chosen[layer].flatten().tolist():
                loads[layer][expert] += 1
            entropy[layer] -= sum(p * math.log(p) for p in routers[layer].softmax(-1).flatten().tolist())
    changed, choices = [0] * layers, 0
    base = []
    for sample in PROBE:
        ours, theirs = (reference.forward(some, TINY, torch.tensor(sample.tokens))[2] for some in (w, after))
        base.append(ours)
        choices += ours[0].numel()
        for layer in range(layers):
            changed[layer] += sum(
                len({*a} - {*b}) for a, b in zip(ours[layer].tolist(), theirs[layer].tolist(), strict=True)
            )
    entropy = [x / tokens for x in entropy]
    base = torch.cat(base, 1)
    steps = [[(sample.tokens, sample.trained) for sample in batch] for batch in STEPS]
    together = [pair for pairs in steps for pair in pairs]
    parts = [reference.loss_parts(w, TINY, pairs, "global") for pairs in (*steps, together)]
    values = {"loss": parts.pop().ce.item()}  # over the targets of all steps together; the others: mean over steps
    values |= {"balance": sum(p.balance.item() for p in parts) / 3, "z_loss": sum(p.z.item() for p in parts) / 3}
    changed = [x / choices for x in changed]
    return {"values": values, "loads": loads, "entropy": entropy, "change": changed, "base": base}


@pytest.mark.parametrize("world", PARTITIONS)
def test_figures_equal_one_plain_process(world, expected):
    experts = TINY.moe.num_experts
    shares = [[count * experts / sum(layer) for count in layer] for layer in expected["loads"]]
    assert min(expected["change"]) > 0 and max(expected["change"]) < 1, "the probe must show something"
    for key, got in (
        (key, got) for rank in run_ranks(world, run_partitions, world, timeout=240) for key, got in rank.items()
    ):
        metrics = got["metrics"]
        assert metrics["loads"] == expected["loads"], key
        for name, value in expected["values"].items():
            assert got["values"][name] == pytest.approx(value, rel=1e-10), (key, name)
        figures = {
            "layer_load_max": [max(layer) for layer in shares],
            "layer_starved": [sum(share < 0.01 for share in layer) for layer in shares],
            "layer_entropy": expected["entropy"],
            "layer_entropy_share": [x / math.log(experts) for x in expected["entropy"]],
            "load_max": max(map(max, shares)),
            "load_min": min(map(min, shares)),
            "starved": sum(share < 0.01 for layer in shares for share in layer),
            "entropy": sum(expected["entropy"]) / len(shares),
            "entropy_share": sum(expected["entropy"]) / len(shares) / math.log(experts),
            "entropy_share_min": min(expected["entropy"]) / math.log(experts),
        }
        assert metrics.keys() == figures.keys() | {"loads"}
        for name, value in figures.items():
            assert metrics[name] == pytest.approx(value, rel=1e-10), (key, name)
        assert torch.equal(got["base"].sort(-1).values, expected["base"].int().sort(-1).values), key
        assert got["still"].tolist() == [0.0] * TINY.n_layers
        assert got["change"].tolist() == pytest.approx(expected["change"], rel=1e-12), key


def test_the_probe_takes_whole_documents():
    lengths, order = np.array([5, 7, 9, 4]), np.array([2, 0, 3, 1])
    taken = [probe_documents(order, lengths, tokens).tolist() for tokens in (1, 9, 13, 14, 18, 1000)]
    assert taken == [[2], [2], [2], [2, 0], [2, 0, 3], [2, 0, 3, 1]]


def health(*layers, entropy=None):
    counts = torch.tensor(layers)
    return RouterHealth(counts, torch.tensor(entropy or [1.0] * len(layers), dtype=torch.float64))


def test_alarms_ring_once_and_end_once(capsys):
    alarms = Alarms(AlarmSection())
    fair, one = [200, 200, 200, 200], [3, 796, 1, 0]
    seen = []
    for step, layers in enumerate([(fair, fair), (fair, one), (fair, one), (one, fair), (fair, fair)]):
        alarms.check(step, health(*layers))
        seen.append((capsys.readouterr().out.splitlines(), alarms.metrics()["alarms"]))
    assert seen[0] == ([], []) and seen[4][1] == []
    assert [line[: line.index(")") + 1] for line in seen[1][0]] == [
        "ALARM at step 1: load_min below 0.01 in layer 1 experts 2, 3 (0.00)",
        "ALARM at step 1: load_max above 3 in layer 1 expert 1 (3.98)",
    ]
    assert all("raise load_balancing_weight" in line for line in seen[1][0])
    assert seen[1][1] == [
        {"alarm": "load_min", "layer": 1, "experts": [2, 3], "value": 0.0},
        {"alarm": "load_max", "layer": 1, "experts": [1], "value": 3.98},
    ]
    assert seen[2] == ([], seen[1][1]), "what goes on holding is not said again"
    assert sorted(line.split(":")[0] for line in seen[3][0]) == ["ALARM at step 3"] * 2 + ["alarm over at step 3"] * 2
    assert "alarm over at step 4: load_max no longer above 3 in layer 0" in seen[4][0]


def test_the_tokens_of_images_and_of_text_ring_for_themselves(capsys):
    """Though all tokens together are shared out well; a step without an image says nothing of them."""
    alarms = Alarms(AlarmSection(load_max=None))
    fair = health([200, 200, 200, 200])
    apart = {"image": health([400, 398, 2, 0], entropy=[0.01]), "text": health([0, 0, 400, 400])}
    nothing = health([0, 0, 0, 0], entropy=[0.0])
    alarms.check(0, dataclasses.replace(fair, parts={"image": nothing, "text": fair}))
    assert not capsys.readouterr().out
    alarms.check(1, dataclasses.replace(fair, parts=apart))
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(")") + 1] for line in lines] == [
        "ALARM at step 1: load_min of image tokens below 0.01 in layer 0 expert 3 (0.00)",
        "ALARM at step 1: entropy_share of image tokens below 0.1 in layer 0 (0.01)",
        "ALARM at step 1: load_min of text tokens below 0.01 in layer 0 experts 0, 1 (0.00)",
    ]
    ringing = alarms.metrics()["alarms"]
    of = {"load_min": ["text", "image"], "entropy_share": ["image"]}
    assert all([event["tokens"] for event in ringing if event["alarm"] == name] == parts for name, parts in of.items())
    alarms.check(2, dataclasses.replace(fair, parts={"image": nothing, "text": fair}))
    assert [event["tokens"] for event in alarms.metrics()["alarms"]] == ["image", "image"]
    assert capsys.readouterr().out.splitlines() == [
        "alarm over at step 2: load_min of text tokens no longer below 0.01 in layer 0"
    ]


def test_each_alarm_has_its_threshold(capsys):
    collapsed, few = health([800, 0, 0, 0], entropy=[0.01]), health([80, 0, 0, 0])
    change = torch.tensor([0.31, 0.29, 0.5, 0.6, 0.7, 0.8])
    rings = {"load_min": [], "load_max": [], "entropy_share": [], "routing_change": []}
    for name, found in rings.items():
        alarms = Alarms(AlarmSection(**{other: None for other in rings if other != name}))
        alarms.check(1, few)
        assert alarms.metrics() == {"alarms": []}, "80 rows: an idle expert may be chance"
        alarms.check(2, collapsed)
        alarms.check_change(2, change)
        found += [(event["layer"], event.get("experts")) for event in alarms.metrics()["alarms"]]
    assert (
        rings["load_min"] == [(0, [1, 2, 3])] and rings["load_max"] == [(0, [0])] and rings["entropy_share"] == [(0, None)]
    )
    assert rings["routing_change"] == [(layer, None) for layer in (0, 2, 3, 4, 5)]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and "layer 0 (0.31); layer 2 (0.50); layer 3 (0.60); layer 4 (0.70) and 1 more" in out[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run file, and the run of one plain process, which drifts fast."""
    home = tmp_path_factory.mktemp("health")
    make_tokenizer(home / "tokenizer.model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(40)]
    (home / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (home / "mix.yaml").write_text("META: [{path: texts.jsonl}]")
    (home / "model.json").write_text(json.dumps(MODEL | {"vocab_size": 300}))
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 64, validation: 0.2}}
parallel: {{precision: fp64}}
optim: {{lr: 1e-2, warmup_epochs: 0}}
train: {{max_steps: 4, batch_size: 8}}
log: {{every: 2, validate_every: 2, probe_tokens: 300}}
save: {{state_every: 2, keep_states: 2}}
out: {home}/plain
"""
    )
    codes, out, err = command("finetune", home / "run.yaml")
    assert codes == [0], err
    (home / "plain.txt").write_text(out)
    return home


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_how_its_routers_are(home):
    rows, out = lines(home / "plain"), (home / "plain.txt").read_text()
    assert [(row["step"], "loads" in row, "routing_change" in row) for row in rows] == [
        (0, False, False),
        *((2, True, False), (2, False, True), (4, True, False), (4, False, True)),
    ]
    documented = re.findall(r"`(\w+)`", (Path(__file__).parents[1] / "docs/metrics.md").read_text())
    for row in rows:
        assert row.keys() <= {*documented}, "docs/metrics.md names every figure"
        assert not any(math.isnan(x) for x in row.values() if isinstance(x, float))
        names = {alarm["alarm"] for alarm in row.get("alarms", [])}
        assert "routing_change" not in names, "from random weights routing may change"
    assert 0 < rows[2]["routing_change"] < 1
    assert rows[4]["routing_change"] == pytest.approx(np.mean(rows[4]["layer_routing_change"]), rel=1e-12)
    assert len(re.findall(r"router: expert load \d", out)) == 2
    assert len(re.findall(r"step +\d  validation loss .* routing changed [\d.]+%", out)) == 2
    assert (home / "plain/report.png").stat().st_size > 10_000


def test_other_partitions_say_the_same(home):
    words = [
        "model.layout=mixtral_sparse",
        "train.batch_size=4",
        "train.accumulation=1",
        f"out={home}/cut",
        "data.packing=false",
    ]
    codes, _, err = command("finetune", home / "run.yaml", *words, ranks=2)
    assert codes == [0, 0], err
    for ours, plain in zip(lines(home / "cut"), lines(home / "plain"), strict=True):
        assert ours.keys() == plain.keys() and ours.get("loads") == plain.get("loads")
        for name in ours.keys() & {
            "entropy",
            "layer_entropy",
            "load_max",
            "starved",
            "routing_change",
            "layer_routing_change",
        }:
            assert ours[name] == pytest.approx(plain[name], rel=1e-9), name


def test_a_resumed_run_knows_the_base(home):
    """In the other layout, from the middle of the run: change is counted from the first run's start."""
    state = next(home.glob("plain/states/step*2"))
    words = [f"resume={state}", "model.layout=mixtral_sparse", "parallel.model_parallel=2", f"out={home}/resumed"]
    codes, _, err = command("finetune", home / "run.yaml", *words, ranks=2)
    assert codes == [0, 0], err
    change = [lines(home / run)[-1]["layer_routing_change"] for run in ("resumed", "plain")]
    assert change[0] == pytest.approx(change[1], rel=1e-9) and min(change[0]) > 0


def test_a_router_forced_to_two_experts_rings(home):
    """Rows of zeros are a tie in every token: the same experts win until the first step; then routing is another."""
    saved = home / "plain/epoch0-iter4"
    (file,) = saved.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: t * (not name.endswith("gate.weight")) for name, t in tensors.items()}, file)
    words = [f"model.checkpoint={saved}", "model.config=null", "model.tokenizer=null", f"out={home}/forced", "log.every=1"]
    codes, out, err = command("finetune", home / "run.yaml", *words, "log.alarms.load_max=1.9", "data.validation=0")
    assert codes == [0], err
    first, *_ = (row for row in lines(home / "forced") if "loads" in row)
    assert first["load_max"] == 2.0 and first["starved"] == 4 and first["entropy_share"] == pytest.approx(1.0)
    assert {event["alarm"] for event in first["alarms"]} == {"load_min", "load_max"} and len(first["alarms"]) == 4
    assert re.search(r"^ALARM at step 1: load_max above 1.9 in layer 0 experts \d, \d \(2.00\); layer 1", out, re.M)
    assert re.search(r"^ALARM at step 2: routing_change above 0.3 in layer", out, re.M), "and without held-out samples"
    assert len(re.findall("^alarm over at step .: load_max", out, re.M)) >= 1


def test_old_metrics_are_compared_too(home, tmp_path):
    known = {"step", "loss", "tokens", "seconds", "loads", "load_max", "load_min", "val_loss"}
    old = [{name: value for name, value in row.items() if name in known} for row in lines(home / "plain")]
    run = tmp_path / "旧 $1$"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, old)))
    codes, out, err = command("compare", run, home / "plain", "--png", tmp_path / "c.png")
    assert codes == [0] and "Glyph" not in err, err
    assert "largest difference of the loss: 0.0e+00" in out and (tmp_path / "c.png").stat().st_size > 10_000


def test_every_panel_of_a_picture_shows_something(home, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), save(figure, *args, **kw)))
    without = {"routing_change", "layer_entropy_share", "val_loss"}
    rows = [{name: value for name, value in row.items() if name not in without} for row in lines(home / "plain")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for directory in (home / "plain", tmp_path):
        plot([History.load(directory)], tmp_path / "picture.png")
    whole, part = ([axis for axis in figure.axes if axis.get_title()] for figure in figures)
    assert [len(whole), len(part)] == [5, 3], "what was not measured has no panel"
    for axis in (*whole, *part):
        assert axis.has_data()
        if "busiest" in axis.get_title() or "entropy" in axis.get_title():  # as tall as what it shows
            values = np.array([line.get_ydata() for line in axis.lines])
            assert np.ptp(axis.get_ylim()) < 1.2 * np.ptp(values)


def test_letters_that_no_font_has_are_escaped(tmp_path):
    with picture(tmp_path / "a.png", 2, 2, ["plain", "\U000e0fff.jsonl"]) as (_, names):
        assert names == ["plain", "\\U000e0fff.jsonl"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_bad_threshold_is_one_sentence(home):
    for word, sentence in (
        ("log.alarms.load_mix=1", "did you mean 'log.alarms.load_min'?"),
        ("log.probe_tokens=-1", "at least 0, found -1"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            RunConfig.load(home / "run.yaml", [word])
