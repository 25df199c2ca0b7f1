"""The steps of a run and their learning rates, against tables written by hand: lr 1, min_lr 0.1, rows counted out.

A step of the warm-up has as much of the rate as its rows, and those before them, are of the warm-up's. Later, a step that
begins when a share p of the rows behind the warm-up is done has 0.1 + 0.9 * (1 + cos(180 p)) / 2:

    p     0    1/6     1/5     1/4     1/3    2/5     5/12    1/2   3/5     2/3    3/4     4/5     5/6     11/12
    rate  1.0  0.9397  0.9141  0.8682  0.775  0.6891  0.6665  0.55  0.4109  0.325  0.2318  0.1859  0.1603  0.1153
"""

import json
import math

import pytest
from jobs import command
from models import WORDS, make_tokenizer
from test_commands import MODEL, rows

from accessory.data.loader import BatchPlan
from accessory.settings import OptimSection
from accessory.train.optim import learning_rate
from accessory.train.plan import Plan, Position

P1_6, P1_5, P1_4, P2_5, P5_12 = 0.939711431703, 0.914057647469, 0.868198051534, 0.689057647469, 0.666468570296
P7_15, P3_5, P11_15, P3_4, P4_5 = 0.597037808470, 0.410942352531, 0.248891227139, 0.231801948466, 0.185942352531
P5_6, P11_12 = 0.160288568297, 0.115333378170
DIGITS = 1e-11

FOUR = (8, 8, 8, 8)
# rows of each epoch, rows of a step, epochs of warm-up, max_steps, (steps, rows) done -> the rate of each step
TABLE = {
    # rows 4, 8 of 8; then 0, 4, ... 20 of 24
    "warm-up of one epoch of four": (FOUR, 4, 1.0, None, (0, 0), [0.5, 1.0, 1.0, P1_6, 0.775, 0.55, 0.325, P5_6]),
    # rows 2, 4 of 4; then 0, 2, ... 10 of 12
    "of half an epoch": ((8, 8), 2, 0.5, None, (0, 0), [0.5, 1.0, 1.0, P1_6, 0.775, 0.55, 0.325, P5_6]),
    # rows 4 of 5, and 8, which is over; then 3, 7, 11 of 15 (36, 84, 132 degrees)
    "that ends inside a step": ((20,), 4, 0.25, None, (0, 0), [0.8, 1.0, P1_5, P7_15, P11_15]),
    # rows 0, 2, ... 10 of 12: it ends one step's rows before its end, where it would be 0.1
    "none": ((12,), 2, 0.0, None, (0, 0), [1.0, P1_6, 0.775, 0.55, 0.325, P5_6]),
    # 12 of the 18 rows: the warm-up is as long as the run
    "longer than the run": ((6, 6), 3, 3.0, None, (0, 0), [0.25, 0.5, 0.75, 1.0]),
    "exactly the run": ((6, 6), 3, 2.0, None, (0, 0), [0.25, 0.5, 0.75, 1.0]),
    # the first table from its third step on, and from its second
    "resumed": (FOUR, 4, 1.0, None, (3, 12), [P1_6, 0.775, 0.55, 0.325, P5_6]),
    "resumed in the warm-up": (FOUR, 4, 1.0, None, (1, 4), [1.0, 1.0, P1_6, 0.775, 0.55, 0.325, P5_6]),
    # the same curve over the same rows: rows 0, 8, 16 of 24
    "resumed with twice the batch": (FOUR, 8, 1.0, None, (2, 8), [1.0, 0.775, 0.325]),
    # rows 6, 8 of 8; then 0, 2, 4, 6 of 8
    "resumed with half the batch": ((8, 8), 2, 1.0, None, (1, 4), [0.75, 1.0, 1.0, P1_4, 0.55, P3_4]),
    # 4 rows done, 8 a step: 4 to 8 (an epoch's last may have fewer), 8 to 16
    "resumed inside an epoch with twice the batch": ((8, 8), 8, 1.0, None, (1, 4), [1.0, 1.0]),
    # 12 rows a step: rows 12, 24 of 24; then 0, 12 of 24
    "accumulation": ((24, 24), BatchPlan(2, 3, 0, 2).global_batch, 1.0, None, (0, 0), [0.5, 1.0, 1.0, 0.55]),
    # 16 of the 32 rows: row 4 of 4; then 0, 4, 8 of 12
    "max_steps": (FOUR, 4, 0.5, 4, (0, 0), [1.0, 1.0, 0.775, 0.325]),
    "max_steps, resumed": (FOUR, 4, 0.5, 4, (2, 8), [0.775, 0.325]),
    "max_steps in the warm-up": (FOUR, 4, 1.0, 1, (0, 0), [1.0]),  # 4 rows: the warm-up is as long as the run
    "max_steps beyond the run": ((8, 8), 4, 1.0, 9, (0, 0), [0.5, 1.0, 1.0, 0.55]),
    # rows 4, 8, 10 of 10; then 0, 4, 8 of 10
    "uneven epochs": ((10, 10), 4, 1.0, None, (0, 0), [0.4, 0.8, 1.0, 1.0, P2_5, P4_5]),
    # rows 3, 6 of 6, as the first epoch has; then 0, 3 | 5, 8, 11 of 12
    "packed epochs": ((6, 5, 7), 3, 1.0, None, (0, 0), [0.5, 1.0, 1.0, P1_4, P5_12, 0.325, P11_12]),
    "one step": ((5,), 8, 0.0, None, (0, 0), [1.0]),
    "over": (FOUR, 4, 1.0, None, (8, 32), []),
}


