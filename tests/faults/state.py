"""Going on where a run was stopped."""

from faults.fault import Fault

FILE, LOOP, MODEL = "accessory/train/state.py", "accessory/train/loop.py", "accessory/train/model.py"
STEPS = "tests/test_run_state.py::test_steps_go_on_as_if_there_had_been_no_state"
RESUMED = "'tests/test_resume.py::test_a_killed_run_goes_on_in_another_partition[before0-after0]'"

FAULTS = (
    Fault(
        "the second moment is read from the first",
        FILE,
        "state.read_kind(kind, name, box)",
        'state.read_kind("exp_avg", name, box)',
        STEPS,
    ),
    Fault("moments begin at zero", FILE, "local[rows] = state.read_kind(", "_ = state.read_kind(", STEPS),
    Fault("AdamW counts its steps anew", FILE, "torch.tensor(float(state.notes.steps)", "torch.tensor(float(0)", STEPS),
    Fault(
        "AdamW's steps are counted in rows",
        FILE,
        "torch.tensor(float(state.notes.steps)",
        "torch.tensor(float(state.notes.rows)",
        STEPS,
    ),
    Fault(
        "weights are the start's, not the state's", MODEL, "source = Overlaid(source, state, state.names)", "pass", RESUMED
    ),
    Fault(
        "the rows seen are steps times the batch",
        LOOP,
        "rows=done.rows,",
        "rows=done.steps * self.batches.global_batch,",
        "tests/test_run_state.py::test_the_rows_that_were_seen",
    ),
    Fault(
        "what is saved is rounded to bf16",
        FILE,
        "(box, local_part(value)[rows])",
        "(box, local_part(value)[rows].bfloat16())",
        STEPS,
    ),
    Fault(
        "the score biases are not restored",
        MODEL,
        "Overlaid(source, state, state.names)",
        "Overlaid(source, state, {name for name in state.names if not is_buffer(name)})",
        "tests/test_balance.py::test_a_run_resumes_with_its_bias",
    ),
    Fault("the oldest states are kept", FILE, "[:-keep]", "[keep:]", RESUMED),
)