def test_the_numbers_of_the_table():
    degrees = {30: P1_6, 36: P1_5, 45: P1_4, 60: 0.775, 72: P2_5, 75: P5_12, 84: P7_15, 90: 0.55, 108: P3_5, 120: 0.325}
    degrees |= {132: P11_15, 135: P3_4, 144: P4_5, 150: P5_6, 165: P11_12}
    for angle, rate in degrees.items():
        assert rate == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.radians(angle))) / 2, rel=DIGITS)


@pytest.mark.parametrize("name", TABLE)
def test_learning_rates(name):
    epochs, global_batch, warmup, max_steps, done, expected = TABLE[name]
    plan = Plan(epochs, global_batch, max_steps, Position(*done))
    config = OptimSection(lr=1.0, min_lr=0.1, warmup_epochs=warmup)
    rates = [learning_rate(step, plan, config) for step in plan.steps()]
    assert rates == pytest.approx(expected, rel=DIGITS)
    half = OptimSection(lr=0.5, min_lr=0.05, warmup_epochs=warmup)
    assert [2 * learning_rate(step, plan, half) for step in plan.steps()] == pytest.approx(expected, rel=DIGITS)


# rows of each epoch, rows of a step, max_steps, (steps, rows) done -> (epoch, its rows, (steps, rows) after, ends it)
PLANS = {
    "even": ((4, 4), 2, None, (0, 0), [(0, 0, 2, 1, 2, 0), (0, 2, 4, 2, 4, 1), (1, 0, 2, 3, 6, 0), (1, 2, 4, 4, 8, 1)]),
    "uneven": ((5, 5), 3, None, (0, 0), [(0, 0, 3, 1, 3, 0), (0, 3, 5, 2, 5, 1), (1, 0, 3, 3, 8, 0), (1, 3, 5, 4, 10, 1)]),
    "packed": ((3, 2, 4), 3, None, (0, 0), [(0, 0, 3, 1, 3, 1), (1, 0, 2, 2, 5, 1), (2, 0, 3, 3, 8, 0), (2, 3, 4, 4, 9, 1)]),
    "an epoch is less than a step": ((2, 2), 5, None, (0, 0), [(0, 0, 2, 1, 2, 1), (1, 0, 2, 2, 4, 1)]),
    "resumed": ((5, 5), 3, None, (2, 5), [(1, 0, 3, 3, 8, 0), (1, 3, 5, 4, 10, 1)]),
    "resumed with another batch": ((5, 5), 4, None, (1, 3), [(0, 3, 5, 2, 5, 1), (1, 0, 4, 3, 9, 0), (1, 4, 5, 4, 10, 1)]),
    "max_steps": ((5, 5), 3, 3, (0, 0), [(0, 0, 3, 1, 3, 0), (0, 3, 5, 2, 5, 1), (1, 0, 3, 3, 8, 0)]),
    "max_steps counts those done": ((5, 5), 3, 3, (2, 5), [(1, 0, 3, 3, 8, 0)]),
    "max_steps done": ((5, 5), 3, 2, (2, 5), []),
    "over": ((5, 5), 3, None, (4, 10), []),
}


@pytest.mark.parametrize("name", PLANS)
def test_steps(name):
    epochs, global_batch, max_steps, done, expected = PLANS[name]
    plan, at = Plan(epochs, global_batch, max_steps, Position(*done)), Position(*done)
    steps = list(plan.steps())
    assert [(s.epoch, s.start, s.stop, s.after.steps, s.after.rows, s.ends_epoch) for s in steps] == expected
    for step in steps:
        assert step.before == at
        at = step.after
    assert plan.end == at


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Ten records, four a step, two epochs."""
    home = tmp_path_factory.mktemp("schedule")
    make_tokenizer(home / "tokenizer.model")
    (home / "model.json").write_text(json.dumps(MODEL | {"vocab_size": 300}))
    records = [{"text": " ".join(WORDS[n:])} for n in range(10)]
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (home / "mix.yaml").write_text("META: [{path: data.jsonl}]\n")
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: 64, validation: 0}}
parallel: {{precision: fp64}}
optim: {{lr: 1.0e-2, min_lr: 1.0e-3, warmup_epochs: 1}}
train: {{epochs: 2, batch_size: 2, accumulation: 2}}
log: {{every: 1, tensorboard: false, probe_tokens: 0}}
save: {{state_every: 2, keep_states: 3}}
out: {home}/run
"""
    )
    return home


def test_a_run_has_the_rates_of_the_table(home):
    codes, _, err = command("finetune", home / "run.yaml")
    assert codes == [0], err
    rates = [0.4, 0.8, 1.0, 1.0, P2_5, P4_5]  # "uneven epochs"
    assert [row["lr"] for row in rows(home / "run")] == pytest.approx([rate / 100 for rate in rates], rel=DIGITS)
    # from row 8 on two rows a step: row 10 of 10; then 0, 2, 4, 6, 8 of 10
    words = (f"resume={home}/run/states/step2", "train.accumulation=1", f"out={home}/more")
    codes, _, err = command("finetune", home / "run.yaml", *words)
    assert codes == [0], err
    rates = [1.0, 1.0, P1_5, P2_5, P3_5, P4_5]
    assert [row["step"] for row in rows(home / "more")] == [3, 4, 5, 6, 7, 8]
    assert [row["lr"] for row in rows(home / "more")] == pytest.approx([rate / 100 for rate in rates], rel=DIGITS)
